"""What numbers depend on: the machine and the code, as a results file says it; nothing in it names the machine."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from shutil import which
from typing import Any

import torch
from pytest_benchmark.utils import get_commit_info

from bench.rates import rates


def commit() -> dict[str, Any]:
    """The commit that is checked out, and whether more than results differs from it: a results file's "commit_info"."""
    found = get_commit_info()
    others = ["git", "diff", "--quiet", "HEAD", "--", ":/", ":(top,exclude)bench/results"]
    dirty = found["dirty"] and subprocess.run(others, check=False).returncode != 0
    return {"id": found["id"], "time": found.get("time"), "dirty": dirty}


def described(found: Mapping[str, Any], device: str, dtype: torch.dtype) -> dict[str, Any]:
    """A results file's "machine_info", of what pytest-benchmark has found."""
    return {
        **versions(found, device), "dtype": str(dtype).removeprefix("torch."), "rates": asdict(rates(device, dtype)),
    }  # fmt: skip


def versions(found: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Of it, what numbers depend on that are not times."""
    name = torch.cuda.get_device_name() if device == "cuda" else found["cpu"].get("brand_raw", "unknown CPU")
    return {
        **{key: found[key] for key in ("machine", "system", "python_version")},
        "device": name, "torch": torch.__version__, "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(), "onednn": _onednn(torch.__config__.show()),
        **(_gpu_versions() if device == "cuda" else {}),
    }  # fmt: skip


def _onednn(configuration: str) -> str | None:
    """The version of oneDNN, which torch names MKL-DNN; None where torch was built without it."""
    named = re.search(r"(?:MKL-DNN|oneDNN) v([\d.]+)", configuration)
    return named and named[1]


def _gpu_versions() -> dict[str, Any]:
    """Of what computes on a GPU, and of its driver; None of what is not there."""
    triton = import_module("triton").__version__ if find_spec("triton") else None
    return {
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "driver": _driver(), "triton": triton,
    }  # fmt: skip


def _driver() -> str | None:
    """As nvidia-smi says it."""
    if which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return lines[0] if lines else None
