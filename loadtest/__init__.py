"""Load tests and the bench: workloads, an HTTP client, statistics, reports and plots.

Speaks HTTP to a server of any make. Imports none of this project's other packages, nor torch:
what needs those (the bench's peers) are plain scripts in peers/, run as processes of their own.
"""
