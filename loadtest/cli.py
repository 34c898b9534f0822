"""`vbserve loadtest`: options in, a run, a report out. Mounted by the command line of the server.

Imports the heavy parts (plots, event loop) when the command runs: the server's own command line
imports this module at every start.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loadtest.distributions import (
    LENGTHS_SYNTAX,
    POPULARITY_SYNTAX,
    parse_lengths,
    parse_popularity,
)
from loadtest.errors import InvalidWorkloadError, LoadtestError

if TYPE_CHECKING:
    from loadtest.run import RunSettings

_POSITIVE = click.IntRange(min=1)


@click.command()
@click.option(
    "--url",
    default="http://127.0.0.1:8000",
    envvar="VBSERVE_CLIENT_URL",
    show_default=True,
    show_envvar=True,
    help="The server.",
)
@click.option(
    "--api-key", envvar="VBSERVE_CLIENT_KEY", show_envvar=True, help="Sent as a bearer token."
)
@click.option("--clients", type=_POSITIVE, help="Closed loop: clients that each wait. [default: 8]")
@click.option("--rate", type=float, help="Open loop: requests a second, Poisson arrivals.")
@click.option(
    "--requests", "num_requests", type=_POSITIVE, help="Stop after so many. [default: 64]"
)
@click.option("--duration", type=float, help="Stop sending after so many seconds.")
@click.option(
    "--warmup", type=click.IntRange(min=0), help="Unmeasured requests. [default: clients]"
)
@click.option(
    "--adapters",
    "num_adapters",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Take the first N adapters that the server lists.",
)
@click.option("--adapter", "adapters", multiple=True, help="Take this adapter; may be repeated.")
@click.option("--popularity", default="zipf:1.0", show_default=True, help=f"{POPULARITY_SYNTAX}.")
@click.option(
    "--base-share",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of requests to the base itself.",
)
@click.option("--prompt-tokens", default="128", show_default=True, help=f"{LENGTHS_SYNTAX}.")
@click.option("--output-tokens", default="64", show_default=True, help=f"{LENGTHS_SYNTAX}.")
@click.option("--stream/--no-stream", default=True, show_default=True)
@click.option(
    "--ignore-eos/--respect-eos",
    default=True,
    show_default=True,
    help="Produce all output tokens, whatever the model says.",
)
@click.option(
    "--token-ids/--no-token-ids",
    default=True,
    show_default=True,
    help="Ask for token ids, to count tokens exactly (vbserve, vLLM).",
)
@click.option(
    "--timeout", type=float, default=600.0, show_default=True, help="Seconds per request."
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--workload",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='JSON list of {"model", "prompt", "max_tokens", "at"}: sent as it is.',
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default="loadtest-out",
    show_default=True,
    help="Folder for loadtest.json and loadtest.png.",
)
@click.option("--save-requests", is_flag=True, help="Put one row per request into the JSON.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def loadtest(**options: Any) -> None:
    """Load a server with completions and report throughput, latencies and errors.

    Closed loop (--clients) asks how fast the server is when N users wait for their answers; open
    loop (--rate) asks how it does when requests come whether it is ready or not.

    \b
      vbserve loadtest --clients 16 --adapters 64 --requests 256
      vbserve loadtest --rate 2 --duration 60 --adapters 8 --popularity uniform
    """
    try:
        execute(**options)
    except LoadtestError as error:
        raise click.ClickException(str(error)) from error


def execute(*, out: Path, save_requests: bool, quiet: bool, **options: Any) -> None:
    """Run with the command's options; writes and prints the report. Raises LoadtestError."""
    import uvloop
    from rich.console import Console

    from loadtest.plots import write_png
    from loadtest.progress import watcher
    from loadtest.report import print_summary, write_json
    from loadtest.run import run
    from loadtest.stats import summarise

    settings = settings_of(**options)
    total = settings.num_requests or len(settings.file_requests) or None
    watch = watcher(Console(stderr=True), total, settings.duration_seconds, quiet=quiet)
    result = uvloop.run(run(settings, watch))
    summary = summarise(result.records, result.window_seconds)
    options["api_key"] = bool(options["api_key"])  # never written out
    shown = {
        key: str(value) if isinstance(value, Path) else value for key, value in options.items()
    }
    write_json(out / "loadtest.json", result, summary, shown, rows=save_requests)
    write_png(out / "loadtest.png", result, summary, _title(settings, len(result.adapters)))
    console = Console()
    print_summary(console, summary)
    console.print(f"{out / 'loadtest.json'}, {out / 'loadtest.png'}", highlight=False)
    if not summary.completed:
        raise LoadtestError(f"no request succeeded: {dict(summary.errors)}")


def settings_of(
    *,
    url: str,
    api_key: str | None,
    clients: int | None,
    rate: float | None,
    num_requests: int | None,
    duration: float | None,
    warmup: int | None,
    num_adapters: int,
    adapters: tuple[str, ...],
    popularity: str,
    base_share: float,
    prompt_tokens: str,
    output_tokens: str,
    stream: bool,
    ignore_eos: bool,
    token_ids: bool,
    timeout: float,
    seed: int,
    workload: Path | None,
) -> RunSettings:
    """Options as settings, dependent defaults filled in. Raises InvalidWorkloadError."""
    from loadtest.client import ClientOptions
    from loadtest.run import RunSettings
    from loadtest.workload import read_workload_file

    file_requests = tuple(read_workload_file(workload)) if workload else ()
    timed = bool(file_requests) and file_requests[0].due is not None
    if clients is None and rate is None and not timed:
        clients = 8
    if num_requests is None and duration is None and not file_requests:
        num_requests = 64
    if workload and (adapters or num_adapters):
        raise InvalidWorkloadError("a workload file names its models: leave --adapter(s) out")
    return RunSettings(
        client=ClientOptions(url, api_key, stream, ignore_eos, token_ids, timeout),
        num_clients=clients,
        rate=rate,
        num_requests=num_requests,
        duration_seconds=duration,
        warmup_requests=(clients or 4) if warmup is None else warmup,
        adapters=adapters,
        num_adapters=num_adapters,
        popularity=parse_popularity(popularity),
        base_share=base_share,
        prompt_lengths=parse_lengths(prompt_tokens),
        output_lengths=parse_lengths(output_tokens),
        seed=seed,
        file_requests=file_requests,
    )


def _title(settings: RunSettings, num_adapters: int) -> str:
    loop = (
        f"closed loop, {settings.num_clients} clients"
        if settings.num_clients
        else f"open loop, {settings.rate:g} requests/s"
        if settings.rate
        else "open loop, times from a file"
    )
    kind = f"zipf({settings.popularity.exponent:g})" if settings.popularity.exponent else "uniform"
    return f"{loop}; {num_adapters} adapters, {kind}" if num_adapters else f"{loop}; base alone"
