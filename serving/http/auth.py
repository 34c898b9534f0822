"""Who may do what: bearer keys for inference and for adapter management.

Keys are compared in constant time, all of them each time. Knows nothing of what a route does.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fastapi import Request

from serving.http.errors import ApiError
from serving.http.services import Access

Guard = Callable[[Request], Coroutine[Any, Any, None]]


def inference_guard(access: Access) -> Guard:
    """Lets a request in that has an inference or an admin key, or any where there are no keys.

    With admin keys alone, inference is open to everyone.
    """

    async def guard(request: Request) -> None:
        if access.api_keys:
            _require(request, (*access.api_keys, *access.admin_keys))

    return guard


def admin_guard(access: Access) -> Guard:
    """Lets a request in that has an admin key; see `Access.admin_keys` for where there is none.

    A server without keys trusts whoever reaches it, but not the web pages that they look at: a
    browser lets any page send a form with files, and says so in Sec-Fetch-Site.
    """

    async def guard(request: Request) -> None:
        if request.headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            raise ApiError(403, "pages of other sites may not manage adapters", "cross_site")
        if not access.api_keys and not access.admin_keys:
            return
        key = _require(request, (*access.api_keys, *access.admin_keys))
        if not _is_one_of(key, access.admin_keys):
            raise ApiError(403, "managing adapters needs an admin key", "admin_key_required")

    return guard


def metrics_guard(access: Access) -> Guard:
    """Open, as scrapers expect it, unless the settings protect it and there are keys."""

    async def guard(request: Request) -> None:
        keys = (*access.api_keys, *access.admin_keys)
        if access.protect_metrics and keys:
            _require(request, keys)

    return guard


def _require(request: Request, keys: Sequence[str]) -> bytes:
    """The request's key, which is one of `keys`; ApiError 401 otherwise."""
    header = request.headers.get("authorization", "").encode("latin-1")  # as it came
    scheme, _, key = header.partition(b" ")
    if scheme.lower() == b"bearer" and _is_one_of(key.strip(), keys):
        return key.strip()
    problem = "the API key is not valid" if key else "an API key is needed"
    raise ApiError(
        401,
        f"{problem}; send it as 'Authorization: Bearer KEY'",
        "invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _is_one_of(key: bytes, keys: Sequence[str]) -> bool:
    """Takes as long for every key of every length, whichever of `keys` it equals."""
    hashed = hashlib.sha256(key).digest()
    found = False
    for known in keys:
        found |= hmac.compare_digest(hashed, hashlib.sha256(known.encode()).digest())
    return found
