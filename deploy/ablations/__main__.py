"""Train all variants on the demo tasks, then tables and plots: `python -m deploy.ablations`.

Runs that results.json has are not made again, so the command can be stopped and called again, and
called twice side by side for different tasks. `--show` draws what there is.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from adapters.durable_files import exclusive_lock
from deploy.ablations.report import draw_all, write_page
from deploy.ablations.runs import run
from deploy.ablations.variants import USUAL, Variant, all_variants
from deploy.demo.tasks import TASKS, task_named
from serving.default_base import ensure_default_base

HERE = Path(__file__).parent
_RESULTS = "results.json"

Results = dict[str, dict[str, dict[str, Any]]]
"""By task, then by variant: what `run` gives."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the runs that are missing, then the page and its plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", nargs="*", choices=[*sorted(TASKS)], default=sorted(TASKS))
    parser.add_argument("--variants", nargs="*", help="names as in results.json; all by default")
    parser.add_argument("--steps", type=int, default=USUAL.num_steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", type=Path, help="a local copy of the base; fetched by default")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--show", action="store_true", help="train nothing")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.show:
        base = options.base or ensure_default_base()
        for task, name, variant in _missing(options.out, options.tasks, options.variants):
            print(f"{task}: {name}", flush=True)
            result = run(task_named(task), variant, base, options.steps, options.seed)
            shown = {key: value for key, value in result.items() if key != "curve"}
            print(f"{task}: {name}: {shown}", flush=True)
            _record(options.out, task, name, result)
    results = read_results(options.out)
    draw_all(results, options.out)
    write_page(results, options.out / "RESULTS.md")


def read_results(out: Path) -> Results:
    """What has been run."""
    file = out / _RESULTS
    results: Results = json.loads(file.read_text())["runs"] if file.exists() else {}
    return results


def _missing(
    out: Path, tasks: Sequence[str], names: Sequence[str] | None
) -> Iterator[tuple[str, str, Variant]]:
    """Variant by variant, all tasks each, so that what is stopped has whole rows."""
    for name, variant in all_variants():
        for task in tasks:
            wanted = names is None or name in names
            if wanted and name not in read_results(out).get(task, {}):
                yield task, name, variant


def _record(out: Path, task: str, name: str, result: dict[str, Any]) -> None:
    with exclusive_lock(out / f".{_RESULTS}.lock"):
        runs = read_results(out)
        runs.setdefault(task, {})[name] = result
        content = {"torch": torch.__version__, "runs": runs}
        written = out / f"{_RESULTS}.{os.getpid()}"
        written.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        written.replace(out / _RESULTS)


if __name__ == "__main__":
    main()
