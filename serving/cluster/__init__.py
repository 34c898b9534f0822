"""The application on Ray Serve: deployments, the way between them, start and stop."""
