"""The command line, `vbserve`."""
