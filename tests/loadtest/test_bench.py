import json
import os
import struct
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from completions_server import CompletionsServer

from loadtest.bench.charts import write_chart
from loadtest.bench.contestants import (
    OURS_HTTP,
    PEFT_MIXED,
    PEFT_SINGLE,
    HttpContestant,
    ScriptContestant,
    WaveResult,
)
from loadtest.bench.exactness import Judge, Output, verdict_of
from loadtest.bench.lifecycle import Lifecycle
from loadtest.bench.limit import MachineSpeed
from loadtest.bench.machine import CpuLoad, describe_machine, measured_load, pss_bytes
from loadtest.bench.markdown import markdown
from loadtest.bench.plan import FULL, SHORT, WORKLOADS, BenchRequest, Plan, Wave, make_plan
from loadtest.bench.processes import ScriptPeer, run_python
from loadtest.bench.report import Report, ratios, refuse_inexact, write_json
from loadtest.bench.results import RoundResult, cells_of, ratio
from loadtest.errors import BenchError
from loadtest.records import RequestRecord
from loadtest.stats import distribution

PROMPTS = [(number, number + 1) for number in range(900)]


def full_plan(num_rounds: int = 3) -> Plan:
    return make_plan(PROMPTS, FULL, num_rounds, tuple(WORKLOADS))


def waves_of(plan: Plan, name: str) -> list[Wave]:
    return [wave for waves in plan.rounds for wave in waves if wave.workload == name]


def test_no_prompt_comes_twice_in_one_model() -> None:
    plan = full_plan()
    asked = [(r.adapter, r.prompt) for waves in plan.rounds for w in waves for r in w.requests]
    asked += [(r.adapter, r.prompt) for r in plan.warmup.requests]
    asked += [(r.adapter, r.prompt) for pair in plan.cold for r in pair]
    assert len(set(asked)) == len(asked)


def test_w3_has_the_prompts_of_w2_and_w4b_those_of_w4() -> None:
    plan = full_plan()
    for many, base in (("W3", "W2"), ("W4", "W4b")):
        for with_adapters, without in zip(waves_of(plan, many), waves_of(plan, base), strict=True):
            assert [r.prompt for r in with_adapters.requests] == [
                r.prompt for r in without.requests
            ]
            assert {r.adapter for r in without.requests} == {None}
    for wave in waves_of(plan, "W3"):
        assert sorted(r.adapter for r in wave.requests) == list(range(16))


def test_plans_are_reproducible_and_leaving_one_workload_out_changes_no_other() -> None:
    assert full_plan() == full_plan()
    only = make_plan(PROMPTS, FULL, 3, ("W4",))
    assert waves_of(only, "W4") == waves_of(full_plan(), "W4")
    assert set(only.adapters_used) == {
        r.adapter for wave in waves_of(only, "W4") for r in wave.requests
    }


def test_w4_follows_zipf() -> None:
    picks = [r.adapter for wave in waves_of(full_plan(6), "W4") for r in wave.requests]
    top = max(picks.count(number) for number in set(picks)) / len(picks)
    assert 0.14 < top < 0.30  # 1 / H(64) = 0.21
    assert 30 < len(set(picks)) <= 64


def test_bad_plans_are_named() -> None:
    with pytest.raises(BenchError, match="W9"):
        make_plan(PROMPTS, FULL, 1, ("W9",))
    with pytest.raises(BenchError, match="fewer"):
        make_plan(PROMPTS[:50], FULL, 5, ("W2",))


SCRIPT = """
import json, sys
print(json.dumps({"hello": sys.argv[1]}), flush=True)
for line in sys.stdin:
    command = json.loads(line)
    if command["do"] == "die":
        sys.exit("out of luck")
    if command["do"] == "hang":
        import time; time.sleep(60)
    if command["do"] == "wave":
        rows = [{"index": r["index"], "sent": 0.5, "times": [1.0, 1.5], "token_ids": [7, 8]}
                for r in reversed(command["requests"])]
        print(json.dumps({"wall_seconds": 2.0, "records": rows}), flush=True)
    if command["do"] == "judge":
        sys.stderr.write(f"{len(command['items'])} judged\\n"); sys.stderr.flush()
        bad = {"first_difference": 1, "expected": 5, "lead": 0.5}
        good = {"first_difference": None, "expected": None, "lead": None}
        print(json.dumps({"verdicts": [good if i["output"] == [7, 8] else bad
                                       for i in command["items"]]}), flush=True)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def peer_of(script: Path, timeout_seconds: float = 30.0) -> ScriptPeer:
    return ScriptPeer(str(script), ["you"], script.with_suffix(".log"), timeout_seconds)


def test_a_script_runs_waves_in_the_order_of_the_wave(script: Path) -> None:
    wave = Wave("W2", 2, tuple(BenchRequest(n, (1, 2), None) for n in (4, 2, 9)))
    with peer_of(script) as peer:
        assert peer.ready == {"hello": "you"}
        result = ScriptContestant("x", frozenset(), peer, {}).run(wave, 2)
    assert [record.index for record in result.records] == [4, 2, 9]
    assert result.wall_seconds == 2.0
    assert (result.records[0].ttft, result.records[0].token_ids) == (0.5, [7, 8])


@pytest.mark.parametrize(("command", "message"), [("die", "out of luck"), ("hang", "hung")])
def test_scripts_that_end_or_hang_are_errors(script: Path, command: str, message: str) -> None:
    with peer_of(script, 0.5) as peer, pytest.raises(BenchError, match=message):
        peer.ask(do=command)
    with pytest.raises(BenchError, match="no such thing"):
        run_python(["-c", "raise SystemExit('no such thing')"])


def test_equal_outputs_are_judged_once_and_remembered(script: Path, tmp_path: Path) -> None:
    request = BenchRequest(0, (1, 2), 3)
    outputs = [Output(request, (7, 8)), Output(request, (7, 9)), Output(request, (7, 8))]
    cache = tmp_path / "verdicts.json"
    with peer_of(script) as peer:
        assert Judge(peer, cache, "one").judge(outputs) == ["equal", "differs", "equal"]
        assert Judge(peer, cache, "one").judge(outputs[:1]) == ["equal"]
        assert Judge(peer, cache, "other base").judge(outputs[:1]) == ["equal"]
    assert script.with_suffix(".log").read_text() == "2 judged\n1 judged\n"


def test_a_difference_counts_unless_peft_itself_was_undecided() -> None:
    assert verdict_of(None, None) == "equal"
    assert verdict_of(5, 0.0009) == "tie"
    assert verdict_of(5, 0.0011) == "differs"


def test_http_contestant_takes_the_closed_loop(completions_server: CompletionsServer) -> None:
    contestant = HttpContestant(OURS_HTTP, frozenset(), completions_server.url)
    requests = tuple(BenchRequest(n, (1, 2, 3), None) for n in (5, 3, 8, 1))
    result = contestant.run(Wave("W2", 2, requests), 6)
    assert [record.index for record in result.records] == [5, 3, 8, 1]
    assert all(record.token_ids == list(range(6)) for record in result.records)
    assert result.wall_seconds >= result.records[-1].chunk_times[0]
    wave = Wave("W1a", 1, (BenchRequest(0, (1,), 77),))
    with pytest.raises(BenchError, match="http_404 for adapter-077"):
        contestant.run(wave, 2)


def test_own_cpu_time_is_not_foreign() -> None:
    with measured_load() as load:
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            pass
    assert load.busy_cores is not None and load.busy_cores > 0.3
    assert load.foreign_cores is not None
    assert load.busy_cores - load.foreign_cores > 0.2
    assert load.others is not None and f"{Path(sys.executable).name} -c" not in load.others


def test_memory_and_machine() -> None:
    own = pss_bytes(os.getpid())
    assert own is not None and own > 2**24
    machine = describe_machine()
    assert machine["cores"] and machine["memory_gib"]


def one_round(name: str, workload: str, number: int, seconds: float, *verdicts: str) -> RoundResult:
    record = RequestRecord(0, "m", 0.0, 0.0, seconds, [seconds / 2, seconds], [1, 9])
    result = WaveResult((record,), seconds)
    return RoundResult(name, workload, number, result, CpuLoad(1.0, 0.5), tuple(verdicts))


def rounds() -> list[RoundResult]:
    return [
        one_round(OURS_HTTP, "W2", 0, 1.0, "equal", "tie"),
        one_round(OURS_HTTP, "W2", 1, 2.0, "equal", "differs"),
        one_round(OURS_HTTP, "W2", 2, 0.5, "equal"),
        *(one_round(PEFT_MIXED, "W2", n, s, "equal") for n, s in enumerate((2.0, 8.0, 1.5))),
        *(one_round(OURS_HTTP, "W3", n, 2.0) for n in range(3)),
        one_round(PEFT_SINGLE, "W1", 0, 4.0),
    ]


def test_figures_are_medians_and_ratios_stay_within_their_round() -> None:
    cells = cells_of(rounds())
    assert cells[OURS_HTTP, "W2"].tokens_per_second == 10.0
    assert cells[OURS_HTTP, "W2"].rounds == (10.0, 5.0, 20.0)
    assert ratio(cells, (OURS_HTTP, "W2"), (PEFT_MIXED, "W2")) == 3.0  # of 2, 4 and 3
    assert ratio(cells, (OURS_HTTP, "W2"), (PEFT_MIXED, "W9")) is None
    assert ratios(cells)[f"{OURS_HTTP}, W3 / W2"] == 0.5


def test_exactness_leaves_ties_out() -> None:
    cell = cells_of(rounds())[OURS_HTTP, "W2"]
    assert (cell.exact, cell.num_ties, cell.num_judged) == (0.75, 1, 5)
    assert cells_of(rounds())[OURS_HTTP, "W3"].exact is None


def report() -> Report:
    life = Lifecycle(6, 9.0, distribution([0.01, 0.02, 0.04]))
    life.pss_base_bytes, life.pss_registered_bytes = 100 * 2**20, 112 * 2**20
    life.cold_ttft = distribution([0.3])
    conditions = {"date": "2026-01-02", "cores": 2, "cpu": "some", "versions": {"peft": "0.1"}}
    speed, limits = MachineSpeed(480e9, 80e9), {"W2": 40.0}
    return Report(
        conditions, SHORT, 3, cells_of(rounds()), rounds(), life, speed=speed, limits=limits
    )


def test_the_page_says_everything_once() -> None:
    page = markdown(report())
    assert "| vbserve over HTTP | - | 10.0 (5.0 to 20.0) (n) | 5.0 (5.0 to 5.0) (n) |" in page
    assert "0.750 of 4, 1 ties" in page
    assert "| vbserve over HTTP / PEFT, W2 | 3.00 |" in page
    assert "| POST /v1/adapters, p50 / max | 20.0 / 40.0 ms |" in page
    assert "| memory per registered adapter, unused | 2.00 MiB |" in page
    assert "at 480 GFLOP/s and summed a large array at 80 GB/s" in page
    assert "| W2 | 40.0 | 0.25 | - |" in page
    assert "- versions: peft 0.1" in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert all(line.count("|") >= 3 for line in rows)


def test_the_chart_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "bench.png"
    write_chart(path, report())
    data = path.read_bytes()
    assert struct.unpack(">II", data[16:24]) > (1000, 700)
    assert len(data) > 30_000


def test_the_json_holds_every_round_and_its_verdicts(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    write_json(path, report())
    content = json.loads(path.read_text())
    assert len(content["rounds"]) == len(rounds())
    assert content["rounds"][0]["verdicts"] == ["equal", "tie"]
    assert content["rounds"][0]["load"]["foreign_cores"] == 0.5
    assert content["ratios"][f"{OURS_HTTP} / PEFT, W2"] == 3.0
    assert content["limit_shares"] == {f"{OURS_HTTP}, W2": 0.25}
    assert content["lifecycle"]["registration"]["p50"] == 0.02


def test_inexact_answers_fail_the_bench() -> None:
    with pytest.raises(BenchError, match=r"vbserve over HTTP on W2: 0\.750 exact"):
        refuse_inexact(report())
    good = [one for one in rounds() if "differs" not in one.verdicts]
    refuse_inexact(replace(report(), cells=cells_of(good)))
