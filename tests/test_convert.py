"""Whole models to partial and back, and the subsets they carry."""

from __future__ import annotations

import copy
import json
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured

import rwn_ext
from rwn_ext import PartialConv2d, convert, restore, set_subsets_, subsets
from rwn_ext.report import describe


class Block(nn.Module):
    """A residual block with a downsampling path."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, padding_mode="reflect")
        self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, 2), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv2(self.bn1(self.conv1(x)).relu()) + self.downsample(x)).relu()


def network() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, 8, 3, padding="same"),
            layer1=Block(8, 8),
            layer2=Block(8, 12),
            head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)),
        )
    )


CONVS = ["stem", *(f"layer{i}.{name}" for i in (1, 2) for name in ("conv1", "conv2", "downsample.0"))]


def learned(model: nn.Module) -> dict[str, str]:
    """What each convolution learns, in short: a count, or `conv` for a plain one."""
    return {
        name: f"{len(module.filters)}" if isinstance(module, PartialConv2d) else "conv"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, PartialConv2d))
    }


def test_convert_and_restore_keep_function_state_and_order():
    model = network().eval()
    plain = copy.deepcopy(model)
    assert convert(model, trainable=0.5) is model
    assert learned(model) == dict.fromkeys(CONVS, "4") | {name: "6" for name in CONVS if "layer2" in name}
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not any(module.training for module in model.modules())
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(model(x), plain(x))
    trained = network()
    model.load_state_dict(trained.state_dict())
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x), trained.eval()(x)) and torch.equal(plain(x), model(x))

    assert restore(model) is model
    assert str(model) == str(plain)
    assert set(learned(model).values()) == {"conv"} and torch.equal(model(x), plain(x))
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("trainable", "skip", "expected"),
    [
        (0, (), ["0"] * 7),
        (2, "stem", ["conv", *["2"] * 6]),
        (2, ["stem", "*.downsample.*"], ["conv", "2", "2", "conv", "2", "2", "conv"]),
        ({"layer1.*": 1}, (), ["conv", "1", "1", "1", "conv", "conv", "conv"]),
        ({"*": 1, "*.downsample.*": 0, "layer2.*": 0.5}, (), ["1", "1", "1", "0", "6", "6", "6"]),
        ({"layer2.*": 0.5, "*.downsample.*": 0, "*": 1}, (), ["1"] * 7),
        ({"*.conv[12]": [0, 2], "stem": 1.0}, "layer2.conv2", ["8", "2", "2", "conv", "2", "conv", "conv"]),
        ({"stem": [True, *[False] * 7]}, (), ["1", *["conv"] * 6]),
    ],
    ids=str,
)
def test_patterns_the_last_that_matches_decides(trainable, skip, expected: list[str]):
    assert learned(convert(network(), trainable=trainable, skip=skip)) == dict(zip(CONVS, expected, strict=True))


def unchanged(model: nn.Module, before: list[nn.Module]) -> bool:
    return all(a is b for a, b in zip(model.modules(), before, strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"trainable": {"layer9.*": 1}}, ValueError, r"'layer9\.\*'.*stem, layer1\.conv1"),
        ({"trainable": {"*": 1, "head": 1}}, ValueError, "'head'"),
        ({"trainable": 1, "skip": "layer9.*"}, ValueError, r"'layer9\.\*'"),
        ({"trainable": {1: 1}}, TypeError, "1 is no name pattern"),
        ({"trainable": 10}, ValueError, "stem: .*10"),
        ({"trainable": {"*": 1, "layer2.downsample.*": 13}}, ValueError, r"layer2\.downsample\.0: .*13"),
        ({"trainable": {"*": 1, "layer2.conv2": True}}, TypeError, r"layer2\.conv2: .*True"),
        ({"trainable": None}, TypeError, "stem: .*None"),
        ({"trainable": 1, "trainable_inputs": 4}, ValueError, "stem: trainable_inputs=4"),
        ({"trainable": 1, "select": "best"}, ValueError, "'best'"),
        ({"trainable": 1, "frozen": "ones"}, ValueError, "'ones'"),
        ({"trainable": 1, "algorithm": "fast"}, ValueError, "'fast'"),
    ],
    ids=str,
)
def test_an_error_names_the_layer_and_leaves_the_model_unchanged(arguments: dict, error: type, named: str):
    model = network()
    before = list(model.modules())
    with pytest.raises(error, match=named):
        convert(model, **arguments)
    assert unchanged(model, before)


def test_a_root_that_is_a_convolution():
    conv = nn.Conv2d(3, 4, 3)
    layer = convert(conv, trainable={"*": 2})
    assert isinstance(layer, PartialConv2d) and subsets(layer) == {"": ([2, 3], [0, 1, 2])}
    plain = restore(layer)
    assert type(plain) is nn.Conv2d and torch.equal(plain.weight, conv.weight) and plain.weight is not conv.weight
    with pytest.raises(ValueError, match=r"the model: .*5"):
        convert(conv, trainable=5)


def test_containers_keep_their_order_and_converting_twice_changes_nothing():
    model = nn.ModuleDict(
        {"b": nn.ModuleList([nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1)]), "a": nn.Conv2d(2, 2, 1)}
    )
    model.register_module("none", None)
    keys = list(model.state_dict())
    convert(model, trainable=1)
    assert list(model) == ["b", "a", "none"] and isinstance(model["b"][1], nn.ReLU)
    assert list(model.state_dict()) == keys and list(learned(model).values()) == ["1"] * 3
    layers = list(model.modules())
    assert unchanged(convert(model, trainable=0), layers)


def test_arguments_reach_every_layer():
    model = convert(
        network(), trainable=1.0, trainable_inputs=1, trainable_bias="none", frozen="zero", algorithm="gather"
    )
    for module in (module for module in model.modules() if isinstance(module, PartialConv2d)):
        assert len(module.inputs) == 1 and module.trainable_bias == "none"
        assert module.frozen == "zero" and module.algorithm == "gather"
        assert not module.weight_frozen_inputs.any()


def test_one_seed_draws_every_layer_differently():
    def chosen(seed: int) -> list:
        model = nn.Sequential(*(nn.Conv2d(32, 32, 1) for _ in range(3)))
        return [filters for filters, _ in subsets(convert(model, 8, select="random", seed=seed)).values()]

    assert chosen(1) == chosen(1) != chosen(2)
    assert len({tuple(filters) for filters in chosen(1)}) == 3


def test_magnitude_looks_at_the_weights_present():
    model = network()
    expected = {
        name: sorted(module.weight.flatten(1).norm(dim=1).topk(3).indices.tolist())
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    assert {name: filters for name, (filters, _) in subsets(convert(model, 3, select="magnitude")).items()} == expected


def test_load_hooks_are_called_with_the_converted_module():
    model, seen = nn.Sequential(nn.Conv2d(3, 4, 3)), []
    model[0].register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    convert(model, 0.5).load_state_dict(model.state_dict())
    assert seen == [model[0]]


def test_a_shared_module_answers_to_all_its_names():
    def shared() -> nn.Module:
        model = nn.Module()
        model.a = model.b = nn.Conv2d(3, 4, 3)
        return model

    model = convert(shared(), {"b": 1})
    assert model.a is model.b and len(model.a.filters) == 1
    assert isinstance(convert(shared(), 0.5, skip="b").a, nn.Conv2d)


def test_hooks_move_along_and_their_handles_still_remove_them():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU())
    conv, calls = model[0], []
    forward = conv.register_forward_hook(lambda *_: calls.append("forward"))
    conv.register_forward_pre_hook(lambda *_, **__: calls.append("pre"), with_kwargs=True)
    conv.register_full_backward_hook(lambda *_: calls.append("backward"))
    conv.register_state_dict_post_hook(lambda *_: calls.append("state"))
    x = torch.randn(1, 2, 5, 5, requires_grad=True)

    def run() -> list[str]:
        calls.clear()
        output = model(x)
        output.backward(torch.randn_like(output))
        model.state_dict()
        return sorted(calls)

    everything = ["backward", "forward", "pre", "state"]
    assert run() == everything
    convert(model, trainable=2)
    assert run() == everything
    restore(model)
    assert run() == everything
    convert(model, trainable=2)
    forward.remove()
    assert run() == ["backward", "pre", "state"]
    model[0].register_forward_hook(lambda *_: calls.append("new"))
    assert run() == ["backward", "new", "pre", "state"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype_device_layout_and_training_flags(dtype: torch.dtype, device: str):
    model = network().to(device, dtype, memory_format=torch.channels_last)
    model.layer1.conv1.eval()
    for other in (convert(model, trainable=[1, 4]), restore(model)):
        for name, module in other.named_modules():
            assert module.training == (name != "layer1.conv1")
            for parameter in module.parameters(recurse=False):
                assert parameter.dtype == dtype and parameter.device.type == device
                if parameter.dim() == 4:
                    assert parameter.is_contiguous(memory_format=torch.channels_last)


def test_meta_models_convert_before_they_hold_weights():
    with torch.device("meta"):
        model = convert(network(), trainable=0.5)
    assert all(p.is_meta for p in model.parameters())
    trained = network()
    model.load_state_dict(trained.state_dict(), assign=True)
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(model.eval()(x), trained.eval()(x))
    with torch.device("meta"):
        assert all(p.is_meta for p in restore(convert(network(), trainable=0.5)).parameters())
    with pytest.raises(ValueError, match="meta"), torch.device("meta"):
        convert(network(), trainable=0.5, select="magnitude")


def test_a_shared_module_stays_one_module():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(conv, nn.Sequential(nn.ReLU(), conv))
    x = torch.randn(2, 4, 5, 5)
    output = model(x)
    convert(model, trainable=2)
    assert isinstance(model[0], PartialConv2d) and model[0] is model[1][1]
    assert torch.equal(model(x), output) and list(subsets(model)) == ["0"]
    restore(model)
    assert type(model[0]) is nn.Conv2d and model[0] is model[1][1]


class Standardized(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    model[1].weight = model[0].weight
    return model


def patched(conv: nn.Conv2d) -> nn.Conv2d:
    conv.forward = lambda x: x
    return conv


def watched(conv: nn.Conv2d) -> nn.Conv2d:
    conv.weight.register_hook(lambda grad: grad * 2)
    return conv


LEFT_ALONE = {
    "subclass": (lambda: nn.Sequential(Standardized(4, 4, 3)), "Standardized"),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), "LazyConv2d"),
    "tied": (tied, r"0 .*weight is shared.*1 .*weight is shared"),
    "weight_norm": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))), "Parametrized"),
    "weight_norm-old": (lambda: nn.Sequential(torch.nn.utils.weight_norm(nn.Conv2d(4, 4, 1))), "computed"),
    "spectral_norm-old": (lambda: nn.Sequential(torch.nn.utils.spectral_norm(nn.Conv2d(4, 4, 1))), "computed"),
    "pruned": (lambda: nn.Sequential(l1_unstructured(nn.Conv2d(4, 4, 1), "weight", 0.5)), "computed"),
    "forward-replaced": (lambda: nn.Sequential(patched(nn.Conv2d(4, 4, 1))), "forward"),
    "weight-hook": (lambda: nn.Sequential(watched(nn.Conv2d(4, 4, 1))), "hook"),
}


@pytest.mark.parametrize(("make", "why"), LEFT_ALONE.values(), ids=LEFT_ALONE)
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.does_not(
    "convert subclasses of `nn.Conv2d`, parametrised and tied weights, weights with hooks: they stay, with a warning"
)
def test_layers_that_would_lose_something_are_left_alone_and_listed(make, why: str):
    model = nn.Sequential(make(), nn.Conv2d(4, 4, 1))
    before = list(model[0].modules())
    with pytest.warns(UserWarning, match=why) as caught:
        convert(model, trainable=2)
    assert unchanged(model[0], before) and isinstance(model[1], PartialConv2d)
    (warning,) = [w for w in caught if issubclass(w.category, UserWarning) and "left" in str(w.message)]
    assert "0.0" in str(warning.message) and warning.filename == __file__
    # None of these is a loss for who asked to skip them.
    model = nn.Sequential(make(), nn.Conv2d(4, 4, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        convert(model, trainable=2, skip="0.*")


def test_reports(capsys: pytest.CaptureFixture[str], without_cpu_kernel):
    model = convert(network(), {"*": 0.5, "layer1.*": 0, "*.conv2": 1.0}, skip="*.downsample.*", verbose=True)
    text = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith(("stem", "layer"))}
    assert list(rows) == ["layer", *CONVS]
    assert rows["stem"] == ["8x3x3x3", "4/8", str(4 * 27 + 4)]
    assert rows["layer1.conv1"] == ["8x8x3x3", "0/8", "0"]
    assert rows["layer2.conv2"] == ["12x12x3x3", "12/12", "1,308"]
    assert rows["layer2.downsample.0"] == ["12x8x1x1", "12/12", str(8 * 12 + 12)]
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in model.parameters())]
    assert text.splitlines()[-1] == f"{counts[0]:,} of the model's {counts[1]:,} parameters are learned"
    for ours, plain in zip(model.state_dict().values(), network().state_dict().values(), strict=True):
        assert ours.shape == plain.shape

    model = network().train()
    model.layer1.bn1.eval()
    x = torch.randn(2, 3, 12, 12)
    running = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    convert(model, {"*": 0.5, "layer1.*": 0, "*.conv2": 1.0}, skip="*.downsample.*", verbose=True, example=x)
    text = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith(("stem", "layer"))}
    assert [rows[name][-1] for name in ["layer", *CONVS]] == [
        "algorithm", "full", "none", "full", "full", "full", "full", "full",
    ]  # fmt: skip
    assert not model.layer1.bn1.training and model.layer2.bn1.training and model.training
    assert all(torch.equal(value, running[key]) for key, value in model.state_dict().items() if "running" in key)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_report_of_a_model_that_calls_by_keyword():
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 32, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(input=x)

    assert "gather" in describe(convert(Wrapper(), trainable=8), torch.randn(1, 3, 99, 99))


class TestSubsets:
    def test_survive_json_and_a_fresh_model(self):
        model = convert(network(), {"*": 0.5, "layer1.*": [0, 2], "stem": 0}, trainable_inputs=[0, 2])
        assert subsets(model)["layer1.conv2"] == ([0, 2], [0, 2])
        assert subsets(model)["stem"] == ([], [0, 2])
        stored = json.loads(json.dumps(subsets(model)))
        other = convert(network(), trainable=3)
        output = other.eval()(torch.ones(2, 3, 12, 12))
        assert set_subsets_(other, stored) is other
        assert subsets(other) == subsets(model)
        assert torch.equal(other(torch.ones(2, 3, 12, 12)), output)
        other.load_state_dict(model.state_dict())
        for (name, ours), (_, theirs) in zip(
            sorted(other.named_parameters()), sorted(model.named_parameters()), strict=True
        ):
            assert torch.equal(ours, theirs) and ours.requires_grad == theirs.requires_grad, name

    def test_layers_not_named_keep_theirs_and_others_are_errors(self):
        model = convert(network(), trainable=2)
        set_subsets_(model, {"stem": ([5], None)})
        assert subsets(model)["stem"] == ([5], [0, 1, 2]) and subsets(model)["layer1.conv1"][0] == [6, 7]
        with pytest.raises(ValueError, match=r"'layer9', 'head\.2'.*stem, layer1"):
            set_subsets_(model, {"stem": ([0], None), "layer9": ([0], None), "head.2": ([0], None)})
        assert subsets(model)["stem"] == ([5], [0, 1, 2])

    @pytest.mark.parametrize(
        ("wrong", "error"),
        [
            (([12], None), ValueError),
            ((True, None), TypeError),
            (([0], [8]), ValueError),
            (([0],), ValueError),
            (5, TypeError),
        ],
        ids=str,
    )
    def test_an_error_names_the_layer_and_leaves_the_model_unchanged(self, wrong: tuple, error: type):
        model = convert(network(), trainable=2)
        before = subsets(model)
        with pytest.raises(error, match=r"layer2\.conv1: "):
            set_subsets_(model, {"stem": ([0], None), "layer2.conv1": wrong})
        assert subsets(model) == before

    def test_an_optimizer_that_cannot_follow_leaves_the_model_unchanged(self):
        model = convert(network(), {"*": 2, "layer2.conv1": 0})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        before = subsets(model)
        with pytest.raises(ValueError, match=r"layer2\.conv1: .*add_param_group"):
            set_subsets_(model, {"stem": ([0], None), "layer2.conv1": ([0], None)}, optimizer=optimizer)
        assert subsets(model) == before


def test_the_public_names():
    assert set(rwn_ext.__all__) <= set(dir(rwn_ext))
    assert {"PartialConv2d", "convert", "restore", "subsets", "set_subsets_"} <= set(rwn_ext.__all__)
