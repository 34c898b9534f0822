"""/v1/adapters and /v1/models over a real store with real PEFT adapters."""

from __future__ import annotations

import asyncio

import pytest
from http_client import BASE, client_of
from tiny_model import save_dora, save_unserved
from uploading import ADAPTERS, error_of, files_of, upload

from adapters.errors import UnknownAdapterError


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
