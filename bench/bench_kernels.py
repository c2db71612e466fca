"""Weight gradients alone, of layers of common networks: PyTorch's own ways, each of our kernels, the planner's choice.

    python -m bench.bench_kernels FOLDER           bf16 channels_last at p = 1, 10, 50 %; on a CPU small ones
    python -m bench.bench_kernels FOLDER --full    every layer, part, layout and number format
    python -m bench.bench_kernels FOLDER --curve   gather + wgrad alone, of 1 to 128 filters, for bench.fit_costs

Results go to kernels.json (or curve.json) of the folder, case by case: an interrupted run continues. Nothing is
measured while the tests fail, and each contender is compared with float64 before it is timed. On a GPU the time is the
device's, under CUDA graph replay over operands that together exceed its L2; on a CPU it is the wall's. The floor is
what the measured rates of this device allow at best.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import gate
from bench.competitors import OURS
from bench.group import COMPILED_SLICE, GATHERED, PLAIN_GRADIENTS, SLICED_GRADIENT, WHOLE, Group
from bench.growing import GrowingResults
from bench.layers import CPU_LAYERS, GPU_LAYERS, Layer, tolerance
from bench.oracle import close
from bench.rates import rates
from bench.results import ResultsError
from rwn_ext import costs, ops, planner
from rwn_ext.describe import table
from rwn_ext.paper.heap import keep_freed_memory
from rwn_ext.paper.timing import synchronized_clock

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUMBERS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "float32": torch.float32}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
ROUNDS = 25
# Compiling takes long, so it is done for a few.
WITH_COMPILED = ("wrn-28-10 stage 1", "resnet-50 l3 3x3", "densenet-121 b3 1x1")
CURVE_LAYERS = {
    "cuda": ("wrn-28-10 stage 1", "wrn-28-10 stage 3", "resnet-50 l1 3x3", "resnet-50 l3 3x3", "vgg-16 conv3_3",
             "densenet-121 b3 1x1"),
    "cpu": ("wrn-16-4 stage 1", "wrn-16-4 stage 3"),
}  # fmt: skip
CURVE = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
FAILED, UNFINISHED = 1, 3
"""Exit codes: some contender failed or computed something else; the budget left cases out."""


@dataclass(frozen=True)
class Case:
    """A weight gradient of the last `learned` filters of a layer."""

    name: str
    layer: Layer
    learned: int
    part: float | None = None
    layout: str = "channels_last"
    numbers: str = "bf16"
    compiled: bool = False
    only: tuple[str, ...] | None = None
    """The contenders, if not all."""

    @property
    def facts(self) -> dict[str, Any]:
        """As the results file names it."""
        facts: dict[str, Any] = {"N,C,H,K,R,stride": ",".join(map(str, self.layer))}
        facts |= {} if self.part is None else {"p": self.part}
        return facts | {"learned": f"{self.learned}/{self.layer.k}", "layout": self.layout, "numbers": self.numbers}

    @property
    def dtype(self) -> torch.dtype:
        return NUMBERS[self.numbers]

    @property
    def output_size(self) -> int:
        return (self.layer.size + 2 * (self.layer.r // 2) - self.layer.r) // self.layer.stride + 1

    @property
    def filters(self) -> tuple[int, int]:
        return self.layer.k - self.learned, self.layer.k

    @property
    def geometry(self) -> tuple[tuple[int, int], ...]:
        """Filter size, stride, padding, dilation."""
        r, stride = self.layer.r, self.layer.stride
        return (r, r), (stride, stride), (r // 2, r // 2), (1, 1)

    def operands(self) -> tuple[Tensor, Tensor]:
        """grad_output and input: random, never zeros."""
        n, c, size, k = self.layer[:4]
        sizes = (n, k, self.output_size, self.output_size), (n, c, size, size)
        make = partial(torch.randn, device=DEVICE, dtype=self.dtype)
        grad_output, x = (make(size).to(memory_format=LAYOUTS[self.layout]) for size in sizes)
        return grad_output, x

    def floor(self) -> tuple[float, float]:
        """Bytes that every way must move, and seconds at this device's rates."""
        least, rate = costs.floor(self.problem), rates(DEVICE, self.dtype)
        return least.bytes, max(least.bytes / rate.bytes_per_second, least.flops / rate.flops_per_second)

    @property
    def problem(self) -> planner.Problem:
        n, c, size, k = self.layer[:4]
        return ops.problem(
            (n, c, size, size),
            k,
            self.filters,
            *self.geometry,
            1,
            torch.device(DEVICE),
            LAYOUTS[self.layout],
            self.dtype,
        )


def selection(full: bool = False, curve: bool = False, device: str = DEVICE) -> list[Case]:
    """The cases of a run, of those in the default one the most important first; what has to be compiled comes last."""
    layers = GPU_LAYERS if device == "cuda" else CPU_LAYERS
    numbers = ("bf16", "fp16", "tf32") if device == "cuda" else ("float32",)
    if curve:
        return [
            Case(name, layers[name], learned, numbers=numbers[0], only=(GATHERED,))
            for name in CURVE_LAYERS[device]
            for learned in CURVE
            if learned <= layers[name].k
        ]
    few = {"cuda": (0.1, 0.01, 0.5), "cpu": (0.05, 0.1, 0.4)}[device]
    parts = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0) if full else few
    cases = [
        Case(
            name, layer, max(1, int(layer.k * part)), part, layout, number,
            compiled=device == "cuda" and (full or name in WITH_COMPILED),
        )
        for number in (numbers if full else numbers[:1])
        for layout in (LAYOUTS if full else ("channels_last",))
        for part in parts
        for name, layer in layers.items()
    ]  # fmt: skip
    return cases if full else sorted(cases, key=lambda case: case.compiled)


Operands = tuple[Tensor, Tensor]
Way = Callable[[Tensor, Tensor], Tensor]


def contenders(case: Case) -> dict[str, Way]:
    """Every way to this gradient, by name: of grad_output and input."""
    (kernel_size, stride, padding, dilation), (first, last) = case.geometry, case.filters
    like = torch.empty((), device=DEVICE, dtype=case.dtype)

    def wgrad(grad_output: Tensor, x: Tensor) -> Tensor:
        # Only the sizes of the weight are looked at.
        weight = like.expand(grad_output.size(1), x.size(1), *kernel_size)
        return torch.ops.aten.convolution_backward(
            grad_output, x, weight, None, stride, padding, dilation, False, (0, 0), 1, (False, True, False)
        )[1]

    def gathered(grad_output: Tensor, x: Tensor) -> Tensor:
        return wgrad(grad_output[:, first:last].contiguous(memory_format=LAYOUTS[case.layout]), x)

    def sliced(grad_output: Tensor, x: Tensor) -> Tensor:
        return wgrad(grad_output[:, first:last], x)

    def ours(algorithm: str, grad_output: Tensor, x: Tensor) -> Tensor:
        return ops.conv2d_weight_grad(
            grad_output, x, case.filters, kernel_size, stride, padding, dilation, 1, algorithm
        )

    ways: dict[str, Way] = {WHOLE: wgrad, GATHERED: gathered}
    if DEVICE == "cpu":
        ways[SLICED_GRADIENT] = sliced
    if case.compiled:
        torch.compiler.reset()  # it stops compiling what it compiled often
        ways[COMPILED_SLICE] = torch.compile(sliced, dynamic=False)
    ways |= {name: partial(ours, name) for name in kernels(case.problem)}
    ways[OURS] = partial(ours, "auto")
    return {name: way for name, way in ways.items() if case.only is None or name in case.only}


def kernels(problem: planner.Problem) -> list[str]:
    """Our algorithms that do not call the library's convolution."""
    own = {name for members in planner.FAMILIES.values() for name in members} | {"matmul", "unfold", "direct"}
    # Unfolding by aten is made for CPUs, and takes more memory than a GPU has.
    return [n for n in planner.candidates(problem) if n in own and (problem.device == "cpu" or n != "unfold")]


def exact(case: Case, grad_output: Tensor, x: Tensor) -> Tensor:
    """The gradient in float64, tap by tap, a few images at a time: (learned, C, R, S)."""
    (kernel_size, (stride, _), (padding, _), _), size = case.geometry, case.output_size
    reach = (size - 1) * stride + 1
    total = torch.zeros(case.learned, x.size(1), *kernel_size, dtype=torch.float64, device=x.device)
    for some_x, some_grad in zip(x.split(16), grad_output[:, slice(*case.filters)].split(16), strict=True):
        padded, grad = F.pad(some_x.double(), (padding,) * 4), some_grad.double()
        for r in range(kernel_size[0]):
            for s in range(kernel_size[1]):
                seen = padded[:, :, r : r + reach : stride, s : s + reach : stride]
                total[:, :, r, s] += torch.einsum("nkpq,ncpq->kc", grad, seen)
    return total


def check(name: str, case: Case, actual: Tensor, expected: Tensor) -> None:
    """WrongResultError where the relative error is beyond the tolerance."""
    length = case.layer.n * case.output_size**2
    rounding = 2.0**-10 if case.numbers == "tf32" else torch.finfo(case.dtype).eps
    close(name, actual[-case.learned :], expected, tolerance(rounding, length))


class Measured(NamedTuple):
    """A case's group, if any contender could be timed; further facts by contender; what failed."""

    group: Group | None
    facts: dict[str, dict[str, Any]]
    failures: list[dict[str, Any]]


def measured(case: Case, rounds: int = ROUNDS) -> Measured:
    """Every contender, checked, then timed in turns."""
    torch.manual_seed(0)
    first = case.operands()
    nbytes = sum(tensor.nbytes for tensor in first)
    copies = max(1, min(16, _cache_bytes() // nbytes + 1))
    operands = [first, *(tuple(t.clone() for t in first) for _ in range(copies - 1))]
    expected, timers, failures = exact(case, *first), {}, []
    moved, floor = case.floor()
    for name, way in contenders(case).items():
        try:
            check(name, case, way(*first), expected)
            timers[name] = (graph_timer if DEVICE == "cuda" else wall_timer)(way, operands)
        except (RuntimeError, ValueError, AssertionError) as error:
            failures.append({"subject": case.name, "case": case.facts, "contender": name, "failure": str(error)[:500]})
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    order = random.Random(0)
    for _ in range(rounds):
        # A new order each time, so that nobody always follows the same one.
        for name in order.sample(list(timers), len(timers)):
            seconds[name].append(timers[name]())
    if not seconds:
        return Measured(None, {}, failures)
    facts: dict[str, dict[str, Any]] = {
        name: {"bytes_per_second": moved / statistics.median(times), "floor_seconds": floor}
        for name, times in seconds.items()
    }
    if OURS in facts:
        facts[OURS]["algorithm"] = planner.plan(case.problem).algorithm
    group = Group(
        "kernel", case.name, case.facts, seconds, tuple(name for name in PLAIN_GRADIENTS if name in seconds),
        floor=dict.fromkeys(seconds, floor),
    )  # fmt: skip
    return Measured(group, facts, failures)


def graph_timer(way: Way, operands: Sequence[Operands]) -> Callable[[], float]:
    """The device's seconds for a call, of calls on each of `operands` replayed as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for pair in operands:
            way(*pair)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for pair in operands:
            way(*pair)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once(replays: int) -> float:
        # The device is busy with the first replay while the host asks for the others.
        graph.replay()
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / replays / len(operands)

    replays = max(1, min(50, int(2e-3 / (once(1) * len(operands)))))
    return lambda: once(replays)


def wall_timer(way: Way, operands: Sequence[Operands]) -> Callable[[], float]:
    """The wall's seconds for a call."""

    def once() -> float:
        started = synchronized_clock()
        for pair in operands:
            way(*pair)
        return (synchronized_clock() - started) / len(operands)

    return once


def _cache_bytes() -> int:
    """Operands beyond this do not stay in a cache: twice the GPU's L2. A CPU's caches may help all alike."""
    return 2 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size if DEVICE == "cuda" else 0


@contextmanager
def numbers_as(numbers: str) -> Iterator[None]:
    """float32 is multiplied as tf32 where that is what is measured, and everybody may look for the best algorithm."""
    if DEVICE == "cpu":
        yield
        return
    flags = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [flag.fp32_precision for flag in flags], torch.backends.cudnn.benchmark
    try:
        for flag in flags:
            flag.fp32_precision = "tf32" if numbers == "tf32" else "ieee"
        torch.backends.cudnn.benchmark = True
        yield
    finally:
        for flag, value in zip(flags, before[0], strict=True):
            flag.fp32_precision = value
        torch.backends.cudnn.benchmark = before[1]


def run(
    cases: Iterable[Case], results: GrowingResults, *, rounds: int = ROUNDS, budget: float = float("inf")
) -> list[Case]:
    """Measures what `results` does not hold yet, at least one case; returns those that `budget` seconds left out."""
    pending = [case for case in cases if not results.has(case.name, case.facts)]
    started = time.perf_counter()
    for done, case in enumerate(pending):
        if done and time.perf_counter() - started > budget:
            return pending[done:]
        with numbers_as(case.numbers):
            found = measured(case, rounds)
        results.content["left_out"] = len(pending) - done - 1
        results.add(*found)
        print(f"{case.name}, {', '.join(map(str, case.facts.values()))}", file=sys.stderr, flush=True)
        if DEVICE == "cuda":
            # An error of the device shows here, after what failed was written down.
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    return []


def summary(content: Mapping[str, Any]) -> str:
    """A line a case: PyTorch's ways, our best kernel, the planner's choice and its share of the floor."""
    by_case: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for entry in content["benchmarks"]:
        case = f"{entry['case']['learned']} {entry['case']['layout']} {entry['case']['numbers']}"
        by_case.setdefault((entry["subject"], case), {})[entry["contender"]] = entry
    header = [
        "layer",
        "learned",
        "full us",
        "gather us",
        "sliced us",
        "compiled us",
        "best kernel us",
        "planned us",
        "GB/s",
        "of floor",
    ]
    rows = [_line(subject, case, ways) for (subject, case), ways in by_case.items()]
    lines = [table(header, rows)] if rows else []
    lines += [f"FAILED {f['subject']} {f['case']}: {f['contender']}: {f['failure']}" for f in content["failures"]]
    return "\n".join(lines)


def _line(subject: str, case: str, ways: Mapping[str, Mapping[str, Any]]) -> list[str]:
    def microseconds(name: str | None) -> str:
        return f"{1e6 * ways[name]['stats']['median']:.1f}" if name in ways else ""

    own = [name for name in ways if name not in (*PLAIN_GRADIENTS, OURS)]
    best = min(own, key=lambda name: ways[name]["stats"]["median"], default=None)
    planned, best_time = ways.get(OURS), f"{microseconds(best)} {best or ''}".strip()
    cells = [subject, case, *(microseconds(name) for name in PLAIN_GRADIENTS), best_time]
    if planned is None:
        return [*cells, "", "", ""]
    speed, share = planned["bytes_per_second"] / 1e9, planned["floor_share"]
    return [*cells, f"{microseconds(OURS)} {planned['algorithm']}", f"{speed:.0f}", f"{share:.0%}"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.bench_kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="for the results, such as bench/results/h100")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--full", action="store_true", help="all cases")
    which.add_argument("--curve", action="store_true", help="gather + wgrad alone, by the number of filters")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), metavar="SECONDS", help="start no case after these"
    )
    gate.add_options(parser.add_argument)
    parser.add_argument("--earlier", type=Path, metavar="FOLDER", help="results to continue from, if not FOLDER's own")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    name = "curve.json" if options.curve else "kernels.json"
    try:
        results = GrowingResults(
            options.folder / name, DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float32,
            options.earlier and options.earlier / name,
        )  # fmt: skip
    except ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failure = None if options.tested else gate.failing_tests(DEVICE)
    if failure is not None:
        print(f"{failure[-2000:]}\n{gate.REFUSAL}", file=sys.stderr)
        return FAILED
    results.content["tests"] = gate.record(DEVICE, options.tested)
    left = run(selection(options.full, options.curve), results, budget=options.budget)
    print(summary(results.content))
    if left:
        print(f"{len(left)} cases are not measured, the time is up; the same command continues")
    return FAILED if results.content["failures"] else UNFINISHED if left else 0


if __name__ == "__main__":
    sys.exit(main())
