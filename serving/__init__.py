"""The HTTP side: Ray Serve deployments, routes, settings and the command line."""
