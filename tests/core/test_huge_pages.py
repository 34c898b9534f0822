"""Memory in huge pages: aligned, apart from each other, and given back."""

import gc
import mmap
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core import huge_pages
from core.huge_pages import HUGE_PAGE, Arena

MAPS = Path("/proc/self/smaps")


def is_advised(address: int) -> bool:
    """Whether the mapping around `address` has the flag of MADV_HUGEPAGE."""
    inside = False
    for line in MAPS.read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return "hg" in line.split()
    raise AssertionError(f"no mapping has {address:#x}")


@pytest.mark.parametrize("num_bytes", [0, 1, HUGE_PAGE - 1, HUGE_PAGE, 3 * HUGE_PAGE + 5])
def test_zeros_of_any_size(num_bytes: int) -> None:
    room = huge_pages.empty(num_bytes)
    assert room.dtype == torch.uint8 and len(room) == num_bytes and not room.any()
    room.fill_(7)
    assert room.eq(7).all()


@pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE") or not MAPS.is_file(), reason="no huge pages to ask for"
)
def test_large_ones_are_asked_for_in_huge_pages() -> None:
    room = huge_pages.empty(4 * HUGE_PAGE)
    assert room.data_ptr() % HUGE_PAGE == 0
    assert is_advised(room.data_ptr()) and is_advised(room.data_ptr() + 4 * HUGE_PAGE - 1)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 999)), min_size=1, max_size=30))
def test_pieces_are_apart(shapes: list[tuple[int, int]]) -> None:
    arena = Arena(block_bytes=1 << 16)
    pieces = [arena.empty(shape) for shape in shapes]
    for number, piece in enumerate(pieces):
        assert piece.is_contiguous() and piece.dtype == torch.float32
        assert piece.data_ptr() % 64 == 0
        piece.fill_(number)
    for number, (piece, shape) in enumerate(zip(pieces, shapes, strict=True)):
        assert tuple(piece.shape) == shape and piece.eq(number).all()


def test_a_copy_has_the_same_values() -> None:
    for tensor in (torch.arange(7, dtype=torch.uint8), torch.randn(3, 5).to(torch.bfloat16)):
        copied = Arena().copy(tensor)
        assert copied.dtype == tensor.dtype and copied.equal(tensor)


def test_a_block_goes_with_its_last_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms: list[weakref.ref[mmap.mmap]] = []
    map_memory = mmap.mmap

    def spy(*args: int, **options: int) -> mmap.mmap:
        room = map_memory(*args, **options)
        rooms.append(weakref.ref(room))
        return room

    monkeypatch.setattr(huge_pages.mmap, "mmap", spy)
    arena = Arena(block_bytes=2 * HUGE_PAGE)
    first, second = arena.empty((1000,)), arena.empty((1000,))
    del arena, first
    gc.collect()
    assert len(rooms) == 1 and rooms[0]() is not None
    second.fill_(1.0)
    del second
    gc.collect()
    assert rooms[0]() is None


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_zeros_are_written_to_the_last_byte(num_threads: int) -> None:
    room = torch.full((HUGE_PAGE + 1,), 7, dtype=torch.uint8)
    huge_pages.write_zeros(room, num_threads)
    assert not room.any()
