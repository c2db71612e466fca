"""What people do to modules and their state: hooks, files, conversions, averages, ties, parametrizations, pruning."""

from __future__ import annotations

import copy
import io

import pytest
import safetensors.torch
import torch
from conftest import filled_with_integers, integers
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rwn_ext import PartialConv2d, convert, merge_state_dict, set_subsets_, split_state_dict, subsets

CHOICES = {"*": [0, 3, 4], "3": 0}


def network(**options) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, **options),
        nn.BatchNorm2d(6, **options),
        nn.ReLU(),
        nn.Conv2d(6, 8, 1, **options),
        nn.Sequential(nn.Conv2d(8, 6, 3, groups=2, bias=False, **options)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5, **options),
    )


def partial(**options) -> nn.Sequential:
    return convert(network(**options), CHOICES, trainable_inputs=[0, 2])


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(left[key], right[key]) for key in left)


def learned(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


class TestLoadHooks:
    """Hooks of load_state_dict see nn.Conv2d's keys, before they are split, and once."""

    @pytest.mark.parametrize("where", ["layer", "parent", "root"])
    def test_that_rename_keys(self, where: str):
        model, renamed = nn.Sequential(partial()), {}
        for key, value in network().state_dict().items():
            renamed["0." + key.replace("weight", "kernel") if key.startswith("0.") else "0." + key] = value
        calls = []

        def rename(state: dict, prefix: str, *_):
            calls.append(prefix)
            for key in [key for key in state if key.startswith(prefix) and "kernel" in key]:
                state[key.replace("kernel", "weight")] = state.pop(key)

        module = {"layer": model[0][0], "parent": model[0], "root": model}[where]
        module._register_load_state_dict_pre_hook(rename)
        report = model.load_state_dict(renamed)
        assert not report.missing_keys and not report.unexpected_keys
        assert torch.equal(model[0][0].weight, renamed["0.0.kernel"])
        assert calls == [{"layer": "0.0.", "parent": "0.", "root": ""}[where]]

    def test_that_take_the_module_and_of_a_layer_alone(self):
        layer, conv = PartialConv2d(3, 6, 3, trainable=2), nn.Conv2d(3, 6, 3)

        def double(module: nn.Module, state: dict, prefix: str, *_):
            assert module is layer
            state[prefix + "weight"] = 2 * state[prefix + "weight"]

        handle = layer.register_load_state_dict_pre_hook(double)
        layer.register_load_state_dict_post_hook(lambda module, keys: keys.missing_keys.append("seen"))
        state = conv.state_dict()
        assert layer.load_state_dict(state, strict=False).missing_keys == ["seen"]
        assert torch.equal(layer.weight, 2 * conv.weight) and list(state) == ["weight", "bias"]
        handle.remove()
        layer.load_state_dict(state, strict=False)
        assert torch.equal(layer.weight, conv.weight)

    def test_that_fail_stay_registered(self):
        layer = PartialConv2d(3, 6, 3, trainable=2)
        layer._register_load_state_dict_pre_hook(lambda *_: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                layer.load_state_dict(nn.Conv2d(3, 6, 3).state_dict())


@pytest.mark.does_not(
    "keep what is written in place into the tensors of `state_dict()`: they are copies; load the changed state dict"
)
def test_writing_into_a_state_dict_changes_nothing_but_loading_it_does():
    """nn.Conv2d's would be the weight itself. The class's docstring says so."""
    model = partial()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = model.state_dict()
    for key in ("0.weight", "0.bias", "4.0.weight"):
        state[key] += 1
    assert same(model.state_dict(), before)
    model.load_state_dict(state)
    assert torch.equal(model[0].weight, before["0.weight"] + 1) and same(model.state_dict(), state)


@pytest.mark.works_with("`torch.save`, pickle, `copy.deepcopy`, safetensors")
class TestFiles:
    def test_safetensors_of_the_state(self, tmp_path):
        model, path = partial(), tmp_path / "model.safetensors"
        safetensors.torch.save_file(model.state_dict(), path)
        for other in (partial(), network()):
            other.load_state_dict(safetensors.torch.load_file(path))
            assert same(other.state_dict(), model.state_dict())

    def test_safetensors_of_the_model(self, tmp_path):
        path = tmp_path / "model.safetensors"
        for source, target in ((partial(), network()), (network(), partial())):
            safetensors.torch.save_model(source, path)
            assert safetensors.torch.load_model(target, path) == (set(), [])
            assert same(target.state_dict(), source.state_dict())

    def test_torch_save_of_the_module(self):
        model, file = partial().eval(), io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        x = torch.randn(2, 3, 6, 6)
        assert str(loaded) == str(model) and subsets(loaded) == subsets(model)
        assert same(loaded.state_dict(), model.state_dict()) and torch.equal(loaded(x), model(x))
        assert learned(loaded) == learned(model)

    def test_into_a_model_on_the_meta_device(self, tmp_path):
        source, path = network(), tmp_path / "state.pt"
        torch.save(source.state_dict(), path)
        model = partial(device="meta")
        model.load_state_dict(torch.load(path, mmap=True, weights_only=True), assign=True)
        assert same(model.state_dict(), source.state_dict()) and learned(model) == learned(partial())


def test_from_meta_to_empty_and_reset():
    torch.manual_seed(3)
    expected = network()
    torch.manual_seed(3)
    model = partial(device="meta").to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert same(model.state_dict(), expected.state_dict()) and learned(model) == learned(partial())


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swapping")
def test_conversion_and_loading_that_swap_tensors():
    model = partial()
    parameters, state = list(model.parameters()), model.state_dict()
    model.double()
    assert all(a is b and a.dtype == torch.float64 for a, b in zip(parameters, model.parameters(), strict=True))
    assert torch.equal(model[0].weight, state["0.weight"].double()) and learned(model) == learned(partial())
    other = network(dtype=torch.float64)
    model.load_state_dict(other.state_dict())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    output = model(x)
    assert torch.equal(output, other(x))
    output.backward(torch.randn_like(output))
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.usefixtures("swapping")
def test_large_layers_swap_tensors():
    layer, x = PartialConv2d(64, 64, 3, trainable=0.1), torch.randn(1, 64, 5, 5)
    parameters, expected = list(layer.parameters()), layer(x)
    layer.double()
    layer.load_state_dict(layer.state_dict())
    layer.float()
    assert all(a is b for a, b in zip(parameters, layer.parameters(), strict=True))
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("convert_to", [nn.Module.half, nn.Module.bfloat16, nn.Module.double], ids=lambda f: f.__name__)
def test_types_change_as_those_of_conv2d(convert_to):
    model, plain = partial(), network()
    plain.load_state_dict(model.state_dict())
    assert same(convert_to(model).state_dict(), convert_to(plain).state_dict())
    assert {p.dtype for p in model.parameters()} == {plain[0].weight.dtype}


def test_memory_format():
    model = partial().to(memory_format=torch.channels_last)
    for key, value in model.state_dict().items():
        assert value.dim() != 4 or value.is_contiguous(memory_format=torch.channels_last), key
    output = model(torch.randn(2, 3, 6, 6).contiguous(memory_format=torch.channels_last))
    output.backward(torch.randn_like(output))
    assert model[0].weight_trainable.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.works_with("averages of the weights (`AveragedModel`)")
def test_an_average_of_the_weights_is_that_of_the_whole_model():
    model, plain = partial(), network()
    plain.load_state_dict(model.state_dict())
    averages = [AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True) for m in (model, plain)]
    for step in range(3):
        state = {k: v + step if v.is_floating_point() else v for k, v in network().state_dict().items()}
        for module, average in zip((model, plain), averages, strict=True):
            module.load_state_dict(state)
            average.update_parameters(module)
    torch.testing.assert_close(averages[0].state_dict(), averages[1].state_dict(), rtol=0, atol=0)
    assert not same(averages[0].module.state_dict(), model.state_dict())


class TestTying:
    def tied(self) -> tuple[nn.Sequential, nn.Sequential]:
        plain = filled_with_integers(nn.Sequential(*(nn.Conv2d(4, 4, 1, dtype=torch.float64) for _ in range(2))))
        model = convert(copy.deepcopy(plain), 2)
        plain[1].weight = plain[0].weight
        for name in ("weight_trainable", "weight_frozen"):
            setattr(model[1], name, getattr(model[0], name))
        return model, plain

    @pytest.mark.works_with("tied weights: layers that share their parts")
    def test_gradients_add_up(self):
        model, plain = self.tied()
        x, cotangent = integers(2, 4, 3, 3), integers(2, 4, 3, 3)
        for module in (model, plain):
            output = module(x)
            output.backward(cotangent)
        assert torch.equal(model(x), plain(x))
        assert torch.equal(model[0].weight_trainable.grad, plain[0].weight.grad[2:])
        assert len(list(model.parameters())) == 6
        assert same(model.state_dict(), plain.state_dict())

    def test_a_tied_layer_is_not_switched_alone(self):
        model, _ = self.tied()
        weight = model[0].weight.detach()
        with pytest.raises(ValueError, match=r"^0: its weight_trainable, weight_frozen are shared"):
            set_subsets_(model, {"0": ([0, 1], None)})
        set_subsets_(model, subsets(model))
        assert torch.equal(model[0].weight, weight) and torch.equal(model[1].weight, weight)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


@pytest.mark.works_with("`parametrize` and `prune` on the learned part")
class TestComputedParts:
    """parametrize and prune on the learned Parameter work; the state dict then holds the parts."""

    def layers(self) -> tuple[PartialConv2d, nn.Conv2d]:
        conv = filled_with_integers(nn.Conv2d(3, 6, 2, dtype=torch.float64))
        return PartialConv2d.from_conv2d(conv, trainable=[1, 4]), conv

    def test_parametrize(self):
        layer, conv = self.layers()
        x, cotangent = integers(2, 3, 4, 4), integers(2, 6, 3, 3)
        parametrize.register_parametrization(layer, "weight_trainable", Doubled())
        output = layer(x)
        output.backward(cotangent)
        expected = conv(x)
        expected.backward(cotangent)
        assert torch.equal(output, expected)
        original = layer.parametrizations.weight_trainable.original
        assert torch.equal(original.grad, 2 * conv.weight.grad[[1, 4]]) and layer.weight_frozen.grad is None
        state = layer.state_dict()
        assert set(state) == {"weight_frozen", "bias", "parametrizations.weight_trainable.original"}
        assert torch.equal(layer.to_conv2d().weight, conv.weight)
        other, _ = self.layers()
        parametrize.register_parametrization(other, "weight_trainable", Doubled())
        with torch.no_grad():
            other.parametrizations.weight_trainable.original.zero_()
        other.load_state_dict(state)
        assert torch.equal(other.weight, conv.weight)
        parametrize.remove_parametrizations(layer, "weight_trainable")
        assert same(layer.state_dict(), conv.state_dict())
        layer.set_trainable_([0], select="first")
        assert torch.equal(layer.weight, conv.weight)

    def test_prune(self):
        layer, conv = self.layers()
        mask = torch.randint(2, layer.weight_trainable.shape)
        prune.custom_from_mask(layer, "weight_trainable", mask)
        state = layer.state_dict()
        assert set(state) == {"weight_frozen", "bias", "weight_trainable_orig", "weight_trainable_mask"}
        output = layer(integers(2, 3, 4, 4))
        output.backward(integers(*output.shape))
        assert not layer.weight_trainable_orig.grad[mask == 0].any()
        other, _ = self.layers()
        prune.identity(other, "weight_trainable")
        other.load_state_dict(state)
        other(integers(2, 3, 4, 4))
        assert torch.equal(other.weight, layer.weight) and torch.equal(other.weight_frozen, layer.weight_frozen)
        prune.remove(layer, "weight_trainable")
        assert list(layer.state_dict()) == ["weight", "bias"]
        assert torch.equal(layer.weight[[1, 4]], conv.weight[[1, 4]] * mask)

    @pytest.mark.parametrize("how", ["parametrize", "prune"])
    @pytest.mark.does_not(
        "switch, reset or load whole weights into parts that are parametrised or pruned: do it before"
    )
    def test_what_they_rule_out_is_said(self, how: str):
        layer, conv = self.layers()
        if how == "parametrize":
            parametrize.register_parametrization(layer, "weight_trainable", Doubled())
        else:
            prune.identity(layer, "weight_trainable")
        with pytest.raises(
            RuntimeError, match=r"weight_trainable.* parametrized or pruned.*choose what is learned before"
        ):
            layer.set_trainable_(3)
        with pytest.raises(RuntimeError, match=r"weight is whole, but .* parametrized or pruned: load before that"):
            layer.load_state_dict(conv.state_dict())
        with pytest.raises(RuntimeError, match=r"weight_trainable.* parametrized or pruned.*reset"):
            layer.reset_parameters()


class TestTwoForms:
    """State dicts of whole weights and of their parts."""

    def parts(self, model: nn.Module) -> dict[str, Tensor]:
        return {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def test_merge_and_split_are_inverse(self):
        model = partial()
        whole, parts = model.state_dict(), {k: v.detach() for k, v in self.parts(model).items()}
        assert "0.weight_trainable" in parts and "3.weight_frozen" in parts and "3.weight_trainable" not in parts
        merged, divided = merge_state_dict(model, parts), split_state_dict(model, whole)
        assert set(merged) == set(whole) and all(torch.equal(merged[key], whole[key]) for key in whole)
        assert set(divided) == set(parts) and all(torch.equal(divided[key], parts[key]) for key in parts)
        assert list(divided) == list(split_state_dict(model, divided))
        assert same(merge_state_dict(model, whole), whole)
        assert list(split_state_dict(model, whole))[:4] == [
            "0.weight_trainable", "0.weight_frozen", "0.weight_frozen_inputs", "0.bias_trainable",
        ]  # fmt: skip
        network().load_state_dict(merged)

    def test_either_loads(self):
        model, other = partial(), partial()
        assert not same(model.state_dict(), other.state_dict())
        other.load_state_dict(split_state_dict(model, model.state_dict()))
        assert same(model.state_dict(), other.state_dict())

    def test_of_a_layer_alone(self):
        layer = PartialConv2d(3, 6, 2, trainable=[1, 4])
        assert same(merge_state_dict(layer, split_state_dict(layer, layer.state_dict())), layer.state_dict())

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            (lambda state: state.pop("0.weight_frozen"), r"0\.weight_frozen has shape None.*\(3, 3, 3, 3\)"),
            (lambda state: state.update({"0.weight_trainable": torch.ones(2)}), r"0\.weight_trainable .*\(2,\)"),
            (
                lambda state: state.update({"3.weight_trainable": torch.ones(2)}),
                r"3\.weight_trainable .*None in the mod",
            ),
        ],
        ids=["missing", "shape", "unknown"],
    )
    def test_parts_of_other_subsets_are_refused(self, change, named: str):
        model = partial()
        state = self.parts(model)
        change(state)
        with pytest.raises(ValueError, match=named):
            merge_state_dict(model, state)

    def test_a_whole_weight_of_another_shape_is_refused(self):
        with pytest.raises(ValueError, match=r"0\.bias has shape \(5,\) in the state dict, \(6,\)"):
            split_state_dict(partial(), {"0.bias": torch.ones(5)})
