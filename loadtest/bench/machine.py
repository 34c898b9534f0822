"""The machine underneath: what it is, who else uses it while we measure, memory of a process tree.

Reads Linux's /proc; elsewhere loads and memory are unknown (None).
"""

from __future__ import annotations

import os
import platform
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_NUM_NAMES = 3
_LEAST_CORES_NAMED = 0.03


@dataclass
class CpuLoad:
    """Mean cores in use over a span: by all, by others than this bench, and stolen by the host.

    `others` names the busiest other programs with their cores.
    """

    busy_cores: float | None = None
    foreign_cores: float | None = None
    stolen_cores: float | None = None
    others: dict[str, float] | None = None


@dataclass(frozen=True)
class _Process:
    parent: int
    name: str
    ticks: int


@dataclass(frozen=True)
class _Snapshot:
    seconds: float
    busy_ticks: int
    stolen_ticks: int
    processes: dict[int, _Process]


@contextmanager
def measured_load() -> Iterator[CpuLoad]:
    """Measure the span of the `with` block; the yielded load is filled when it ends."""
    load = CpuLoad()
    before = _snapshot()
    yield load
    after = _snapshot()
    if before is None or after is None:
        return
    per_core = (after.seconds - before.seconds) * os.sysconf("SC_CLK_TCK")
    busy = after.busy_ticks - before.busy_ticks
    own = _own_ticks(after) - _own_ticks(before)
    load.busy_cores = round(busy / per_core, 3)
    load.foreign_cores = round(max(0, busy - own) / per_core, 3)
    load.stolen_cores = round((after.stolen_ticks - before.stolen_ticks) / per_core, 3)
    load.others = _busiest_others(before, after, per_core)


def _snapshot() -> _Snapshot | None:
    try:
        fields = [int(field) for field in (_PROC / "stat").read_text().split("\n")[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    user, nice, system, _, _, irq, softirq, stolen = fields
    busy = user + nice + system + irq + softirq
    return _Snapshot(time.monotonic(), busy, stolen, dict(_processes()))


def _processes() -> Iterator[tuple[int, _Process]]:
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "stat").read_text()
            except OSError:  # it has just ended
                continue
            name = text[text.index("(") + 1 : text.rindex(")")]
            fields = text[text.rindex(")") + 2 :].split()
            ticks = sum(int(field) for field in fields[11:15])  # with those of ended children
            yield int(entry.name), _Process(int(fields[1]), name, ticks)


def _tree(processes: dict[int, _Process], root: int) -> set[int]:
    children = defaultdict[int, list[int]](list)
    for pid, process in processes.items():
        children[process.parent].append(pid)
    members, queue = set[int](), [root]
    while queue:
        pid = queue.pop()
        if pid not in members:
            members.add(pid)
            queue += children[pid]
    return members


def _own_ticks(snapshot: _Snapshot) -> int:
    own = _tree(snapshot.processes, os.getpid())
    return sum(snapshot.processes[pid].ticks for pid in own if pid in snapshot.processes)


def _busiest_others(before: _Snapshot, after: _Snapshot, per_core: float) -> dict[str, float]:
    own, cores = _tree(after.processes, os.getpid()), defaultdict[str, float](float)
    for pid, process in after.processes.items():
        if pid not in own:
            earlier = before.processes.get(pid)
            cores[process.name] += (process.ticks - (earlier.ticks if earlier else 0)) / per_core
    ranked = sorted(cores.items(), key=lambda item: -item[1])[:_NUM_NAMES]
    return {name: round(used, 2) for name, used in ranked if used >= _LEAST_CORES_NAMED}


def pss_bytes(pid: int) -> int | None:
    """Proportional set size of a process and all its descendants; None where unknown."""
    if not (_PROC / "self" / "smaps_rollup").exists():
        return None
    return sum(_own_pss_bytes(member) for member in _tree(dict(_processes()), pid))


def _own_pss_bytes(pid: int) -> int:
    try:
        lines = (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended, or is not ours to look into
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def describe_machine() -> dict[str, object]:
    """What a reader needs to know of the machine."""
    info = _cpu_info()
    flags = set(info.get("flags", "").split())
    return {
        "cpu": info.get("model name") or platform.processor() or "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "vector_extensions": [
            f for f in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if f in flags
        ],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": _system(),
        "python": platform.python_version(),
    }


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def _cpu_info() -> dict[str, str]:
    try:
        text = (_PROC / "cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
