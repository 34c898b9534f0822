"""The bench: this project's server, its bare engine, plain PEFT and other servers, side by side.

    python -m loadtest.bench          the whole of it
    python -m loadtest.bench --short  tiny sizes: does it run and is it exact, never how fast

Speaks HTTP to the server, and JSON lines to the scripts in ../peers, which run as processes.
"""
