"""Of a layer on a CPU, the fixed part lies in memory that has room for the learned one (rwn_ext.rooms)."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwn_ext import PartialConv2d, autograd, ops, rooms


def layer(channels: int = 64, kernel_size: int = 3, **options) -> PartialConv2d:
    return PartialConv2d(channels, 64, kernel_size, padding=kernel_size // 2, **({"trainable": 0.1} | options))


def merged(conv: PartialConv2d) -> Tensor:
    return ops.merge(conv.weight_trainable, conv.weight_frozen, conv.filters.runs, 0, torch.float32, stage="forward")


@pytest.mark.parametrize("select", ["last", "first"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("channels", "kernel_size"), [(64, 3), (600, 1), (8, 15)])
def test_the_whole_is_made_without_copying_what_is_fixed(select, layout, channels, kernel_size):
    conv = layer(channels, kernel_size, select=select).to(memory_format=layout)
    expected = conv.weight.detach()
    with torch.no_grad():
        whole = merged(conv)
        assert torch.equal(whole, expected) and whole.is_contiguous(memory_format=layout)
        place = conv.weight_frozen if select == "last" else conv.weight_trainable
        assert whole.data_ptr() == place.data_ptr()
        conv.weight_trainable.mul_(2)
        conv.weight_frozen.add_(1)
        again = merged(conv)
        assert again.data_ptr() == whole.data_ptr() and torch.equal(again, conv.weight)


def has_room(conv: PartialConv2d) -> bool:
    room = rooms._ROOMS.get(id(conv.weight_frozen))
    return room is not None and room.is_of(conv.weight_trainable, conv.weight_frozen)


@pytest.mark.parametrize(
    ("change", "room"),
    [
        (lambda c: c, True),
        (copy.deepcopy, True),
        (lambda c: c.set_trainable_(20), True),
        (lambda c: c.set_trainable_([1, 5]), False),
        (lambda c: c.set_trainable_([1, 5]).set_trainable_(6), True),
        (lambda c: c.set_trainable_(1.0).set_trainable_(6), True),
        (lambda c: c.double().float(), True),
        (lambda c: (c.load_state_dict({k: v + 1 for k, v in c.state_dict().items()}), c)[1], True),
        (lambda c: (c.load_state_dict({k: v + 1 for k, v in c.state_dict().items()}, assign=True), c)[1], True),
        (lambda c: pickle.loads(pickle.dumps(c)), True),
        (lambda c: c.share_memory(), False),
        (lambda c: (c.weight_trainable.share_memory_(), c)[1], False),
        (lambda c: (c.weight_frozen.share_memory_(), c)[1], False),
        (lambda c: (setattr(c.weight_trainable, "data", c.weight_trainable + 1), c)[1], False),
        (lambda c: (setattr(c.weight_frozen, "data", c.weight_frozen + 1), c)[1], False),
    ],
)
def test_it_follows_what_becomes_of_the_parameter(change, room: bool):
    x, conv = torch.randn(1, 64, 4, 4), change(layer())
    assert has_room(conv) == room
    for _ in range(2):
        assert torch.equal(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1))
        with torch.no_grad():
            for parameter in conv.parameters():
                parameter.mul_(2)


def test_parameters_that_lie_there_stay_there():
    conv = layer()
    before = [p.data_ptr() for p in conv.parameters()]
    assert [p.data_ptr() for p in conv.float().to("cpu").parameters()] == before


def test_memory_that_others_hold_stays_where_it_is():
    flat = torch.randn(64 * 64 * 9)
    fixed = nn.Parameter(flat[: 58 * 576].view(58, 64, 3, 3), requires_grad=False)
    rooms.make(nn.Module(), "weight", fixed, 58, 6)
    assert fixed.data_ptr() == flat.data_ptr()


def test_a_view_of_the_learned_filters_is_not_them():
    conv, x = layer(), torch.randn(1, 64, 4, 4)
    turned = conv.weight_trainable.detach().transpose(2, 3)
    expected = F.conv2d(x, torch.cat([conv.weight_frozen, turned]), conv.bias, padding=1)
    assert torch.equal(torch.func.functional_call(conv, {"weight_trainable": turned}, (x,)), expected)


def test_filters_in_the_middle_are_not_the_last():
    conv = layer()
    with torch.no_grad():
        learned, fixed = conv.weight_trainable, conv.weight_frozen
        whole = ops.merge(learned, fixed, (3, 9), 0, torch.float32, stage="forward")
        assert torch.equal(whole, torch.cat([fixed[:3], learned, fixed[3:]]))


def test_another_default_device_does_not_matter():
    conv = layer()
    with torch.device("meta"):
        rooms.make(conv, "weight", conv.weight_frozen, 58, 6)
    assert conv.weight_frozen.device.type == "cpu"


def test_memory_of_the_caller_stays_as_it_is():
    base = torch.randn(64, 64, 3, 3)
    before, learned = base.clone(), torch.randn(6, 64, 3, 3)
    with torch.no_grad():
        for fixed in (base[:58], nn.Parameter(base[:58], requires_grad=False)):
            rooms.make(nn.Module(), "weight", fixed, 58, 6)
            ops.merge(learned, fixed, (58, 64), 0, torch.float32, stage="forward")
    assert torch.equal(base, before)


def test_learned_filters_lie_beside_the_fixed_ones():
    conv = layer()
    with torch.no_grad():
        whole = merged(conv)
    assert whole.data_ptr() == conv.weight_frozen.data_ptr()
    assert whole[58:].data_ptr() == conv.weight_trainable.data_ptr()


def test_filters_are_saved_without_their_neighbours(tmp_path):
    conv = layer()
    for name, parameter in conv.named_parameters():
        torch.save(parameter, tmp_path / name)
        assert (tmp_path / name).stat().st_size < parameter.nbytes + 2000
        assert torch.equal(torch.load(tmp_path / name), parameter)


def test_what_stands_in_for_the_learned_filters_does_not_overwrite_them():
    conv, x = layer(), torch.randn(1, 64, 4, 4)
    before, other = conv.weight.detach().clone(), torch.zeros_like(conv.weight_trainable)
    weight = torch.cat([before[:58], other])
    expected = F.conv2d(x, weight, conv.bias, padding=1)
    assert torch.equal(torch.func.functional_call(conv, {"weight_trainable": other}, (x,)), expected)
    assert torch.equal(conv.weight, before)
    conv.weight_trainable.data = other
    assert torch.equal(conv(x), expected) and torch.equal(conv.weight, weight)


def test_a_block_of_inputs_is_copied_beside_the_fixed_filters():
    conv, x = layer(trainable_inputs=0.5), torch.randn(1, 64, 4, 4, requires_grad=True)
    for _ in range(2):
        with torch.no_grad():
            conv.weight_trainable.add_(1)
        output, weight = conv(x), conv.weight.detach()
        assert torch.equal(output, F.conv2d(x, weight, conv.bias, padding=1))
        (grad,) = torch.autograd.grad(output.sum(), x)
        (expected,) = torch.autograd.grad(F.conv2d(x, weight, padding=1).sum(), x)
        torch.testing.assert_close(grad, expected)


def test_the_other_way_round_is_another_whole():
    conv = layer()
    with torch.no_grad():
        parts = conv.weight_trainable, conv.weight_frozen
        for _ in range(2):
            whole = ops.merge(*parts, (0, 6), 0, torch.float32, stage="forward")
            assert torch.equal(whole, torch.cat(parts))


def test_a_forward_between_forward_and_backward_is_harmless():
    conv, x = layer(), torch.randn(1, 64, 4, 4, requires_grad=True)
    first, second = conv(x), conv(2 * x)
    conv.eval()(x.detach())
    (grad,) = torch.autograd.grad((first + second).sum(), x)
    (expected,) = torch.autograd.grad(F.conv2d(3 * x, conv.weight.detach(), padding=1).sum(), x)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("bias", [True, False])
def test_small_layers_and_biases_have_one_too(bias: bool):
    conv = PartialConv2d(3, 8, 1, trainable=2, bias=bias)
    for fixed in (conv.weight_frozen, *([conv.bias_frozen] if bias else [])):
        room = rooms._ROOMS[id(fixed)]
        assert room.shared and room.whole.data_ptr() == fixed.data_ptr()
        assert torch.equal(room.whole, conv.weight if fixed is conv.weight_frozen else conv.bias)


def test_it_ends_with_the_layer():
    gc.collect()
    before, conv = set(rooms._ROOMS), layer()
    assert len(set(rooms._ROOMS) - before) == 2
    del conv
    gc.collect()
    assert set(rooms._ROOMS) <= before


def test_backward_sees_what_was_changed_in_place():
    for name in ("weight_trainable", "weight_frozen"):
        conv, x = layer(), torch.randn(1, 64, 4, 4, requires_grad=True)
        output = conv(x)
        with torch.no_grad():
            getattr(conv, name).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_double_backward_reaches_the_learned_filters():
    conv, x = layer(), torch.randn(1, 64, 4, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(conv(x).square().sum(), x, create_graph=True)
    (ours,) = torch.autograd.grad(grad.square().sum(), conv.weight_trainable)
    plain = conv.to_conv2d()
    (grad,) = torch.autograd.grad(plain(x).square().sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(grad.square().sum(), plain.weight)
    torch.testing.assert_close(ours, expected[-6:], rtol=1e-4, atol=1e-3)


def test_a_graph_of_an_earlier_choice_is_refused_and_a_later_one_is_right():
    conv, x = layer(), torch.randn(1, 64, 4, 4, requires_grad=True)
    output = conv(x)
    conv.set_trainable_(9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    conv(x).sum().backward()
    expected = torch.autograd.grad(F.conv2d(x, conv.weight.detach(), padding=1).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


def test_what_is_lent_is_not_kept_for_backward():
    """A block of inputs is copied into the room at each call, which may be another's before backward."""
    conv, x = layer(trainable_inputs=0.5), torch.randn(1, 64, 4, 4, requires_grad=True)
    output = conv(x)
    other = torch.zeros_like(conv.weight_trainable)
    torch.func.functional_call(conv, {"weight_trainable": other}, (x.detach(),))
    (grad,) = torch.autograd.grad(output.sum(), x)
    (expected,) = torch.autograd.grad(F.conv2d(x, conv.weight.detach(), padding=1).sum(), x)
    torch.testing.assert_close(grad, expected)


def test_the_whole_is_kept_for_backward(monkeypatch: pytest.MonkeyPatch):
    conv, x = layer(), torch.randn(1, 64, 4, 4, requires_grad=True)
    used, gradients = [], autograd.gradients
    monkeypatch.setattr(
        autograd, "gradients", lambda *a, weight: (used.append(weight), gradients(*a, weight=weight))[1]
    )
    conv(x).sum().backward()
    checkpoint(conv, x, use_reentrant=False).sum().backward()
    whole = rooms._ROOMS[id(conv.weight_frozen)].whole
    assert used[0] is whole and used[1] is whole
    assert conv(x.detach()).grad_fn.room is None
    conv.set_trainable_([1, 5])(x).sum().backward()
    assert used[2] is None


def test_backward_sees_what_was_given_other_memory():
    conv, x = layer(bias=False), torch.randn(1, 64, 4, 4, requires_grad=True)
    output = conv(x)
    for parameter in conv.parameters():
        parameter.data = torch.zeros_like(parameter)
    assert not torch.autograd.grad(output.sum(), x)[0].any()


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.load_state_dict(c.state_dict(), assign=True),
        lambda c: c.double().float(),
        lambda c: setattr(c, "weight_frozen", nn.Parameter(c.weight_frozen.clone(), False)),
    ],
)
def test_what_was_replaced_leaves_none_behind(change):
    gc.collect()
    conv = layer()
    before = len(rooms._ROOMS)
    for _ in range(3):
        change(conv)
        conv.float()
    assert len(rooms._ROOMS) == before
    conv.to("meta")
    assert len(rooms._ROOMS) == before - 2


def test_a_part_of_two_layers_has_one_as_long_as_either():
    first, second = layer(bias=False), layer(bias=False)
    second.weight_frozen, second.weight_trainable = first.weight_frozen, first.weight_trainable
    second.float()
    del first
    gc.collect()
    second.float()
    assert has_room(second)


def test_backward_computes_with_what_hooks_saved():
    conv, x = layer(), torch.randn(1, 64, 4, 4, requires_grad=True)
    expected = torch.autograd.grad(conv(x).sum(), x)[0]
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        output = conv(x)
    with torch.no_grad():
        conv.weight_trainable.mul_(3)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), x)[0], expected)


@pytest.mark.parametrize("channels", [8, 64])
def test_double_backward_saves_nothing_that_is_lent(channels: int):
    conv, x = layer(channels, trainable_inputs=0.5).requires_grad_(False), torch.randn(1, channels, 4, 4)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(conv(x).square().sum(), x, create_graph=True)
    other = torch.zeros_like(conv.weight_trainable)
    torch.func.functional_call(conv, {"weight_trainable": other}, (x.detach(),))
    (ours,) = torch.autograd.grad(grad.square().sum(), x)
    weight = conv.weight.detach()
    output = F.conv2d(x, weight, conv.bias, padding=1)
    (grad,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(grad.square().sum(), x)[0], rtol=1e-4, atol=1e-3)


def test_parts_of_two_types_have_none():
    conv = layer()
    conv.weight_frozen.data = conv.weight_frozen.bfloat16()
    rooms.make(conv, "weight", conv.weight_frozen, 58, 6, conv.weight_trainable)
    assert id(conv.weight_frozen) not in rooms._ROOMS


def test_parts_that_do_not_fit_have_none():
    conv = layer()
    other = nn.Parameter(torch.randn(1, 64, 3, 3))
    before = other.detach().clone()
    rooms.make(conv, "weight", conv.weight_frozen, 58, 6, other)
    assert torch.equal(other, before) and id(conv.weight_frozen) not in rooms._ROOMS


def test_it_is_made_once_where_only_the_learned_filters_are_shared_between_processes():
    conv = layer()
    conv.weight_trainable.share_memory_()
    address = conv.float().weight_frozen.data_ptr()
    assert conv.weight_trainable.is_shared()
    assert conv.float().weight_frozen.data_ptr() == address


def test_tensors_can_be_swapped():
    conv, bias = layer(), torch.randn(58)
    torch.utils.swap_tensors(conv.bias_frozen, nn.Parameter(bias.clone(), False))
    assert torch.equal(conv.bias[:58], bias)
