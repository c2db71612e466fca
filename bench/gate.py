"""The tests that come before every measurement: numbers of code that computes something else are worth nothing."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rwn_ext import cuda

ROOT = Path(__file__).parents[1]
# What every number on a CPU rests on: operators, their gradients and lean blocks, against float64. Side by side.
ON_CPU = (
    ("tests/test_ops.py", "tests/test_rooms.py", "tests/test_cpu.py", "tests/test_lean_block.py"),
    ("tests/test_autograd.py",),
)
# On a GPU: the Triton kernels alone, in layers and in lean blocks; compiled models; operators; the kernels of csrc.
ON_GPU = (
    "tests/test_kernels_gpu.py", "tests/test_kernels_api.py", "tests/test_kernels_lean.py", "tests/test_compile.py",
)  # fmt: skip
OPERATORS = "tests/test_ops.py"  # needs hypothesis
COMPILED = "tests/test_csrc.py::test_real_layers_on_a_gpu"
# Tests on a GPU compile many kernels, which processes do side by side; each takes a few hundred megabytes of the GPU.
SHARDS = min(16, max(4, os.cpu_count() or 1))
PASSED, SAID = "passed", "said to have passed"
REFUSAL = "the tests above fail, so nothing is measured"


def files(device: str) -> tuple[str, ...]:
    """What is tested, of what can be tested with the packages at hand."""
    if device == "cpu":
        return tuple(file for group in ON_CPU for file in group)
    operators = (OPERATORS,) if importlib.util.find_spec("hypothesis") else ()
    return (*ON_GPU, *operators, *((COMPILED,) if cuda.native is not None else ()))


def commands(device: str, *options: str) -> tuple[tuple[str, ...], ...]:
    """The processes that together run these tests."""
    pytest = (sys.executable, "-m", "pytest", "-q", *options)
    if device == "cpu":
        return tuple((*pytest, *group) for group in ON_CPU)
    return tuple((*pytest, *files(device), f"--shard={i}/{SHARDS}") for i in range(SHARDS))


def failing_tests(device: str) -> str | None:
    """What pytest says where a test fails; the first failure ends all."""
    with ExitStack() as stack:
        running = {}
        for command in commands(device, "-x"):
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            running[stack.enter_context(process)] = log
        while running:
            time.sleep(0.1)
            for process in [process for process in running if process.poll() is not None]:
                log = running.pop(process)
                if process.returncode:
                    for other in running:
                        other.terminate()
                    log.seek(0)
                    return log.read()
    return None


def add_options(add: Callable[..., Any]) -> None:
    """Those of a measuring program, whose `tested` is then the outcome of tests that it need not run; else None."""
    add("--tested", action="store_const", const=SAID, help="do not run the tests: you say that they have passed")
    add("--just-tested", action="store_const", const=PASSED, dest="tested", help=argparse.SUPPRESS)


def record(device: str, tested: str | None) -> dict[str, Any]:
    """What a results file says of the tests, all of which have passed or are said to have."""
    return {"files": list(files(device)), "outcome": tested or PASSED}
