"""The page pool under random use, against a model of dictionaries."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from core.kv_cache import KVPool, first_hash, page_hash


def chain(digest: str | None, tokens: list[int], page_size: int = 2) -> list[bytes]:
    hashes = [first_hash(digest)]
    for start in range(0, len(tokens) - page_size + 1, page_size):
        hashes.append(page_hash(hashes[-1], tokens[start : start + page_size]))
    return hashes[1:]


class KVPoolMachine(RuleBasedStateMachine):
    """Sequences are prefixes of a few token streams, so that they often share pages.

    `content` says what each page really holds: the hash of what its first writer computed there.
    """

    @initialize(num_pages=st.integers(1, 12))
    def start(self, num_pages: int) -> None:
        self.pool = KVPool(num_pages, page_size=2)
        self.held: dict[int, tuple[list[int], list[bytes]]] = {}  # by name: pages, their hashes
        self.content: dict[int, bytes | None] = dict.fromkeys(range(num_pages))
        self.next_name = 0

    @rule(
        stream=st.integers(0, 2),
        num_tokens=st.integers(1, 20),
        digest=st.sampled_from([None, "a", "base"]),
    )
    def begin(self, stream: int, num_tokens: int, digest: str | None) -> None:
        tokens = [stream * 100 + place for place in range(num_tokens)]
        hashes = chain(digest, tokens)
        usable = hashes[: (num_tokens - 1) // 2]
        shared = usable[: self.pool.match_prefix(usable)]
        needed = self.pool.num_pages_for(num_tokens) - len(shared)
        free_then = self.pool.num_free_if_shared(shared)
        if needed > free_then:
            return
        pages = self.pool.share(shared)
        assert self.pool.num_free == free_then
        assert [self.content[page] for page in pages] == shared, "a hit on other content"
        new = self.pool.allocate(needed)
        holders = {page for held, _ in self.held.values() for page in held}
        assert not holders & set(new), "a page that is held was given away"
        assert not set(pages) & set(new)
        for page in new:
            self.content[page] = None
        for page, own_hash in zip(new, hashes[len(shared) :], strict=False):
            self.content[page] = own_hash  # computed now
        self.held[self.next_name] = (pages + new, hashes)
        self.next_name += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        pages, hashes = self.held[data.draw(st.sampled_from(sorted(self.held)))]
        for page, own_hash in list(zip(pages, hashes, strict=False))[
            : data.draw(st.integers(0, 9))
        ]:
            self.pool.publish(page, own_hash)
        count = self.pool.match_prefix(hashes)
        assert count <= len(hashes)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        pages, _ = self.held.pop(data.draw(st.sampled_from(sorted(self.held))))
        self.pool.release(pages)

    @invariant()
    def accounts_agree(self) -> None:
        self.pool.check_integrity()
        held = {page for pages, _ in self.held.values() for page in pages}
        assert self.pool.num_used == len(held)
        assert self.pool.num_free == self.pool.num_pages - len(held)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for pages, _ in self.held.values():
                self.pool.release(pages)
            assert self.pool.num_used == 0
            self.pool.check_integrity()


TestKVPool = KVPoolMachine.TestCase
TestKVPool.settings = settings(
    max_examples=50, stateful_step_count=30, deadline=None, derandomize=True
)


def test_heads_of_prompts_stay_longest() -> None:
    """The first pages serve the most later prompts: eviction begins at the tail."""
    pool = KVPool(4, page_size=2)
    hashes = chain(None, list(range(8)))
    pages = pool.allocate(4)
    for page, own_hash in zip(pages, hashes, strict=True):
        pool.publish(page, own_hash)
    pool.release(pages)
    for left in (3, 2, 1, 0):
        taken = pool.allocate(1)
        assert pool.match_prefix(hashes) == left
        assert taken == [pages[left]]


def test_blank_pages_are_taken_before_published_ones() -> None:
    pool = KVPool(3, page_size=2)
    pages = pool.allocate(2)
    hashes = chain("a", [1, 2, 3, 4])
    for page, own_hash in zip(pages, hashes, strict=True):
        pool.publish(page, own_hash)
    pool.release(pages)
    pool.release(pool.allocate(1))
    assert pool.match_prefix(hashes) == 2


def test_misuse_is_an_assertion() -> None:
    pool = KVPool(2, page_size=2)
    (page,) = pool.allocate(1)
    with pytest.raises(AssertionError, match="2 pages wanted"):
        pool.allocate(2)
    pool.release([page])
    with pytest.raises(AssertionError, match="not held"):
        pool.release([page])
    with pytest.raises(AssertionError, match="does not hold"):
        pool.publish(page, b"x")


def test_hashes_tell_digest_tokens_and_what_came_before() -> None:
    seen = {
        first_hash(None),
        first_hash("base"),
        first_hash(""),
        first_hash("a"),
        page_hash(first_hash("a"), [1, 2]),
        page_hash(first_hash("b"), [1, 2]),
        page_hash(first_hash("a"), [2, 1]),
        page_hash(first_hash("a"), [1, 2, 0]),
        page_hash(page_hash(first_hash("a"), [1, 2]), [1, 2]),
        page_hash(first_hash("a"), [258]),  # as bytes, 258 is 2, 1
    }
    assert len(seen) == 10
