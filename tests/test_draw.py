"""Initial values from a seed: the published generator, the documented layout, the distributions."""

from __future__ import annotations

import hashlib
import math
import statistics

import pytest
import torch
from torch import nn

from rwn_ext import PartialConv2d, convert, draw_
from rwn_ext.draw import _normal, draw, philox, philox_rounds
from rwn_ext.paper import networks

# counter, key and words of the authors' known-answer tests (Random123, kat_vectors).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_answers(counter, key, words):
    for length in (1, 9):
        result = philox_rounds([torch.full((length,), word) for word in counter], key)
        assert all((column == word).all() for column, word in zip(result, words, strict=True))


def one_word(seed: int, name: str, index: int) -> int:
    """Word `index` of a stream in plain Python, by the layout in the module's docstring."""
    stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    c = [index // 4 % 2**32, index // 4 // 2**32, stream % 2**32, stream // 2**32]
    k = [seed % 2**32, seed // 2**32]
    for _ in range(10):
        p, q = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [q // 2**32 ^ c[1] ^ k[0], q % 2**32, p // 2**32 ^ c[3] ^ k[1], p % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c[index % 4]


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3, 2**64 - 1])
def test_words_and_uniform_values_lie_as_documented(seed: int):
    name, shape = "block1.0.conv1.weight", (5, 7, 31, 31)
    values = draw(seed, name, shape)
    bound = 1 / math.sqrt(7 * 31 * 31)
    for index in (0, 1, 6, 32767, 32768, values.numel() - 1):
        expected = torch.tensor(((one_word(seed, name, index) + 0.5) * 2.0**-31 - 1) * bound, dtype=torch.float32)
        assert values.flatten()[index] == expected
    assert philox(seed, name, 2**33, 1)[1] == one_word(seed, name, 2**35 + 1)


def test_normal_values_are_those_of_the_inverse_distribution_function():
    words = torch.cat([torch.arange(0, 2**32, 999_983), torch.tensor([1, 2, 300, 2**31 - 1, 2**31, 2**32 - 1])])
    inverse = statistics.NormalDist().inv_cdf
    expected = torch.tensor([inverse((word + 0.5) / 2**32) for word in words.tolist()], dtype=torch.float64)
    torch.testing.assert_close(_normal(words.double()), expected, rtol=2e-7, atol=1e-15)
    std = math.sqrt(2 / (9 * 32))
    values = draw(3, "conv.weight", (32, 16, 3, 3), init="normal").flatten()
    assert values[5].item() == pytest.approx(std * inverse((one_word(3, "conv.weight", 5) + 0.5) / 2**32), rel=1e-6)


def test_values_are_the_same_bits_everywhere():
    """Hashes that any machine must reproduce: another value here breaks every compact checkpoint."""
    hashes = {}
    for init in ("uniform", "normal", "he", "orthogonal", "signed"):
        values = draw(1802_00844, "conv.weight", (64, 32, 3, 3), init=init)
        hashes[init] = hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]
    assert hashes == {
        "uniform": "7d2205094fbc91e9", "normal": "ab70213587e9bcba", "he": "898f1a9891ef2b7a",
        "orthogonal": "354fd79bf22b855c", "signed": "b940a47c73551fd0",
    }  # fmt: skip


def test_orthogonal_values_span_what_the_normal_ones_do():
    """Against torch's QR: the same subspace of the first rows, also where there are more filters than inputs."""
    for shape in ((12, 5, 3, 3), (40, 3, 3, 3)):
        normal = draw(2, "w", shape, init="he").flatten(1).double()
        values = draw(2, "w", shape, init="orthogonal").flatten(1).double() / math.sqrt(2)
        normal, values = (normal, values) if shape[0] < 27 else (normal.t(), values.t())
        torch.testing.assert_close(values @ values.t(), torch.eye(len(values)).double(), rtol=0, atol=1e-6)
        basis = torch.linalg.qr(normal.t())[0]
        signs = torch.sign((basis * values.t()).sum(0))
        torch.testing.assert_close(values.t(), basis * signs, rtol=0, atol=1e-5)


def test_moments():
    uniform, normal = (draw(5, "w", (100, 100, 3, 3), init=init).double() for init in ("uniform", "normal"))
    assert uniform.abs().max() <= 1 / 30 and abs(uniform.mean()) < 5e-4
    assert uniform.var().item() == pytest.approx(1 / 900 / 3, rel=0.02)
    std = math.sqrt(2 / 900)
    assert normal.std().item() == pytest.approx(std, rel=0.01) and abs(normal.mean() / std) < 0.02
    assert ((normal / std) ** 4).mean().item() == pytest.approx(3, rel=0.05)
    neighbours = torch.stack([normal.flatten()[:-1], normal.flatten()[1:]])
    assert abs(torch.corrcoef(neighbours)[0, 1]) < 0.02


def test_threads_and_the_global_generator_do_not_matter():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(9, "w", (40, 30, 5, 5), init="normal")
    assert torch.equal(torch.get_rng_state(), state)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    second = draw(9, "w", (40, 30, 5, 5), init="normal")
    torch.set_num_threads(threads)
    assert torch.equal(first, second)


class TestModels:
    def test_a_layer_depends_on_its_name_alone(self):
        small = draw_(nn.Sequential(nn.Conv2d(3, 8, 3)), 4)
        large = draw_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Linear(8, 2)), 4)
        assert torch.equal(small[0].weight, large[0].weight) and torch.equal(small[0].bias, large[0].bias)
        assert large[3].weight.abs().max() <= 8**-0.5 and large[3].bias.abs().max() <= 8**-0.5
        assert not torch.equal(draw_(nn.Sequential(nn.Conv2d(3, 8, 3)), 5)[0].weight, small[0].weight)

    def test_some_layers_only(self):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1))
        before = model[0].weight.detach().clone()
        draw_(model, 4, layers=["1"])
        assert torch.equal(model[0].weight, before)
        assert torch.equal(model[1].weight, draw(4, "1.weight", (8, 8, 1, 1)))

    @pytest.mark.parametrize("frozen", ["random", "zero"])
    def test_before_or_after_converting(self, frozen: str):
        before = convert(draw_(nn.Sequential(nn.Conv2d(3, 8, 3)), 4, init="normal"), [1, 2], frozen=frozen)
        after = draw_(convert(nn.Sequential(nn.Conv2d(3, 8, 3)), [1, 2], frozen=frozen), 4, init="normal")
        assert torch.equal(before[0].weight, after[0].weight) and torch.equal(before[0].bias, after[0].bias)
        assert bool(after[0].weight_frozen.any()) == (frozen == "random")
        assert torch.equal(draw_(PartialConv2d(3, 8, 3, trainable=1), 4).weight, draw(4, "weight", (8, 3, 3, 3)))

    def test_convert_draws_the_layers_it_converts(self):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 2))
        kept = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
        convert(model, {"1": 2}, draw_seed=4)
        assert torch.equal(model[0].weight, kept[0]) and torch.equal(model[2].weight, kept[1])
        assert torch.equal(model[1].weight, draw(4, "1.weight", (8, 8, 1, 1)))

    def test_the_papers_networks(self):
        wide, dense = (networks.build(name, 10, 0.4, seed=6) for name in ("wrn-10-1", "densenet-bc-22-12"))
        conv = wide.block2[0].conv1
        assert torch.equal(conv.weight, draw(6, "block2.0.conv1.weight", conv.weight.shape))
        conv = dense.block2[0].conv1
        assert torch.equal(conv.weight, draw(6, "block2.0.conv1.weight", conv.weight.shape, init="normal"))

    def test_wrong_values(self):
        for seed in (-1, 2**64):
            with pytest.raises(ValueError, match=f"seed={seed} is outside"):
                draw_(nn.Conv2d(1, 1, 1), seed)
        with pytest.raises(ValueError, match="init='him' is unknown; choose one of uniform, normal"):
            draw_(nn.Conv2d(1, 1, 1), 0, init="him")
