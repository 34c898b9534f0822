"""The command line: help that answers at once, inspect, adapters offline and over HTTP."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_model import _save, save_unserved

from adapters.store import AdapterStore
from core.factors import PROJECTIONS
from core.model_config import BaseInfo, read_base_info
from serving.cli.main import COMMANDS, main
from serving.cli.serve import GROUPS
from serving.settings import Settings

Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `vbserve` with arguments in this process, in a wide terminal."""
    monkeypatch.setenv("COLUMNS", "160")

    def invoke(*arguments: str | Path) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return invoke


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from serving.cli.main import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'ray', 'transformers', 'pydantic', 'fastapi'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    for name, command in COMMANDS.items():
        assert f"{name} " in done.stdout
        assert command.summary in done.stdout


def test_a_client_of_a_server_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from serving.cli.main import main\n"
        "CliRunner().invoke(main, ['adapters', 'list', '--url', 'http://127.0.0.1:9'])\n"
        "heavy = {'torch', 'ray', 'transformers', 'fastapi'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(run: Run, name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    assert "Usage: main" in result.output


def test_version(run: Run) -> None:
    assert run("--version").output == f"vbserve {version('vbserve')}\n"


def test_an_unknown_command_is_refused(run: Run) -> None:
    result = run("server")
    assert result.exit_code == 2
    assert "No such command 'server'" in result.output


def test_serve_has_one_option_per_setting(run: Run) -> None:
    names = [name for group in GROUPS.values() for name in group]
    assert sorted(names) == sorted(Settings.model_fields)
    text = run("serve", "--help").output
    for name in names:
        assert f"--{name.replace('_', '-')}" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "http"], "port: "),
        (["--host", "0.0.0.0"], "allow_public"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml does not exist"),
    ],
)
def test_serve_refuses_bad_settings_before_anything_starts(
    run: Run, options: list[str], message: str
) -> None:
    result = run("serve", *options)
    assert result.exit_code == 2
    assert message in result.output


def test_serve_refuses_a_port_in_use_before_anything_heavy(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", "--port", str(port))
    assert result.exit_code == 1
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in result.output


def test_inspect_compares_with_lora(run: Run, tiny_model: Path, peft_adapters: Path) -> None:
    result = run("inspect", peft_adapters / "one", "--model", tiny_model)
    assert result.exit_code == 0, result.output
    rows = _rows(result.output)
    assert rows["kind"] == "vblora"
    assert rows["rank"] == "4"
    assert rows["k"] == "2"
    assert rows["bank"].startswith("32 vectors of 16")
    assert rows["modules"] == "4 in 2 layers: q_proj, v_proj"
    # q: 64 -> 64, v: 64 -> 32, two layers, two bytes: 2 * 2 * rank * (128 + 96)
    assert rows["LoRA of rank 4, bfloat16"].startswith("3.5KiB")
    assert rows["LoRA of rank 64, bfloat16"].startswith("56.0KiB")
    # in float32, at the adapter's own rank
    assert rows["factors in float32"] == "7.0KiB"


def test_inspect_counts_as_the_paper_does_and_beside_any_lora(
    run: Run, tiny_model: Path, peft_adapters: Path
) -> None:
    folder = peft_adapters / "one"
    result = run("inspect", folder, "--model", tiny_model, "--lora-rank", "8", "--lora-rank", "2")
    rows = _rows(result.output)
    # 32 vectors of 16; q and v of two layers at rank 4: 2 * 4 * (128 + 96) / 16 sub-vectors
    assert rows["sub-vectors"] == "112"
    assert rows["stored parameters"] == f"{32 * 16 + 112 * (2 * 0.25 + 1):.0f}"
    assert rows["... with whole indices"] == f"{32 * 16 + 112 * 3}"
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert rows["files"] == f"{size / 1024:.1f}KiB"
    assert rows["LoRA of rank 8, bfloat16"].startswith("7.0KiB")
    assert rows["LoRA of rank 2, bfloat16"].startswith("1.8KiB")
    assert "LoRA of rank 64, bfloat16" not in rows
    assert rows["entropy of the weights"].endswith("of 1.00 bits")


def test_inspect_draws_the_bank(
    run: Run, tiny_model: Path, peft_adapters: Path, tmp_path: Path
) -> None:
    from matplotlib.image import imread

    options = ["--model", tiny_model, "--picture", tmp_path / "bank.png"]
    result = run("inspect", peft_adapters / "one", *options)
    assert result.exit_code == 0, result.output
    picture = imread(tmp_path / "bank.png")
    assert picture.shape[1] > 1000 and len({tuple(pixel) for pixel in picture[200]}) > 10
    nowhere = ["--picture", tmp_path / "no folder" / "bank.png"]
    failed = run("inspect", peft_adapters / "one", "--model", tiny_model, *nowhere)
    assert failed.exit_code == 1 and "Error: " in failed.output and "no folder" in failed.output


def test_inspect_draws_no_bank_of_lora(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM")
    _save(tiny_model, tmp_path / "lora", config, 0)
    options = ["--model", tiny_model, "--picture", tmp_path / "bank.png"]
    result = run("inspect", tmp_path / "lora", *options)
    assert result.exit_code == 1
    assert "a lora adapter has no bank to draw" in result.output


def test_inspect_of_lora_has_no_bank(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM")
    _save(tiny_model, tmp_path / "lora", config, 0)
    rows = _rows(run("inspect", tmp_path / "lora", "--model", tiny_model).output)
    assert rows["kind"] == "lora"
    assert "bank" not in rows


def test_inspect_tells_why_an_adapter_is_refused(
    run: Run, tiny_model: Path, tmp_path: Path
) -> None:
    save_unserved(tiny_model, tmp_path / "biased")
    result = run("inspect", tmp_path / "biased", "--model", tiny_model)
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert "lora_bias" in result.output


def test_adapters_offline(
    run: Run, tiny_base: BaseInfo, tiny_model: Path, peft_adapters: Path, tmp_path: Path
) -> None:
    where = ["--store", tmp_path / "store", "--model", tiny_model]
    assert run("adapters", "list", *where).output == "no adapters\n"
    added = run("adapters", "add", "team/a", peft_adapters / "one", *where)
    assert added.exit_code == 0, added.output
    assert added.output.startswith("team/a is registered\n")
    assert "unchanged" in run("adapters", "add", "team/a", peft_adapters / "one", *where).output

    store = AdapterStore.open(tmp_path / "store", tiny_base)
    digest = store.resolve("team/a").digest
    assert digest in run("adapters", "show", "team/a", *where).output
    assert digest[:32] in run("adapters", "list", *where).output

    refused = run("adapters", "add", "team/a", peft_adapters / "two", *where)
    assert refused.exit_code == 1
    assert "other content" in refused.output
    assert (
        run("adapters", "add", "team/a", peft_adapters / "two", "--replace", *where).exit_code == 0
    )
    assert store.resolve("team/a").digest != digest

    assert run("adapters", "remove", "team/a", *where).output == "team/a is removed\n"
    assert run("adapters", "show", "team/a", *where).exit_code == 1
    assert store.records() == []


def test_adapters_over_http(run: Run, start_server: Callable[[], str], peft_adapters: Path) -> None:
    where = ["--url", start_server()]
    added = run("adapters", "add", "b", peft_adapters / "two", *where)
    assert added.exit_code == 0, added.output
    assert added.output.startswith("b is registered\n")
    assert "unchanged" in run("adapters", "add", "b", peft_adapters / "two", *where).output
    refused = run("adapters", "add", "b", peft_adapters / "one", *where)
    assert refused.exit_code == 1
    assert "(HTTP 409)" in refused.output
    assert run("adapters", "add", "b", peft_adapters / "one", "--replace", *where).exit_code == 0
    listed = run("adapters", "list", *where).output
    assert "team/one" in listed
    assert " b " in listed
    assert "vblora" in run("adapters", "show", "team/one", *where).output
    assert run("adapters", "remove", "b", *where).exit_code == 0
    gone = run("adapters", "show", "b", *where)
    assert gone.exit_code == 1
    assert "(HTTP 404)" in gone.output


def test_no_server_is_told_in_one_line(run: Run) -> None:
    result = run("adapters", "list", "--url", "http://127.0.0.1:9")
    assert result.exit_code == 1
    assert result.output.startswith("Error: no answer from http://127.0.0.1:9")


def test_a_broken_model_is_told_in_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    result = run("inspect", tmp_path, "--model", tmp_path)
    assert result.exit_code == 1
    assert "'gpt2'" in result.output


def _rows(table: str) -> dict[str, str]:
    """First and second column of a rich table."""
    cells = [line.strip("│ ").split("│") for line in table.splitlines() if "│" in line]
    return {name.strip(): value.strip() for name, value in cells}


def test_convert_vertical_reports_and_refuses(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    options = ["--chunks", "1", "--rank", "2", "--text", tmp_path / "text"]
    result = run("convert", "vertical", tiny_model, tmp_path / "v", *options)
    assert result.exit_code == 1, result.output
    assert "nothing was written: a vertical base is trained, not converted" in result.output
    assert not (tmp_path / "v").exists()
    rows = [line.strip("│ ").split("│") for line in result.output.splitlines() if "│" in line]
    assert [cells[0].strip() for cells in rows] == list(PROJECTIONS)
    assert all(float(cell.split()[0]) > 0.5 for cells in rows for cell in cells[1:3])
    assert "perplexity over 16 times 256 tokens: " in result.output

    result = run("convert", "vertical", tiny_model, tmp_path / "v", *options, "--accept-loss")
    assert result.exit_code == 0, result.output
    assert read_base_info(tmp_path / "v").config.vertical is not None
    again = run("convert", "vertical", tiny_model, tmp_path / "v", *options)
    assert again.exit_code == 1 and "exists already" in again.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--chunks", "9"], "9 chunks, must be 1 to 2, the layers"),
        (["--rank", "0"], "0 is not in the range"),
    ],
)
def test_convert_vertical_names_what_is_wrong(
    run: Run, tiny_model: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    result = run("convert", "vertical", tiny_model, tmp_path / "v", *options)
    assert result.exit_code != 0 and message in result.output


def test_convert_lora_fits_and_reports(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    _save(tiny_model, tmp_path / "lora", config, 0)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    rng = torch.Generator().manual_seed(0)  # PEFT begins with a B of zeros
    save_file({n: torch.randn(t.shape, generator=rng) for n, t in load_file(file).items()}, file)
    options = ["--model", tiny_model, "--num-vectors", "16", "--vector-length", "16"]
    result = run("convert", "lora", tmp_path / "lora", tmp_path / "vb", *options)
    assert result.exit_code == 0, result.output
    rows = _rows(result.output)
    assert {"q_proj", "down_proj"} <= set(rows)
    assert 0 < float(rows["q_proj"].split()[0]) < 1.5
    assert "rank 2, 16 vectors of 16, k 2" in result.output
    again = _rows(run("inspect", tmp_path / "vb", "--model", tiny_model).output)
    assert again["kind"] == "vblora" and again["rank"] == "2"
    refused = run("convert", "lora", tmp_path / "vb", tmp_path / "other", *options)
    assert refused.exit_code == 1 and "is a vblora adapter, not LoRA" in refused.output
    there = run("convert", "lora", tmp_path / "lora", tmp_path / "vb", *options)
    assert there.exit_code == 1 and "exists already" in there.output


def test_convert_lora_distils(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    _save(tiny_model, tmp_path / "lora", config, 0)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    rng = torch.Generator().manual_seed(0)
    save_file({n: torch.randn(t.shape, generator=rng) for n, t in load_file(file).items()}, file)
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(f'{{"prompt": "fox {n}", "completion": " dog"}}' for n in range(12)))
    options = ["--model", tiny_model, "--num-vectors", "16", "--vector-length", "16"]
    options += ["--distil", data, "--distil-steps", "20"]
    result = run("convert", "lora", tmp_path / "lora", tmp_path / "vb", *options)
    assert result.exit_code == 0, result.output
    told = re.search(r"divergence from 1 held-out .*: (\S+) -> (\S+) nats", result.output)
    assert told is not None and 0 < float(told[2]) < float(told[1])
    assert _rows(run("inspect", tmp_path / "vb", "--model", tiny_model).output)["rank"] == "2"


def test_convert_pissa(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    config = LoraConfig(
        r=2, target_modules=["v_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM"
    )
    _save(tiny_model, tmp_path / "pissa", config, 0)
    refused = run("inspect", tmp_path / "pissa", "--model", tiny_model)
    assert refused.exit_code == 1 and "vbserve convert pissa" in refused.output
    made = ["convert", "pissa", tmp_path / "pissa", tmp_path / "made", "--model", tiny_model]
    result = run(*made)
    assert result.exit_code == 0, result.output
    assert _rows(run("inspect", tmp_path / "made", "--model", tiny_model).output)["rank"] == "4"
    assert "exists already" in run(*made).output
