"""What lean models keep for backward, of plain nn, at the sizes we hold ourselves to: `python -m bench.memory [CASE]`.

Each contender runs in a process of its own, which is measured twice: by what the operating system gave it (resident
memory, large blocks returned as soon as they are free) and by the allocator's record. Nothing is timed here, so the
machine need not be quiet. `--out FOLDER` writes memory.json there, the source of the README's table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pytest_benchmark.plugin import pytest_benchmark_generate_machine_info
from torch import Tensor, nn

import rwn_ext
from bench.machine import commit, versions
from bench.results import read
from rwn_ext.files import replacing
from rwn_ext.memory import measure_cpu
from rwn_ext.paper.networks import build
from tests.architectures import MobileNetV2, resnet50, resnet101


@dataclass(frozen=True)
class Case:
    """A model, a batch and the share of plain nn's bytes that we want, or that `source` published of another way."""

    make: Callable[[], nn.Module]
    size: tuple[int, ...]
    target: float
    options: dict
    metric: str = "kept"
    input_gradient: bool = False
    source: str = ""


# The numbers are in results/paper/poster.csv of github.com/plutonium-239/memsave_torch, as "Scaled M" of ResNet-101.
MEMSAVE = "memsave_torch, arXiv 2404.12406, section 3"
CIFAR, IMAGENET = (128, 3, 32, 32), (8, 3, 224, 224)
NOTHING = {"trainable": 0, "norm": "frozen"}
INPUTS = {"trainable": 1.0, "trainable_inputs": 0.125, "norm": "frozen"}
FIRST_QUARTER = {"trainable": {"*": 0, "conv1": 1.0, "layer1.*": 1.0, "layer2.*": 1.0}}
CASES = {
    "wrn-28-10 with dropout, p=.1, batch statistics, peak of a step": Case(
        lambda: build("wrn-28-10", 10), CIFAR, 0.52, {"trainable": 0.1}, "peak"
    ),
    "wrn-28-4, p=.1, batch statistics": Case(lambda: build("wrn-28-4", 10), CIFAR, 0.52, {"trainable": 0.1}),
    "wrn-28-4, p=1, batch statistics": Case(lambda: build("wrn-28-4", 10), CIFAR, 0.52, {"trainable": 1.0}),
    "densenet-bc-100-12, p=.1, batch statistics": Case(
        lambda: build("densenet-bc-100-12", 10), CIFAR, 0.25, {"trainable": 0.1}
    ),
    "vgg19-bn, p=.1, batch statistics": Case(lambda: build("vgg19-bn", 10), CIFAR, 0.55, {"trainable": 0.1}),
    "resnet-50, p=.1, batch statistics": Case(resnet50, IMAGENET, 0.85, {"trainable": 0.1}),
    "wrn-28-4, input gradient only": Case(lambda: build("wrn-28-4", 10), CIFAR, 0.06, NOTHING, input_gradient=True),
    "densenet-bc-100-12, input gradient only": Case(
        lambda: build("densenet-bc-100-12", 10), CIFAR, 0.06, NOTHING, input_gradient=True
    ),
    "vgg19-bn, input gradient only": Case(lambda: build("vgg19-bn", 10), CIFAR, 0.06, NOTHING, input_gradient=True),
    "resnet-50, input gradient only": Case(resnet50, IMAGENET, 0.06, NOTHING, input_gradient=True),
    "resnet-50, input subset .125": Case(resnet50, IMAGENET, 0.16, INPUTS),
    "mobilenet-v2, input subset .125": Case(MobileNetV2, IMAGENET, 0.10, INPUTS),
    # "Input" differentiates by the input alone.
    "resnet-101, all": Case(resnet101, IMAGENET, 1.09, {"trainable": 1.0}, source=MEMSAVE),
    "resnet-101, input": Case(resnet101, IMAGENET, 0.67, {"trainable": 0}, input_gradient=True, source=MEMSAVE),
    "resnet-101, input, norms in evaluation mode": Case(
        resnet101, IMAGENET, 0.18, NOTHING, input_gradient=True, source=MEMSAVE
    ),
    "resnet-101, norms": Case(resnet101, IMAGENET, 0.67, {"trainable": 0}, source=MEMSAVE),
    "resnet-101, surgical (first quarter)": Case(resnet101, IMAGENET, 0.88, FIRST_QUARTER, source=MEMSAVE),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"part of a name; default all of: {'; '.join(CASES)}")
    parser.add_argument("--contender", choices=("plain", "lean"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write memory.json there, beside what it holds")
    options = parser.parse_args(arguments)
    names = [name for name in CASES if not options.cases or any(part in name for part in options.cases)]
    if options.contender:
        print(json.dumps(measured(CASES[options.cases[0]], options.contender)))
        return
    print("| case | process | allocator | target |\n| --- | ---: | ---: | ---: |")
    for name in names:
        found = row(name, *(_in_own_process(name, contender) for contender in ("plain", "lean")))
        print(f"| {name} | {found['process']:.3f} | {found['allocator']:.3f} | {found['target']} |", flush=True)
        if options.out:
            add(found, options.out / "memory.json")


def row(name: str, plain: dict[str, dict[str, int]], lean: dict[str, dict[str, int]]) -> dict[str, Any]:
    """A case as the results file says it: the two ratios, and the bytes by the allocator's record."""
    case, metric = CASES[name], CASES[name].metric
    ratios = {way: round(lean[way][metric] / plain[way][metric], 4) for way in ("process", "allocator")}
    sizes = {f"{who} MB": round(found["allocator"][metric] / 1e6) for who, found in (("plain", plain), ("lean", lean))}
    return {"case": name, "bytes": metric, **ratios, "target": case.target, "source": case.source, **sizes}


def add(row: dict[str, Any], file: Path) -> None:
    """Puts the row into the file, at once or not at all; others of the same machine and commit stay."""
    content: dict[str, Any] = {
        "machine_info": versions(pytest_benchmark_generate_machine_info(), "cpu"),
        "commit_info": commit(),
        "text": TEXT,
    }
    earlier = read(file) if file.exists() else {}
    rows: Iterable[dict[str, Any]] = earlier["cases"] if content.items() <= earlier.items() else ()
    by_name = {old["case"]: old for old in rows} | {row["case"]: row}
    content["cases"] = [by_name[name] for name in CASES if name in by_name]
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as path:
        path.write_text(json.dumps(content, indent=1) + "\n")


TEXT = (
    "Bytes of one training step with `lean=True`, of those of the same network in plain nn that learns everything "
    "(float32): live between forward and backward, or the peak with parameters and momentum. CIFAR networks: 128 "
    "images of 32x32; the others: 8 of 224x224."
)


def measured(case: Case, contender: str) -> dict[str, dict[str, int]]:
    """Bytes of one step: kept between forward and backward, and the peak with everything that lives between steps."""
    torch.manual_seed(0)
    model = case.make()
    if contender == "lean":
        model = rwn_ext.convert(model, lean=True, **case.options)
    learned = [p for p in model.parameters() if p.requires_grad]
    # Beyond the metric of the input's gradient, plain nn trains all it has.
    optimizer = torch.optim.SGD(learned, lr=1e-3, momentum=0.9) if learned and not case.input_gradient else None
    x = torch.randn(case.size, requires_grad=case.input_gradient)

    def step(mark: Callable[[], None], batch: Tensor) -> None:
        loss = F.cross_entropy(model(batch), torch.zeros(len(batch), dtype=torch.long))
        mark()
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        batch.grad = None
        model.zero_grad()

    step(lambda: None, x[:2].detach().requires_grad_(case.input_gradient))
    by_process = _resident(lambda mark: step(mark, x))
    kept, peak = measure_cpu(lambda mark: step(mark, x))
    states = [v for s in optimizer.state.values() for v in s.values()] if optimizer else []
    lasting = [*model.parameters(), *model.buffers(), x, *(v for v in states if torch.is_tensor(v))]
    return {
        "process": by_process,
        "allocator": {"kept": kept, "peak": peak + sum(t.nbytes for t in lasting)},
    }


def _resident(step: Callable[[Callable[[], None]], None]) -> dict[str, int]:
    """By /proc: what the process grew by until the mark, and its largest size beyond the libraries' own."""
    before, kept = _status("VmRSS"), []
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    step(lambda: kept.append(_status("VmRSS") - before))
    return {"kept": kept[0], "peak": _status("VmHWM") - _BARE}


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


_BARE = _status("VmRSS")
"""The interpreter with its libraries, before any model."""


def _in_own_process(name: str, contender: str) -> dict[str, dict[str, int]]:
    # Blocks of 64 kB and more come from the system and go back to it.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "bench.memory", "--contender", contender, name]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if output.returncode:
        raise SystemExit(output.stderr)
    return json.loads(output.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
