"""/v1/adapters and /v1/models over a real store with real PEFT adapters."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_client import BASE, client_of
from tiny_model import save_dora, save_unserved

from adapters.errors import UnknownAdapterError
from adapters.store import AdapterStore
from serving.http.services import Services

ADAPTERS = "/v1/adapters"


def files_of(directory: Path) -> list[tuple[str, tuple[str, bytes]]]:
    return [("files", (file.name, file.read_bytes())) for file in sorted(directory.iterdir())]


async def upload(
    client: httpx.AsyncClient, directory: Path, adapter_id: str, **fields: str
) -> httpx.Response:
    return await client.post(ADAPTERS, data={"id": adapter_id, **fields}, files=files_of(directory))


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    return error


async def test_an_upload_registers(client, store, engine, peft_adapters):
    response = await upload(client, peft_adapters / "two", "two")
    assert response.status_code == 201
    record = store.resolve("two")
    assert response.json() == {
        "id": "two",
        "object": "adapter",
        "digest": record.digest,
        "base": BASE,
        "kind": "vblora",
        "rank": 4,
        "targets": ["q_proj", "v_proj"],
        "num_modules": 4,
        "num_stored_parameters": record.num_stored_parameters,
        "compact_bytes": record.compact_bytes,
        "factor_bytes": record.factor_bytes,
        "created": record.created,
    }


async def test_a_new_adapter_answers_at_once(client, store, engine, peft_adapters):
    await upload(client, peft_adapters / "two", "two")
    body = {"model": "two", "prompt": "Hello"}
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    assert engine.requests[0].adapter_digest == store.resolve("two").digest


async def test_the_same_content_again_changes_nothing(client, store, peft_adapters):
    before = store.resolve("team/one")
    response = await upload(client, peft_adapters / "one", "team/one")
    assert response.status_code == 200
    assert response.json()["digest"] == before.digest
    assert store.resolve("team/one") == before


async def test_other_content_needs_replace(client, store, peft_adapters):
    before = store.resolve("team/one").digest
    response = await upload(client, peft_adapters / "two", "team/one")
    assert response.status_code == 409
    assert error_of(response)["code"] == "adapter_exists"
    assert store.resolve("team/one").digest == before
    response = await upload(client, peft_adapters / "two", "team/one", replace="true")
    assert response.status_code == 201
    assert store.resolve("team/one").digest == response.json()["digest"] != before


async def test_a_running_request_keeps_its_digest_through_replace_and_delete(
    client, store, engine, peft_adapters
):
    engine.seconds_per_step = 0.05
    pinned = store.resolve("team/one").digest
    body = {"model": "team/one", "prompt": "Hello", "max_tokens": 20, "ignore_eos": True}
    running = asyncio.create_task(client.post("/v1/completions", json=body))
    await engine.started.wait()
    await upload(client, peft_adapters / "two", "team/one", replace="true")
    assert (await client.delete(f"{ADAPTERS}/team/one")).status_code == 200
    assert not running.done()
    response = await running
    assert response.status_code == 200
    assert engine.requests[0].adapter_digest == pinned
    assert pinned.startswith(response.json()["system_fingerprint"])
    assert (await client.post("/v1/completions", json=body)).status_code == 404


async def test_list_show_and_delete(client, store, peft_adapters):
    await upload(client, peft_adapters / "two", "two")
    listed = (await client.get(ADAPTERS)).json()
    assert [entry["id"] for entry in listed["data"]] == ["team/one", "two"]
    shown = (await client.get(f"{ADAPTERS}/team/one")).json()
    assert shown == listed["data"][0]
    response = await client.delete(f"{ADAPTERS}/team/one")
    assert response.json() == {
        "id": "team/one",
        "object": "adapter",
        "deleted": True,
        "digest": shown["digest"],
    }
    for answer in (
        await client.get(f"{ADAPTERS}/team/one"),
        await client.delete(f"{ADAPTERS}/team/one"),
        await client.get("/v1/models/team/one"),
    ):
        assert answer.status_code == 404
        assert error_of(answer)["code"] == "model_not_found"
    with pytest.raises(UnknownAdapterError):
        store.resolve("team/one")


async def test_models_are_the_base_and_its_adapters(client, store, tiny_base):
    listed = (await client.get("/v1/models")).json()
    base, adapter = listed["data"]
    assert listed["object"] == "list"
    assert (base["id"], base["parent"], base["root"]) == (BASE, None, tiny_base.fingerprint)
    record = store.resolve("team/one")
    assert adapter == {
        "id": "team/one",
        "object": "model",
        "created": record.created,
        "owned_by": "vbserve",
        "parent": BASE,
        "root": record.digest,
    }
    assert (await client.get(f"/v1/models/{BASE}")).json() == base
    assert (await client.get("/v1/models/team%2Fone")).json() == adapter


async def test_a_malformed_adapter_says_what_and_where(client, store, peft_adapters, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for _, (file_name, data) in files_of(peft_adapters / "one"):
        (broken / file_name).write_bytes(data)
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    response = await upload(client, broken, "broken")
    assert response.status_code == 422
    error = error_of(response)
    assert error["code"] == "malformed_adapter"
    assert error["message"]
    assert [record.id for record in store.records()] == ["team/one"]


async def test_dora_registers(client, store, tiny_model, tmp_path):
    save_dora(tiny_model, tmp_path / "dora")
    response = await upload(client, tmp_path / "dora", "dora")
    assert response.status_code == 201
    assert response.json()["kind"] == "lora" and response.json()["targets"] == ["q_proj"]
    compact = store.load(store.resolve("dora").digest)
    assert compact.gains is not None and len(compact.gains) == sum(
        spec.out_features for spec in compact.modules
    )


async def test_what_is_not_served_is_refused_by_name(client, tiny_model, tmp_path):
    save_unserved(tiny_model, tmp_path / "biased")
    response = await upload(client, tmp_path / "biased", "biased")
    assert response.status_code == 422
    error = error_of(response)
    assert error["code"] == "unsupported_adapter"
    assert "lora_bias" in error["message"]


@pytest.mark.parametrize("adapter_id", ["", "../up", "a//b", "x" * 200, BASE, "a b"])
async def test_an_id_that_cannot_name_an_adapter(client, engine, peft_adapters, adapter_id):
    response = await upload(client, peft_adapters / "one", adapter_id)
    assert response.status_code == 422
    assert error_of(response)["code"] == "invalid_adapter_id"


@pytest.mark.parametrize(
    "name", ["../evil.json", "/etc/passwd", "a/b.json", "a\\b.json", "", ".hidden", "x" * 200]
)
async def test_a_file_name_with_a_path_is_refused(client, store, peft_adapters, name):
    files = [*files_of(peft_adapters / "two"), ("files", (name, b"{}"))]
    response = await client.post(ADAPTERS, data={"id": "two"}, files=files)
    assert response.status_code in (400, 422)
    assert error_of(response)["param"] == "files"
    assert len(store.records()) == 1


async def test_a_file_that_comes_twice(client, peft_adapters):
    files = files_of(peft_adapters / "two") * 2
    response = await client.post(ADAPTERS, data={"id": "two"}, files=files)
    assert response.status_code == 422
    assert "twice" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "id"),
        ({"id": "two", "replace": "perhaps"}, "replace"),
        ({"id": "two", "colour": "red"}, "colour"),
        ({"id": "two", "replace": "x" * 5000}, "replace"),
    ],
)
async def test_a_bad_form_field_is_named(client, store, peft_adapters, fields, param):
    response = await client.post(ADAPTERS, data=fields, files=files_of(peft_adapters / "two"))
    assert response.status_code in (400, 413)
    assert error_of(response)["param"] == param
    assert len(store.records()) == 1


async def test_files_under_another_field_are_refused(client, peft_adapters):
    files = [("file", part) for _, part in files_of(peft_adapters / "two")]
    response = await client.post(ADAPTERS, data={"id": "two"}, files=files)
    assert response.status_code == 400
    assert "'files'" in error_of(response)["message"]


MULTIPART = {"content-type": "multipart/form-data; boundary=frontier"}


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b"no multipart at all", MULTIPART),
        (b'--frontier\r\nContent-Disposition: form-data; name="id"\r\n\r\ntwo\r\n', MULTIPART),
        (b"", MULTIPART),
        (b"x", {"content-type": "multipart/form-data"}),
    ],
)
async def test_a_broken_multipart_body(client, content, headers):
    response = await client.post(ADAPTERS, content=content, headers=headers)
    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_multipart"


@pytest.mark.parametrize("announced", [True, False])
async def test_an_upload_over_the_cap_leaves_nothing_behind(
    services: Services, store: AdapterStore, tmp_path: Path, announced: bool
):
    spool = tmp_path / "spool"
    spool.mkdir()
    written: list[int] = []

    def body() -> Iterator[bytes]:
        yield (
            b'--frontier\r\nContent-Disposition: form-data; name="files"; '
            b'filename="adapter_model.safetensors"\r\n\r\n'
        )
        for _ in range(64):
            yield b"x" * 65536
            written.append(sum(f.stat().st_size for f in spool.rglob("*") if f.is_file()))
        yield b"\r\n--frontier--\r\n"

    async def in_pieces():
        for piece in body():
            yield piece

    content = b"".join(body()) if announced else in_pieces()
    access = {"max_upload_bytes": 1_000_000, "spool_directory": spool}
    async with client_of(services, **access) as client:
        response = await client.post(ADAPTERS, content=content, headers=MULTIPART)
    assert response.status_code == 413
    assert max(written) <= 1_000_000
    assert list(spool.iterdir()) == []
    assert len(store.records()) == 1


async def send_in_pieces(client: httpx.AsyncClient, request: httpx.Request) -> httpx.Response:
    """The same body, without an announcement of its size."""
    content = request.read()

    async def pieces():
        for start in range(0, len(content), 1000):
            yield content[start : start + 1000]

    headers = {"content-type": request.headers["content-type"]}
    return await client.post(request.url, content=pieces(), headers=headers)


async def test_a_body_of_unknown_size_goes_through_a_spool(
    services, store, peft_adapters, tmp_path
):
    spool = tmp_path / "spool"
    spool.mkdir()
    async with client_of(services, spool_directory=spool) as client:
        form = {"data": {"id": "two"}, "files": files_of(peft_adapters / "two")}
        request = client.build_request("POST", ADAPTERS, **form)
        assert (await send_in_pieces(client, request)).status_code == 201
        assert list(spool.iterdir()) == []
        assert (await upload(client, peft_adapters / "two", "other")).status_code == 201
    assert store.resolve("two").digest == store.resolve("other").digest
    assert store.resolve("two").source_files == store.resolve("other").source_files


async def test_a_small_body_needs_no_spool(services, peft_adapters, tmp_path):
    async with client_of(services, spool_directory=tmp_path / "absent") as client:
        assert (await upload(client, peft_adapters / "two", "two")).status_code == 201


REFUSED = {
    "no_config": [("files", ("adapter_model.safetensors", b"x"))],
    "no_weights": [("files", ("adapter_config.json", b"{}"))],
    "no_json": [("files", ("adapter_config.json", b"{"))],
    "pickle": [("files", ("adapter_model.bin", b"x"))],
    "two_weights": [("files", ("more.safetensors", b"x"))],
    "twice": [("files", ("a.txt", b"x")), ("files", ("a.txt", b"x"))],
    "path": [("files", ("../a.txt", b"x"))],
    "other_field": [("file", ("a.txt", b"x"))],
    "over_the_cap": [("files", ("a.txt", b"x" * 200_000))],
}


@pytest.mark.parametrize("name", REFUSED)
async def test_refusals_do_not_depend_on_how_a_body_comes(services, name):
    async with client_of(services, max_upload_bytes=100_000) as client:
        form = {"data": {"id": "bad"}, "files": REFUSED[name]}
        in_memory = await client.post(ADAPTERS, **form)
        request = client.build_request("POST", ADAPTERS, **form)
        spooled = await send_in_pieces(client, request)
    assert in_memory.is_client_error
    assert (in_memory.status_code, in_memory.json()) == (spooled.status_code, spooled.json())


@pytest.mark.parametrize("absolute", [True, False])
async def test_a_source_under_the_allowed_root(services, store, peft_adapters, absolute):
    source = str(peft_adapters / "two") if absolute else "two"
    async with client_of(services, allowed_source_root=peft_adapters) as client:
        response = await client.post(ADAPTERS, json={"id": "two", "source": source})
        assert response.status_code == 201, response.text
        response = await client.post(
            ADAPTERS, json={"id": "team/one", "source": source, "replace": True}
        )
        assert response.status_code == 201
    assert store.resolve("two").digest == store.resolve("team/one").digest


async def test_sources_outside_of_the_allowed_root(services, peft_adapters, tmp_path):
    root = tmp_path / "allowed"
    root.mkdir()
    (root / "link").symlink_to(peft_adapters / "two")
    (root / "files").mkdir()
    for file in (peft_adapters / "two").iterdir():
        (root / "files" / file.name).symlink_to(file)
    (root / "a-file").write_text("x")
    async with client_of(services, allowed_source_root=root) as client:
        for source, status in [
            (str(peft_adapters / "two"), 403),
            ("../peft/two", 403),
            ("link", 403),
            ("/etc", 403),
            ("/does/not/exist", 403),
            ("missing", 422),
            ("a-file", 422),
            ("nul\0", 422),
            ("files", 422),  # the directory is inside, its files are not
        ]:
            response = await client.post(ADAPTERS, json={"id": "x", "source": source})
            assert response.status_code == status, (source, response.text)
        assert len((await client.get(ADAPTERS)).json()["data"]) == 1


async def test_no_sources_without_an_allowed_root(client, peft_adapters):
    body = {"id": "two", "source": str(peft_adapters / "two")}
    response = await client.post(ADAPTERS, json=body)
    assert response.status_code == 403
    assert error_of(response)["code"] == "source_not_allowed"


async def test_json_fields_are_checked(client):
    response = await client.post(ADAPTERS, json={"id": "two", "source": "x", "force": True})
    assert response.status_code == 400
    assert error_of(response)["param"] == "force"
