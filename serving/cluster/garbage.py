"""Python's garbage collector while much is loaded, and after. Knows nothing of what that is."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """For imports of large libraries: look for no garbage while objects are only added.

    The collector would go through all of them again and again, a third of what torch and
    transformers take to import.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def set_loaded_objects_aside() -> None:
    """Never look again at what is loaded by now; for the end of a replica's start.

    A full collection looks at every object while nothing else runs, mostly at those of imported
    libraries, which stay: about 200 ms in the engine's process, a gap in every stream.
    """
    gc.collect()
    gc.freeze()
