"""The HTTP application over a fake engine, a real store and a tiny model."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fake_engine import FakeEngine
from http_client import BASE, REPLY, client_of
from tiny_model import MAX_MODEL_LEN, load_tokenizer, save_tiny_model, save_vblora

from adapters.store import AdapterStore
from core.model_config import BaseInfo, read_base_info
from serving.http.app import build_app
from serving.http.services import Services


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-model")
    save_tiny_model(path)
    return path


@pytest.fixture(scope="session")
def tiny_base(tiny_model: Path) -> BaseInfo:
    return read_base_info(tiny_model)


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="session")
def peft_adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two VB-LoRA adapters, `one` and `two`, as PEFT saves them."""
    root = tmp_path_factory.mktemp("peft")
    for seed, name in enumerate(("one", "two")):
        save_vblora(tiny_model, root / name, seed=seed)
    return root


@pytest.fixture
def store(tmp_path: Path, tiny_base: BaseInfo, peft_adapters: Path) -> AdapterStore:
    """A store that has the adapter `team/one`."""
    store = AdapterStore.open(tmp_path / "store", tiny_base)
    store.add("team/one", peft_adapters / "one")
    return store


@pytest.fixture
def engine(tokenizer: Any) -> FakeEngine:
    """Says REPLY and ends."""
    eos = tokenizer.eos_token_id
    return FakeEngine(lambda request: [*tokenizer.encode(REPLY), eos], eos)


@pytest.fixture
def services(
    tiny_base: BaseInfo, tokenizer: Any, store: AdapterStore, engine: FakeEngine
) -> Services:
    return Services(
        base_name=BASE,
        base=tiny_base,
        tokenizer=tokenizer,
        store=store,
        engines=engine,
        max_model_len=MAX_MODEL_LEN,
    )


@pytest.fixture
async def client(services: Services) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(services) as client:
        yield client


@pytest.fixture
def start_server(services: Services) -> Iterator[Callable[[], str]]:
    """Serves the application on a free port; returns its URL."""
    servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start() -> str:
        config = uvicorn.Config(build_app(services), port=0, log_level="warning", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        servers.append((server, thread))
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    yield start
    for server, thread in servers:
        server.should_exit = server.force_exit = True
        thread.join(10)
        assert not thread.is_alive()
