"""Factors that are there, least recently used first, and which of them may go.

Not safe for threads: the owner's lock guards it. Knows nothing of loading and rebuilding.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from core.factors import AdapterFactors

NO_CLAIM = float("-inf")


@dataclass
class FactorEntry:
    """One adapter's factors. `FactorEntries` alone writes to it."""

    factors: AdapterFactors
    claimed_until: float  # on the owner's clock; NO_CLAIM when nobody waits for it
    fresh: bool = True  # not leased yet: its first lease is no hit
    num_leases: int = 0

    def is_held(self, now: float) -> bool:
        """Whether it must stay: leased, or awaited by the one who asked for it."""
        return self.num_leases > 0 or self.claimed_until > now


class FactorEntries:
    """Entries by digest within `budget_bytes`, which held entries alone may exceed."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._entries: OrderedDict[str, FactorEntry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    @property
    def num_leases(self) -> int:
        """Leases on all entries."""
        return sum(entry.num_leases for entry in self._entries.values())

    def lease(self, digest: str) -> tuple[FactorEntry, bool] | None:
        """The entry with one lease more, and whether that is a hit; None if it is not here."""
        entry = self._entries.get(digest)
        if entry is None:
            return None
        hit, entry.fresh = not entry.fresh, False
        entry.claimed_until = NO_CLAIM
        entry.num_leases += 1
        self._entries.move_to_end(digest)
        return entry, hit

    def release(self, entry: FactorEntry) -> None:
        """Take one lease back."""
        assert entry.num_leases > 0
        entry.num_leases -= 1

    def insert(self, factors: AdapterFactors, claimed_until: float) -> None:
        """Keep factors, whether there is room or not; `make_room` first."""
        assert factors.digest not in self._entries
        self._entries[factors.digest] = FactorEntry(factors, claimed_until)
        self.used_bytes += factors.num_bytes

    def make_room(self, num_bytes: int, now: float) -> int:
        """Drop entries that are not held, oldest first, until `num_bytes` fit; how many went."""
        num_dropped = 0
        for digest, entry in list(self._entries.items()):
            if self.has_room(num_bytes):
                break
            if not entry.is_held(now):
                self._drop(digest)
                num_dropped += 1
        return num_dropped

    def has_room(self, num_bytes: int) -> bool:
        """Whether `num_bytes` more stay within the budget."""
        return self.used_bytes + num_bytes <= self.budget_bytes

    def evict(self, digest: str) -> bool:
        """Drop one entry unless it is leased; whether it was dropped."""
        entry = self._entries.get(digest)
        if entry is None or entry.num_leases:
            return False
        self._drop(digest)
        return True

    def check_integrity(self) -> None:
        """Assert what must hold between any two calls of the owner."""
        entries = self._entries
        assert self.used_bytes == sum(entry.factors.num_bytes for entry in entries.values())
        assert all(digest == entry.factors.digest for digest, entry in entries.items())
        assert all(entry.num_leases >= 0 for entry in entries.values())
        assert not any(entry.fresh and entry.num_leases for entry in entries.values())
        # a claim that has run out is noticed at the next call, so any claim counts here
        all_held = all(entry.is_held(NO_CLAIM) for entry in entries.values())
        assert self.has_room(0) or all_held, "over budget with an entry that nobody holds"

    def _drop(self, digest: str) -> None:
        self.used_bytes -= self._entries.pop(digest).factors.num_bytes
