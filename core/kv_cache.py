"""Paged keys and values: who holds which page, and which pages equal prompts may share.

`KVPool` is the one owner of pages. A page holds the keys and values of `page_size` consecutive
tokens of one sequence in all layers. A full page is published under a hash of everything before
it and the adapter's digest; a later sequence with the same beginning and the same digest takes it
over. Knows nothing of attention, scheduling or names of adapters.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

PageHash = bytes


class KVPool:
    """Reference-counted pages with prefix reuse; free pages that are published are reused last.

    Not thread-safe: the engine's thread alone calls it.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self._num_refs = [0] * num_pages
        self._blank = list(range(num_pages - 1, -1, -1))  # free, nothing to reuse in them
        self._reusable: OrderedDict[int, None] = OrderedDict()  # free but published, oldest first
        self._page_of: dict[PageHash, int] = {}
        self._hash_of: dict[int, PageHash] = {}

    @property
    def num_free(self) -> int:
        """Pages that no sequence holds, published ones included."""
        return len(self._blank) + len(self._reusable)

    @property
    def num_used(self) -> int:
        """Pages that at least one sequence holds."""
        return self.num_pages - self.num_free

    def num_pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.page_size)

    def allocate(self, num_pages: int) -> list[int]:
        """Take `num_pages` blank pages; the caller has checked `num_free`."""
        assert num_pages <= self.num_free, f"{num_pages} pages wanted, {self.num_free} free"
        return [self._take_blank() for _ in range(num_pages)]

    def release(self, pages: Sequence[int]) -> None:
        """Give back one reference on each page, the last page first so that heads stay longest."""
        for page in reversed(pages):
            assert self._num_refs[page] > 0, f"page {page} is not held"
            self._num_refs[page] -= 1
            if self._num_refs[page] == 0:
                self._make_free(page)

    def match_prefix(self, hashes: Sequence[PageHash]) -> int:
        """How many leading pages of a sequence with these page hashes are there already."""
        for count, page_hash in enumerate(hashes):
            if page_hash not in self._page_of:
                return count
        return len(hashes)

    def num_free_if_shared(self, hashes: Sequence[PageHash]) -> int:
        """`num_free` as it would be after `share(hashes)`."""
        return self.num_free - sum(self._page_of[h] in self._reusable for h in hashes)

    def share(self, hashes: Sequence[PageHash]) -> list[int]:
        """Take a reference on each page of a matched prefix."""
        pages = [self._page_of[page_hash] for page_hash in hashes]
        for page in pages:
            self._reusable.pop(page, None)
            self._num_refs[page] += 1
        return pages

    def publish(self, page: int, page_hash: PageHash) -> None:
        """Offer a full page, held by the caller, to later sequences; the first one stays."""
        assert self._num_refs[page] > 0, f"page {page} is published by one who does not hold it"
        if page_hash in self._page_of or page in self._hash_of:
            return
        self._page_of[page_hash] = page
        self._hash_of[page] = page_hash

    def check_integrity(self) -> None:
        """Assert that every page is in exactly one state and the hash tables mirror each other."""
        free = [*self._blank, *self._reusable]
        assert len(free) == len(set(free)), "a page is free twice"
        assert all(self._num_refs[page] == 0 for page in free), "a free page is held"
        held = sum(refs > 0 for refs in self._num_refs)
        assert held + len(free) == self.num_pages, "a page is neither held nor free"
        assert {page: h for h, page in self._page_of.items()} == self._hash_of, "hash tables differ"
        assert all(page in self._hash_of for page in self._reusable), "unpublished page kept"
        assert not any(page in self._hash_of for page in self._blank), "published page is blank"

    def _take_blank(self) -> int:
        if self._blank:
            page = self._blank.pop()
        else:
            page, _ = self._reusable.popitem(last=False)
            del self._page_of[self._hash_of.pop(page)]
        self._num_refs[page] = 1
        return page

    def _make_free(self, page: int) -> None:
        if page in self._hash_of:
            self._reusable[page] = None
        else:
            self._blank.append(page)


def first_hash(adapter_digest: str | None) -> PageHash:
    """The hash before the first page: sequences of different adapters never share a page."""
    return blake2b(
        ("base" if adapter_digest is None else f"adapter:{adapter_digest}").encode(), digest_size=32
    ).digest()


def page_hash(previous: PageHash, token_ids: Sequence[int]) -> PageHash:
    """The hash of a full page from the one before it and its own tokens."""
    return blake2b(
        np.asarray(token_ids, dtype=np.int64).tobytes(), key=previous, digest_size=32
    ).digest()
