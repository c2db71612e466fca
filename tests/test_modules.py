"""PartialConv2d as a module: nn.Conv2d's arguments, state_dict and repr, and what it adds."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from conftest import filled_with_integers, integers, saved_tensors
from torch import Tensor, nn

from rwn_ext import PartialConv2d

CHOICES = {
    "last": {"trainable": 2},
    "scattered": {"trainable": [0, 2, 5]},
    "block": {"trainable": [1, 4], "trainable_inputs": [0, 2]},
    "one-input": {"trainable": 1.0, "trainable_inputs": 1},
    "all": {"trainable": 1.0},
    "none": {"trainable": 0},
    "bias-only": {"trainable": 0.0, "trainable_bias": "all"},
    "no-bias": {"trainable": [0, 2], "bias": False},
}
EVERY_CHOICE = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)


def layer_of(choice: dict, **more) -> PartialConv2d:
    return PartialConv2d(3, 6, (3, 2), **{**choice, **more})


def conv_of(choice: dict, **more) -> nn.Conv2d:
    return nn.Conv2d(3, 6, (3, 2), bias=choice.get("bias", True), **more)


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


@EVERY_CHOICE
def test_parameters_are_the_parts(choice: dict):
    layer = layer_of(choice)
    rows, columns = list(layer.filters.indices), list(layer.inputs.indices)
    weight, bias = layer.weight, layer.bias
    others = [k for k in range(6) if k not in rows]
    fixed_columns = [c for c in range(3) if c not in columns]
    expected = {
        "weight_trainable": weight[rows][:, columns],
        "weight_frozen": weight[others],
        "weight_frozen_inputs": weight[rows][:, fixed_columns],
    }
    if bias is not None:
        learned = list(range(6)) if choice.get("trainable_bias") == "all" else rows
        expected |= {"bias_trainable": bias[learned], "bias_frozen": bias[[k for k in range(6) if k not in learned]]}
    expected = {name: part for name, part in expected.items() if part.numel()}
    actual = dict(layer.named_parameters())
    assert list(actual) == list(expected)
    for name, part in expected.items():
        assert torch.equal(actual[name], part)
        assert actual[name].requires_grad == name.endswith("trainable") and actual[name].is_leaf
    assert not list(layer.buffers())
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in conv_of(choice).parameters())


def test_arguments_are_those_of_conv2d():
    arguments = (4, 6, (3, 1), (2, 1), (1, 0), (1, 2), 2, False, "reflect", "cpu", torch.float64)
    conv, layer = nn.Conv2d(*arguments), PartialConv2d(*arguments, trainable=2)
    text = repr(conv).removeprefix("Conv2d(").removesuffix(")")
    assert repr(layer) == f"PartialConv2d({text}, trainable=2/6)"
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(layer, name) == getattr(conv, name)
    assert layer.weight.dtype == torch.float64 and layer.bias is None
    with pytest.raises(TypeError, match="trainable"):
        PartialConv2d(4, 6, 3)
    with pytest.raises(TypeError):
        PartialConv2d(4, 6, 3, 1, 0, 1, 1, True, "zeros", None, None, 0.5)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"trainable": 0.11}, "trainable=14/128"),
        ({"trainable": 1.0, "trainable_inputs": [0, 5]}, "trainable=128/128, trainable_inputs=2/64"),
        ({"trainable": 0, "trainable_bias": "all"}, "trainable=0/128, trainable_bias=all"),
        ({"trainable": 1, "frozen": "zero", "algorithm": "gather"}, "trainable=1/128, frozen=zero, algorithm=gather"),
        ({"trainable": 1, "padding": "same", "bias": False}, "padding=same, bias=False, trainable=1/128"),
    ],
    ids=str,
)
def test_repr_says_what_is_learned(arguments: dict, text: str):
    assert repr(PartialConv2d(64, 128, 3, **arguments)).endswith(f", {text})")


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"trainable": 7}, ValueError, r"trainable=7\b"),
        ({"trainable": True}, TypeError, "trainable=True"),
        ({"trainable": None}, TypeError, "trainable=None"),
        ({"trainable": [6]}, ValueError, "trainable holds index 6"),
        ({"trainable": 1, "trainable_inputs": 4}, ValueError, "trainable_inputs=4"),
        ({"trainable": 1, "trainable_inputs": [1, 1]}, ValueError, "trainable_inputs holds index 1 twice"),
        ({"trainable": 1, "trainable_inputs": False}, TypeError, "trainable_inputs=False"),
        ({"trainable": 1, "trainable_bias": "some"}, ValueError, "trainable_bias='some'"),
        ({"trainable": 1, "trainable_bias": True}, ValueError, "trainable_bias=True"),
        ({"trainable": 1, "frozen": "ones"}, ValueError, "frozen='ones'"),
        ({"trainable": 1, "select": "best"}, ValueError, "select='best'"),
        ({"trainable": [1], "select": "best"}, ValueError, "select='best'"),
        ({"trainable": 1, "algorithm": "fast"}, ValueError, "algorithm='fast'"),
        ({"trainable": 1, "groups": 2}, ValueError, "groups"),
        ({"trainable": 1, "padding": "full"}, ValueError, "full"),
        ({"trainable": 1, "padding_mode": "mirror"}, ValueError, "mirror"),
        ({"trainable": 1, "padding": "same", "stride": 2}, ValueError, "same"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_by_value(arguments: dict, error: type, named: str):
    with pytest.raises(error, match=named):
        layer_of(arguments)


def test_input_subsets_count_within_a_group():
    layer = PartialConv2d(6, 4, 3, groups=2, trainable=1.0, trainable_inputs=1)
    assert layer.inputs.indices == (2,) and layer.weight_trainable.shape == (4, 1, 3, 3)
    with pytest.raises(ValueError, match="index 3"):
        PartialConv2d(6, 4, 3, groups=2, trainable=1.0, trainable_inputs=[3])


def test_selection_policies():
    conv = filled_with_integers(nn.Conv2d(3, 6, 2), 0, 0)
    with torch.no_grad():
        conv.weight[1], conv.weight[4, 2] = -1.0, 5.0

    def chosen(**arguments) -> tuple:
        layer = PartialConv2d.from_conv2d(conv, **arguments)
        return layer.filters.indices, layer.inputs.indices

    assert chosen(trainable=2, trainable_inputs=1, select="magnitude") == ((1, 4), (2,))
    assert chosen(trainable=2, trainable_inputs=1, select="first") == ((0, 1), (0,))
    assert chosen(trainable=2, trainable_inputs=1) == ((4, 5), (2,))
    assert chosen(trainable=3, select="random", seed=1) == chosen(trainable=3, select="random", seed=1)
    assert len({chosen(trainable=3, select="random", seed=seed) for seed in range(8)}) > 1
    with pytest.raises(ValueError, match="meta"):
        layer_of({"trainable": 1}, select="magnitude", device="meta")


@pytest.mark.parametrize(
    ("trainable_bias", "learned"), [("with_filters", [1, 4]), ("all", list(range(6))), ("none", [])], ids=str
)
def test_which_biases_are_learned(trainable_bias: str, learned: list[int]):
    conv = filled_with_integers(conv_of({}, dtype=torch.float64))
    layer = PartialConv2d.from_conv2d(conv, trainable=[1, 4], trainable_bias=trainable_bias)
    x, cotangent = integers(2, 3, 5, 5), integers(2, 6, 3, 4)
    output, expected = layer(x), conv(x)
    assert torch.equal(output, expected)
    output.backward(cotangent)
    if learned:
        assert torch.equal(layer.bias_trainable.grad, cotangent.sum((0, 2, 3))[learned])
    else:
        assert layer.bias_trainable is None
    if len(learned) == 6:
        assert layer.bias_frozen is None
    else:
        assert not layer.bias_frozen.requires_grad and layer.bias_frozen.grad is None


def test_a_block_without_inputs_still_learns_its_biases():
    layer = layer_of({"trainable": [1, 4], "trainable_inputs": 0})
    assert layer.weight_trainable is None and layer.bias_trainable.shape == (2,)


@pytest.mark.parametrize("choice", [CHOICES["scattered"], CHOICES["block"]], ids=["scattered", "block"])
def test_frozen_zero(choice: dict):
    conv = conv_of({})
    layer = PartialConv2d.from_conv2d(conv, frozen="zero", **choice)
    expected = torch.zeros_like(conv.weight)
    rows, columns = torch.tensor(layer.filters.indices)[:, None], torch.tensor(layer.inputs.indices)
    expected[rows, columns] = conv.weight.detach()[rows, columns]
    assert torch.equal(layer.weight, expected)
    assert not layer.bias_frozen.any() and torch.equal(layer.bias_trainable, conv.bias[list(layer.filters.indices)])
    layer.reset_parameters()
    assert layer.weight_trainable.all() and not layer.weight_frozen.any() and not layer.bias_frozen.any()


@EVERY_CHOICE
def test_initial_values_are_those_of_conv2d(choice: dict):
    torch.manual_seed(5)
    conv = conv_of(choice)
    torch.manual_seed(5)
    layer = layer_of(choice)
    assert same(layer, conv)
    torch.manual_seed(6)
    conv.reset_parameters()
    torch.manual_seed(6)
    parameters = list(layer.parameters())
    layer.reset_parameters()
    assert same(layer, conv)
    assert all(a is b for a, b in zip(parameters, layer.parameters(), strict=True))


@EVERY_CHOICE
def test_from_conv2d_copies_and_leaves_the_source_alone(choice: dict):
    choice = {**choice}
    conv = conv_of(choice, dtype=torch.bfloat16).eval()
    choice.pop("bias", None)
    output = conv(torch.randn(2, 3, 5, 5, dtype=torch.bfloat16))
    output.backward(torch.randn_like(output))
    before = {name: (p, p.detach().clone(), p.grad, p.grad.clone()) for name, p in conv.named_parameters()}
    layer = PartialConv2d.from_conv2d(conv, frozen="zero", **choice)
    for parameter in layer.parameters():
        parameter.data.fill_(7)
    for name, (parameter, value, grad, grad_value) in before.items():
        assert getattr(conv, name) is parameter and torch.equal(parameter, value) and parameter.requires_grad
        assert parameter.grad is grad and torch.equal(grad, grad_value)
    assert all(p.grad is None and p.dtype == torch.bfloat16 for p in layer.parameters())
    assert not layer.training


def test_from_conv2d_wants_a_conv2d():
    for wrong in (nn.Linear(2, 2), nn.Conv1d(2, 2, 1), layer_of({"trainable": 1}), torch.randn(3)):
        with pytest.raises(TypeError, match=f"Conv2d, got {type(wrong).__name__}"):
            PartialConv2d.from_conv2d(wrong, trainable=1)


@EVERY_CHOICE
def test_to_conv2d_and_back(choice: dict):
    layer = layer_of(choice, stride=2, padding="valid", dtype=torch.float64).eval()
    conv = layer.to_conv2d()
    assert type(conv) is nn.Conv2d and not conv.training and same(layer, conv)
    assert repr(layer).startswith("Partial" + repr(conv)[:-1])
    assert all(p.requires_grad and p.is_leaf and p.grad is None for p in conv.parameters())
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    assert torch.equal(layer(x), conv(x))
    with torch.no_grad():
        conv.weight.zero_()
    assert layer.weight.abs().min() > 0


def test_to_conv2d_keeps_the_memory_format():
    conv = nn.Conv2d(3, 6, 3).to(memory_format=torch.channels_last)
    layer = PartialConv2d.from_conv2d(conv, trainable=[0, 3])
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert layer.to_conv2d().weight.is_contiguous(memory_format=torch.channels_last)


@EVERY_CHOICE
@pytest.mark.does_not(
    "keep what is written into `module.weight`: it is merged anew at each access; write into the parts"
)
def test_weight_is_a_copy_through_which_gradients_flow(choice: dict):
    layer = layer_of(choice)
    before = layer.state_dict()["weight"].clone()
    with torch.no_grad():
        layer.weight.zero_()
    layer.weight.data.zero_()
    if layer.bias is not None:
        bias = layer.bias.detach().clone()
        layer.bias.data.zero_()
        assert torch.equal(layer.bias, bias)
    assert torch.equal(layer.weight, before)
    for value in (before, nn.Parameter(before)):
        with pytest.raises((AttributeError, KeyError)):
            layer.weight = value
    if layer.weight_trainable is not None:
        cotangent = torch.randn_like(before)
        layer.weight.backward(cotangent)
        rows, columns = list(layer.filters.indices), list(layer.inputs.indices)
        assert torch.equal(layer.weight_trainable.grad, cotangent[rows][:, columns])


class TestStateDict:
    """`weight` and `bias` as nn.Conv2d has them, whatever is learned."""

    @EVERY_CHOICE
    @pytest.mark.works_with("strict `load_state_dict` both ways against `nn.Conv2d`, `assign=True` too")
    def test_is_that_of_conv2d_both_ways(self, choice: dict):
        layer, conv = layer_of(choice), conv_of(choice)
        assert list(layer.state_dict()) == list(conv.state_dict())
        assert not any(value.requires_grad for value in layer.state_dict().values())
        parameters = list(layer.parameters())
        flags = [p.requires_grad for p in parameters]
        assert not any(layer.load_state_dict(conv.state_dict(), strict=True))
        assert same(layer, conv)
        assert all(a is b for a, b in zip(parameters, layer.parameters(), strict=True))
        assert flags == [p.requires_grad for p in parameters]
        layer.reset_parameters()
        assert not same(layer, conv)
        assert not any(conv.load_state_dict(layer.state_dict(), strict=True))
        assert same(layer, conv)

    def test_between_different_subsets_and_prefixes(self):
        ours = nn.Sequential(nn.Sequential(layer_of(CHOICES["block"])), nn.BatchNorm2d(6))
        theirs = nn.Sequential(nn.Sequential(layer_of(CHOICES["scattered"])), nn.BatchNorm2d(6))
        ours.load_state_dict(theirs.state_dict())
        assert same(ours, theirs)
        assert list(ours.state_dict())[:3] == ["0.0.weight", "0.0.bias", "1.weight"]

    def test_buffers_and_extra_state_are_there_too(self):
        class Counting(PartialConv2d):
            steps = 0

            def get_extra_state(self) -> int:
                return self.steps

            def set_extra_state(self, steps: int) -> None:
                self.steps = steps

        layers = [Counting(3, 6, 2, trainable=2) for _ in range(2)]
        for steps, layer in enumerate(layers, 3):
            layer.steps = steps
            layer.register_buffer("seen", torch.full((2,), float(steps)))
        assert list(layers[0].state_dict()) == ["weight", "bias", "seen", "_extra_state"]
        layers[0].load_state_dict(layers[1].state_dict())
        assert layers[0].steps == 4 and torch.equal(layers[0].seen, layers[1].seen)
        assert torch.equal(layers[0].weight, layers[1].weight)

    def test_keep_vars(self):
        layer = layer_of(CHOICES["block"])
        assert layer.state_dict(keep_vars=True)["weight"].requires_grad

    def test_another_dtype_is_cast_as_conv2d_casts(self):
        layer, conv = layer_of(CHOICES["block"]), conv_of({}, dtype=torch.float64)
        layer.load_state_dict(conv.state_dict())
        assert layer.weight.dtype == torch.float32 and torch.equal(layer.weight, conv.weight.float())

    @pytest.mark.parametrize("choice", ["block", "all", "none"])
    @pytest.mark.parametrize(
        "broken", ["missing-weight", "missing-bias", "missing-both", "shape", "unexpected", "text"]
    )
    def test_complaints_are_those_of_conv2d(self, choice: str, broken: str):
        """The same module name and the same message, so the same text."""
        state = {"0." + key: value for key, value in conv_of({}).state_dict().items()}
        if broken == "shape":
            state["0.weight"], state["0.bias"] = torch.randn(6, 3, 3, 3), torch.randn(5)
        elif broken == "unexpected":
            state |= {"0.weight_g": torch.randn(6), "0.running_mean": torch.randn(6)}
        elif broken == "text":
            state["0.weight"] = "a text"
        else:
            for name in ("weight", "bias"):
                if broken in (f"missing-{name}", "missing-both"):
                    del state["0." + name]
        complaints = []
        for module in (layer_of(CHOICES[choice]), conv_of({})):
            with pytest.raises(RuntimeError) as caught:
                nn.Sequential(module).load_state_dict(state)
            complaints.append(str(caught.value))
        assert complaints[0] == complaints[1]

    def test_not_strict_reports_and_loads_the_rest(self):
        layer, conv = layer_of(CHOICES["block"]), conv_of({})
        weight = layer.weight.detach()
        report = layer.load_state_dict({"bias": conv.bias, "other": torch.randn(1)}, strict=False)
        assert report.missing_keys == ["weight"] and report.unexpected_keys == ["other"]
        assert torch.equal(layer.weight, weight) and torch.equal(layer.bias, conv.bias)

    def test_a_bias_too_many_or_too_few(self):
        with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "bias"'):
            layer_of(CHOICES["no-bias"]).load_state_dict(conv_of({}).state_dict())
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "bias"'):
            layer_of(CHOICES["block"]).load_state_dict(conv_of(CHOICES["no-bias"]).state_dict())

    def test_a_refused_state_dict_leaves_the_caller_s_untouched(self):
        state = conv_of({}).state_dict()
        keys = list(state)
        layer_of(CHOICES["block"]).load_state_dict(state)
        assert list(state) == keys

    @EVERY_CHOICE
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_assign(self, choice: dict, dtype: torch.dtype):
        with torch.device("meta"):
            layer = layer_of(choice)
        assert all(p.is_meta for p in layer.parameters()) and layer.weight.is_meta
        conv = conv_of(choice, dtype=dtype)
        layer.load_state_dict(conv.state_dict(), assign=True)
        assert same(layer, conv) and layer.weight.dtype == dtype
        for name, parameter in layer.named_parameters():
            assert isinstance(parameter, nn.Parameter) and parameter.requires_grad == name.endswith("trainable")
        x = torch.randn(2, 3, 5, 5, dtype=dtype)
        assert torch.equal(layer(x), conv(x))
        before = conv.weight.detach().clone()
        for parameter in layer.parameters():
            parameter.data.zero_()
        assert torch.equal(conv.weight, before), "the parts are copies"

    @EVERY_CHOICE
    def test_copies(self, choice: dict):
        layer = layer_of(choice, stride=2).eval()
        stored = io.BytesIO()
        torch.save(layer.state_dict(), stored)
        stored.seek(0)
        loaded = layer_of(choice, stride=2).eval()
        loaded.load_state_dict(torch.load(stored, weights_only=True))
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
            assert same(other, layer) and repr(other) == repr(layer) and other.partition == layer.partition
            x = torch.randn(2, 3, 5, 5, requires_grad=True)
            output = other(x)
            assert torch.equal(output, layer(x))
            output.backward(torch.randn_like(output))
            assert all(p.grad is None for p in layer.parameters())


def test_meta_device_and_to_empty():
    layer = layer_of(CHOICES["block"], device="meta")
    assert layer(torch.randn(2, 3, 7, 5, device="meta")).shape == (2, 6, 5, 4)
    assert layer.to_conv2d().weight.is_meta
    layer = layer.to_empty(device="cpu")
    assert layer.weight.isnan().all()
    layer.reset_parameters()
    assert layer(torch.randn(2, 3, 7, 5)).isfinite().all()


@EVERY_CHOICE
def test_moving_and_casting(choice: dict, device: str):
    layer = layer_of(choice).to(device, torch.float64).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, device=device, requires_grad=True)
    output = layer(x)
    output.backward(torch.randn_like(output))
    for parameter in layer.parameters():
        assert parameter.device.type == device and parameter.dtype == torch.float64
        assert (parameter.grad is not None) == parameter.requires_grad


def test_functional_call_and_ema_see_the_parts():
    layer = layer_of(CHOICES["block"])
    averaged = torch.optim.swa_utils.AveragedModel(layer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(layer)
    first = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight_trainable.add_(1)
    averaged.update_parameters(layer)
    assert torch.allclose(averaged.module.weight, (first + layer.weight) / 2)


class TestSetTrainable:
    def test_keeps_the_function_and_the_parameters(self):
        layer = layer_of(CHOICES["block"])
        x = torch.randn(2, 3, 5, 5)
        output, weight, learned = layer(x).detach(), layer.weight.detach(), layer.weight_trainable
        layer(x).backward(torch.randn_like(output))
        assert layer.set_trainable_([0, 1, 3]) is layer
        assert layer.filters.indices == (0, 1, 3) and layer.inputs.is_full
        assert layer.weight_trainable is learned and learned.shape == (3, 3, 3, 2) and learned.grad is None
        assert torch.equal(layer.weight, weight) and torch.equal(layer(x), output)
        layer(x).backward(torch.randn_like(output))
        assert learned.grad.shape == learned.shape and layer.bias_trainable.grad.shape == (3,)

    @EVERY_CHOICE
    def test_through_every_kind_of_subset(self, choice: dict):
        layer = layer_of(CHOICES["last"], dtype=torch.float64)
        conv = layer.to_conv2d()
        layer.set_trainable_(choice["trainable"], choice.get("trainable_inputs"))
        fresh = PartialConv2d.from_conv2d(
            conv, trainable=choice["trainable"], trainable_inputs=choice.get("trainable_inputs")
        )
        assert [(n, p.shape, p.requires_grad) for n, p in sorted(layer.named_parameters())] == [
            (n, p.shape, p.requires_grad) for n, p in sorted(fresh.named_parameters())
        ]
        assert same(layer, conv) and layer.partition == fresh.partition

    @pytest.mark.parametrize(
        ("trainable", "error"), [(7, ValueError), ([6], ValueError), (True, TypeError), (1.5, ValueError)], ids=str
    )
    def test_a_wrong_choice_changes_nothing(self, trainable, error: type):
        layer = layer_of(CHOICES["block"])
        partition, state = layer.partition, {k: v.clone() for k, v in layer.state_dict().items()}
        with pytest.raises(error):
            layer.set_trainable_(trainable)
        assert layer.partition is partition
        assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())

    @pytest.mark.parametrize("choice", [CHOICES["none"], CHOICES["bias-only"]], ids=["none", "bias-only"])
    def test_a_new_parameter_needs_a_new_optimizer_group(self, choice: dict):
        layer = layer_of(choice)
        partition = layer.partition
        optimizer = torch.optim.SGD([*layer.parameters(), nn.Parameter(torch.ones(1))], lr=0.1)
        with pytest.raises(ValueError, match=r"weight_trainable.*add_param_group"):
            layer.set_trainable_(2, optimizer=optimizer)
        assert layer.partition is partition and layer.weight_trainable is None
        layer.set_trainable_(2)
        assert layer.weight_trainable.shape == (2, 3, 3, 2)

    def test_selection(self):
        layer = layer_of(CHOICES["block"])
        norms = layer.weight.flatten(1).norm(dim=1)
        layer.set_trainable_(2, select="magnitude")
        assert set(layer.filters.indices) == set(norms.topk(2).indices.tolist())
        layer.set_trainable_(3, select="random", seed=4)
        chosen = layer.filters
        assert layer.set_trainable_(1).set_trainable_(3, select="random", seed=4).filters == chosen


def test_a_merged_weight_lives_no_longer_than_the_forward():
    """Neither attributes nor the graph of the output hold a tensor of the whole weight's size."""
    layer = layer_of(CHOICES["block"])
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    with saved_tensors() as kept:
        output = layer(x)
    del output
    held: list[Tensor] = [v for v in vars(layer).values() if torch.is_tensor(v)]
    assert all(t.numel() < layer.weight.numel() for t in [*held, *(t for t in kept if t.shape[2:] == (3, 2))])


@pytest.mark.parametrize(
    "geometry", [{"padding": [1]}, {"stride": (2,)}, {"dilation": (2,)}, {"padding": [1, 2]}], ids=str
)
def test_one_number_in_a_sequence_stands_for_both_as_in_conv2d(geometry):
    conv, x = nn.Conv2d(3, 4, 3, **geometry), torch.randn(2, 3, 9, 9)
    assert torch.equal(PartialConv2d.from_conv2d(conv, trainable=2)(x), conv(x))


def test_three_numbers_are_no_pair():
    with pytest.raises(RuntimeError, match=r"\(1, 2, 3\) is neither one number nor a pair"):
        PartialConv2d(3, 4, 3, stride=(1, 2, 3), trainable=2)(torch.randn(2, 3, 9, 9))
