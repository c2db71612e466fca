"""The autograd Function: numerical derivatives, what is kept for backward, grad modes, autocast."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close, dense, filled_with_integers, integers, saved_tensors
from torch import Tensor, nn

from rwn_ext import PartialConv2d, ops

LAYERS = {
    "scattered": {"trainable": [0, 2, 5]},
    "block": {"trainable": [1, 2], "trainable_inputs": [1]},
    "all-filters-one-input": {"trainable": 1.0, "trainable_inputs": [0]},
    "all": {"trainable": 1.0},
    "none": {"trainable": 0},
    "bias-only": {"trainable": 0, "trainable_bias": "all"},
    "no-inputs": {"trainable": 3, "trainable_inputs": 0},
    "grouped": {"trainable": [0, 1, 4], "groups": 2},
    "one-group": {"trainable": [3], "groups": 2, "trainable_inputs": 1},
    "circular": {"trainable": [0, 2], "padding_mode": "circular"},
    "unfold": {"trainable": [0, 2], "algorithm": "unfold"},
    "full": {"trainable": [0, 2], "algorithm": "full"},
}


def layer_of(choice: dict, **more) -> PartialConv2d:
    return PartialConv2d(4, 6, (3, 2), (1, 2), (1, 0), **{"dtype": torch.float64, **choice, **more})


@pytest.mark.parametrize("choice", LAYERS.values(), ids=LAYERS)
@pytest.mark.works_with("double backward")
def test_first_and_second_derivatives_are_numerically_right(choice: dict):
    layer = layer_of(choice)
    x = torch.randn(2, 4, 4, 5, dtype=torch.float64, requires_grad=True)
    learned = {name: p for name, p in layer.named_parameters() if p.requires_grad}

    def call(leaf: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(learned, values, strict=True)), (leaf,))

    assert torch.autograd.gradcheck(call, (x, *learned.values()))
    assert torch.autograd.gradgradcheck(call, (x, *learned.values()))


def test_double_backward_reaches_the_input_through_the_saved_channels():
    """d/dx of grad_weight alone, without any path through grad_input."""
    layer = layer_of({"trainable": [0, 2], "trainable_inputs": [1, 3]})
    x = torch.randn(2, 4, 4, 6, dtype=torch.float64, requires_grad=True)
    output = layer(x)
    (grad,) = torch.autograd.grad(output, layer.weight_trainable, torch.randn_like(output), create_graph=True)
    (second,) = torch.autograd.grad(grad, x, torch.randn_like(grad))
    assert second[:, [1, 3]].abs().min() > 0 and not second[:, [0, 2]].any()


def test_retained_graph_two_forwards_and_accumulation():
    conv = filled_with_integers(nn.Conv2d(4, 6, 3, dtype=torch.float64))
    layer = PartialConv2d.from_conv2d(conv, trainable=[0, 2], trainable_inputs=[1, 3])
    rows = ([0, 2], [1, 3])
    xs, cotangents = [integers(2, 4, 5, 5) for _ in range(2)], [integers(2, 6, 3, 3) for _ in range(2)]
    expected = [dense(conv, x, c)[2]["weight"][rows[0]][:, rows[1]] for x, c in zip(xs, cotangents, strict=True)]

    outputs = [layer(x) for x in xs]
    outputs[1].backward(cotangents[1], retain_graph=True)
    assert torch.equal(layer.weight_trainable.grad, expected[1])
    outputs[0].backward(cotangents[0])
    assert torch.equal(layer.weight_trainable.grad, expected[0] + expected[1])
    outputs[1].backward(cotangents[1])
    assert torch.equal(layer.weight_trainable.grad, expected[0] + 2 * expected[1])
    with pytest.raises(RuntimeError, match="second time"):
        outputs[1].backward(cotangents[1])


def test_weights_changed_between_forward_and_backward_are_noticed():
    layer = layer_of({"trainable": 2})
    output = layer(torch.randn(2, 4, 4, 5, dtype=torch.float64, requires_grad=True))
    with torch.no_grad():
        layer.weight_trainable.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward(torch.randn_like(output))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("choice", LAYERS.values(), ids=LAYERS)
def test_without_gradients_nothing_is_kept_and_training_works_afterwards(choice: dict, mode, monkeypatch):
    """An index tensor first made in inference mode must not end up in a graph."""
    monkeypatch.setattr(ops, "_INDICES", {})
    choice = {**choice, "trainable": [0, 3, 4, 7, 11]} if choice["trainable"] != 0 else choice
    layer = PartialConv2d(6, 12, 3, **{**choice, "trainable_inputs": [0, 2]})
    x = torch.randn(2, 6, 7, 7, requires_grad=True)
    with mode(), saved_tensors() as kept:
        output = layer(x)
    assert not kept and not output.requires_grad
    trained = layer(x)
    assert torch.equal(trained, output)
    trained.backward(torch.randn_like(trained))
    assert x.grad.isfinite().all()
    with mode():
        layer(x)
    cotangent = torch.randn_like(output).requires_grad_()
    (again,) = torch.autograd.grad(layer(x), x, cotangent, create_graph=True)
    again.backward(torch.randn_like(again))


def aliases(kept: list[Tensor], tensor: Tensor) -> bool:
    return any(t.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for t in kept)


def floats(kept: list[Tensor]) -> list[Tensor]:
    return [t for t in kept if t.is_floating_point()]


@pytest.mark.parametrize("leaf", [True, False], ids=["x-with-grad", "x-without"])
@pytest.mark.parametrize("choice", ["none", "bias-only", "no-inputs"])
def test_a_layer_that_learns_no_weight_keeps_no_input(choice: str, leaf: bool, device: str):
    layer = layer_of(LAYERS[choice], device=device)
    x = torch.randn(8, 4, 16, 16, dtype=torch.float64, device=device, requires_grad=leaf)
    with saved_tensors() as kept:
        output = layer(x)
    assert output.requires_grad == (leaf or choice != "none")
    if leaf:
        # grad_input needs the whole weight, which lies in one Parameter here.
        assert len(kept) == 1 and kept[0].data_ptr() == layer.weight_frozen.data_ptr()
    else:
        assert not kept


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("inputs", [[0], [1, 2], [0, 3]], ids=str)
def test_an_input_subset_keeps_a_compact_copy_of_its_channels(inputs: list[int], layout, device: str):
    layer = layer_of({"trainable": [0, 2], "trainable_inputs": inputs}, device=device)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64, device=device).to(memory_format=layout).requires_grad_()
    with saved_tensors() as kept:
        layer(x)
    assert not aliases(kept, x)
    (seen,) = [t for t in floats(kept) if t.shape[2:] == x.shape[2:]]
    assert torch.equal(seen, x[:, inputs]) and seen.is_contiguous(memory_format=layout)
    assert seen.untyped_storage().nbytes() == seen.numel() * 8


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("filters", "inputs", "channels"),
    [
        ([0, 2], None, [0, 1]),
        ([6], None, [4, 5]),
        ([1, 9, 11], None, [0, 1, 6, 7]),
        ([4, 9], [1], [3, 7]),
    ],
    ids=str,
)
def test_a_grouped_layer_keeps_only_touched_groups(filters, inputs, channels, layout, device: str):
    layer = PartialConv2d(8, 12, 3, groups=4, trainable=filters, trainable_inputs=inputs, device=device)
    x = torch.randn(2, 8, 6, 6, device=device).to(memory_format=layout).requires_grad_()
    with saved_tensors() as kept:
        layer(x)
    assert not aliases(kept, x)
    (seen,) = [t for t in floats(kept) if t.shape[2:] == x.shape[2:]]
    assert torch.equal(seen, x[:, channels]) and seen.untyped_storage().nbytes() == seen.numel() * 4


@pytest.mark.parametrize("channels", [[2], [0, 2]], ids=str)
def test_a_depthwise_layer_keeps_only_learned_channels(channels: list[int], device: str):
    layer = PartialConv2d(4, 4, 3, groups=4, trainable=channels, device=device)
    x = torch.randn(2, 4, 6, 6, device=device, requires_grad=True)
    with saved_tensors() as kept:
        layer(x)
    (seen,) = [t for t in floats(kept) if t.shape[2:] == x.shape[2:]]
    assert torch.equal(seen, x[:, channels]) and not aliases(kept, x)


@pytest.mark.parametrize("leaf", [True, False], ids=["x-with-grad", "x-without"])
@pytest.mark.parametrize("choice", [name for name in LAYERS if name != "all"])
def test_the_merged_weight_is_never_kept(choice: str, leaf: bool, device: str):
    """Only Parameters, which live anyway, and the input: and no weight at all where the input needs no gradient."""
    layer = layer_of(LAYERS[choice], device=device)
    x = torch.randn(2, 4, 8, 9, dtype=torch.float64, device=device, requires_grad=leaf)
    with saved_tensors() as kept:
        layer(x)
    weights = [t for t in floats(kept) if t.shape[2:] == (3, 2)]
    parameters = {p.data_ptr() for p in layer.parameters()}
    assert all(t.data_ptr() in parameters for t in weights)
    assert bool(weights) == leaf
    assert len(floats(kept)) - len(weights) == (layer.weight_trainable is not None)


@pytest.mark.parametrize("choice", LAYERS.values(), ids=LAYERS)
def test_autocast_equals_conv2d_under_autocast(choice: dict, device: str):
    layer = layer_of(choice, dtype=torch.float32, device=device)
    conv = layer.to_conv2d()
    xs = [torch.randn(2, 4, 8, 9, device=device, requires_grad=True)]
    xs.append(xs[0].detach().clone().requires_grad_())
    outputs = []
    for module, x in zip((layer, conv), xs, strict=True):
        with torch.autocast(device, torch.bfloat16):
            outputs.append(module(x))
    assert outputs[0].dtype == torch.bfloat16
    cotangent = torch.randn(outputs[0].shape, device=device).bfloat16()
    for output in outputs:
        output.backward(cotangent)
    assert torch.equal(outputs[0], outputs[1])
    assert xs[0].grad.dtype == torch.float32
    assert_close(xs[0].grad.bfloat16(), xs[1].grad.double(), 36)
    if layer.weight_trainable is not None:
        grad = layer.weight_trainable.grad
        expected = conv.weight.grad[list(layer.filters.indices)][:, list(layer.inputs.indices)]
        assert grad.dtype == torch.float32
        assert_close(grad.bfloat16(), expected.double(), 2 * 8 * 4)
    if layer.bias_trainable is not None:
        assert layer.bias_trainable.grad.dtype == torch.float32


def test_backward_inside_autocast_is_the_same(device: str):
    layer = PartialConv2d(4, 6, 3, trainable=[0, 2], trainable_inputs=[1], device=device)
    x = torch.randn(2, 4, 8, 9, device=device, requires_grad=True)
    grads = []
    for inside in (False, True):
        with torch.autocast(device, torch.bfloat16):
            output = layer(x)
        cotangent = torch.ones_like(output) * torch.arange(7, device=device)
        with torch.autocast(device, torch.bfloat16, enabled=inside):
            grads.append(torch.autograd.grad(output, [x, layer.weight_trainable], cotangent))
    for outside, inside in zip(*grads, strict=True):
        assert torch.equal(outside, inside) and inside.dtype == torch.float32


@pytest.mark.parametrize("algorithm", ["full", "gather", "unfold"])
def test_backward_inside_autocast_of_a_forward_outside_stays_fp32(algorithm: str, device: str):
    layer = PartialConv2d(4, 6, 3, trainable=[0, 2], trainable_inputs=[1], algorithm=algorithm, device=device)
    x = torch.randn(2, 4, 8, 9, device=device, requires_grad=True)
    output = layer(x)
    cotangent, leaves = torch.randn_like(output), [x, layer.weight_trainable, layer.bias_trainable]
    expected = torch.autograd.grad(output, leaves, cotangent, retain_graph=True)
    with torch.autocast(device, torch.bfloat16):
        inside = torch.autograd.grad(output, leaves, cotangent)
    assert all(torch.equal(a, b) for a, b in zip(inside, expected, strict=True))


@pytest.mark.works_with("a fixed part in bfloat16 beside a learned part in float32")
def test_a_frozen_part_in_bf16_beside_a_learned_part_in_fp32(device: str):
    layer = PartialConv2d(4, 6, 3, trainable=[0, 2], trainable_inputs=[1], device=device)
    for name, parameter in layer.named_parameters():
        if "frozen" in name:
            parameter.data = parameter.data.bfloat16()
    conv = layer.to_conv2d()
    assert conv.weight.dtype == torch.float32
    x = torch.randn(2, 4, 8, 9, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        output, expected = layer(x), conv(x)
    assert torch.equal(output, expected)
    output.backward(torch.randn_like(output))
    assert layer.weight_trainable.grad.dtype == layer.bias_trainable.grad.dtype == torch.float32
    assert torch.equal(layer(x), conv(x)), "without autocast"


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("choice", LAYERS.values(), ids=LAYERS)
@pytest.mark.works_with("both kinds of activation checkpointing")
def test_checkpointing_recomputes_the_same(choice: dict, reentrant: bool):
    layer = layer_of(choice)
    x = torch.randn(2, 4, 4, 5, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    cotangent = torch.randn_like(layer(x))
    plain = torch.autograd.grad(layer(x), leaves, cotangent)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant).backward(cotangent)
    assert all(torch.equal(a, leaf.grad) for a, leaf in zip(plain, leaves, strict=True))


@pytest.mark.parametrize("choice", LAYERS.values(), ids=LAYERS)
@pytest.mark.works_with("saved-tensor hooks and anomaly mode")
def test_saved_tensors_may_wait_elsewhere_and_anomalies_may_be_looked_for(choice: dict, device: str):
    layer = layer_of(choice, device=device)
    x = torch.randn(2, 4, 4, 5, dtype=torch.float64, device=device, requires_grad=True)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    cotangent = torch.randn_like(layer(x))
    plain = torch.autograd.grad(layer(x), leaves, cotangent)
    moved: list[Tensor] = []

    def away(tensor: Tensor) -> Tensor:
        moved.append(tensor.cpu().clone())
        return moved[-1]

    with torch.autograd.graph.saved_tensors_hooks(away, lambda tensor: tensor.to(device)):
        output = layer(x)
    assert moved
    with torch.autograd.detect_anomaly(check_nan=True):
        again = torch.autograd.grad(layer(x), leaves, cotangent)
    for grads in (torch.autograd.grad(output, leaves, cotangent), again):
        assert all(torch.equal(a, b) for a, b in zip(plain, grads, strict=True))


def test_anomaly_mode_names_the_backward_that_made_a_nan():
    layer = layer_of({"trainable": [0, 2]})
    x = torch.randn(2, 4, 4, 5, dtype=torch.float64, requires_grad=True)
    with torch.autograd.detect_anomaly(check_nan=True):
        output = layer(x)
        with pytest.raises(RuntimeError, match=r"PartialConv2dFunctionBackward.* returned nan"):
            output.backward(torch.full_like(output, torch.nan))


@pytest.mark.works_with("hooks on modules and parameters")
def test_hooks_on_the_module_and_its_parameters_run():
    layer = layer_of({"trainable": [0, 2]})
    seen: list[str] = []
    layer.register_forward_pre_hook(lambda *_: seen.append("forward pre"))
    layer.register_forward_hook(lambda *_: seen.append("forward"))
    layer.register_full_backward_pre_hook(lambda *_: seen.append("backward pre"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    layer.weight_trainable.register_hook(lambda grad: grad * 2)
    layer.weight_trainable.register_post_accumulate_grad_hook(lambda p: seen.append(f"accumulated {tuple(p.shape)}"))
    x = torch.randn(2, 4, 4, 5, dtype=torch.float64, requires_grad=True)
    output = layer(x)
    cotangent = torch.randn_like(output)
    output.backward(cotangent)
    assert seen[:3] == ["forward pre", "forward", "backward pre"]
    assert sorted(seen[3:]) == ["accumulated (2, 4, 3, 2)", "backward"]
    expected = dense(layer.to_conv2d(), x, cotangent)[2]["weight"][[0, 2]]
    assert_close(layer.weight_trainable.grad, 2 * expected, cotangent[:, 0].numel())


@pytest.mark.parametrize("choice", LAYERS.values(), ids=LAYERS)
@pytest.mark.does_not(
    "learn more after `model.requires_grad_(True)`: what learns is the subset; `set_subsets_` changes it"
)
def test_unfreezing_a_whole_model_lets_fixed_parts_stay_without_gradient(choice: dict):
    """`model.requires_grad_(False)`, then True again, as adversarial training does, teaches fixed parts nothing."""
    layer = layer_of(choice)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    x = torch.randn(2, 4, 4, 5, dtype=torch.float64)
    assert not layer.requires_grad_(False)(x).requires_grad
    output = layer.requires_grad_(True)(x)
    output.backward(torch.randn_like(output))
    optimizer.step()
    for name, parameter in layer.named_parameters():
        assert ("trainable" in name) == (parameter.grad is not None) == (not torch.equal(parameter, before[name]))


SCATTERED = {"trainable": [0, 2, 5], "trainable_inputs": [0, 3]}


def two_steps(layer: PartialConv2d, x: torch.Tensor, between) -> None:
    for step in range(2):
        output = layer(x)
        output.backward(torch.ones_like(output))
        if step == 0:
            between()


def test_index_tensors_are_made_once(monkeypatch: pytest.MonkeyPatch):
    """Each would be a copy from the host to the device."""
    monkeypatch.setattr(ops, "_INDICES", {})
    layer, x = PartialConv2d(4, 6, 3, **SCATTERED), torch.randn(2, 4, 7, 7, requires_grad=True)
    known = []
    two_steps(layer, x, lambda: known.extend(ops._INDICES.values()))
    assert known and list(map(id, ops._INDICES.values())) == list(map(id, known))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can be waited for")
def test_a_step_never_waits_for_the_gpu():
    layer = PartialConv2d(4, 6, 3, device="cuda", **SCATTERED)
    x = torch.randn(2, 4, 7, 7, device="cuda", requires_grad=True)
    try:
        two_steps(layer, x, lambda: torch.cuda.set_sync_debug_mode("error"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("bias", [True, False])
def test_many_gradients_at_once(bias: bool):
    """`is_grads_batched`, which vectorised Jacobians use."""
    layer, x = PartialConv2d(16, 32, 3, padding=1, trainable=4, bias=bias), torch.randn(2, 16, 6, 6, requires_grad=True)
    learned = [p for p in layer.parameters() if p.requires_grad]
    output, many = layer(x), torch.randn(3, 2, 32, 6, 6)
    ours = torch.autograd.grad(output, [x, *learned], many, retain_graph=True, is_grads_batched=True)
    for i, one in enumerate(many):
        expected = torch.autograd.grad(output, [x, *learned], one, retain_graph=True)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-4)
