"""What a store accepts."""

from __future__ import annotations

from dataclasses import dataclass

from adapters.errors import AdapterTooLargeError
from adapters.peft_adapter import MAX_CONFIG_BYTES, MAX_WEIGHTS_BYTES
from adapters.usage_ledger import Usage


@dataclass(frozen=True)
class StoreLimits:
    """What a store accepts.

    max_upload_bytes         size of an adapter's weights file
    max_config_bytes         size of its config
    max_rank                 largest rank of any module
    max_adapters             registered names
    max_total_compact_bytes  sum of all compact forms, a bank counted for each adapter that uses it
    """

    max_upload_bytes: int = MAX_WEIGHTS_BYTES
    max_config_bytes: int = MAX_CONFIG_BYTES
    max_rank: int = 256
    max_adapters: int = 100_000
    max_total_compact_bytes: int = 64 * 1024**3

    def check_rank(self, rank: int) -> None:
        """Raise AdapterTooLargeError for a rank over the limit."""
        if rank > self.max_rank:
            raise AdapterTooLargeError(f"rank {rank} is over the limit of {self.max_rank}")

    def check_usage(self, usage: Usage) -> None:
        """Raise AdapterTooLargeError if a store may not hold this much."""
        if usage.num_adapters > self.max_adapters:
            raise AdapterTooLargeError(
                f"the store is full: {self.max_adapters} adapters are registered"
            )
        if usage.compact_bytes > self.max_total_compact_bytes:
            raise AdapterTooLargeError(
                f"the store is full: with this adapter it would hold {usage.compact_bytes} bytes, "
                f"at most {self.max_total_compact_bytes} are allowed"
            )
