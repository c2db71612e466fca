"""Ahead-of-time contracts: what each path compiles to for sm_80, sm_90 and sm_100, checked without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton")
from rwn_ext.kernels import tiles

ROOT = Path(__file__).parents[1]
ARCHS = (80, 90, 100)
DTYPES = ("bf16", "fp16", "tf32", "tf32x3", "ieee")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Of `correlate_kernel` where C % 8 == 0: the tensor core's instruction by architecture; the still operand comes in
# 16-byte copies. A prologue on sm_100, and float32, use the older instruction on purpose; ieee is no tensor core's.
TENSOR = {80: ("mma",), 90: ("mma", "wgmma"), 100: ("mma", "tcgen05")}
LARGE = {"size": [32, 128, 32, 32, 128, 3, 3], "runs": [120, 128], "dtype": "bf16", "family": "stationary"}
SLICE = [
    {**LARGE, "arch": 90},
    {**LARGE, "arch": 80, "channels_last": False},
    {**LARGE, "arch": 100, "dtype": "fp16", "runs": [127, 128]},
    {**LARGE, "arch": 90, "affine": True, "bias": True},
    {**LARGE, "arch": 80, "dtype": "tf32"},
    {**LARGE, "arch": 90, "dtype": "ieee", "last_block": True},
    {**LARGE, "arch": 90, "family": "depthwise", "groups": 128, "runs": [64, 128]},
    {**LARGE, "arch": 90, "family": "affine_relu", "affine": True},
    {**LARGE, "arch": 80, "family": "affine_relu", "affine": True, "channels_last": False},
    # Few filters are loaded whole too.
    {**LARGE, "arch": 90, "family": "depthwise", "groups": 128, "runs": [64, 72]},
]


def name(case: dict) -> str:
    parts = [
        case["family"],
        case["dtype"],
        f"sm_{case['arch']}",
        f"of{case['runs'][1] - case['runs'][0]}",
        *map(str, case.get("block", ())),
    ]
    flags = [flag for flag in ("affine", "bias", "last_block") if case.get(flag)]
    return "-".join([*parts, *flags, "nhwc" if case.get("channels_last", True) else "nchw"])


def compiled(cases: list[dict]) -> dict[str, list[dict]]:
    """In a process where the kernels were not imported for the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "aot.py", "2"],
        input=json.dumps(cases), env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(map(name, cases), json.loads(done.stdout), strict=True))


def assert_contract(case: dict, launches: list[dict]) -> None:
    by_kernel = {launch["kernel"]: launch for launch in launches}
    for launch in launches:
        assert launch["spill"] == 0 and launch["stack"] == 0, launch
        assert launch["shared"] <= SHARED_LIMIT[case["arch"]], launch
    if case["family"] == "affine_relu":
        assert by_kernel["affine_relu_backward_kernel"]["load16"] >= 2, by_kernel
        return
    if case["family"] == "depthwise":
        assert by_kernel["depthwise_kernel"]["ffma"], by_kernel
        assert not case.get("channels_last", True) or by_kernel["depthwise_kernel"]["load16"], by_kernel
        return
    product = by_kernel["correlate_kernel"]
    # The pixels that a strided 1x1 layer visits lie apart in NCHW, where its channels do, too.
    apart = case["family"] == "pointwise" and "stride" in case and not case.get("channels_last", True)
    assert product["async16"] or product["load16"] or apart, product
    if case["dtype"] == "ieee":
        assert product["ffma"] and not any(product[mark] for mark in ("mma", "wgmma", "tcgen05")), product
    else:
        assert any(product[mark] for mark in TENSOR[case["arch"]]), product
    assert bool(product["atomic"]) == bool(case.get("last_block")), product
    assert ("sum_splits_kernel" in by_kernel) != bool(case.get("last_block"))


def assert_contracts(cases: list[dict]) -> None:
    outcomes, broken = compiled(cases), []
    for case in cases:
        try:
            assert_contract(case, outcomes[name(case)])
        except AssertionError as error:
            broken.append(f"{name(case)}: {error}")
    assert not broken, "\n".join(broken)


def test_a_slice_of_the_matrix_keeps_its_contract():
    """One test, so that its compilations share two processes."""
    assert_contracts(SLICE)


VARIANTS = {
    "plain": {}, "affine": {"affine": True}, "nchw": {"channels_last": False}, "last block": {"last_block": True},
}  # fmt: skip
# Beside the number formats above, these are told by bfloat16 and by plain multiply-adds, which need the most registers.
FURTHER = {
    "affine nchw": {"affine": True, "channels_last": False}, "bias last block": {"bias": True, "last_block": True},
}  # fmt: skip


@pytest.mark.aot
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("variant", "dtype"),
    [*product(VARIANTS, DTYPES), *product(FURTHER, ("bf16", "ieee"))],
)
def test_every_shipped_configuration_keeps_its_contract(variant: str, dtype: str, arch: int):
    case = {**LARGE, **(VARIANTS | FURTHER)[variant], "arch": arch, "dtype": dtype}
    size = 2 if dtype in ("bf16", "fp16") else 4
    operands = tiles.Operands(size, case.get("channels_last", True), bool(case.get("affine")))
    shipped = tiles.shipped(operands, arch)
    assert_contracts([{**case, "block": [shape.block_channels, shape.block_columns]} for shape in shipped])


# Launches whose operands lie otherwise: few channels and many filters, filters beside each other and not.
STEM = {"size": [16, 3, 112, 112, 64, 7, 7], "stride": [2, 2], "family": "swapped"}
SKINNY = {"size": [32, 256, 28, 28, 64, 1, 1], "family": "pointwise"}
PLACES = (
    {**STEM, "runs": [32, 64]}, {**STEM, "runs": [3, 30, 40, 64]},
    {**SKINNY, "runs": [56, 64]}, {**SKINNY, "runs": [57, 64], "stride": [2, 2]},
)  # fmt: skip


@pytest.mark.aot
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_swapped_and_pointwise_launches_keep_their_contract(dtype: str, arch: int):
    ways = ({}, {"affine": True}, {"channels_last": False})
    assert_contracts([{**place, **way, "arch": arch, "dtype": dtype} for place in PLACES for way in ways])


@pytest.mark.aot
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "ieee"])
@pytest.mark.parametrize("extra", [{}, {"affine": True, "bias": True}], ids=["plain", "affine-bias"])
def test_every_depthwise_block_keeps_its_contract(extra: dict, dtype: str, arch: int):
    case = {**LARGE, **extra, "arch": arch, "dtype": dtype, "family": "depthwise", "groups": 128}
    assert_contracts([{**case, "runs": [64, 64 + learned]} for learned in (8, 16, 24, 64)])
