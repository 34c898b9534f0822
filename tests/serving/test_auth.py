"""Which key opens which door."""

from __future__ import annotations

import pytest
from http_client import BASE, client_of

INFER = ("POST", "/v1/completions")
MODELS, ADAPTERS = ("GET", "/v1/models"), ("GET", "/v1/adapters")
ADD, DELETE = ("POST", "/v1/adapters"), ("DELETE", "/v1/adapters/team/one")
OPEN = [("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/metrics")]

USER, ADMIN = "user-key-ä", "admin-key"
BOTH = {"api_keys": ("other-key", USER), "admin_keys": (ADMIN,)}


async def status(services, access, call, authorization) -> int:
    method, path = call
    bodies = {
        INFER: {"model": BASE, "prompt": "Hello"},
        ADD: {"id": "x", "source": "/outside"},  # passes the guard: 403 with another code
    }
    headers = {} if authorization is None else {"authorization": authorization.encode()}
    async with client_of(services, **access) as client:
        response = await client.request(method, path, json=bodies.get(call), headers=headers)
    if response.status_code == 401:
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
    if response.status_code == 403 and call == ADD:
        code = response.json()["error"]["code"]
        return 403 if code == "admin_key_required" else 200
    return response.status_code


@pytest.mark.parametrize("call", [INFER, MODELS, ADAPTERS, ADD, DELETE, *OPEN])
async def test_without_keys_everything_is_open(services, call):
    assert await status(services, {}, call, None) == 200


@pytest.mark.parametrize("call", [INFER, MODELS, ADAPTERS, ADD, DELETE])
@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", f"Basic {USER}", USER, f"Bearer {USER}x"],
)
async def test_with_keys_nothing_opens_without_one(services, call, authorization):
    assert await status(services, BOTH, call, authorization) == 401


@pytest.mark.parametrize(
    ("call", "expected"), [(INFER, 200), (MODELS, 200), (ADAPTERS, 200), (ADD, 403), (DELETE, 403)]
)
async def test_an_inference_key_does_not_manage_adapters(services, call, expected):
    assert await status(services, BOTH, call, f"Bearer {USER}") == expected


@pytest.mark.parametrize("call", [INFER, MODELS, ADAPTERS, ADD, DELETE])
async def test_an_admin_key_opens_everything(services, call):
    assert await status(services, BOTH, call, f"bearer {ADMIN}") == 200


@pytest.mark.parametrize("call", [ADD, DELETE])
async def test_inference_keys_alone_close_the_management(services, call):
    access = {"api_keys": (USER,)}
    assert await status(services, access, call, f"Bearer {USER}") == 403
    assert await status(services, access, call, None) == 401


async def test_admin_keys_alone_leave_inference_open(services):
    access = {"admin_keys": (ADMIN,)}
    assert await status(services, access, INFER, None) == 200
    assert await status(services, access, ADD, None) == 401
    assert await status(services, access, ADD, f"Bearer {ADMIN}") == 200


@pytest.mark.parametrize("call", OPEN)
async def test_health_and_metrics_stay_open(services, call):
    assert await status(services, BOTH, call, None) == 200


async def test_metrics_are_protected_where_asked(services):
    access = {**BOTH, "protect_metrics": True}
    assert await status(services, access, OPEN[2], None) == 401
    assert await status(services, access, OPEN[2], f"Bearer {USER}") == 200
    assert await status(services, access, OPEN[0], None) == 200


async def test_a_body_is_not_read_before_the_key_is_known(services):
    read = []

    async def body():
        read.append(1)
        yield b"x"

    async with client_of(services, **BOTH) as client:
        response = await client.post(
            "/v1/adapters", content=body(), headers={"content-type": "application/json"}
        )
    assert (response.status_code, read) == (401, [])


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
async def test_other_sites_pages_do_not_manage_adapters(client, peft_adapters, store, site):
    """Without keys, a form with files needs no permission from the browser's user."""
    files = [("files", (f.name, f.read_bytes())) for f in (peft_adapters / "two").iterdir()]
    for value, status in ((site, 403), ("same-origin", 201)):
        headers = {"sec-fetch-site": value}
        response = await client.post(
            "/v1/adapters", data={"id": "two"}, files=files, headers=headers
        )
        assert response.status_code == status
    assert len(store.records()) == 2
