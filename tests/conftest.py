"""The oracle, the tolerance, the devices and the poisoned memory of every test."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    # Before anything imports Triton: its kernels then run on CPU tensors, in the interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

from rwn_ext import cpu, planner

# `make gpu` does without it, and without the tests that need it.
if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile(
        "rwn_ext", deadline=None, derandomize=True, database=None, print_blob=False, max_examples=60
    )
    settings.load_profile("rwn_ext")

# What is compared with float64 is float32, not what convolutions on a GPU make of it unless told otherwise.
torch.backends.cudnn.allow_tf32 = False

# On tensors this small threads only wait for each other.
torch.set_num_threads(1)

DEVICES = [pytest.param("cpu", id="cpu")]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", id="cuda", marks=pytest.mark.gpu))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="I/N", help="every N-th test from the I-th on, for N processes side by side")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.shard:
        first, count = map(int, config.option.shard.split("/"))
        items[:] = items[first::count]


def dense(conv: nn.Conv2d, x: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The oracle: output, grad_input and parameter gradients of torch's own convolution in float64."""
    conv, x = copy.deepcopy(conv).double().requires_grad_(), x.detach().double().requires_grad_()
    output = conv(x)
    grad_input, *grads = torch.autograd.grad(output, [x, *conv.parameters()], cotangent.double())
    return output.detach(), grad_input, dict(zip(dict(conv.named_parameters()), grads, strict=True))


def assert_close(actual: Tensor, expected: Tensor, length: int) -> None:
    """Relative RMS error against float64, for a sum of `length` products: two roundings of the result, and those of a
    running sum in the accumulator's type, which is float32 for the half types."""
    assert actual.shape == expected.shape
    accumulator = torch.float64 if actual.dtype == torch.float64 else torch.float32
    tolerance = 2 * torch.finfo(actual.dtype).eps + torch.finfo(accumulator).eps * length**0.5
    error = (actual.double() - expected).square().mean().sqrt()
    assert error <= tolerance * expected.square().mean().sqrt(), f"{error:.3g} is more than {tolerance:.3g} of it"


def integers(*shape: int, low: int = -3, high: int = 3, dtype: torch.dtype = torch.float64, device: str = "cpu"):
    """Whole numbers, whose sums of products are exact: compare with ==."""
    return torch.randint(low, high + 1, shape).to(device, dtype)


def filled_with_integers(module: nn.Module, low: int = -3, high: int = 3) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randint(low, high + 1, parameter.shape))
    return module


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """What autograd keeps for backward of the operations inside."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory_and_seed() -> Iterator[None]:
    """Fresh memory holds NaN, so that nothing reads what nobody wrote."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def no_forced_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RWN_EXT_ALGORITHM", "RWN_EXT_TUNE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def without_cpu_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where the package was built without a C++ compiler."""
    planner._forget()
    monkeypatch.setattr(cpu, "native", None)
    yield
    monkeypatch.undo()
    planner._forget()
