"""From the name in a request to the content that serves it. Knows nothing of HTTP."""

from __future__ import annotations

from typing import NamedTuple

from adapters.errors import InvalidAdapterIdError, UnknownAdapterError, WrongBaseError
from adapters.records import AdapterRecord
from serving.http.schemas_responses import ModelCard
from serving.http.services import Services

OWNER = "vbserve"


class ResolvedModel(NamedTuple):
    """A name's content, pinned for one request. `adapter_digest` None is the base itself.

    `fingerprint` begins like the content's digest; a base that is not computed as it is stored
    says how behind it.
    """

    name: str
    adapter_digest: str | None
    fingerprint: str


def resolve_model(services: Services, name: str) -> ResolvedModel:
    """Raises UnknownAdapterError for whatever is neither the base nor an adapter of it."""
    if name == services.base_name:
        return ResolvedModel(name, None, _shown(services, services.base.fingerprint))
    record = resolve_adapter(services, name)
    return ResolvedModel(name, record.digest, _shown(services, record.digest))


def _shown(services: Services, digest: str) -> str:
    return digest[:16] + (f"-{services.quantize}" if services.quantize != "none" else "")


def resolve_adapter(services: Services, name: str) -> AdapterRecord:
    """The adapter of this base under a name. Raises UnknownAdapterError."""
    try:
        return services.store.resolve(name)
    except UnknownAdapterError as error:
        raise UnknownAdapterError(f"the model {name!r} does not exist") from error
    except (InvalidAdapterIdError, WrongBaseError) as error:
        raise UnknownAdapterError(f"the model {name[:200]!r} is not served: {error}") from error


def served_records(services: Services) -> list[AdapterRecord]:
    """All adapters that this base serves, sorted by id."""
    fingerprint = services.base.fingerprint
    return [r for r in services.store.records() if r.base_fingerprint == fingerprint]


def base_card(services: Services, created: int) -> ModelCard:
    """The base in /v1/models."""
    return ModelCard(services.base_name, created, services.base.fingerprint, None, "model", OWNER)


def adapter_card(services: Services, record: AdapterRecord) -> ModelCard:
    """An adapter in /v1/models."""
    return ModelCard(record.id, record.created, record.digest, services.base_name, "model", OWNER)
