"""Nothing is collected while much is loaded; then it is set aside, and later garbage collected."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest

from serving.cluster.garbage import collection_paused, set_loaded_objects_aside


class Link:
    """One half of a cycle."""

    other: "Link"


def cycle() -> Link:
    first, second = Link(), Link()
    first.other, second.other = second, first
    return first


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_loaded_objects_are_set_aside_without_their_garbage() -> None:
    garbage = weakref.ref(cycle())
    kept = cycle()
    set_loaded_objects_aside()
    assert garbage() is None
    assert gc.get_freeze_count() > 0
    assert not any(each is kept for each in gc.get_objects())


def test_later_garbage_is_collected() -> None:
    set_loaded_objects_aside()
    later = weakref.ref(cycle())
    gc.collect()
    assert later() is None


def test_no_collection_runs_while_it_is_paused() -> None:
    with collection_paused():
        garbage = weakref.ref(cycle())
        many = [[] for _ in range(100_000)]  # far more than a collection waits for
        assert garbage() is not None
    assert gc.isenabled()
    gc.collect()
    assert garbage() is None and len(many) == 100_000


@pytest.mark.parametrize("was_enabled", [True, False])
def test_a_pause_ends_as_it_began_even_by_an_error(was_enabled: bool) -> None:
    (gc.enable if was_enabled else gc.disable)()
    try:
        with pytest.raises(ImportError), collection_paused(), collection_paused():
            raise ImportError
        assert gc.isenabled() is was_enabled
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "module", ["serving.cluster.engine_deployment", "serving.cluster.ingress_deployment"]
)
def test_a_replicas_libraries_are_imported_without_a_collection(module: str) -> None:
    """A fresh process, as Ray starts one: none of the oldest generation runs during the import."""
    code = (
        "import gc; before = gc.get_stats()[2]['collections']\n"
        f"import {module}\n"
        "print(gc.get_stats()[2]['collections'] - before, gc.isenabled())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split()[-2:] == ["0", "True"]
