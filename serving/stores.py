"""The server's adapter store: where it is, and what is registered in it when a server starts.

A preload directory says what is there at start: each of its folders that holds a PEFT adapter is
registered under the folder's name unless that name is taken. So a removed adapter comes back at the
next start (start with `--preload none` to prevent it), and one that was replaced by other content
under the same name stays as it is. Knows nothing of Ray or HTTP.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import platformdirs

from adapters.errors import AdapterError, AdapterExistsError
from adapters.store import AdapterStore
from adapters.store_limits import StoreLimits
from core.errors import CoreError
from core.model_config import BaseInfo
from serving.default_base import DefaultBaseError
from serving.settings import Settings, SettingsError

OFFLINE_ERRORS: tuple[type[Exception], ...] = (
    AdapterError,
    CoreError,
    DefaultBaseError,
    SettingsError,
)
"""What reading a base or an adapter may raise that a person can act on."""

_DEMO_ADAPTERS = Path(__file__).resolve().parent.parent / "deploy" / "demo" / "adapters"
_CONFIG_FILE = "adapter_config.json"


class Preloaded(NamedTuple):
    """Ids of a preload directory by what became of them."""

    added: list[str]
    present: list[str]
    differing: list[str]  # the name is taken by other content, which stays


def store_directory(settings: Settings, base: BaseInfo) -> Path:
    """The store's directory: the user's choice, else one per base, since adapters fit one base."""
    own = platformdirs.user_data_path("vbserve") / "adapters" / base.fingerprint[:16]
    return settings.adapters or own


def open_store(settings: Settings, base_name: str, base: BaseInfo) -> AdapterStore:
    """The store with the settings' limits; the base's name cannot name an adapter."""
    limits = StoreLimits(max_upload_bytes=settings.max_upload_bytes)
    directory = store_directory(settings, base)
    return AdapterStore.open(directory, base, limits=limits, reserved_ids=[base_name])


def served_ids(store: AdapterStore) -> list[str]:
    """Ids of the adapters that were registered for this base, sorted."""
    fingerprint = store.base.fingerprint
    return [r.id for r in store.records() if r.base_fingerprint == fingerprint]


def preload_directory(settings: Settings) -> Path | None:
    """Where the adapters to register at start are; None for none. Raises SettingsError."""
    if settings.preload == "none":
        return None
    if settings.preload == "demo":
        is_default_base = settings.model is None
        return _DEMO_ADAPTERS if is_default_base and _DEMO_ADAPTERS.is_dir() else None
    if not settings.preload.is_dir():
        raise SettingsError(f"preload: {settings.preload} is not a directory")
    return settings.preload


def preload_adapters(store: AdapterStore, directory: Path) -> Preloaded:
    """Register each adapter folder of `directory`; raises AdapterError for one that is refused."""
    done = Preloaded([], [], [])
    for config in sorted(directory.glob(f"*/{_CONFIG_FILE}")):
        adapter_id = config.parent.name
        try:
            result = store.add(adapter_id, config.parent)
        except AdapterExistsError:
            done.differing.append(adapter_id)
        else:
            (done.added if result.created else done.present).append(adapter_id)
    return done
