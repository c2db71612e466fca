"""Lean blocks: the bits of the plain modules, what is kept for backward, and the plain way for everything else."""

from __future__ import annotations

import copy
import itertools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import saved_tensors
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rwn_ext import PartialConv2d
from rwn_ext.frozen_norm import freeze_norms
from rwn_ext.lean import bits, block, norms, pooling
from rwn_ext.lean.function import BlockFunction

C = 12


def frozen(norm: nn.Module) -> nn.Module:
    freeze_norms(norm)
    return norm


NORMS = {
    "batch": lambda: nn.BatchNorm2d(C),
    "batch-fixed-affine": lambda: nn.BatchNorm2d(C).requires_grad_(False),
    "no-affine": lambda: nn.BatchNorm2d(C, affine=False),
    "cumulative": lambda: nn.BatchNorm2d(C, momentum=None),
    "untracked": lambda: nn.BatchNorm2d(C, track_running_stats=False),
    "eval": lambda: nn.BatchNorm2d(C).eval(),
    "frozen": lambda: frozen(nn.BatchNorm2d(C)),
    "group": lambda: nn.GroupNorm(3, C),
    "none": lambda: None,
}
ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "none": lambda: None,
}
CONVS = {
    "part": lambda: [PartialConv2d(C, 8, 3, padding=1, trainable=0.5)],
    "two": lambda: [
        PartialConv2d(C, 8, 3, padding=1, trainable=0.5, trainable_inputs=0.25),
        nn.Conv2d(C, 8, 1, stride=2),
    ],
    "nothing-learned": lambda: [PartialConv2d(C, 8, 1, trainable=0)],
    "fixed-conv2d": lambda: [nn.Conv2d(C, 8, 1, bias=False).requires_grad_(False)],
    "bias": lambda: [PartialConv2d(C, 8, 1, trainable=0, trainable_bias="all")],
    "depthwise": lambda: [PartialConv2d(C, C, 3, groups=C, trainable=[0, 5, 11])],
    "same": lambda: [PartialConv2d(C, 8, 3, padding="same", trainable=[1, 4])],
    "no-conv": lambda: [],
}
PIECES, DTYPES = (1, 3), (torch.float32, torch.bfloat16)
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def plainly(pieces: list[Tensor], norm, activation, dropout, convs) -> tuple[Tensor, ...]:
    """What a block computes, in plain torch."""
    y = torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]
    for module in (norm, activation, dropout):
        y = y if module is None else module(y)
    return (*(conv(y) for conv in convs), y)


def leanly(pieces: list[Tensor], norm, activation, dropout, convs) -> tuple[Tensor, ...]:
    outputs = block(pieces, norm, activation, dropout, convs, give_y=True)
    assert "BlockFunction" in type(outputs[0].grad_fn).__name__
    return outputs


def everything(way, modules, pieces: list[Tensor], dtype: torch.dtype) -> list[Tensor | None]:
    """Outputs, gradients and buffers of one training step."""
    norm, activation, dropout, convs = copy.deepcopy(modules)
    torch.manual_seed(1)
    pieces = [piece.detach().clone().requires_grad_() for piece in pieces]
    outputs = way(pieces, norm, activation, dropout, convs)
    torch.autograd.backward(outputs, [torch.randn_like(output) for output in outputs])
    parts = [m for m in (norm, *convs) if m is not None]
    return [
        *(output.detach() for output in outputs),
        *(piece.grad for piece in pieces),
        *(p.grad for m in parts for p in m.parameters()),
        *(buffer for m in parts for buffer in m.buffers()),
    ]


def assert_bits(modules, pieces: list[Tensor], dtype: torch.dtype) -> None:
    for way_modules in modules[:1] + tuple(modules[3]):
        if way_modules is not None:
            way_modules.to(dtype)
    pieces = [piece.to(dtype) for piece in pieces]
    for ours, plain in zip(
        everything(leanly, modules, pieces, dtype), everything(plainly, modules, pieces, dtype), strict=True
    ):
        assert (ours is None) == (plain is None)
        assert ours is None or (torch.equal(ours, plain) and not ours.isnan().any())


def images(count: int, layout: torch.memory_format = torch.contiguous_format, size=(4, C, 7, 6)) -> list[Tensor]:
    n, c, h, w = size
    return [torch.randn(n, c // count, h, w).to(memory_format=layout) for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("convs", ["part", "two", "nothing-learned"])
@pytest.mark.parametrize("norm", NORMS)
def test_bits_by_norm(norm: str, convs: str, dtype):
    assert_bits((NORMS[norm](), nn.ReLU(), None, CONVS[convs]()), images(1), dtype)


@pytest.mark.parametrize("norm", ["batch", "frozen", "none"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pieces", PIECES)
def test_bits_by_activation(activation: str, norm: str, pieces: int):
    assert_bits((NORMS[norm](), ACTIVATIONS[activation](), None, CONVS["part"]()), images(pieces), torch.float32)


@pytest.mark.parametrize("norm", ["batch", "frozen", "group"])
@pytest.mark.parametrize("dropout", [None, 0.3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("convs", CONVS)
def test_bits_by_convolutions(convs: str, dropout: float | None, norm: str, layout: str):
    modules = (NORMS[norm](), nn.ReLU(), nn.Dropout(dropout) if dropout else None, CONVS[convs]())
    assert_bits(modules, images(1, LAYOUTS[layout]), torch.float32)


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bits_of_every_combination(activation: str, norm: str, pieces: int, layout: str, dtype):
    for convs, dropout in itertools.product(CONVS.values(), (None, nn.Dropout(0.3), nn.Dropout(0.5).eval())):
        assert_bits(
            (NORMS[norm](), ACTIVATIONS[activation](), dropout, convs()), images(pieces, LAYOUTS[layout]), dtype
        )


@pytest.mark.parametrize(
    ("norm", "activation", "give_y"), [("batch", "silu", True), ("none", "silu", False), ("batch", "leaky", False)]
)
def test_second_derivatives(norm: str, activation: str, give_y: bool):
    norm, activation, convs = NORMS[norm](), ACTIVATIONS[activation](), [PartialConv2d(C, 4, 3, trainable=2)]
    for module in (norm, *convs):
        if module is not None:
            module.double()
    x = torch.randn(1, C, 4, 3, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return block([x], norm, activation, None, convs, give_y=give_y)

    learned = [convs[0].weight_trainable, *(norm.parameters() if norm is not None else [])]
    assert torch.autograd.gradcheck(call, (x, *learned))
    assert torch.autograd.gradgradcheck(call, (x, *learned))


@pytest.mark.parametrize("by_scaling", [True, False])
@given(st.lists(st.integers(1, 40), min_size=4, max_size=4), st.sampled_from(list(LAYOUTS.values())))
def test_a_batch_norm_made_again_has_the_same_bits(by_scaling: bool, shape: list[int], layout: torch.memory_format):
    """From the statistics kept, as far as this build of torch allows it, and by the same call."""
    shape[0] += 1
    z, gamma, beta = torch.randn(shape).to(memory_format=layout), torch.randn(shape[1]), torch.randn(shape[1])
    mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
    norm = norms.BatchNorm(True, 0.1, 1e-5)
    normed, state = norm.forward(z, (gamma, beta, mean, var))
    before = mean.clone(), var.clone()
    with torch.no_grad(), mock.patch.object(norms, "_adds_unrounded_products", lambda _: by_scaling and SCALES[layout]):
        again = norm.again(z, (gamma, beta, mean, var), state)
    assert torch.equal(again, normed) and again.stride() == normed.stride()
    assert torch.equal(mean, before[0]) and torch.equal(var, before[1])


SCALES = {layout: norms._adds_unrounded_products(layout == torch.channels_last) for layout in LAYOUTS.values()}


def test_second_derivatives_that_would_be_wrong_are_refused():
    """What a frozen norm's block keeps of y leads back to nothing."""
    x = torch.randn(2, C, 4, 3, requires_grad=True)
    convs = [PartialConv2d(C, 4, 3, trainable=2)]
    (output,) = block([x], frozen(nn.BatchNorm2d(C)), nn.ReLU(), None, convs)
    with pytest.raises(RuntimeError, match="convert without lean=True"):
        torch.autograd.grad(output, convs[0].weight_trainable, torch.randn_like(output), create_graph=True)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU(), nn.LeakyReLU(0.1)], ids=str)
@pytest.mark.parametrize("convs", ["part", "no-conv"])
def test_an_input_that_may_be_overwritten_is_unless_it_is_kept(activation: nn.Module, convs: str):
    convs, results = CONVS[convs](), []
    for overwrites in (True, False):
        x = torch.linspace(-1, 1, 2 * C * 5 * 4).view(2, C, 5, 4).requires_grad_()
        doubled = x + x
        outputs = block([doubled], None, activation, None, convs, give_y=True, overwrites=overwrites)
        if not convs:
            outputs[-1].add_(1)  # an output like any other, no view
        torch.manual_seed(0)
        torch.autograd.backward(outputs, [torch.randn_like(output) for output in outputs])
        results.append([*outputs, x.grad, *(p.grad for conv in convs for p in conv.parameters() if p.requires_grad)])
        taken = outputs[-1].data_ptr() == doubled.data_ptr()
        assert taken == (overwrites and not isinstance(activation, nn.SiLU))
        convs = copy.deepcopy(convs)
        for conv in convs:
            conv.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_retained_graph_gives_the_same_again():
    x = torch.randn(2, C, 6, 5, requires_grad=True)
    outputs = block([x], nn.BatchNorm2d(C), nn.ReLU(), nn.Dropout(0.3), CONVS["two"]())
    cotangents = [torch.randn_like(output) for output in outputs]
    first = torch.autograd.grad(outputs, x, cotangents, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(outputs, x, cotangents)[0])


def test_an_output_nobody_asks_for():
    modules = (nn.BatchNorm2d(C), nn.ReLU(), None, CONVS["two"]())
    results = []
    for way in (leanly, plainly):
        x = images(1)[0].requires_grad_() if not results else results[0][0].detach().clone().requires_grad_()
        norm, activation, dropout, convs = copy.deepcopy(modules)
        output = way([x], norm, activation, dropout, convs)[1]
        output.square().sum().backward()
        results.append((x, x.grad, norm.weight.grad, convs[1].weight.grad, convs[0].weight_trainable.grad))
    for ours, plain in zip(*(r[1:] for r in results), strict=True):
        assert (ours is None and plain is None) or torch.equal(ours, plain)


def kept_bytes(*arguments, **options) -> dict[str, int]:
    """Bytes kept by kind, parameters and per-channel vectors left out."""
    with saved_tensors() as kept:
        outputs = block(*arguments, **options)
    assert all("BlockFunction" in type(o.grad_fn).__name__ for o in outputs)
    sizes: dict[str, int] = {}
    storages = {t.untyped_storage().data_ptr(): t for t in kept if t.numel() > 8 * C * C}
    for tensor in storages.values():
        kind = "bits" if tensor.dtype == torch.uint8 else "values"
        sizes[kind] = sizes.get(kind, 0) + tensor.untyped_storage().nbytes()
    return sizes


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, C, 16, 16, requires_grad=True)


Z = 4 * C * 16 * 16 * 4
ONE_BIT = Z // 32
PART = {"trainable": 0.5}
INPUT = {"trainable": 0.5, "trainable_inputs": 0.25}
NOTHING = {"trainable": 0}


@pytest.mark.parametrize(
    ("norm", "activation", "dropout", "convs", "expected"),
    [
        ("batch", "relu", 0, [PART], {"values": Z}),
        ("batch", "relu", 0, [NOTHING], {"values": Z}),
        ("batch", "silu", 0, [PART, PART], {"values": Z}),
        ("batch", "relu", 0.5, [PART], {"values": Z, "bits": ONE_BIT}),
        ("group", "relu", 0, [PART], {"values": Z}),
        ("batch", "none", 0, [PART], {"values": Z}),
        ("eval", "relu", 0, [PART], {"values": Z}),  # gamma learns
        ("frozen", "relu", 0, [PART], {"values": Z}),
        ("frozen", "relu", 0, [NOTHING], {"bits": ONE_BIT}),
        ("frozen", "relu6", 0, [NOTHING], {"bits": ONE_BIT}),
        ("frozen", "leaky", 0.5, [NOTHING], {"bits": 2 * ONE_BIT}),
        ("frozen", "relu", 0, [INPUT], {"values": Z // 4, "bits": ONE_BIT}),
        ("frozen", "relu", 0, [INPUT, INPUT], {"values": Z // 4, "bits": ONE_BIT}),
        ("frozen", "relu", 0, [INPUT, PART], {"values": Z}),
        ("frozen", "relu", 0, [], {"bits": ONE_BIT}),
        ("frozen", "none", 0, [], {}),
        ("frozen", "silu", 0, [PART], {"values": Z}),
        ("none", "relu", 0, [PART], {"values": Z}),
        ("none", "relu", 0, [INPUT], {"values": Z // 4, "bits": ONE_BIT}),
        ("none", "relu", 0, [], {"bits": ONE_BIT}),
    ],
    ids=str,
)
def test_what_is_kept(x: Tensor, norm: str, activation: str, dropout: float, convs: list[dict], expected: dict):
    made = [PartialConv2d(C, 8, 1, **choice) for choice in convs]
    drop = nn.Dropout(dropout) if dropout else None
    sizes = kept_bytes([x], NORMS[norm](), ACTIVATIONS[activation](), drop, made, give_y=not convs)
    assert sizes == expected


def test_nothing_is_kept_below_the_first_learned_layer():
    x = torch.randn(4, C, 16, 16)
    with saved_tensors() as kept:
        (output,) = block([x], frozen(nn.BatchNorm2d(C)), nn.ReLU(), None, [PartialConv2d(C, 8, 1, trainable=0)])
    assert not kept and not output.requires_grad
    conv = PartialConv2d(C, 8, 1, trainable=2, trainable_inputs=0.25)
    assert kept_bytes([x], frozen(nn.BatchNorm2d(C)), nn.ReLU(), None, [conv]) == {"values": Z // 4}
    assert kept_bytes([x], nn.BatchNorm2d(C, affine=False), nn.ReLU(), None, [conv]) == {"values": Z // 4}


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_pieces_are_kept_once_however_many_blocks_read_them(norm: str):
    pieces = [torch.randn(4, C // 3, 16, 16, requires_grad=True) for _ in range(3)]
    convs = [PartialConv2d(C, 8, 1, trainable=1) for _ in range(4)]
    with saved_tensors() as kept:
        for conv in convs:
            block(pieces, NORMS[norm](), nn.ReLU(), None, [conv], sharers=[4] * 3)
    large = {t.untyped_storage().data_ptr(): t.nbytes for t in kept if t.numel() > 8 * C * C}
    assert sum(large.values()) == Z


def test_a_y_that_somebody_else_keeps_is_kept_once(x: Tensor):
    """No mask, no second making: the signs of the kept y say all. By batch statistics the input stays, too."""
    for norm, expected in (("frozen", Z), ("batch", 2 * Z)):
        with saved_tensors() as kept:
            (y,) = block([x], NORMS[norm](), nn.ReLU(), give_y=True, y_is_kept=True)
            y * y
        large = {t.untyped_storage().data_ptr(): t.nbytes for t in kept if t.numel() > 8 * C * C}
        assert sum(large.values()) == expected


def test_everything_kept_is_seen_by_saved_tensor_hooks(x: Tensor):
    """Offloading must reach it: nothing large may hang on the node itself."""
    (output,) = block([x], nn.BatchNorm2d(C), nn.ReLU(), nn.Dropout(0.5), [PartialConv2d(C, 8, 1, trainable=1)])
    node = output.grad_fn

    def tensors(value):
        if torch.is_tensor(value):
            yield value
        elif isinstance(value, dict):
            yield from itertools.chain.from_iterable(map(tensors, value.values()))
        elif isinstance(value, list | tuple):
            yield from itertools.chain.from_iterable(map(tensors, value))

    assert not list(tensors(dict(vars(node))))


class OtherNorm(nn.BatchNorm2d):
    pass


HOOKED = nn.ReLU()
HOOKED.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ((OtherNorm(C), nn.ReLU(), None, CONVS["part"]()), (4, C, 5, 5)),
        ((nn.BatchNorm2d(C), nn.GELU(), None, CONVS["part"]()), (4, C, 5, 5)),
        ((nn.BatchNorm2d(C), HOOKED, None, CONVS["part"]()), (4, C, 5, 5)),
        ((nn.BatchNorm2d(C), nn.LeakyReLU(-0.1), None, CONVS["part"]()), (4, C, 5, 5)),
        ((nn.BatchNorm2d(C), nn.ReLU(), nn.Dropout2d(0.5), CONVS["part"]()), (4, C, 5, 5)),
        ((nn.BatchNorm2d(C), nn.ReLU(), nn.Dropout(1.0), CONVS["part"]()), (4, C, 5, 5)),
        (
            (
                nn.BatchNorm2d(C),
                nn.ReLU(),
                None,
                [PartialConv2d(C, 8, 3, padding=1, padding_mode="circular", trainable=1)],
            ),
            (4, C, 5, 5),
        ),
        ((nn.BatchNorm2d(C), nn.ReLU(), None, [nn.Conv2d(C, 8, 2, padding="same")]), (4, C, 5, 5)),
        ((nn.GroupNorm(3, C), nn.ReLU(), None, CONVS["part"]()), (C, 5, 5)),
    ],
    ids=["subclass", "gelu", "hook", "slope", "dropout2d", "p=1", "circular", "uneven", "unbatched"],
)
def test_whatever_a_block_does_not_know_goes_the_plain_way(arguments, size):
    results = []
    for way in (lambda *a: block(*a, give_y=True), plainly):
        torch.manual_seed(0)
        norm, activation, dropout, convs = copy.deepcopy(arguments)
        if size == (C, 5, 5):
            norm = None
        x = torch.randn(size, requires_grad=True)
        outputs = way([x], norm, activation, dropout, convs)
        assert "BlockFunction" not in type(outputs[0].grad_fn).__name__
        torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
        results.append([*outputs, x.grad, *(b for b in (norm.buffers() if norm else []))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_wrong_inputs_are_refused_as_the_modules_refuse_them():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block([torch.randn(1, C, 1, 1, requires_grad=True)], nn.BatchNorm2d(C), nn.ReLU(), give_y=True)
    norm = nn.BatchNorm2d(C)
    with pytest.raises(RuntimeError, match="shape"):
        block(
            [torch.randn(2, C, 4, 4, requires_grad=True)], norm, nn.ReLU(), None, [PartialConv2d(5, 8, 1, trainable=1)]
        )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    norm, convs = nn.BatchNorm2d(C), CONVS["part"]()
    x = torch.randn(2, C, 5, 5)
    with mode(), saved_tensors() as kept:
        outputs = block([x], norm, nn.ReLU(), None, convs)
    assert not kept and not outputs[0].requires_grad and norm.num_batches_tracked == 1


@pytest.mark.parametrize("norm", ["batch", "frozen"])
@pytest.mark.parametrize("convs", ["part", "two"])
def test_bits_under_autocast(norm: str, convs: str):
    def under(way):
        def call(*arguments):
            with torch.autocast("cpu", torch.bfloat16):
                return way(*arguments)

        return call

    modules = (NORMS[norm](), nn.ReLU(), None, CONVS[convs]())
    for x in (images(1), [image.bfloat16() for image in images(1)]):
        for ours, plain in zip(
            everything(under(leanly), modules, x, None), everything(under(plainly), modules, x, None), strict=True
        ):
            assert (ours is None) == (plain is None) and (ours is None or torch.equal(ours, plain))


@given(st.lists(st.integers(1, 9), min_size=4, max_size=4), st.booleans())
def test_bits_come_back(shape: list[int], channels_last: bool):
    mask = torch.rand(shape) > 0.5
    if channels_last:
        mask = mask.to(memory_format=torch.channels_last)
    packed, layout = bits.pack(mask)
    unpacked = bits.unpack(packed, layout)
    assert packed.numel() == -(-mask.numel() // 8) and torch.equal(unpacked, mask)
    assert not channels_last or unpacked.is_contiguous(memory_format=torch.channels_last)


@given(
    st.sampled_from([2, 3, (3, 2), 5]), st.sampled_from([None, 1, 2, (2, 3)]), st.sampled_from([0, 1]),
    st.sampled_from([1, 2]), st.booleans(), st.sampled_from(list(LAYOUTS.values())),
    st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_pools_have_the_bits_of_torch_s(window, stride, padding, dilation, ceil_mode, layout, dtype):
    x = torch.randint(-3, 4, (2, 3, 13, 12)).to(dtype).to(memory_format=layout)  # with ties
    for ours, plain, options in (
        (pooling.max_pool2d, F.max_pool2d, {"dilation": dilation, "ceil_mode": ceil_mode}),
        (pooling.avg_pool2d, F.avg_pool2d, {"ceil_mode": ceil_mode, "count_include_pad": dilation == 1}),
    ):
        xs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [f(x, window, stride, padding, **options) for f, x in zip((ours, plain), xs, strict=True)]
        cotangent = torch.randn_like(outputs[0])
        for output in outputs:
            output.backward(cotangent)
        assert torch.equal(*outputs) and torch.equal(xs[0].grad, xs[1].grad)
        assert xs[0].grad.stride() == xs[1].grad.stride()


def test_pools_of_wide_images_have_the_bits_of_torch_s():
    """A byte does not hold how far apart in the plane two rows of a window lie."""
    x = torch.randint(-3, 4, (1, 2, 9, 301)).float()
    xs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [pool(x, 3, 2, 1, 2) for pool, x in zip((pooling.max_pool2d, F.max_pool2d), xs, strict=True)]
    cotangent = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(cotangent)
    assert torch.equal(*outputs) and torch.equal(xs[0].grad, xs[1].grad)


def test_pools_keep_one_byte_or_nothing():
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    with saved_tensors() as kept:
        output = pooling.pool(x, nn.MaxPool2d(3, 2, 1))
    assert [(t.dtype, t.numel()) for t in kept] == [(torch.uint8, output.numel())]
    with saved_tensors() as kept:
        pooling.pool(x, nn.AvgPool2d(2))
    assert not kept
    x = x.detach().double()[:, :1].requires_grad_()
    for function in (pooling.max_pool2d, pooling.avg_pool2d):
        assert torch.autograd.gradgradcheck(lambda x, f=function: f(x, 3, 2, 1), (x,))


def test_pools_leave_what_they_cannot_to_torch():
    x = torch.randn(3, 40, 40, requires_grad=True)
    for output in (pooling.max_pool2d(x, 2), pooling.max_pool2d(x[None], 20), pooling.avg_pool2d(x, 2)):
        assert "Pool2D" in type(output.grad_fn).__name__  # torch's own; ours is _MaxPool2dBackward
    hooked, seen = nn.MaxPool2d(2), []
    hooked.register_forward_hook(lambda *_: seen.append(1))
    pooling.pool(x[None], hooked)
    values, indices = pooling.pool(x[None], nn.MaxPool2d(2, return_indices=True))
    assert seen == [1] and indices.dtype == torch.int64 and values.shape == indices.shape


def test_the_function_is_what_runs():
    """The tests above compare it with torch: they must not have compared torch with torch."""
    calls = []
    original = BlockFunction.backward
    BlockFunction.backward = staticmethod(lambda ctx, *grads: (calls.append(1), original(ctx, *grads))[1])
    try:
        assert_bits((nn.BatchNorm2d(C), nn.ReLU(), None, CONVS["part"]()), images(1), torch.float32)
    finally:
        BlockFunction.backward = original
    assert calls == [1]
