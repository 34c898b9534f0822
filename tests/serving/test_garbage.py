"""What replicas set aside is not looked at again, and what comes later still is collected."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from serving.cluster.garbage import set_loaded_objects_aside


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
