"""The engine: a Llama forward whose batches mix base rows and rows of any number of adapters.

Knows nothing of vector banks, adapter names, HTTP or Ray.
"""
