"""Compiles the C files of this folder once per machine and loads them; no compiler, no kernels.

The library is linked without an OpenMP runtime of its own: its symbols resolve to the one that
torch has loaded, so that both share one pool of threads. That runtime is GNU's, so the compiler is
GCC: what clang compiles asks for one of its own. Knows nothing of what the kernels do.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess  # the C compiler, with fixed arguments
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from platformdirs import user_cache_dir

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_FLAGS = (
    *("-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-fopenmp", "-fPIC"),
    "-Wno-unknown-pragmas",
)
_COMPILE_SECONDS = 120


def load_library(cache_dir: Path | None = None) -> ctypes.CDLL | None:
    """The kernels, compiled on first use into `cache_dir`; None where that is not possible.

    `cache_dir` defaults to VBSERVE_CACHE_DIR or the user's cache. The reason for None is logged.
    """
    root = cache_dir or Path(os.environ.get("VBSERVE_CACHE_DIR") or user_cache_dir("vbserve"))
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        logger.info("no C compiler is installed: the CPU kernels are torch's own")
        return None
    try:
        path = root / "kernels" / f"cpu-{_key(compiler)}.so"
        if not path.is_file():
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        logger.warning("the CPU kernels can't be built, torch's own are used: %s", output)
        return None


def _key(compiler: str) -> str:
    """Changes with the source, the flags, the compiler, torch and the processor."""
    version = subprocess.run(  # noqa: S603  a compiler found on PATH
        [compiler, "--version"],
        capture_output=True,
        text=True,
        check=True,
        timeout=_COMPILE_SECONDS,
    ).stdout
    files = sorted(path for path in _FOLDER.iterdir() if path.suffix in {".c", ".h"})
    sources = (part for path in files for part in (path.name, path.read_text()))
    parts = (*sources, *_FLAGS, version, torch.__version__, _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {flags}"


def _compile(compiler: str, path: Path) -> None:
    """Compile and link next to `path`, then rename, so that two processes may do it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        sources = sorted(_FOLDER.glob("*.c"))
        objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        linked = Path(folder) / "cpu.so"
        commands = [
            [compiler, *_FLAGS, "-c", str(source), "-o", compiled]
            for source, compiled in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        _run([compiler, "-shared", *objects, "-o", str(linked), "-lm"])
        linked.replace(path)


def _run(command: list[str]) -> None:
    subprocess.run(  # noqa: S603  a compiler found on PATH
        command, capture_output=True, text=True, check=True, timeout=_COMPILE_SECONDS
    )
