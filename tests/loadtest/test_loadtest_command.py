import json
import struct
from pathlib import Path

from click.testing import CliRunner
from completions_server import ADAPTERS, CompletionsServer

from loadtest.cli import loadtest


def run(server: CompletionsServer, out: Path, *options: str) -> tuple[int, str]:
    arguments = ["--url", server.url, "--out", str(out), "--output-tokens", "8", *options]
    result = CliRunner().invoke(loadtest, arguments)
    return result.exit_code, result.output


def read(out: Path) -> dict:
    return json.loads((out / "loadtest.json").read_text())


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


def test_closed_loop_report(completions_server: CompletionsServer, tmp_path: Path) -> None:
    code, output = run(
        completions_server, tmp_path, "--clients", "5", "--requests", "40", "--adapters", "4",
        "--base-share", "0.2", "--api-key", "top-secret", "--save-requests",
    )  # fmt: skip
    assert code == 0, output
    report = read(tmp_path)
    summary = report["summary"]
    assert (summary["requests"], summary["completed"], summary["errors"]) == (40, 40, {})
    assert summary["output_tokens"] == 320
    rate = summary["output_tokens"] / summary["window_seconds"]
    assert summary["output_tokens_per_second"] == rate
    assert sum(row["requests"] for row in summary["models"]) == 40
    assert {row["model"] for row in summary["models"]} <= {"base", *ADAPTERS[:4]}
    assert len(report["requests"]) == 40
    assert "top-secret" not in (tmp_path / "loadtest.json").read_text()
    assert "time to first token" in output and "tok/s" in output
    width, height = png_size(tmp_path / "loadtest.png")
    assert width > 1200 and height > 700
    assert (tmp_path / "loadtest.png").stat().st_size > 40_000


def test_prompts_reach_the_wanted_length(
    completions_server: CompletionsServer, tmp_path: Path
) -> None:
    run(completions_server, tmp_path, "--requests", "12", "--prompt-tokens", "50", "--quiet")
    prompt_tokens = read(tmp_path)["summary"]["prompt_tokens"]
    assert prompt_tokens["p50"] == 50  # the test's server has 5 characters a token, exactly
    assert read(tmp_path)["conditions"]["chars_per_token"] > 4.8


def test_open_loop_by_time(completions_server: CompletionsServer, tmp_path: Path) -> None:
    code, output = run(
        completions_server, tmp_path, "--rate", "40", "--duration", "1", "--adapter", ADAPTERS[1],
        "--no-stream", "--warmup", "0", "--quiet",
    )  # fmt: skip
    assert code == 0, output
    summary = read(tmp_path)["summary"]
    assert 15 <= summary["requests"] <= 75
    assert [row["model"] for row in summary["models"]] == [ADAPTERS[1]]
    assert summary["send_lag"]["p50"] < 0.05


def test_workload_file_with_failures(completions_server: CompletionsServer, tmp_path: Path) -> None:
    models = ["base", "cut", "base", "busy", "error-event", "base"]
    rows = [{"model": model, "prompt": [1, 2, 3], "max_tokens": 4} for model in models]
    path = tmp_path / "workload.json"
    path.write_text(json.dumps(rows))
    code, output = run(
        completions_server, tmp_path, "--workload", str(path), "--clients", "2", "--warmup", "0"
    )
    assert code == 0, output
    report = read(tmp_path)
    assert report["summary"]["errors"] == {"disconnect": 1, "http_429": 1, "stream_error": 1}
    assert "engine died" in report["failures"]["stream_error"]
    assert "1 x http_429" in output
    assert [body["prompt"] for body in completions_server.bodies] == [[1, 2, 3]] * 6


def test_bad_options_and_dead_servers_end_with_a_message(
    completions_server: CompletionsServer, tmp_path: Path
) -> None:
    cases = {
        ("--adapter", "nobody"): "does not list nobody",
        ("--adapters", "99"): "the server lists 6",
        ("--clients", "2", "--rate", "2"): "either clients",
        ("--prompt-tokens", "many"): "lengths 'many'",
        ("--rate", "-1"): "rate is -1",
    }
    for options, message in cases.items():
        code, output = run(completions_server, tmp_path, *options)
        assert code == 1, output
        assert message in output
    code, output = run(CompletionsServer(url="http://127.0.0.1:9"), tmp_path)
    assert code == 1
    assert "127.0.0.1:9" in output


def test_all_requests_failing_is_a_failure(
    completions_server: CompletionsServer, tmp_path: Path
) -> None:
    path = tmp_path / "workload.json"
    path.write_text(json.dumps([{"model": "cut", "prompt": "x", "max_tokens": 4}]))
    code, output = run(completions_server, tmp_path, "--workload", str(path), "--clients", "1")
    assert code == 1
    assert "no request succeeded" in output
    assert (tmp_path / "loadtest.png").exists()
