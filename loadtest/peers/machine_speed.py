"""Print what this machine can do at best with fp32: {"flops_per_second", "bytes_per_second"}.

    flops   x @ w of square matrices, as torch.mm and as oneDNN's product with a packed w
    bytes   one sum over an array far larger than the caches

Both on all threads of torch, again and again until the time is up; the fastest counts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

FLOAT_BYTES = 4


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, required=True, help="for each kind of product")
    parser.add_argument("--sides", type=json.loads, required=True, help="of matrices, a JSON list")
    parser.add_argument("--array-bytes", type=int, required=True)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    products = [way for side in options.sides for way in products_of(side)]
    flops = max(flops / best(product, options.seconds) for flops, product in products)
    array = torch.ones(options.array_bytes // FLOAT_BYTES)
    read = array.nbytes / best(array.sum, options.seconds)
    print(json.dumps({"flops_per_second": flops, "bytes_per_second": read}))  # noqa: T201 - the answer


def products_of(side: int) -> list[tuple[int, Callable[[], object]]]:
    """(FLOPs, product) of each way to multiply two square matrices."""
    x, w, out = (torch.ones(side, side) for _ in range(3))
    ways: list[Callable[[], object]] = [lambda: torch.mm(x, w, out=out)]
    if torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(w)
        linear = torch.ops.mkldnn._linear_pointwise
        ways.append(lambda: linear(x, packed, None, "none", [], ""))
    return [(2 * side**3, way) for way in ways]


def best(work: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest of the runs that fit into `seconds`; three at least."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
