"""AdapterStore under random operations, against a dictionary."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from adapters import AdapterExistsError, AdapterStore, CompactAdapter, UnknownAdapterError
from core.model_config import BaseInfo


class StoreMachine(RuleBasedStateMachine):
    """`names` is what must be registered, `kept` what must load though its name is gone."""

    base: BaseInfo
    adapters: list[CompactAdapter]

    names_drawn = st.sampled_from(["a", "b", "team/c"])
    contents = st.integers(0, 3)

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.store = AdapterStore.open(self.root, self.base)
        self.reader = AdapterStore.open(self.root, self.base)  # another process, as it were
        self.names: dict[str, CompactAdapter] = {}
        self.kept: dict[str, CompactAdapter] = {}

    @rule(name=names_drawn, content=contents, replace=st.booleans())
    def add(self, name: str, content: int, replace: bool) -> None:
        adapter, old = self.adapters[content], self.names.get(name)
        if old is not None and old.digest != adapter.digest and not replace:
            with pytest.raises(AdapterExistsError):
                self.store.add_compact(name, adapter)
            return
        record, created = self.store.add_compact(name, adapter, replace=replace)
        assert created == (old is None or old.digest != adapter.digest)
        assert record.digest == adapter.digest
        if old is not None:
            self.kept[old.digest] = old
        self.names[name] = adapter

    @rule(name=names_drawn)
    def remove(self, name: str) -> None:
        if name not in self.names:
            with pytest.raises(UnknownAdapterError):
                self.store.remove(name)
            return
        adapter = self.names.pop(name)
        assert self.store.remove(name).digest == adapter.digest
        self.kept[adapter.digest] = adapter

    @rule()
    def reopen(self) -> None:
        self.store = AdapterStore.open(self.root, self.base)

    @rule()
    def collect_within_grace(self) -> None:
        assert self.store.collect_garbage(3600).num_files == 0

    @rule()
    def collect_all(self) -> None:
        self.store.collect_garbage(0)
        self.kept.clear()
        blobs = {path.name.split(".")[0] for path in (self.root / "blobs").iterdir()}
        used = {a.digest for a in self.names.values()}
        used |= {a.bank.digest for a in self.names.values() if a.bank is not None}
        assert blobs == used

    @invariant()
    def names_are_those_of_the_model(self) -> None:
        for store in (self.store, self.reader):
            found = {record.id: record.digest for record in store.records()}
            assert found == {name: adapter.digest for name, adapter in self.names.items()}
            for name, digest in found.items():
                assert store.resolve(name).digest == digest

    @invariant()
    def contents_load(self) -> None:
        for adapter in (*self.names.values(), *self.kept.values()):
            assert self.reader.load(adapter.digest).digest == adapter.digest

    @invariant()
    def books_are_right(self) -> None:
        self.store.check_integrity()
        assert self.store.usage() == self.store._manifests.count()
        assert not list((self.root / "staging").iterdir())

    def teardown(self) -> None:
        shutil.rmtree(self.root)


def test_random_operations(base: BaseInfo, vblora_dirs: list[Path], lora_dir: Path) -> None:
    from adapters import read_peft_adapter

    StoreMachine.base = base
    StoreMachine.adapters = [read_peft_adapter(path, base) for path in (*vblora_dirs, lora_dir)]
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        StoreMachine, settings=settings(max_examples=15, stateful_step_count=25, deadline=None)
    )
