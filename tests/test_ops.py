"""The two operators: their contract with torch.library, their values, their FLOPs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import integers
from hypothesis import example, given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from rwn_ext import PartialConv2d, cpu, ops
from rwn_ext.subsets import Subset

LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])


def runs(*indices: int) -> tuple[int, ...]:
    return Subset.from_indices(99, indices).runs


@LAYOUTS
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("learned", [runs(0, 1), runs(4, 5), runs(2, 3), runs(0, 2), runs(1, 3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_keeps_its_contract(learned, axis: int, layout, dtype: torch.dtype, device: str):
    whole = torch.randn(6, 6, 3, 2, device=device).to(memory_format=layout)
    chosen = Subset(6, learned)
    parts = [
        ops.take(whole, subset.runs, axis).clone(memory_format=layout).requires_grad_(subset is chosen)
        for subset in (chosen, chosen.complement)
    ]
    arguments = (*parts, learned, axis, dtype, "forward")
    merged = torch.ops.rwn_ext.merge(*(a.detach() if torch.is_tensor(a) else a for a in arguments))
    assert torch.equal(merged, whole.to(dtype)) and merged.is_contiguous(memory_format=layout)
    assert all(merged.untyped_storage().data_ptr() != part.untyped_storage().data_ptr() for part in parts)
    torch.library.opcheck(torch.ops.rwn_ext.merge.default, [a.detach() if torch.is_tensor(a) else a for a in arguments])


@LAYOUTS
@pytest.mark.parametrize(
    ("filters", "groups", "algorithm"),
    [
        (runs(0, 1, 2), 1, "gather"),
        (runs(1, 4), 1, "gather"),
        (runs(1, 4), 1, "full"),
        (runs(1, 4), 1, "unfold"),
        (runs(1, 4), 1, "auto"),
        (runs(0, 3, 4), 2, "gather"),
        (runs(0, 3, 4), 2, "full"),
        (runs(4), 2, "unfold"),
        (runs(*range(6)), 1, "full"),
    ],
    ids=str,
)
def test_conv2d_weight_grad_keeps_its_contract(filters, groups: int, algorithm: str, layout, device: str):
    x = integers(2, 4, 7, 6, device=device).to(memory_format=layout)
    seen = x[:, 2:] if groups == 2 and algorithm == "unfold" else x
    cotangent = integers(2, 6, 4, 6, device=device).to(memory_format=layout)
    geometry = ((3, 2), (2, 1), (1, 1), (1, 2))
    seen = seen.clone(memory_format=layout)
    arguments = (cotangent, seen, filters, *geometry, groups, algorithm)
    expected = torch.nn.grad.conv2d_weight(x, (6, 4 // groups, 3, 2), cotangent, *geometry[1:], groups)
    grad = torch.ops.rwn_ext.conv2d_weight_grad(*arguments)
    assert torch.equal(grad, expected[list(Subset(6, filters).indices)])
    assert grad.is_contiguous(memory_format=layout)
    assert all(grad.untyped_storage().data_ptr() != t.untyped_storage().data_ptr() for t in (cotangent, seen))
    torch.library.opcheck(torch.ops.rwn_ext.conv2d_weight_grad.default, arguments)


@LAYOUTS
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)], ids=str)
def test_conv2d_weight_grad_of_1x1_filters_keeps_its_contract(stride, layout, device: str):
    x = integers(2, 4, 7, 6, device=device).to(memory_format=layout)
    cotangent = integers(2, 6, (7 + stride[0] - 1) // stride[0], (6 + stride[1] - 1) // stride[1], device=device)
    arguments = (cotangent, x, runs(1, 4), (1, 1), stride, (0, 0), (1, 1), 1, "matmul")
    expected = torch.nn.grad.conv2d_weight(x, (6, 4, 1, 1), cotangent, stride)
    assert torch.equal(torch.ops.rwn_ext.conv2d_weight_grad(*arguments), expected[[1, 4]])
    torch.library.opcheck(torch.ops.rwn_ext.conv2d_weight_grad.default, arguments)


def assert_fake_is_true(op, arguments: tuple) -> None:
    """The fake of this op says the shape, type and strides of what it computes; a stride of one element is none."""
    real = op(*arguments)
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(a) if torch.is_tensor(a) else a for a in arguments))
    assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)
    strides = [
        [step for step, size in zip(t.stride(), t.shape, strict=True) if size > 1 and t.numel()] for t in (fake, real)
    ]
    assert strides[0] == strides[1]


def laid_out(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """The same values: contiguous, channels_last, a part of a larger tensor, or with height and width exchanged."""
    if how == "sliced":
        return torch.stack([tensor, tensor], -1)[..., 0]
    if how == "transposed":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    return tensor.contiguous(memory_format=torch.channels_last if how == "nhwc" else torch.contiguous_format)


LAYING_OUT = st.sampled_from(["nchw", "nhwc", "sliced", "transposed"])
TYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


@st.composite
def weight_grad_arguments(draw) -> tuple:
    """Of `conv2d_weight_grad`: any geometry, subset, algorithm that can compute it, layouts and types."""
    algorithm = draw(st.sampled_from(["auto", "full", "gather", "unfold", "matmul"]))
    groups = 1 if algorithm in ("unfold", "matmul") else draw(st.sampled_from([1, 2, 3]))
    one = st.integers(1, 3)
    kernel, stride, dilation = ((1, 1), (draw(one), 1), (1, 1)) if algorithm == "matmul" else (
        (draw(one), draw(one)), (draw(one), draw(one)), (draw(one), draw(one))
    )  # fmt: skip
    padding = (0, 0) if algorithm == "matmul" else tuple(draw(st.integers(0, k - 1)) for k in kernel)
    per_group, channels = draw(st.integers(1, 3)), draw(one)
    k = groups * per_group
    filters = Subset.from_indices(k, sorted(draw(st.sets(st.integers(0, k - 1), min_size=1))))
    touched = len({f // per_group for f in filters.indices})
    size = [draw(st.integers(7, 9)) for _ in (0, 1)]
    output = [(size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    batch, dtype = draw(st.integers(0, 2)), draw(TYPES)
    x = laid_out(torch.randn(batch, touched * channels, *size).to(dtype), draw(LAYING_OUT))
    cotangent = laid_out(torch.randn(batch, k, *output).to(dtype), draw(LAYING_OUT))
    result = draw(st.none() | TYPES)
    return (cotangent, x, filters.runs, kernel, stride, padding, dilation, groups, algorithm, result)


@given(weight_grad_arguments())
def test_the_fake_of_conv2d_weight_grad_is_true(arguments: tuple):
    assert_fake_is_true(torch.ops.rwn_ext.conv2d_weight_grad, arguments)


@st.composite
def merge_arguments(draw) -> tuple:
    size, axis = draw(st.integers(2, 6)), draw(st.integers(0, 1))
    chosen = Subset.from_indices(size, sorted(draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=size - 1))))
    shape = [draw(st.integers(1, 3)) for _ in range(4)]
    shape[axis] = size
    whole, how = torch.randn(shape), draw(LAYING_OUT)
    parts = [
        laid_out(ops.take(whole, subset.runs, axis).to(draw(TYPES)), how) for subset in (chosen, chosen.complement)
    ]
    return (*parts, chosen.runs, axis, draw(TYPES), draw(st.sampled_from(["forward", "backward"])))


@given(merge_arguments())
def test_the_fake_of_merge_is_true(arguments: tuple):
    assert_fake_is_true(torch.ops.rwn_ext.merge, arguments)


@LAYOUTS
@pytest.mark.parametrize(
    "dtypes", [(torch.float16, None), (torch.bfloat16, torch.float32), (torch.float64, None)], ids=str
)
@pytest.mark.parametrize(
    ("filters", "channels", "geometry", "groups"),
    [
        (runs(1, 2), 3, ((3, 3), (1, 1), (1, 1), (1, 1)), 1),
        (runs(0, 5), 3, ((1, 5), (2, 2), (0, 2), (1, 1)), 1),
        (runs(0, 3), 2, ((2, 2), (1, 1), (0, 1), (2, 3)), 3),
        (runs(1, 4), 2, ((3, 3), (3, 1), (2, 2), (1, 1)), 6),
    ],
    ids=str,
)  # fmt: skip
def test_conv2d_weight_grad_keeps_its_contract_over_geometries(filters, channels, geometry, groups, dtypes, layout):
    kernel, stride, padding, dilation = geometry
    output = [((9, 8)[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    x, cotangent = (
        torch.randn(size).to(dtypes[0]).contiguous(memory_format=layout)
        for size in [(2, channels, 9, 8), (2, 6, *output)]
    )
    arguments = (cotangent, x, filters, *geometry, groups, "auto", dtypes[1])
    torch.library.opcheck(torch.ops.rwn_ext.conv2d_weight_grad.default, arguments)


def test_no_op_is_registered_but_these():
    """Every op of ours has its contract checked in this file."""
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("rwn_ext::")}
    assert names == {"merge", "conv2d_weight_grad", "conv2d_weight_bias_grad", "affine_relu_backward"}


class Made(TorchDispatchMode):
    """The bytes of every tensor that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        held = {t.untyped_storage().data_ptr() for t in args if torch.is_tensor(t)}
        for t in result if isinstance(result, tuple) else (result,):
            if torch.is_tensor(t) and t.untyped_storage().data_ptr() not in held:
                self.bytes.append(t.untyped_storage().nbytes())
        return result


@LAYOUTS
def test_gather_makes_nothing_larger_than_the_learned_part(layout):
    """No dummy of a whole weight, no whole weight gradient, no copy of the input."""
    x = torch.randn(2, 4, 7, 6).to(memory_format=layout)
    cotangent = torch.randn(2, 64, 7, 6).to(memory_format=layout)
    with Made() as made:
        # The implementation itself: a dispatch mode would see the op as one.
        ops._weight_grad(cotangent, x, runs(3, 50), (3, 3), (1, 1), (1, 1), (1, 1), 1, "gather")
    gathered, learned, one = 2 * 2 * 7 * 6 * 4, 2 * 4 * 3 * 3 * 4, 4
    assert gathered + learned <= sum(made.bytes) <= gathered + learned + one


def test_grad_input_makes_no_dummy_of_the_input(device: str):
    """Beside grad_input and the merged weight, backward makes nothing of a noticeable size."""
    layer = PartialConv2d(8, 8, 3, padding=1, trainable=[1, 3], trainable_inputs=[0], bias=False, device=device)
    x = torch.randn(2, 8, 16, 16, device=device, requires_grad=True)
    output = layer(x)
    cotangent = torch.randn_like(output)
    with Made() as made:
        torch.autograd.grad(output, x, cotangent)
    assert sum(size >= x.numel() * 4 for size in made.bytes) == 1


def test_a_scattered_take_compiles_to_the_same(device: str):
    x = integers(2, 7, 3, 3, device=device)
    chosen = runs(0, 1, 3, 6)
    assert torch.equal(ops.take(x, chosen, 1), x[:, [0, 1, 3, 6]])
    compiled = torch.compile(lambda t: ops.take(t, chosen, 1), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), x[:, [0, 1, 3, 6]])


def flops_of_weight_grad(layer: PartialConv2d, *size: int) -> int:
    """All that backward does where the input needs no gradient."""
    output = layer(torch.randn(size))
    if not output.requires_grad:
        return 0
    with FlopCounterMode(display=False) as counter:
        output.backward(torch.randn_like(output))
    return counter.get_total_flops()


# N, C, H, W = 2, 8, 9, 11; 3x3 filters with stride 2 and padding 1: P, Q = 5, 6
PER_FILTER = 2 * 2 * (5 * 6) * 8 * (3 * 3)


@pytest.mark.parametrize(
    ("choice", "flops"),
    [
        ({"trainable": 0}, 0),
        ({"trainable": 0, "trainable_bias": "all"}, 0),
        ({"trainable": 3, "algorithm": "gather"}, 3 * PER_FILTER),
        ({"trainable": [0, 5], "algorithm": "gather"}, 2 * PER_FILTER),
        ({"trainable": [0, 5], "algorithm": "gather", "trainable_inputs": 2}, 2 * PER_FILTER // 4),
        ({"trainable": [0, 5], "algorithm": "full"}, 12 * PER_FILTER),
        ({"trainable": [0, 5], "algorithm": "unfold"}, 2 * PER_FILTER * (9 * 11) // (5 * 6)),
        ({"trainable": 1.0}, 12 * PER_FILTER),
        ({"trainable": [0, 5], "groups": 2, "algorithm": "gather"}, 2 * PER_FILTER // 2),
        ({"trainable": [0, 1, 7], "groups": 4, "algorithm": "gather"}, 3 * PER_FILTER // 4),
        ({"trainable": [0, 5], "groups": 4, "algorithm": "full"}, 6 * PER_FILTER // 4),
    ],
    ids=str,
)
def test_counted_flops_are_those_done(choice: dict, flops: int):
    layer = PartialConv2d(8, 12, 3, stride=2, padding=1, **choice)
    assert flops_of_weight_grad(layer, 2, 8, 9, 11) == flops


def test_counted_flops_of_1x1_filters_are_those_done():
    layer = PartialConv2d(8, 12, 1, stride=2, trainable=[1, 5], algorithm="matmul")
    assert flops_of_weight_grad(layer, 2, 8, 9, 11) == 2 * 2 * (5 * 6) * 8 * 2


def test_forward_and_grad_input_cost_what_conv2d_s_do():
    layer, conv = PartialConv2d(8, 12, 3, stride=2, padding=1, trainable=0), torch.nn.Conv2d(8, 12, 3, 2, 1)
    conv.requires_grad_(False)
    counts = []
    for module in (layer, conv):
        x = torch.randn(2, 8, 9, 11, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            output = module(x)
            forward = counter.get_total_flops()
            output.backward(torch.randn_like(output))
        counts.append((forward, counter.get_total_flops()))
    assert counts[0] == counts[1] and counts[0][0] == 12 * PER_FILTER


@example((0, 2, 5, 5), [0, 2, 3, 1], False)
@given(st.tuples(*[st.sampled_from((0, 1, 2, 5))] * 4), st.permutations(range(4)), st.booleans())
def test_formats_are_those_that_torch_sees(size, order, cut):
    axes = [size[axis] for axis in order]
    tensor = torch.empty([2 * n for n in axes] if cut else axes)[tuple(slice(n) for n in axes)]
    tensor = tensor.permute([order.index(axis) for axis in range(4)])
    assert tensor.shape == size
    assert ops._format_of(tensor.shape, tensor.stride()) == ops.memory_format(tensor)


@LAYOUTS
@pytest.mark.parametrize(
    ("frozen", "algorithm"), [("random", "auto"), ("random", "full"), ("random", "gather"), ("zero", None)]
)
@pytest.mark.parametrize(("size", "stride"), [((4, 1), 2), ((1, 2), (1, 3)), ((1, 1), (2, 3))], ids=str)
def test_steps_wider_than_the_image_in_bfloat16(frozen: str, algorithm: str | None, size, stride, layout):
    """oneDNN's own gradient holds there, with AVX-512, what happens to lie in memory."""
    layer = PartialConv2d(32, 48, 3, stride, 1, trainable=9, frozen=frozen, algorithm=algorithm, dtype=torch.bfloat16)
    layer = layer.to(memory_format=layout)
    for _ in range(4):
        layer.zero_grad()
        x = torch.randn(4, 32, *size, dtype=torch.bfloat16).contiguous(memory_format=layout).requires_grad_()
        output = layer(x)
        cotangent = torch.randn_like(output)
        litter = [torch.full((1 << power,), 3e38) for power in (8, 10, 14, 16, 18)]
        del litter
        output.backward(cotangent)
        weight = layer.to_conv2d().weight.double().detach().requires_grad_()
        exact = F.conv2d(x.detach().double(), weight, None, stride, 1)
        (expected,) = torch.autograd.grad(exact, weight, cotangent.double())
        expected, ours = expected[-9:], layer.weight_trainable.grad
        assert ours.dtype == torch.bfloat16 and (ours.double() - expected).norm() < 0.02 * expected.norm()


@LAYOUTS
@pytest.mark.parametrize("cut", [lambda x: x[:, 3:27], lambda x: x[:, :24, :, ::2]], ids=["channels", "columns"])
@pytest.mark.parametrize("algorithm", ["auto", "direct", "gather", "full"])
def test_an_affine_relu_of_a_view_comes_before_the_plan(algorithm: str, cut, layout):
    if algorithm == "direct" and cpu.native is None:
        pytest.skip("rwn_ext was built without a C++ compiler")
    x = cut(torch.randn(3, 30, 8, 16).contiguous(memory_format=layout))
    scale, shift, grad_output = torch.randn(24), torch.randn(24), torch.randn(3, 8, *x.shape[2:])
    geometry = ((3, 3), (1, 1), (1, 1), (1, 1), 1, algorithm)
    ours = ops.conv2d_weight_grad(grad_output, x, (6, 8), *geometry, scale=scale, shift=shift)
    normed = ops.affine_relu(x, scale, shift).double()
    expected = torch.nn.grad.conv2d_weight(normed, (8, 24, 3, 3), grad_output.double(), padding=1)[6:]
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-3)
