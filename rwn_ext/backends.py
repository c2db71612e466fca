"""Which backends this installation has, and why not the others."""

from __future__ import annotations

import importlib.util

import torch

from rwn_ext import cpu, cuda


def backends() -> str:
    """In words: torch, Triton, the compiled kernels (for the CPU; toolkit, architectures, compiler), the device."""
    return "\n".join(
        [
            f"aten: torch {torch.__version__}",
            f"cpu: {_cpu_kernel()}",
            f"triton: {_triton()}",
            f"cuda: {_kernels()}",
            f"device: {_device()}",
        ]
    )


def _cpu_kernel() -> str:
    if cpu.native is None:
        return "no rwn_ext._cpu beside this package: built without a C++ compiler, or not built in this folder"
    return f"compiled, runs as {cpu.native.INSTRUCTIONS[0]} here"


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    import triton

    return str(triton.__version__)


def _kernels() -> str:
    if cuda.native is None:
        return (
            "no rwn_ext._cuda beside this package: built without nvcc, or not built in this folder (pip install -e .)"
        )
    native = cuda.native
    return f"nvcc {native.TOOLKIT}, architectures {native.ARCHITECTURES}, {native.COMPILER}"


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if cuda.native is None:
        return "torch finds none"
    try:
        capability = cuda.native.device(0).capability
    except RuntimeError as error:
        return f"none usable: {error}"
    return f"compute capability {capability / 10}, which this torch cannot use"
