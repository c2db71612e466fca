"""The paper's networks: golden parameter counts, initial values, which parts learn."""

import math

import pytest
import torch
from torch import nn

from rwn_ext import PartialConv2d, load_compact, save_compact
from rwn_ext.paper.networks import build

# Learned parameters of the authors' own runs, CIFAR-10 head.
GOLDEN = {
    "wrn-28-10": {
        None: 36_479_194, 0.07: 2_530_629, 0.1: 3_669_829, 0.4: 14_606_284, 0.7: 25_542_739,
        1: 99_909, 5: 402_097, 10: 779_832,
    },
    "densenet-bc-100-12": {
        None: 769_162, 0.07: 58_453, 0.1: 90_196, 0.4: 305_701, 0.7: 532_894,
        1: 57_529, 5: 177_973, 10: 328_528,
    },
}  # fmt: skip
INTEGRAL = {"conv1": 24_636, "block1": 194_484, "block2": 258_996, "block3": 291_252, "fc": 27_418, "nothing": 23_988}
NAMES = ["wrn-10-1", "densenet-bc-22-12", "vgg11-bn", "vgg19-bn", "vgg19", "alexnet"]


def learned(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize("part", GOLDEN["wrn-28-10"], ids=str)
@pytest.mark.parametrize("name", GOLDEN)
def test_learned_parameters_equal_the_papers(name, part):
    with torch.device("meta"):
        assert learned(build(name, 10, part)) == GOLDEN[name][part]


# (filters, input channels, filter size) of each convolution, from the papers that introduced the networks.
VGG11 = (64, 128, 256, 256, 512, 512, 512, 512)
VGG19 = (64,) * 2 + (128,) * 2 + (256,) * 4 + (512,) * 8
ALEXNET = [(64, 3, 11), (192, 64, 5), (384, 192, 3), (256, 384, 3), (256, 256, 3)]


def vgg(widths: tuple[int, ...]) -> list[tuple[int, int, int]]:
    return [(width, before, 3) for before, width in zip((3, *widths), widths, strict=False)]


@pytest.mark.parametrize(
    ("name", "convolutions", "norm", "width"),
    [
        ("vgg11-bn", vgg(VGG11), True, 512), ("vgg19-bn", vgg(VGG19), True, 512), ("vgg19", vgg(VGG19), False, 512),
        ("alexnet", ALEXNET, False, 256),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_plain_networks_are_the_published_ones(name, convolutions, norm, width):
    """Each convolution with a bias, in this order; one linear layer as the head."""
    with torch.device("meta"):
        network = build(name, 10)
    found = [(*m.weight.shape[:3],) for m in network.modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
    assert found == convolutions
    weights = sum(k * c * r * r + k for k, c, r in convolutions) + 10 * width + 10
    assert learned(network) == weights + norm * sum(2 * k for k, _, _ in convolutions)


def test_wide_networks_have_their_weights_and_project_what_was_activated():
    """3x3 convolutions two a unit, 1x1 projections where the width changes, reading relu(bn(x)) as the first does."""
    network = build("wrn-28-4", 10, seed=0)
    widths, total, before = (64, 128, 256), 3 * 16 * 9, 16
    for width in widths:
        total += before * width * 9 + before * width + 7 * width * width * 9
        total += 2 * (before + 7 * width)
        before = width
    assert learned(network) == total + 2 * before + 10 * before + 10
    seen = {}
    unit = network.block2[0]
    for conv in ("conv1", "shortcut"):
        unit.get_submodule(conv).register_forward_pre_hook(lambda _, args, name=conv: seen.update({name: args[0]}))
    network(torch.randn(1, 3, 32, 32))
    assert seen["conv1"] is seen["shortcut"] and (seen["conv1"] >= 0).all()


@pytest.mark.parametrize("only", INTEGRAL)
def test_learned_parameters_of_one_part_equal_the_papers(only):
    with torch.device("meta"):
        assert learned(build("densenet-bc-100-12", 10, only=only)) == INTEGRAL[only]


@pytest.mark.parametrize(("name", "bn", "fc"), [("wrn-28-10", 17_952, 6_410), ("densenet-bc-100-12", 23_988, 3_430)])
def test_batch_norm_and_classifier_counts(name, bn, fc):
    with torch.device("meta"):
        network = build(name, 10)
        fixed = build(name, 10, 0.1, bn="frozen")
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert sum(learned(m) for m in norms) == bn
    assert learned(network.fc) == fc
    assert learned(fixed) == GOLDEN[name][0.1] - bn


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", [None, 0.1, 0], ids=str)
def test_every_network_computes_and_learns(name, part):
    network = build(name, 7, part, seed=0)
    output = network(torch.randn(2, 3, 32, 32))
    assert output.shape == (2, 7)
    (output * torch.randn_like(output)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_partial_network_computes_what_the_whole_one_does(name):
    whole, partial = build(name, 10, seed=3).eval(), build(name, 10, 0.4, seed=3).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(partial(x), whole(x), rtol=0, atol=0)


def test_filters_learned_are_the_last_and_the_others_can_be_zero():
    network = build("vgg11-bn", 10, 0.25, frozen="zero", seed=0)
    convs = [m for m in network.modules() if isinstance(m, PartialConv2d)]
    assert len(convs) == 8
    for conv in convs:
        learns = conv.out_channels // 4
        assert conv.filters.indices == tuple(range(conv.out_channels - learns, conv.out_channels))
        assert not conv.weight[:-learns].any() and conv.weight[-learns:].any()
        assert not conv.bias[:-learns].any() and conv.bias[-learns:].all()


def test_part_within_only_one_part():
    network = build("wrn-10-1", 10, 0.5, only="block2")
    for name, conv in network.named_modules():
        if isinstance(conv, PartialConv2d):
            assert len(conv.filters) == (conv.out_channels // 2 if name.startswith("block2.") else 0)
    assert not network.fc.weight.requires_grad


def test_several_parts_learn_together():
    network = build("wrn-10-1", 10, only="conv1+fc")
    assert learned(network.conv1) == 16 * 27 and learned(network.fc) == 650
    assert all(name.split(".")[-1].startswith("bn") for name, m in network.named_modules() if _own(m) and "." in name)
    half = build("wrn-10-1", 10, 0.5, only="block1+block3")
    for name, conv in half.named_modules():
        if isinstance(conv, PartialConv2d):
            assert len(conv.filters) == (conv.out_channels // 2 if name[:6] in ("block1", "block3") else 0)


def _own(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))


@pytest.mark.parametrize("frozen", ["random", "zero"])
def test_input_channels_are_chosen_along_dimension_one(frozen):
    network = build("wrn-10-1", 10, 0.25, frozen, dim=1, seed=0)
    conv = network.block2[0].conv2
    assert conv.weight_trainable.shape == (32, 8, 3, 3) and conv.inputs.indices == tuple(range(24, 32))
    assert conv.weight[:, :24].any() == (frozen == "random")
    assert network.conv1.inputs.indices == (2,), "at least one"


def test_filters_can_be_chosen_by_their_magnitude():
    whole, network = build("wrn-10-1", 10, seed=0), build("wrn-10-1", 10, 3, select="magnitude", seed=0)
    largest = whole.block1[0].conv1.weight.flatten(1).norm(dim=1).topk(3).indices
    assert network.block1[0].conv1.filters.indices == tuple(sorted(largest.tolist()))
    drawn = [build("wrn-10-1", 10, 3, select="random", seed=seed).conv1.filters.indices for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("name", ["wrn-10-1", "densenet-bc-22-12", "vgg11-bn"])
def test_networks_without_batch_norm(name):
    network = build(name, 10, 0.1, bn="none", seed=0)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    output = network(torch.randn(2, 3, 32, 32))
    (output * torch.randn_like(output)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("seed", [None, 4])
def test_gamma_can_be_uniform(seed):
    torch.manual_seed(1)
    network = build("wrn-16-4", 10, only="nothing", gamma="uniform", seed=seed)
    gamma = torch.cat([m.weight.detach() for m in network.modules() if isinstance(m, nn.BatchNorm2d)])
    assert gamma.min() >= 0 and gamma.max() <= 1 and abs(gamma.mean() - 0.5) < 0.03
    assert abs(gamma.var() - 1 / 12) < 0.01 and not any(m.bias.any() for m in network.modules() if _is_norm(m))


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d)


@pytest.mark.parametrize("init", ["he", "orthogonal", "signed"])
def test_fixed_weights_can_be_of_other_distributions(init):
    network = build("wrn-10-2", 10, 0.1, frozen=init, seed=2)
    again = build("wrn-10-2", 10, 0.1, frozen=init, seed=2)
    conv = network.block2[0].conv2
    weight, std = conv.weight.detach(), math.sqrt(2 / (64 * 9))
    assert conv.frozen == "random" and network.init == init and torch.equal(weight, again.block2[0].conv2.weight)
    assert weight.std().item() == pytest.approx(std, rel=0.03)
    if init == "signed":
        assert weight.abs().unique().numel() == 1 and abs((weight > 0).double().mean() - 0.5) < 0.02
    if init == "orthogonal":
        matrix = weight.flatten(1).double()
        torch.testing.assert_close(matrix @ matrix.t(), 2 * torch.eye(64).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("init", ["he", "orthogonal", "signed"])
def test_such_networks_fit_into_compact_checkpoints(tmp_path, init):
    pytest.importorskip("safetensors")
    network = build("wrn-10-1", 10, 0.1, frozen=init, seed=2)
    with torch.no_grad():
        network.block1[0].conv1.weight_trainable.add_(1)
    save_compact(network, tmp_path / "compact.safetensors", seed=2, init=network.init)
    loaded = load_compact(build("wrn-10-1", 10, seed=9), tmp_path / "compact.safetensors")
    torch.testing.assert_close(loaded.state_dict(), network.state_dict(), rtol=0, atol=0)


def test_networks_begin_with_anothers_weights():
    start = build("wrn-10-1", 10, seed=1).state_dict()
    network = build("wrn-10-1", 7, only="block2", seed=2, start=start)
    own = network.state_dict()
    fresh = build("wrn-10-1", 7, seed=2).state_dict()
    for key in own:
        assert torch.equal(own[key], (fresh if key.startswith("fc.") else start)[key]), key
    with pytest.raises(ValueError, match=r"start is of another network: its .* has shape None"):
        build("wrn-16-1", 10, start=start)
    with pytest.raises(ValueError, match="start is of another network"):
        build("wrn-10-2", 10, start=start)


def test_imagenet_network_has_stride_two_in_every_block():
    network = build("wrn-10-1-imagenet", 20, 0.5, seed=0)
    sizes = []
    for block in (network.block1, network.block2, network.block3):
        block.register_forward_hook(lambda _, args, output: sizes.append(output.shape[-1]))
    assert network(torch.randn(1, 3, 64, 64)).shape == (1, 20) and sizes == [32, 16, 8]
    assert network.init == "normal"


def test_initial_values():
    """DenseNet's convolutions are normal by fan-out, the others PyTorch's uniform by fan-in."""
    unit = build("densenet-bc-40-12", 10, seed=0).block3[5]
    for weight in (unit.conv1.weight, unit.conv2.weight):
        fan_out = weight.size(0) * weight.size(2) ** 2
        assert weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
        assert weight.abs().max() > 2.5 * weight.std()
    wide = build("wrn-16-4", 10, seed=0).block3[1].conv1.weight
    bound = 1 / math.sqrt(wide[0].numel())
    assert 0.99 * bound < wide.abs().max() <= bound


def test_seed_decides_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    first, second, other = (build("wrn-10-1", 10, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.randn(3), expected)
    assert torch.equal(first.conv1.weight, second.conv1.weight)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


def test_dropout_is_the_papers_unless_given():
    def rates(name, **options):
        with torch.device("meta"):
            return {m.p for m in build(name, 10, **options).modules() if isinstance(m, nn.Dropout)}

    assert rates("wrn-28-10") == {0.3}
    assert rates("wrn-28-4") == set()
    assert rates("wrn-28-10", dropout=0.0) == set()
    assert rates("wrn-16-2", dropout=0.2) == {0.2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet-50", 10), "resnet-50"),
        (("wrn-29-10", 10), "6n \\+ 4"),
        (("densenet-bc-101-12", 10), "6n \\+ 4"),
        (("wrn-10-1", 10, 40), "conv1.*40"),
        (("wrn-10-1", 10, 1.5), "1.5"),
        (("wrn-10-1", 10, None, "zero"), "zero"),
        (("wrn-10-1", 10, None, "random", "block9"), "block9.*block1"),
        (("wrn-10-1", 10, None, "random", "nothing", "frozen"), "nothing of wrn-10-1 to learn"),
        (("alexnet", 10, None, "random", "nothing"), "nothing of alexnet to learn"),
        (("wrn-10-1", 10, None, "random", "block1+block9"), "block1\\+block9.*block1"),
        (("wrn-10-1", 10, 0.1, "ones"), "frozen='ones'.*signed"),
        (("wrn-10-1", 10, 0.1, "random", None, "no"), "bn='no'"),
        (("vgg19", 10, None, "random", None, "learned", 0.5), "dropout=0.5"),
        (("wrn-10-1", 10, None, "random", None, "learned", 1.0), "dropout=1.0"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(map(str, value)),
)
def test_wrong_choices_name_the_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 4, "part": 0.1}, "dim=4"),
        ({"dim": 1}, "dim=1 needs"),
        ({"dim": 2, "part": 5}, "conv1.*part=5"),
        ({"dim": 3, "part": 0.1, "select": "random"}, "select='random'"),
        ({"gamma": "normal"}, "gamma='normal'"),
        ({"part": 0.1, "select": "best"}, "select='best'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_dimensions_and_selections_name_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        build("wrn-10-1", 10, **options)


@pytest.mark.parametrize("frozen", ["random", "zero"])
def test_at_least_one_input_channel_is_learned(frozen):
    """A tenth of the images' three channels is none; zeroed, the network would see nothing."""
    network = build("densenet-bc-22-12", 10, 0.1, dim=1, frozen=frozen, seed=0)
    assert network.conv1.inputs.indices == (2,) and len(network.conv1.filters) == 24
    assert network.block1[0].conv1.inputs.indices == (22, 23)
    assert network.conv1.weight_trainable.shape == (24, 1, 3, 3)
    if frozen == "zero":
        x = torch.randn(4, 3, 16, 16)
        assert network(x).std(0).min() > 0
