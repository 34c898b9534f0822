"""The kernels as they are compiled for several processors."""

import ctypes
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from core.kernels import build

FORMS = {  # compiler flags, and what the processor must have
    "native": (("-march=native",), ()),
    "avx_vnni": (("-march=x86-64-v3", "-mavxvnni"), ("avx2", "avx_vnni")),
    "avx512": (("-march=skylake-avx512",), ("avx512f", "avx512bw", "avx512vl", "avx512dq")),
    "avx2": (("-march=x86-64-v3",), ("avx2",)),
    "plain": ((), ()),
}


def processor_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    return set(info.read_text().split()) if info.is_file() else set()


_loaded: dict[str, ctypes.CDLL] = {}


def load_form(form: str, folder: Path) -> ctypes.CDLL:
    """All kernels in one form, compiled once; skips the test where that cannot run here."""
    flags, needed = FORMS[form]
    compiler = shutil.which("cc")
    if compiler is None or not processor_flags().issuperset(needed):
        pytest.skip(f"no compiler, or no {needed}")
    if form not in _loaded:
        _loaded[form] = _compile(compiler, flags, folder)
    return _loaded[form]


def _compile(compiler: str, flags: tuple[str, ...], folder: Path) -> ctypes.CDLL:
    arguments = [flag for flag in build._FLAGS if not flag.startswith("-march")]
    sources = sorted(Path(build.__file__).parent.glob("*.c"))
    objects = [str(folder / f"{source.stem}.o") for source in sources]
    # Linked apart: with -ffast-math there a library turns subnormals off for its whole process.
    commands = [
        [compiler, *arguments, *flags, "-c", str(source), "-o", compiled]
        for source, compiled in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))
    linked = str(folder / "kernels.so")
    subprocess.run([compiler, "-shared", *objects, "-o", linked, "-lm"], check=True)
    return ctypes.CDLL(linked)
