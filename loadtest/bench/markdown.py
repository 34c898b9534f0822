"""The bench's figures as a Markdown page that a README can quote."""

from __future__ import annotations

from collections.abc import Sequence

from loadtest.bench.contestants import OURS
from loadtest.bench.lifecycle import Lifecycle
from loadtest.bench.plan import WORKLOADS
from loadtest.bench.reach import Reach
from loadtest.bench.report import Report, limit_shares, peer_ratios, ratios
from loadtest.bench.results import Cell, ratio
from loadtest.bench.tables import MIB, in_ratio, in_seconds, mib, pair, plain, table
from loadtest.stats import Distribution

_NOISY_CORES = 0.2
_ABOUT_PEERS = (
    "The other servers have the plain LoRA too, and no prefix cache. vLLM and OpenVINO run twice: "
    "without LoRA for W1, W2 and W4b, where that is faster, and with it for the rest. OpenVINO has "
    "no server: in process, requests join its batch for the base; with adapters it takes one "
    "adapter a call, and those that wait for the same one go together. llama.cpp keeps keys and "
    "values in 16 bits, its default."
)


def markdown(report: Report) -> str:
    """The whole page."""
    parts = [
        "# Bench",
        _introduction(report),
        "## Output tokens a second, prefill included",
        f"Medians of {report.num_rounds} rounds (lowest to highest). Exact: share of requests "
        "whose tokens all equal those of PEFT in fp32; ties of PEFT's own set aside.",
        _throughput(report),
        "## Ratios of throughput",
        "Medians over the rounds of the ratio within a round.",
        _ratios(report),
        *_beside_limit(report),
        *_beside_peers(report),
        "## Latency, ms",
        "Over the requests of all rounds.",
        _latency(report),
    ]
    if report.lifecycle is not None:
        parts += ["## Adapters in the server", _lifecycle(report.lifecycle)]
    parts += ["## Conditions", _conditions(report)]
    return "\n\n".join(parts) + "\n"


def _introduction(report: Report) -> str:
    sizes = report.sizes
    lines = [
        f"{sizes.num_adapters} random VB-LoRA adapters of rank {sizes.rank} on all linear layers "
        f"(bank {sizes.num_vectors} x {sizes.vector_length}, top-{sizes.topk}); PEFT has the same "
        f"weights as plain LoRA. {sizes.prompt_tokens} prompt tokens and {sizes.max_tokens} output "
        "tokens a request, greedy, all prompts different, end-of-text ignored. PEFT runs in "
        "process, as static batches or one request at a time; contestants took turns.",
        *((_ABOUT_PEERS,) if report.peers else ()),
        "",
    ]
    clients = sizes.num_clients
    numbers = {"W1": sizes.num_single, "W1a": sizes.num_single, "W2": clients, "W3": clients}
    for name in report.workloads:
        what = WORKLOADS[name].replace("all clients", f"{clients} clients")
        what = what.replace("Zipf's law", f"Zipf's law, exponent {sizes.zipf:g}")
        lines.append(f"- {name}: {what}; {numbers.get(name, sizes.num_closed)} requests a round")
    return "\n".join(lines)


def _throughput(report: Report) -> str:
    rows = []
    for name in report.contestants:
        cells = [report.cells.get((name, workload)) for workload in report.workloads]
        rows.append([name, *(_rate(cell) for cell in cells), _exact(cells)])
    return table(["", *report.workloads, "exact"], rows)


def _rate(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    spread = f" ({min(cell.rounds):.1f} to {max(cell.rounds):.1f})" if len(cell.rounds) > 1 else ""
    noisy = " (n)" if (cell.foreign_cores or 0.0) > _NOISY_CORES else ""
    return f"{cell.tokens_per_second:.1f}{spread}{noisy}"


def _exact(cells: Sequence[Cell | None]) -> str:
    judged = [cell for cell in cells if cell is not None and cell.exact is not None]
    ties = sum(cell.num_ties for cell in judged)
    decided = [cell.num_judged - cell.num_ties for cell in judged]
    if not sum(decided):
        return "-"
    equal = sum((cell.exact or 0.0) * num for cell, num in zip(judged, decided, strict=True))
    return f"{equal / sum(decided):.3f} of {sum(decided)}" + (f", {ties} ties" if ties else "")


def _ratios(report: Report) -> str:
    rows = [[name, f"{value:.2f}"] for name, value in ratios(report.cells).items()]
    return table(["", "ratio"], rows) if rows else "None: no two contestants to compare."


def _beside_limit(report: Report) -> list[str]:
    """What the machine could do at best, and which share of it was reached."""
    if report.speed is None or not report.limits:
        return []
    flops, read = report.speed.flops_per_second, report.speed.bytes_per_second
    shares = limit_shares(report)
    rows = [
        [name, f"{limit:.1f}", *(in_ratio(shares.get((ours, name))) for ours in OURS)]
        for name, limit in report.limits.items()
    ]
    return [
        "### Beside the limit",
        f"This machine multiplied square fp32 matrices at {flops / 1e9:.0f} GFLOP/s and summed a "
        f"large array at {read / 1e9:.0f} GB/s, on the bench's threads, the best of many before "
        "and after the rounds. At these speeds a wave of the base takes at least one step for all "
        "prompts and one for each further token; a step is the longer of its arithmetic and its "
        "reads (weights once in fp32, keys and values of each request). Where memory is what one "
        "stream waits for, a base kept in fewer bits may pass this limit.",
        table(["", "limit, tok/s", *(f"{ours}, share" for ours in OURS)], rows),
    ]


def _beside_peers(report: Report) -> list[str]:
    if not report.peers:
        return []
    rows = [
        [f"{ours} / {peer}", *(in_ratio(row.get(workload)) for workload in report.workloads)]
        for (ours, peer), row in peer_ratios(report.cells).items()
    ]
    return [
        "### Beside other servers",
        table(["", *report.workloads], rows) if rows else "None: nothing of ours took part.",
        "## Reach",
        f"With all {report.sizes.num_adapters} adapters: until all can be asked for, memory (PSS) "
        "after all rounds, speed with adapters by speed of the base, and how long requests of W4 "
        "wait for their first token. Where a peer runs twice, start and memory are of the process "
        "with adapters.",
        _reach(report),
    ]


def _reach(report: Report) -> str:
    rows = []
    for name in report.contestants:
        reach = report.reach.get(name, Reach(None, None))
        many = report.cells.get((name, "W4"))
        shares = (
            ratio(report.cells, (name, adapters), (name, base))
            for adapters, base in (("W3", "W2"), ("W4", "W4b"))
        )
        rows.append(
            [
                name,
                in_seconds(reach.start_seconds),
                mib(reach.pss_bytes),
                *map(in_ratio, shares),
                pair(many.ttft if many else None),
                _wait(many.ttft if many else None),
            ]
        )
    headers = ["", "start", "memory", "W3 / W2", "W4 / W4b", "W4 first token p50 / p99, ms"]
    return table([*headers, "p99 / p50"], rows)


def _wait(ttft: Distribution | None) -> str:
    if ttft is None or not ttft.p50 or ttft.p99 is None:
        return "-"
    return f"{ttft.p99 / ttft.p50:.1f}"


def _latency(report: Report) -> str:
    rows = [
        [
            cell.contestant,
            workload,
            pair(cell.ttft),
            _wait(cell.ttft),
            pair(cell.time_between_tokens),
            pair(cell.e2e),
        ]
        for workload in report.workloads
        for name in report.contestants
        if (cell := report.cells.get((name, workload))) is not None
    ]
    headers = ["", "", "first token p50 / p99", "p99 / p50", "between tokens p50 / p99"]
    return table([*headers, "end to end p50 / p99"], rows)


def _lifecycle(life: Lifecycle) -> str:
    rows = [
        ["start to ready", in_seconds(life.first_ready_seconds)],
        [
            f"start to ready with {life.num_adapters} registered",
            in_seconds(life.again_ready_seconds),
        ],
        ["POST /v1/adapters, p50 / max", pair(life.registration, high="max", unit=" ms")],
        ["first token, adapter in no cache, p50 / max", pair(life.cold_ttft, "max", " ms")],
        ["first token, the same adapter again, p50 / max", pair(life.warm_ttft, "max", " ms")],
        ["memory (PSS) of the server, no adapter", mib(life.pss_base_bytes)],
        ["memory per registered adapter, unused", _per_adapter(life, life.pss_registered_bytes)],
        ["memory at the end", mib(life.pss_end_bytes)],
    ]
    return table(["", ""], rows)


def _per_adapter(life: Lifecycle, total: int | None) -> str:
    if total is None or life.pss_base_bytes is None:
        return "-"
    return f"{(total - life.pss_base_bytes) / life.num_adapters / MIB:.2f} MiB"


def _conditions(report: Report) -> str:
    lines = [f"- {name}: {plain(value)}" for name, value in report.conditions.items()]
    foreign = [one.load.foreign_cores for one in report.rounds]
    known = [cores for cores in foreign if cores is not None]
    if known:
        noisy = sum(cores > _NOISY_CORES for cores in known)
        lines.append(
            f"- other programs: {sum(known) / len(known):.2f} cores on average, at most "
            f"{max(known):.2f}; more than {_NOISY_CORES} in {noisy} of {len(known)} waves, (n) "
            "where one of them counts"
        )
    return "\n".join(lines)
