"""`vbserve train`, from a file of lines to an adapter that a running server has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from training_base import write_small_base
from transformers import AutoTokenizer

from adapters import read_peft_adapter
from core.model_config import read_base_info
from serving.cli.main import main

Train = Callable[..., Result]
SMALL = ("--rank", "2", "--num-vectors", "16", "--vector-length", "32", "--batch-size", "2")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, default_base: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(default_base)
    return write_small_base(tmp_path_factory.mktemp("train") / "small", tokenizer)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "data.jsonl"
    lines = [{"prompt": f"{n} and", "completion": f" {n + 1}"} for n in range(20)]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


@pytest.fixture
def train(base: Path, data: Path) -> Train:
    def invoke(out: Path, *options: str | Path) -> Result:
        command = ["train", data, out, "--model", base, *SMALL, *options]
        return CliRunner().invoke(main, [str(part) for part in command])

    return invoke


def test_what_it_leaves_is_an_adapter_and_a_curve(train: Train, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = train(out, "--steps", "4", "--save-every", "2")
    assert result.exit_code == 0, result.output
    assert "of 2 held-out answers exactly right" in result.output
    adapter = read_peft_adapter(out, read_base_info(base))
    assert adapter.kind == "vblora" and adapter.max_rank == 2
    curve = json.loads((out / "training" / "curve.json").read_text())["curve"]
    assert [point["step"] for point in curve] == [2, 4]
    assert all(point["train"] > 0 and point["held_out"] > 0 for point in curve)
    assert (out / "training" / "loss.png").stat().st_size > 5000
    assert sorted(p.name for p in (out / "training").iterdir()) == ["curve.json", "loss.png"]


def test_an_interrupted_training_goes_on(
    train: Train, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapters.training.trainer import AdapterTrainer

    whole = train(tmp_path / "whole", "--steps", "4", "--save-every", "2")
    assert whole.exit_code == 0, whole.output
    step = AdapterTrainer.step

    def interrupted(self: AdapterTrainer) -> float:
        if self.num_done == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(AdapterTrainer, "step", interrupted)
    assert train(tmp_path / "part", "--steps", "4", "--save-every", "2").exit_code != 0
    monkeypatch.undo()
    refused = train(tmp_path / "part", "--steps", "4")
    assert refused.exit_code == 1 and "--resume goes on" in refused.output
    other = train(tmp_path / "part", "--steps", "5", "--resume")
    assert other.exit_code == 1 and "was made with num_steps 4, not 5" in other.output
    resumed = train(tmp_path / "part", "--steps", "4", "--save-every", "2", "--resume")
    assert resumed.exit_code == 0, resumed.output
    digests = [
        read_peft_adapter(tmp_path / name, read_base_info(base)).digest
        for name in ("whole", "part")
    ]
    assert digests[0] == digests[1]


def test_over_the_bank_of_another(train: Train, base: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "first", "--steps", "2").exit_code == 0
    second = train(tmp_path / "second", "--steps", "2", "--seed", "1", "--bank", tmp_path / "first")
    assert second.exit_code == 0, second.output
    adapters = [
        read_peft_adapter(tmp_path / name, read_base_info(base)) for name in ("first", "second")
    ]
    assert adapters[0].bank.digest == adapters[1].bank.digest
    assert adapters[0].digest != adapters[1].digest


def test_what_is_wrong_is_told_in_a_line(train: Train, data: Path, tmp_path: Path) -> None:
    for options, message in (
        (["--resume"], "has no training to go on with"),
        (["--topk", "17"], "topk is 17, must be at most num_vectors (16)"),
        (["--max-tokens", "2"], "line 1: "),
        (["--held-out", tmp_path / "none"], "does not exist"),
    ):
        result = train(tmp_path / "out", *options)
        assert result.exit_code != 0 and message in result.output, result.output
    data.write_text('{"prompt": "a", "completion": "b"}')
    assert "at least 10, or name others with --held-out" in train(tmp_path / "out").output


def test_the_result_registers_with_a_running_server(
    tiny_model: Path, tmp_path: Path, data: Path, start_server: Callable[[], str]
) -> None:
    url = start_server()
    command = ["train", data, tmp_path / "out", "--model", tiny_model, "--steps", "1"]
    options = ["--num-vectors", "16", "--register", "mine", "--url", url]
    result = CliRunner().invoke(main, [str(part) for part in (*command, *options)])
    assert result.exit_code == 0, result.output
    assert "mine is registered" in result.output
    listed = CliRunner().invoke(main, ["adapters", "list", "--url", url]).output
    assert "mine" in listed
