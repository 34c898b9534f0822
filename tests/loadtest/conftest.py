from collections.abc import Iterator

import pytest
from completions_server import CompletionsServer
from llama_server_app import LlamaServerApp
from running_app import running


@pytest.fixture(scope="session")
def _running_server() -> Iterator[CompletionsServer]:
    app = CompletionsServer()
    with running(app) as url:
        app.url = url
        yield app


@pytest.fixture
def completions_server(_running_server: CompletionsServer) -> CompletionsServer:
    _running_server.bodies.clear()
    _running_server.keys.clear()
    return _running_server


@pytest.fixture
def llama_server_app() -> Iterator[LlamaServerApp]:
    app = LlamaServerApp()
    with running(app) as url:
        app.url = url
        yield app
