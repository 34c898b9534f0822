"""The benches' short modes as a user starts them: real servers, a tiny base, PEFT as the judge."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loadtest.bench.inputs import prepare, tiny_base
from loadtest.bench.plan import SHORT

LANES = (("scale",), ("adapters", "cost"))  # side by side: nothing here depends on time


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which all of them have written, with one cache."""
    folder = tmp_path_factory.mktemp("bench-out")
    prepare(tiny_base(folder / "cache"), SHORT, folder / "cache")
    with ThreadPoolExecutor(len(LANES)) as pool:
        for _ in pool.map(lambda names: [run(name, folder) for name in names], LANES):
            pass
    return folder


def run(name: str, folder: Path) -> None:
    command = [sys.executable, "-m", f"loadtest.bench.{name}_command", "--short", "--out", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == (folder / f"{name.upper()}.md").read_text() + "\n"


def content(out: Path, name: str) -> dict:
    found = json.loads((out / f"{name}.json").read_text())
    exactness = found["exactness"]
    assert exactness["num_judged"] >= 15
    assert exactness["num_equal"] == exactness["num_judged"] - exactness["num_ties"]
    return found


def test_scale(out: Path) -> None:
    found = content(out, "scale")
    assert len(found["zipf_all"]) == 1
    assert found["exactness"]["num_adapters"] >= 3


def test_by_number_of_adapters(out: Path) -> None:
    found = content(out, "adapters")
    assert [figures["num_adapters"] for figures in found["counts"]] == [0, 1, 4]
    assert all(len(figures["ttft"]) == SHORT.num_closed for figures in found["counts"])
    assert (out / "adapters.png").stat().st_size > 20_000


def test_cost(out: Path) -> None:
    found = content(out, "cost")
    states = {(p["num_sequences"], p["context"], p["rank"]) for p in found["points"]}
    assert states == {(1, 32, None), (1, 32, 4), (4, 32, None), (4, 32, 4), (2, 32, None),
                      (2, 32, 4), (2, 64, None), (2, 64, 4), (2, 32, 2)}  # fmt: skip
    assert all(seconds > 0 for point in found["points"] for seconds in point["seconds"])
    assert (out / "cost.png").stat().st_size > 20_000
