"""Compiles the kernels as the launchers would launch them, for GPUs that are not there, and reads what came out.

    python tests/aot.py < cases.json > outcomes.json

A case names a problem, a dtype and an architecture. The launcher itself runs, on CPU memory that nobody touches; its
launches are recorded with Triton's own rules for specialising arguments, and compiled. A process of its own, because a
kernel that was imported for the interpreter cannot be compiled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from rwn_ext.kernels import affine_relu, tiles
from rwn_ext.kernels import weight_grad as launcher

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# SASS that says how a path works, by the name the contracts use.
MARKS = {
    "wgmma": r"\bHGMMA\b",
    "mma": r"\bHMMA\b",
    "tcgen05": r"\bUTCHMMA\b",
    "ffma": r"\bFFMA2?\b",
    "async16": r"\bLDGSTS\.E\.(BYPASS\.)?(LTC128B\.)?128\b",
    "load16": r"\bLDG\.E\.(\w+\.)*128\b",
    "load2": r"\bLDG\.E\.(\w+\.)*U16\b",
    "atomic": r"\b(ATOMG|ATOM|RED)\b",
    "spill": r"\b(STL|LDL)\b",
}


def outcome(case: dict[str, Any]) -> list[dict[str, Any]]:
    """What each launch of this case compiles to."""
    return [_compiled(*launch, case["arch"]) for launch in launches(case)]


def launches(case: dict[str, Any]) -> list[tuple[JITFunction, tuple, dict]]:
    """The launches that the launcher makes of this case."""
    n, c, h, w, k, r, s = case["size"]
    groups, runs, stride = case.get("groups", 1), tuple(case["runs"]), tuple(case.get("stride", (1, 1)))
    layout = torch.channels_last if case.get("channels_last", True) else torch.contiguous_format
    dtype = DTYPES.get(case["dtype"], torch.float32)
    padding = (r // 2, s // 2)
    p, q = (h + 2 * padding[0] - r) // stride[0] + 1, (w + 2 * padding[1] - s) // stride[1] + 1
    filters = launcher.Filters(runs, k, groups)
    touched = len(launcher._by_group(filters))
    x = torch.empty(n, c // groups * touched, h, w, dtype=dtype, memory_format=layout)
    grad_output = torch.empty(n, k, p, q, dtype=dtype, memory_format=layout)
    learned = sum(runs[1::2]) - sum(runs[::2])
    out = torch.empty(learned, c // groups, r, s, dtype=dtype)
    affine = launcher.Affine(torch.empty(x.size(1)), torch.empty(x.size(1))) if case.get("affine") else None
    bias = torch.empty(learned, dtype=dtype) if case.get("bias") else None
    geometry = launcher._Geometry((r, s), stride, padding, (1, 1))
    precision = case["dtype"] if dtype == torch.float32 else "ieee"

    recorded: list[tuple[JITFunction, tuple, dict]] = []
    run, chip, cut = JITFunction.run, launcher._chip, tiles.cut
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: recorded.append((self, args, kwargs))
    launcher._chip = lambda device: (MULTIPROCESSORS[case["arch"]], case["arch"])
    if "block" in case:
        tiles.cut = lambda *args, **kwargs: _with_block(cut(*args, **kwargs), *case["block"], case, dtype)
    try:
        if case["family"] == "affine_relu":
            affine_relu.affine_relu_backward(x, x, *affine, out=x)
            return recorded
        launcher._launch(
            case["family"], grad_output, x, filters, geometry, out, bias, affine, precision,
            case.get("last_block", False),
        )  # fmt: skip
    finally:
        JITFunction.run, launcher._chip, tiles.cut = run, chip, cut
    return recorded


def _with_block(plan: tiles.Tiles, channels: int, columns: int, case: dict, dtype: torch.dtype) -> tiles.Tiles:
    """The plan with another shipped tile."""
    operands = tiles.Operands(dtype.itemsize, case.get("channels_last", True), bool(case.get("affine")))
    shape = tiles.shape(channels, columns, operands, case["arch"])
    return plan._replace(shape=shape)


def _compiled(kernel: JITFunction, args: tuple, kwargs: dict, arch: int) -> dict[str, Any]:
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    options = {name: values.pop(name) for name in list(values) if name not in kernel.arg_names}
    constants, signature, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            constants[parameter.name], signature[parameter.name] = value, "constexpr"
            continue
        signature[parameter.name] = _type(value)
        address = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if address % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return {"kernel": kernel.__name__, "shared": binary.metadata.shared, **_disassembled(binary.asm["cubin"])}


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}
        return "*" + names[value.dtype]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _disassembled(cubin: bytes) -> dict[str, Any]:
    """What the binary's code says; remembered beside Triton's own cache of binaries, since reading it takes as long."""
    key = hashlib.sha256(cubin + json.dumps(MARKS).encode()).hexdigest()
    known = Path(triton.knobs.cache.dir) / "disassembled" / f"{key}.json"
    if known.exists():
        return json.loads(known.read_text())
    found = _read(cubin)
    known.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=known.parent, delete=False) as part:
        json.dump(found, part)
    os.replace(part.name, known)
    return found


def _read(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("cuobjdump", "-sass", file.name)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        **{name: len(re.findall(pattern, sass)) for name, pattern in MARKS.items()},
    }


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / name), *arguments], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    torch.set_num_threads(1)
    with get_context("fork").Pool(int(sys.argv[1]) if len(sys.argv) > 1 else 2) as pool:
        json.dump(pool.map(outcome, json.load(sys.stdin), chunksize=1), sys.stdout)
