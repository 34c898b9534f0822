"""Base and adapters are looked at in a child that is gone afterwards; launchers have no torch."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import save_unserved

LAUNCHER = """
import json, os, sys
import serving.cluster.launch, serving.cluster.application
from serving.cluster.launch_checks import LaunchError
from serving.cluster.preparation import preparation
from serving.settings import load_settings

def children():
    path = f"/proc/self/task/{os.getpid()}/children"
    return [int(pid) for pid in open(path).read().split()]

result = {}
with preparation(load_settings(json.loads(sys.argv[1]), None)) as prepared:
    [child] = children()
    if sys.argv[2]:
        os.kill(child, int(sys.argv[2]))
    try:
        if sys.argv[3] == "ask":
            base = prepared.base(print)
            result["base"] = [base.name, str(base.path)]
            result["adapters"] = prepared.adapters()._asdict()
    except LaunchError as error:
        result["error"] = str(error)
result["children"] = children()
result["heavy"] = [name for name in ("torch", "transformers", "peft") if name in sys.modules]
print(json.dumps(result))
"""


def launch(
    settings: dict[str, object], *, kill: signal.Signals | None = None, ask: bool = True
) -> dict[str, object]:
    """What a launcher, a process of its own, learns; `kill` is sent to its child at once."""
    options = json.dumps({name: str(value) for name, value in settings.items()})
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, options, str(int(kill or 0) or ""), "ask" * ask],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    assert result.pop("children") == []
    assert result.pop("heavy") == []
    assert "Traceback" not in done.stderr
    return result


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path) -> dict[str, object]:
    return {"model": tiny_model, "adapters": tmp_path / "store"}


def test_base_and_adapters_are_found(
    settings: dict[str, object], tiny_model: Path, peft_adapters: Path, tmp_path: Path
) -> None:
    settings |= {"preload": peft_adapters, "model_name": "mine"}
    for num_new in (2, 0):
        assert launch(settings) == {
            "base": ["mine", str(tiny_model)],
            "adapters": {
                "ids": ["one", "two"],
                "notes": [f"{num_new} new from {peft_adapters}", f"2 in {tmp_path / 'store'}"],
            },
        }


def test_what_cannot_be_served_is_told(
    settings: dict[str, object], tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    result = launch(settings | {"model": tmp_path / "empty"})
    assert result == {
        "error": f"{tmp_path / 'empty'} has no config.json: not a Hugging Face model directory"
    }
    result = launch(settings | {"preload": tmp_path / "absent"})
    assert result["error"] == f"preload: {tmp_path / 'absent'} is not a directory"
    save_unserved(tiny_model, tmp_path / "adapters" / "biased")
    result = launch(settings | {"preload": tmp_path / "adapters"})
    assert "bias" in str(result["error"])
    assert "base" in result  # it was found before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_that_ends_early_is_an_error(
    settings: dict[str, object], number: signal.Signals
) -> None:
    assert launch(settings, kill=number) == {"error": "reading base and adapters failed"}


def test_an_interrupt_of_all_is_the_launchers_alone(settings: dict[str, object]) -> None:
    assert launch(settings, kill=signal.SIGINT)["base"]


def test_a_launcher_that_gives_up_leaves_no_child(settings: dict[str, object]) -> None:
    assert launch(settings, ask=False) == {}


CHILD = """
import json, multiprocessing, signal, sys
from serving.cluster.preparation import _run
from serving.settings import load_settings

class Outbox:
    def send(self, message):
        ignores = signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        print(type(message).__name__, ignores)

_run(load_settings(json.loads(sys.argv[1]), None), multiprocessing.Pipe()[0], Outbox())
"""


def test_a_child_that_has_said_all_ends_by_itself(
    settings: dict[str, object], tmp_path: Path
) -> None:
    """The launcher asks it to, and what it ends with would be disturbed and told."""

    def said(options: dict[str, object]) -> list[str]:
        text = json.dumps({name: str(value) for name, value in options.items()})
        command = [sys.executable, "-c", CHILD, text]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        return done.stdout.splitlines()

    assert said(settings) == ["FoundBase False", "FoundAdapters True"]
    assert said(settings | {"model": tmp_path}) == ["LaunchError True"]
