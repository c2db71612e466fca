"""torch.compile: one graph, the same values, and no merged weight kept between forward and backward."""

from __future__ import annotations

import copy
import io
import shutil
from contextlib import nullcontext

import pytest
import torch
from conftest import integers, saved_tensors
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from rwn_ext import PartialConv2d, convert

CHOICES = {
    "contiguous": {"trainable": 3},
    "scattered": {"trainable": [0, 3, 4, 9]},
    "block": {"trainable": [1, 5], "trainable_inputs": [0, 2]},
    "none": {"trainable": 0},
    "all": {"trainable": 1.0},
}
EVERY_CHOICE = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def layer_of(choice: dict, **more) -> PartialConv2d:
    return PartialConv2d(4, 12, 3, **{"padding": 1, "dtype": torch.float64, **choice, **more})


def values_and_gradients(
    call, layer: nn.Module, *size: int, layout: torch.memory_format = torch.contiguous_format
) -> list[torch.Tensor]:
    torch.manual_seed(1)
    x = integers(*size, device=next(layer.parameters()).device.type).to(memory_format=layout).requires_grad_()
    layer.zero_grad()
    output = call(x)
    output.backward(integers(*output.shape, device=x.device.type))
    return [output.detach(), x.grad, *(p.grad.clone() for p in layer.parameters() if p.requires_grad)]


def assert_same(compiled, layer: nn.Module, *size: int, **more) -> None:
    ours, eager = (values_and_gradients(call, layer, *size, **more) for call in (compiled, layer))
    for a, b in zip(ours, eager, strict=True):
        assert a.stride() == b.stride() and torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@EVERY_CHOICE
def test_one_graph_and_eager_s_values(choice: dict, dynamic: bool | None, device: str):
    layer = layer_of(choice, device=device)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for size in [(2, 4, 7, 8), (3, 4, 9, 6)]:
        assert_same(compiled, layer, *size)


@pytest.mark.parametrize(
    "more",
    [
        {"groups": 2},
        {"groups": 4, "stride": 2},
        {"padding": "same", "padding_mode": "reflect"},
        {"padding": "valid", "stride": (1, 2), "bias": False},
        {"algorithm": "full"},
        {"algorithm": "unfold"},
        {"kernel_size": 1, "padding": 0, "algorithm": "matmul"},
    ],
    ids=str,
)
def test_geometries_and_forced_algorithms(more: dict, device: str):
    layer = PartialConv2d(
        **{"in_channels": 4, "out_channels": 12, "kernel_size": 3, "padding": 1, "trainable": [0, 2, 3], **more},
        dtype=torch.float64,
        device=device,
    )
    assert_same(torch.compile(layer, backend="aot_eager", fullgraph=True), layer, 2, 4, 7, 8)


def test_an_algorithm_that_cannot_be_is_refused_when_compiled_too():
    layer = layer_of({"trainable": 3}, algorithm="matmul")
    with pytest.raises(Exception, match="1x1"):
        torch.compile(layer, backend="aot_eager")(integers(2, 4, 7, 8))


def test_after_set_trainable_the_new_subset_is_compiled():
    layer = layer_of({"trainable": [0, 3]})
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_same(compiled, layer, 2, 4, 7, 8)
    layer.set_trainable_([1, 3])
    assert_same(compiled, layer, 2, 4, 7, 8)
    layer.set_trainable_([1, 5, 7], [0])
    assert_same(compiled, layer, 2, 4, 7, 8)


@pytest.mark.parametrize("choice", ["contiguous", "scattered", "block"])
def test_autocast(choice: str, device: str):
    layer = layer_of(CHOICES[choice], dtype=torch.float32, device=device)

    def call(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            return layer(x.float())

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    ours, eager = (values_and_gradients(c, layer, 2, 4, 7, 8) for c in (compiled, call))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, eager, strict=True))


@needs_compiler
@pytest.mark.parametrize(
    ("choice", "layout"),
    [
        ("contiguous", torch.channels_last),
        ("scattered", torch.channels_last),
        ("block", torch.channels_last),
        ("contiguous", torch.contiguous_format),
    ],
    ids=str,
)
def test_inductor_equals_eager_and_keeps_no_merged_weight(choice: str, layout: torch.memory_format, device: str):
    """Contiguous tensors it keeps as channels_last copies, of nn.Conv2d's weight and input too; others as they are."""
    layer = layer_of(CHOICES[choice], device=device).to(memory_format=layout)
    compiled = torch.compile(layer, fullgraph=True)
    assert_same(compiled, layer, 2, 4, 7, 8, layout=layout)
    x = integers(2, 4, 7, 8, device=device).to(memory_format=layout).requires_grad_()
    with saved_tensors() as kept:
        compiled(x)
    assert kept and layer.weight.shape not in [t.shape for t in kept]
    if layout == torch.channels_last:
        held = {p.untyped_storage().data_ptr() for p in (*layer.parameters(), x)}
        new = [t for t in kept if t.is_floating_point() and t.untyped_storage().data_ptr() not in held]
        seen = 0 if layer.inputs.is_full else x[:, layer.inputs.indices].numel() * x.element_size()
        assert sum(t.untyped_storage().nbytes() for t in new) == seen


@pytest.mark.parametrize("choice", ["contiguous", "scattered", "block"])
def test_batches_of_all_sizes_need_two_compilations(choice: str, device: str):
    layer = layer_of(CHOICES[choice], device=device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for batch in (2, 3, 5, 7, 4):
        assert_same(compiled, layer, batch, 4, 7, 8)
    assert counter.frame_count == 2


def network(device: str) -> nn.Sequential:
    """Filters learned scattered, in some groups, in a contiguous block."""
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=2, bias=False), nn.ReLU(),
        nn.Conv2d(12, 6, 1),
    )  # fmt: skip
    return convert(model.to(device), {"0": [1, 4, 5], "2": [0, 5, 6], "4": 2})


def trained(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The model's output and gradients in a step of training, which is made."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    x = x.clone().requires_grad_()
    output = model(x)
    output.float().square().sum().backward()
    optimizer.step()
    return [output.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@needs_compiler
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
@pytest.mark.works_with(
    "`torch.compile(fullgraph=True)` in training, under autocast too; batches of all sizes need two compilations"
)
def test_inductor_trains_a_network_and_compiles_for_two_sizes(amp: bool, device: str):
    eager = network(device)
    model = copy.deepcopy(eager)
    counters.clear()
    compiled = torch.compile(model, fullgraph=True)
    # bfloat16 has 8 bits, and fused operations round less often.
    tolerance = 2e-2 if amp else 1e-5
    graphs = []
    for batch in (3, 5, 6, 9):
        x = torch.randn(batch, 4, 7, 8, device=device)
        with torch.autocast(device, torch.bfloat16) if amp else nullcontext():
            ours, expected = trained(compiled, x), trained(eager, x)
        graphs.append(counters["stats"]["unique_graphs"])
        for a, b in zip(ours, expected, strict=True):
            assert a.dtype == b.dtype and (a - b).norm() <= tolerance * b.norm()
        # Rounding must not add up over the steps.
        model.load_state_dict(eager.state_dict())
    assert graphs == [1, 2, 2, 2] and not counters["graph_break"]


@pytest.mark.parametrize("frozen", ["random", "zero"])
@pytest.mark.parametrize("lean", [False, True], ids=["plain", "lean"])
def test_whole_models_are_one_graph_in_training(frozen: str, lean: bool, device: str):
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, bias=False),
        nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 12, 1),
    )  # fmt: skip
    eager = convert(model.to(device, torch.float64), [0, 3, 5], frozen=frozen, lean=lean)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for batch in (2, 3):
        x = torch.randn(batch, 4, 7, 8, dtype=torch.float64, device=device)
        for a, b in zip(trained(compiled, x), trained(eager, x), strict=True):
            torch.testing.assert_close(a, b)
    assert all(torch.allclose(a, b) for a, b in zip(model.buffers(), eager.buffers(), strict=True))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.works_with("`torch.export` with a dynamic batch")
def test_a_trained_model_is_exported_with_a_dynamic_batch(choice: str, device: str):
    model = nn.Sequential(layer_of(CHOICES[choice], device=device), nn.BatchNorm2d(12), nn.ReLU()).double()
    example = integers(2, 4, 7, 8, device=device)
    trained(model.to(device), example)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model.eval(), (example,), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file)
    for x in (example, integers(5, 4, 7, 8, device=device), integers(1, 4, 7, 8, device=device)):
        for program in (exported, loaded):
            assert torch.equal(program.module()(x), model(x))


@pytest.mark.parametrize("choice", ["contiguous", "scattered", "block", "all"])
def test_torch_func_and_the_merged_weight_are_differentiated_when_compiled_too(choice: str, device: str):
    layer, x = layer_of(CHOICES[choice], device=device), integers(2, 4, 7, 8, device=device)
    learned = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}

    def gradient(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> dict[str, torch.Tensor]:
        return torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).square().sum())(parameters)

    ours, eager = torch.compile(gradient, backend="aot_eager", fullgraph=True)(learned, x), gradient(learned, x)
    assert all(torch.allclose(ours[name], value, rtol=1e-12) for name, value in eager.items())
    torch.compile(lambda: layer.weight.square().sum(), backend="aot_eager", fullgraph=True)().backward()
    assert torch.equal(layer.weight_trainable.grad, 2 * layer.weight_trainable)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("choice", ["contiguous", "scattered", "block"])
def test_a_captured_cuda_graph_repeats_the_step(choice: str):
    layer = layer_of(CHOICES[choice], device="cuda")
    x, cotangent = integers(2, 4, 7, 8, device="cuda"), integers(2, 12, 7, 8, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            layer(x).backward(cotangent)
    torch.cuda.current_stream().wait_stream(side)
    layer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(x).backward(cotangent)
    x.copy_(integers(2, 4, 7, 8, device="cuda"))
    graph.replay()
    captured = layer.weight_trainable.grad.clone()
    (expected,) = torch.autograd.grad(layer(x), layer.weight_trainable, cotangent)
    assert torch.allclose(captured, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_reduced_overhead_equals_eager():
    layer = layer_of(CHOICES["scattered"], device="cuda")
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    for _ in range(3):
        assert_same(compiled, layer, 2, 4, 7, 8)
