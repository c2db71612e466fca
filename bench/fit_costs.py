"""Fits the constants of rwn_ext.costs to measured times: `python -m bench.fit_costs FOLDER`; `--write` enters them.

Reads kernels.json and curve.json of a folder of bench.bench_kernels: device times of the library's weight gradients and
of the Triton kernels. What is made smallest is the mean square of log(predicted / measured). The chip's memory and
matrix rates are those measured with them.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from bench.group import GATHERED, WHOLE
from bench.results import ResultsError, read
from rwn_ext import costs
from rwn_ext.costs import Chip, LibraryModel
from rwn_ext.planner import Problem

COSTS = Path(costs.__file__)
LIBRARY_WAYS = {WHOLE: "full", GATHERED: "gather"}
FILTER_TILES, CHANNEL_TILES = (8, 16, 32, 64, 128), (1, 4, 8, 16, 32)
EFFICIENCIES, REREADS, SHARES = (0.05, 1.0), (0.0, 1.5), (0.1, 1.0)


class Sample(NamedTuple):
    """A measured device time, and what it is the time of."""

    problem: Problem
    algorithm: str
    seconds: float


class Fit(NamedTuple):
    library: LibraryModel
    triton_bandwidth_share: float
    triton_flops_share: float

    @classmethod
    def current(cls) -> Fit:
        return cls(costs.LIBRARY, costs.TRITON_BANDWIDTH_SHARE, costs.TRITON_FLOPS_SHARE)


def samples(folder: Path) -> list[Sample]:
    """Of all results files of the kernels' benchmark in a folder. ResultsError where there are none."""
    files = [path for path in (folder / "kernels.json", folder / "curve.json") if path.exists()]
    found = [sample for file in files for sample in _samples(read(file))]
    if not found:
        raise ResultsError(f"{folder} holds no kernels.json or curve.json with times; bench.bench_kernels makes them")
    return found


def _samples(content: Mapping[str, Any]) -> Iterator[Sample]:
    machine = content["machine_info"]
    for entry in content["benchmarks"]:
        algorithm = LIBRARY_WAYS.get(entry["contender"], entry["contender"])
        if algorithm in (costs.LIBRARIES | costs.TRITON) and entry["case"]["numbers"] in ("bf16", "fp16"):
            yield Sample(_problem(entry["case"], _chip(machine)), algorithm, entry["stats"]["median"])


def _chip(machine: Mapping[str, Any]) -> Chip:
    """The named chip at its measured rates, driven by a host that never makes it wait."""
    known = next((chip for chip in costs.CHIPS if chip.name in machine["device"]), costs.A100)
    rates = machine["rates"]
    return replace(
        known, bandwidth=rates["bytes_per_second"], half=rates["flops_per_second"], library_call=0.0, triton_call=0.0
    )


def _problem(case: Mapping[str, Any], chip: Chip) -> Problem:
    n, c, size, k, r, stride = map(int, case["N,C,H,K,R,stride"].split(","))
    return Problem(
        batch=n, channels=c, height=size, width=size, filters=k, learned=int(case["learned"].split("/")[0]),
        kernel_size=(r, r), stride=(stride, stride), padding=(r // 2, r // 2), device="cuda",
        channels_last=case["layout"] == "channels_last", chip=chip,
        dtype={"bf16": "bfloat16", "fp16": "float16"}[case["numbers"]],
    )  # fmt: skip


def fitted(found: Sequence[Sample]) -> Fit:
    """The constants of smallest error; those of which nothing was measured stay."""
    now = Fit.current()
    library = [sample for sample in found if sample.algorithm in costs.LIBRARIES]
    triton = [sample for sample in found if sample.algorithm in costs.TRITON]
    if library:
        now = now._replace(library=_fitted_library(library, now))
    if triton:

        def error(bandwidth: float, flops: float) -> float:
            return mean_square(triton, now._replace(triton_bandwidth_share=bandwidth, triton_flops_share=flops))

        bandwidth, flops = _smallest(error, SHARES, SHARES)
        now = now._replace(triton_bandwidth_share=bandwidth, triton_flops_share=flops)
    return now


def _fitted_library(found: Sequence[Sample], now: Fit) -> LibraryModel:
    best: tuple[float, LibraryModel] | None = None
    for filter_tile, channel_tile in product(FILTER_TILES, CHANNEL_TILES):

        def model(efficiency: float, rereads: float, tiles: tuple[int, int] = (filter_tile, channel_tile)):
            return LibraryModel(efficiency, tiles[0], rereads, tiles[1])

        def error(efficiency: float, rereads: float, model=model) -> float:
            return mean_square(found, now._replace(library=model(efficiency, rereads)))

        candidate = model(*_smallest(error, EFFICIENCIES, REREADS))
        value = mean_square(found, now._replace(library=candidate))
        if best is None or value < best[0] - 1e-12:
            best = value, candidate
    assert best is not None
    return best[1]


def _smallest(
    error: Callable[[float, float], float], first: tuple[float, float], second: tuple[float, float]
) -> tuple[float, float]:
    """Where `error` is smallest in a rectangle: on a grid of 7 x 7, then on ever finer ones around the best."""
    ranges = [first, second]
    for _ in range(6):
        axes = [[low + i * (high - low) / 6 for i in range(7)] for low, high in ranges]
        best = min(product(*axes), key=lambda point: error(*point))
        ranges = [
            (max(limits[0], value - (high - low) / 6), min(limits[1], value + (high - low) / 6))
            for value, (low, high), limits in zip(best, ranges, (first, second), strict=True)
        ]
    return round(best[0], 3), round(best[1], 3)


def mean_square(found: Sequence[Sample], fit: Fit) -> float:
    """Of log(predicted / measured)."""
    return statistics.fmean(math.log(ratio) ** 2 for ratio in ratios(found, fit))


def ratios(found: Sequence[Sample], fit: Fit) -> list[float]:
    """Predicted time relative to the measured one, sample by sample."""
    with _constants(fit):
        predict = costs.LIBRARIES | costs.TRITON
        return [predict[s.algorithm](s.problem).seconds / s.seconds for s in found]


@contextmanager
def _constants(fit: Fit) -> Iterator[None]:
    names = ("LIBRARY", "TRITON_BANDWIDTH_SHARE", "TRITON_FLOPS_SHARE")
    before = Fit.current()
    try:
        for name, value in zip(names, fit, strict=True):
            setattr(costs, name, value)
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(costs, name, value)


def described(found: Sequence[Sample], fit: Fit) -> str:
    """The error by algorithm, in words."""
    lines = []
    for name in dict.fromkeys(sample.algorithm for sample in found):
        own = sorted(ratios([sample for sample in found if sample.algorithm == name], fit))
        lines.append(
            f"{name}: predicted / measured {statistics.median(own):.2f} at the median, {own[0]:.2f} to {own[-1]:.2f}, "
            f"{len(own)} times"
        )
    return "\n".join(lines)


def entered(source: str, fit: Fit) -> str:
    """The source of rwn_ext/costs.py with these constants."""
    values = {f"    {f.name}: {f.type}": getattr(fit.library, f.name) for f in fields(LibraryModel)}
    values |= {"TRITON_BANDWIDTH_SHARE": fit.triton_bandwidth_share, "TRITON_FLOPS_SHARE": fit.triton_flops_share}
    for name, value in values.items():
        source, count = re.subn(rf"^{re.escape(name)} = .*$", f"{name} = {value!r}", source, flags=re.MULTILINE)
        if count != 1:
            raise ResultsError(f"{name.strip()!r} stands {count} times in {COSTS.name}, not once; enter it by hand")
    return source


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fit_costs", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of results, such as bench/results/h100")
    parser.add_argument("--write", action="store_true", help="enter the constants into rwn_ext/costs.py")
    options = parser.parse_args(arguments)
    try:
        found = samples(options.folder)
        fit = fitted(found)
        print(f"now:\n{described(found, Fit.current())}\n\nfitted:\n{described(found, fit)}\n\n{fit}")
        if options.write:
            COSTS.write_text(entered(COSTS.read_text(), fit))
    except ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
