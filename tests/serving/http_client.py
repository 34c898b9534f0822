"""A client of the application without a socket, and the names that the tests share."""

from __future__ import annotations

import dataclasses
from typing import Any

import httpx

from serving.http.app import build_app
from serving.http.services import Access, Services

BASE = "tiny"
REPLY = " fox jumps over the lazy dog"


def client_of(services: Services, **access: Any) -> httpx.AsyncClient:
    """A client of an application over `services`; `access` overrides fields of Access."""
    if access:
        services = dataclasses.replace(services, access=Access(**access))
    transport = httpx.ASGITransport(build_app(services), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")
