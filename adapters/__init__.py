"""From a PEFT directory to low-rank factors: read, validate, store, rebuild, cache.

Knows core's factor types and a base's geometry; knows nothing of HTTP and Ray.
"""

from adapters.bank_pool import Bank, BankPool
from adapters.compact import CompactAdapter, CompactLoRA, CompactVBLoRA
from adapters.errors import (
    AdapterError,
    AdapterExistsError,
    AdapterTooLargeError,
    InvalidAdapterIdError,
    MalformedAdapterError,
    StoreCorruptedError,
    UnknownAdapterError,
    UnsupportedAdapterError,
    WrongBaseError,
)
from adapters.factor_cache import FactorCache
from adapters.factor_cache_stats import FactorCacheStats
from adapters.peft_adapter import read_peft_adapter
from adapters.rebuild import rebuild_factors
from adapters.records import AdapterRecord
from adapters.store import AdapterStore, AddResult
from adapters.store_limits import StoreLimits

__all__ = [
    "AdapterError",
    "AdapterExistsError",
    "AdapterRecord",
    "AdapterStore",
    "AdapterTooLargeError",
    "AddResult",
    "Bank",
    "BankPool",
    "CompactAdapter",
    "CompactLoRA",
    "CompactVBLoRA",
    "FactorCache",
    "FactorCacheStats",
    "InvalidAdapterIdError",
    "MalformedAdapterError",
    "StoreCorruptedError",
    "StoreLimits",
    "UnknownAdapterError",
    "UnsupportedAdapterError",
    "WrongBaseError",
    "read_peft_adapter",
    "rebuild_factors",
]
