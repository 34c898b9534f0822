"""Which tokens of which sequences the next step computes.

The one owner of a sequence's status, pages and lease. Running sequences come first, in the order
of their admission: one token each for those that decode, prompts in chunks. Then waiting ones are
admitted, fair between adapters. Without free pages the youngest running sequence gives its pages
up and is computed again later, with all its tokens. Knows nothing of tensors or of what a token
means.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq

from core.engine_config import EngineConfig
from core.errors import AdapterUnavailableError
from core.factors import FactorSource
from core.kv_cache import KVPool, first_hash, page_hash
from core.sequence import Chunk, Sequence, Status
from core.waiting_queue import Digest, WaitingQueue

_PROMPTS_BESIDE_DECODES = 4  # of a step's limit they get one part in so many


class Scheduler:
    """Not thread-safe: the engine's thread alone calls it."""

    def __init__(
        self,
        config: EngineConfig,
        pool: KVPool,
        factor_source: FactorSource | None,
        *,
        tokens_per_step: int,
        max_reusable_prompt: int | None = None,
    ) -> None:
        """What a step may hold, and how long a prompt may be that shares pages.

        tokens_per_step        prompt chunks and decodes together
        max_reusable_prompt    see `Rotary.depends_on_length`; None: any
        """
        self._config, self._pool, self._factor_source = config, pool, factor_source
        self._tokens_per_step, self._max_reusable_prompt = tokens_per_step, max_reusable_prompt
        self.waiting = WaitingQueue(config.max_waiting, config.max_waiting_per_adapter)
        self.running: list[Sequence] = []
        self.failed: list[tuple[Sequence, str]] = []  # to be reported by the engine's next step
        self.num_preemptions = 0
        self.num_prefix_hit_tokens = 0

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence; EngineOverloadedError where there is no room."""
        self.waiting.check_room(seq.digest)
        self.waiting.push(seq, self._busy())
        if seq.digest is not None and self._factor_source is not None:
            self._factor_source.prefetch(seq.digest)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step; empty when nothing can run now."""
        chunks, budget = self._continue_running()
        self._admit(chunks, budget)
        for chunk in chunks:
            self.waiting.count_served(chunk.seq.digest, chunk.num_tokens)
        return chunks

    def complete(self, chunk: Chunk) -> None:
        """Note that a chunk's keys and values are computed; publish the pages that it filled."""
        seq = chunk.seq
        seq.num_computed = chunk.end
        if self._may_share(seq):
            self._extend_hashes(seq, seq.num_computed)
            full = seq.num_computed // self._pool.page_size
            for index in range(seq.num_published, full):
                self._pool.publish(seq.pages[index], seq.page_hashes[index])
            seq.num_published = max(seq.num_published, full)

    def finish(self, seq: Sequence) -> None:
        """End a sequence wherever it stands and free what it holds."""
        if seq.status is Status.RUNNING:
            self.running.remove(seq)
        elif seq.status is Status.WAITING:
            self.waiting.remove(seq)
        seq.status = Status.FINISHED
        self._release_pages(seq)
        if seq.lease is not None:
            seq.lease.release()
            seq.lease = None
        self.waiting.forget_idle(self._busy())

    def check_integrity(self) -> None:
        """Assert that pages and leases are held by exactly those that may hold them."""
        self._pool.check_integrity()
        held: dict[int, int] = {}
        for seq in self.running:
            assert seq.status is Status.RUNNING
            assert len(seq.pages) >= self._pool.num_pages_for(seq.num_computed)
            assert (seq.digest is None) == (seq.lease is None), "lease and digest differ"
            for page in seq.pages:
                held[page] = held.get(page, 0) + 1
        assert len(held) == self._pool.num_used, "pages are held by no running sequence"
        for seq in self.waiting:
            assert seq.status is Status.WAITING and not seq.pages and seq.num_computed == 0

    # -- running sequences ---------------------------------------------------------------------

    def _continue_running(self) -> tuple[list[Chunk], int]:
        """Chunks of running sequences, and how many more tokens of prompts the step may take.

        Each one that decodes takes a token. Of the rest, prompts get a quarter of the limit at
        most while anyone decodes, who waits for them between two tokens; and so does what comes
        meanwhile before its own prompt begins.
        """
        chunks: list[Chunk] = []
        limit = self._tokens_per_step
        num_decoding = sum(seq.num_uncomputed == 1 for seq in self.running)
        budget = limit - num_decoding
        if num_decoding:
            budget = min(budget, max(1, limit // _PROMPTS_BESIDE_DECODES))
        for seq in list(self.running):
            if seq.status is not Status.RUNNING:
                continue  # preempted for one before it
            decodes = seq.num_uncomputed == 1
            num_tokens = 1 if decodes else min(seq.num_uncomputed, budget)
            if num_tokens > 0 and self._make_room(seq, seq.num_computed + num_tokens):
                chunks.append(Chunk(seq, seq.num_computed, num_tokens))
                budget -= 0 if decodes else num_tokens
        return chunks, budget

    def _make_room(self, seq: Sequence, num_tokens: int) -> bool:
        """Give `seq` pages for its first `num_tokens` tokens; False if it was preempted itself."""
        missing = self._pool.num_pages_for(num_tokens) - len(seq.pages)
        while missing > self._pool.num_free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        if missing > 0:
            seq.pages += self._pool.allocate(missing)
        return True

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._release_pages(seq)
        seq.status = Status.WAITING
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.push_front(seq)

    def _release_pages(self, seq: Sequence) -> None:
        self._pool.release(seq.pages)
        seq.pages, seq.num_computed, seq.num_published = [], 0, 0

    # -- waiting sequences ---------------------------------------------------------------------

    def _admit(self, chunks: list[Chunk], budget: int) -> None:
        refused: set[Digest] = set()  # their factors are not there yet
        while budget > 0 and len(self.running) < self._config.max_num_seqs:
            seq = self._next_bound(refused)
            if seq is None or not self._start(seq):
                return
            num_tokens = min(seq.num_uncomputed, budget)
            chunks.append(Chunk(seq, seq.num_computed, num_tokens))
            budget -= num_tokens

    def _next_bound(self, refused: set[Digest]) -> Sequence | None:
        """The first in the order of fairness whose factors are there; fills `refused`."""
        for head in self.waiting.heads():
            if head.digest in refused:
                continue
            if self._bind_factors(head):
                return head
            refused.add(head.digest)
        return None

    def _bind_factors(self, seq: Sequence) -> bool:
        """Lease the adapter's factors; False while they are loading, or when they failed."""
        if seq.digest is None or seq.lease is not None:
            return True
        assert self._factor_source is not None, "a digest was admitted without a factor source"
        try:
            seq.lease = self._factor_source.try_acquire(seq.digest)
        except AdapterUnavailableError as error:
            for each in self.waiting.of(seq.digest):  # all have waited for this load
                if each.lease is None:
                    self.finish(each)
                    self.failed.append((each, str(error)))
        return seq.lease is not None

    def _start(self, seq: Sequence) -> bool:
        """Make `seq` run if pages for all its tokens are free (one spare for each that runs)."""
        shared = self._reusable_prefix(seq)
        needed = self._pool.num_pages_for(len(seq.token_ids)) - len(shared)
        spare = len(self.running)
        if needed + spare > self._pool.num_free_if_shared(shared) and self.running:
            return False
        seq.pages = self._pool.share(shared)
        seq.pages += self._pool.allocate(needed)
        seq.num_computed = len(shared) * self._pool.page_size
        seq.num_published = len(shared)
        self.waiting.remove(seq)
        seq.status = Status.RUNNING
        self.running.append(seq)
        if seq.scheduled is None:
            seq.scheduled = time.monotonic()
            seq.num_cached_tokens = seq.num_computed
            self.num_prefix_hit_tokens += seq.num_computed
        return True

    def _reusable_prefix(self, seq: Sequence) -> Seq[bytes]:
        if not self._may_share(seq) or seq.request.sampling.prompt_logprobs is not None:
            return ()
        self._extend_hashes(seq, len(seq.token_ids))
        # At least one token must be computed, since its logits are wanted.
        usable = seq.page_hashes[: (len(seq.token_ids) - 1) // self._pool.page_size]
        return usable[: self._pool.match_prefix(usable)]

    def _may_share(self, seq: Sequence) -> bool:
        limit = self._max_reusable_prompt
        return self._config.enable_prefix_caching and (limit is None or len(seq.token_ids) <= limit)

    def _extend_hashes(self, seq: Sequence, num_tokens: int) -> None:
        size = self._pool.page_size
        for index in range(len(seq.page_hashes), num_tokens // size):
            previous = seq.page_hashes[-1] if seq.page_hashes else first_hash(seq.digest)
            tokens = seq.token_ids[index * size : (index + 1) * size]
            seq.page_hashes.append(page_hash(previous, tokens))

    def _busy(self) -> set[Digest]:
        return {seq.digest for seq in self.running}
