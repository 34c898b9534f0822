"""Compact forms in memory, least recently used dropped first, banks counted once.

Not safe for threads: the owner's lock guards it. Knows nothing of where compact forms come from.
"""

from __future__ import annotations

from collections import Counter, OrderedDict

from adapters.compact import CompactAdapter


class CompactCache:
    """Compact forms by digest within `budget_bytes`; one that exceeds it alone is not kept."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.adapter_bytes = 0  # without banks
        self.bank_bytes = 0
        self._adapters: OrderedDict[str, CompactAdapter] = OrderedDict()
        self._bank_users: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._adapters)

    def get(self, digest: str) -> CompactAdapter | None:
        """The compact form, now the most recently used; None if it is not here."""
        if digest in self._adapters:
            self._adapters.move_to_end(digest)
        return self._adapters.get(digest)

    def put(self, digest: str, adapter: CompactAdapter) -> None:
        """Keep a compact form, dropping others for it."""
        self.drop(digest)
        self._adapters[digest] = adapter
        self._count(adapter, +1)
        while self._adapters and self.adapter_bytes + self.bank_bytes > self.budget_bytes:
            self.drop(next(iter(self._adapters)))

    def drop(self, digest: str) -> None:
        """Forget a compact form; nothing happens if it is not here."""
        adapter = self._adapters.pop(digest, None)
        if adapter is not None:
            self._count(adapter, -1)

    def check_integrity(self) -> None:
        """Assert that the byte counts are those of what is here, and within the budget."""
        adapters = self._adapters.values()
        banks = {a.bank.digest: a.bank.num_bytes for a in adapters if a.bank is not None}
        assert self.adapter_bytes == sum(adapter.num_bytes for adapter in adapters)
        assert self.bank_bytes == sum(banks.values())
        assert self.adapter_bytes + self.bank_bytes <= self.budget_bytes

    def _count(self, adapter: CompactAdapter, sign: int) -> None:
        self.adapter_bytes += sign * adapter.num_bytes
        bank = adapter.bank
        if bank is None:
            return
        users = self._bank_users[bank.digest]
        self._bank_users[bank.digest] += sign
        if users + sign == 0:
            del self._bank_users[bank.digest]
        if users == 0 or users + sign == 0:
            self.bank_bytes += sign * bank.num_bytes
