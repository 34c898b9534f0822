import socket
import threading
from collections.abc import Iterator

import pytest
import uvicorn
from completions_server import CompletionsServer


@pytest.fixture(scope="session")
def _running_server() -> Iterator[CompletionsServer]:
    app = CompletionsServer()
    listener = socket.create_server(("127.0.0.1", 0))
    app.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    config = uvicorn.Config(app, log_config=None, ws="none", lifespan="off", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield app
    server.should_exit = True
    thread.join()
    listener.close()


@pytest.fixture
def completions_server(_running_server: CompletionsServer) -> CompletionsServer:
    _running_server.bodies.clear()
    _running_server.keys.clear()
    return _running_server
