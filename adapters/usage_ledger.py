"""How much a store holds, known without listing it, and exact after a kill at any point.

Before a manifest changes, the ledger notes the totals before and after and how to tell whether the
change took place; the next writer looks. One small file, replaced once per change. It is not
synced: after a power failure it may be out of date until the next `recount`.

Knows nothing of adapters. Every call is made by the holder of the store's lock.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from adapters.durable_files import publish, write_staged


class Usage(NamedTuple):
    """Totals over all registered adapters; a bank counts once per adapter that uses it."""

    num_adapters: int
    compact_bytes: int

    def plus(self, compact_bytes: int) -> Usage:
        """With one adapter more."""
        return Usage(self.num_adapters + 1, self.compact_bytes + compact_bytes)

    def minus(self, compact_bytes: int) -> Usage:
        """With one adapter less."""
        return Usage(self.num_adapters - 1, self.compact_bytes - compact_bytes)


class UsageLedger:
    """The totals in a file. `digest_of` and `recount` read the store itself."""

    def __init__(
        self,
        path: Path,
        staging: Path,
        digest_of: Callable[[str], str | None],
        recount: Callable[[], Usage],
    ) -> None:
        self._path = path
        self._staging = staging
        self._digest_of = digest_of
        self._recount = recount

    def current(self) -> Usage:
        """The totals now."""
        try:
            entry = json.loads(self._path.read_bytes())
            took_place = self._digest_of(entry["manifest"]) == entry["digest"]
            return Usage(*entry["after" if took_place else "before"])
        except (OSError, ValueError, KeyError, TypeError):
            return self._recount()

    def begin(self, before: Usage, after: Usage, manifest: str, digest: str | None) -> None:
        """Note a change of one manifest to `digest` (None: its removal) that is about to happen."""
        entry = {"before": before, "after": after, "manifest": manifest, "digest": digest}
        data = json.dumps(entry).encode()
        publish(write_staged(self._staging, data, durable=False), self._path)

    def reset(self) -> Usage:
        """Count anew and note that."""
        usage = self._recount()
        self.begin(usage, usage, "", None)
        return usage
