"""The compiled kernel of the CPU, in every instruction set this machine runs: exact sums, float64, threads, layouts."""

import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F

from rwn_ext import PartialConv2d, backends, cpu, ops, planner
from rwn_ext.planner import Problem
from rwn_ext.subsets import Subset, run_indices

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(cpu.native is None, reason="rwn_ext was built without a C++ compiler")
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def instructions() -> tuple[str, ...]:
    return cpu.native.INSTRUCTIONS if cpu.native is not None else ()


def weight_grad(grad_output, input, filters, kernel_size, stride, padding, dilation, which="", depthwise=False):
    out = torch.full((len(filters), 1 if depthwise else input.size(1), *kernel_size), torch.nan)
    bias = None if depthwise else torch.full((len(filters),), torch.nan)
    compute(grad_output, input, filters, kernel_size, stride, padding, dilation, out, bias, depthwise, which)
    if bias is not None:
        expected = grad_output.double()[:, list(run_indices(filters.runs))].sum((0, 2, 3))
        torch.testing.assert_close(bias.double(), expected, rtol=1e-5, atol=1e-4)
    return out


def compute(
    grad_output, input, filters, kernel_size, stride, padding, dilation, out, bias=None, depthwise=False, which=""
):
    """Into `out`, of any strides, and `bias`."""
    task = cpu.native.WeightGrad(
        input.shape, input.stride(), grad_output.shape[2:], grad_output.stride(), list(run_indices(filters.runs)),
        out.stride(), kernel_size, stride, padding, dilation, depthwise, which,
    )  # fmt: skip
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (input, grad_output, out, bias)]
    task(*addresses, torch.get_num_threads())


def oracle(grad_output, input, filters, kernel_size, stride, padding, dilation):
    """By autograd through the dense convolution in float64."""
    weight = torch.zeros(grad_output.size(1), input.size(1), *kernel_size, dtype=torch.float64, requires_grad=True)
    output = F.conv2d(input.double(), weight, None, stride, padding, dilation)
    (whole,) = torch.autograd.grad(output, weight, grad_output.double())
    return whole[list(run_indices(filters.runs))]


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
kernels = st.tuples(st.integers(1, 3), st.integers(1, 9))


@pytest.mark.parametrize("which", instructions())
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    batch=st.sampled_from((1, 2, 3, 17, 70)), channels=st.integers(1, 70), filters=st.integers(1, 40), data=st.data(),
    kernel=kernels, stride=pairs, dilation=pairs, padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    extra=st.tuples(st.integers(0, 9), st.sampled_from((0, 1, 6, 40, 75))), layout=st.sampled_from(LAYOUTS),
)  # fmt: skip
def test_sums_of_integers_are_exact(
    which, batch, channels, filters, data, kernel, stride, dilation, padding, extra, layout
):
    size = [
        max(d * (k - 1) + 1 - 2 * pad, 1) + e for d, k, pad, e in zip(dilation, kernel, padding, extra, strict=True)
    ]
    input = torch.randint(-4, 5, (batch, channels, *size)).float().contiguous(memory_format=layout)
    shape = F.conv2d(input, torch.zeros(filters, channels, *kernel), None, stride, padding, dilation).shape
    grad_output = torch.randint(-4, 5, shape).float().contiguous(memory_format=layout)
    chosen = data.draw(st.sets(st.integers(0, filters - 1), min_size=1))
    learned = Subset.from_indices(filters, sorted(chosen))
    geometry = (learned, kernel, stride, padding, dilation)
    ours = weight_grad(grad_output, input, *geometry, which)
    assert torch.equal(ours.double(), oracle(grad_output, input, *geometry))


@pytest.mark.parametrize("which", instructions())
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    batch=st.sampled_from((0, 1, 3, 17)), channels=st.integers(1, 50), data=st.data(), run=st.booleans(),
    kernel=kernels, stride=pairs, dilation=pairs, padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    extra=st.tuples(st.integers(0, 9), st.sampled_from((0, 1, 6, 40, 75))),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
)  # fmt: skip
def test_depthwise_sums_of_integers_are_exact(
    which, batch, channels, data, run, kernel, stride, dilation, padding, extra, layouts
):
    size = [
        max(d * (k - 1) + 1 - 2 * pad, 1) + e for d, k, pad, e in zip(dilation, kernel, padding, extra, strict=True)
    ]
    input = torch.randint(-4, 5, (batch, channels, *size)).float()
    weight = torch.zeros(channels, 1, *kernel, dtype=torch.float64, requires_grad=True)
    output = F.conv2d(input.double(), weight, None, stride, padding, dilation, channels)
    grad_output = torch.randint(-4, 5, output.shape).float().contiguous(memory_format=layouts[0])
    if run:
        begin = data.draw(st.integers(0, channels - 1))
        chosen = range(begin, data.draw(st.integers(begin, channels - 1)) + 1)
    else:
        chosen = data.draw(st.sets(st.integers(0, channels - 1), min_size=1))
    learned = Subset.from_indices(channels, sorted(chosen))
    seen = input[:, sorted(chosen)].contiguous(memory_format=layouts[1])
    ours = weight_grad(grad_output, seen, learned, kernel, stride, padding, dilation, which, depthwise=True)
    (whole,) = torch.autograd.grad(output, weight, grad_output.double())
    assert torch.equal(ours.double(), whole[sorted(chosen)])


@pytest.mark.parametrize("which", instructions())
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        ((20, 150, 9, 7), (1, 1), (1, 1), (0, 0)), ((20, 150, 9, 7), (1, 1), (2, 1), (0, 0)),
        ((20, 150, 2, 2), (3, 3), (1, 1), (1, 1)), ((20, 150, 4, 3), (3, 3), (2, 2), (2, 1)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("chosen", [[0, 2, 3, 4, 5, 6, 8], [3, 8]], ids=len)
def test_several_tiles_and_images_at_once(which, layout, size, kernel, stride, padding, chosen):
    """All channels of many images in one item; many small images in one block."""
    input = torch.randint(-4, 5, size).float().contiguous(memory_format=layout)
    shape = F.conv2d(input, torch.zeros(9, size[1], *kernel), None, stride, padding).shape
    grad_output = torch.randint(-4, 5, shape).float().contiguous(memory_format=layout)
    geometry = (Subset.from_indices(9, chosen), kernel, stride, padding, (1, 1))
    assert torch.equal(
        weight_grad(grad_output, input, *geometry, which).double(), oracle(grad_output, input, *geometry)
    )


@pytest.mark.skipif(instructions()[:2] != ("avx512", "avx2"), reason="there is one width of registers")
@pytest.mark.parametrize(("channels", "narrow"), [(3, True), (31, True), (32, False)])
def test_few_channels_are_computed_in_narrow_registers(channels, narrow):
    """Whose sums are of other partial sums."""
    input, grad_output = torch.randn(3, channels, 40, 40), torch.randn(3, 4, 40, 40)
    geometry = (Subset.full(4), (3, 3), (1, 1), (1, 1), (1, 1))
    chosen, wide, slim = (weight_grad(grad_output, input, *geometry, which) for which in ("", "avx512", "avx2"))
    assert (torch.equal(chosen, wide), torch.equal(chosen, slim)) == (not narrow, narrow)


@pytest.mark.parametrize("which", instructions())
@pytest.mark.parametrize("channels", [16, 48, 70, 128, 129, 200])
@pytest.mark.parametrize("learned", [1, 2, 3, 6])
def test_taps_that_share_pixels(which, channels, learned):
    """Few filters: of so many channels, pixels are read where they lie, or copied."""
    input = torch.randint(-4, 5, (70, channels, 7, 9)).float().contiguous(memory_format=torch.channels_last)
    grad_output = torch.randint(-4, 5, (70, 9, 6, 7)).float().contiguous(memory_format=torch.channels_last)
    geometry = (Subset.from_indices(9, list(range(9 - learned, 9))), (4, 5), (1, 1), (1, 1), (1, 1))
    ours = weight_grad(grad_output, input, *geometry, which)
    assert torch.equal(ours.double(), oracle(grad_output, input, *geometry))


@pytest.mark.parametrize("which", instructions())
def test_any_strides(which):
    """Operands cut out of larger ones; a result of its own layout."""
    input = torch.randn(2, 60, 9, 20)[:, 3:50, :, ::2]
    grad_output = torch.randn(9, 10, 30, 2).permute(3, 2, 0, 1)
    geometry = (Subset.from_indices(30, [1, 2, 29]), (3, 3), (1, 1), (1, 1), (1, 1))
    ours = weight_grad(grad_output, input, *geometry, which)
    torch.testing.assert_close(ours.double(), oracle(grad_output, input, *geometry), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", instructions())
def test_any_strides_of_depthwise_filters(which):
    input = torch.randn(3, 9, 20, 100)[:, :, ::2, ::2].permute(0, 3, 1, 2)
    grad_output = torch.randn(1, 50, 1, 10).expand(3, 50, 9, 10)
    weight = torch.zeros(50, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    output = F.conv2d(input.double(), weight, None, 1, 1, 1, 50)
    (expected,) = torch.autograd.grad(output, weight, grad_output.double())
    geometry = ((3, 3), (1, 1), (1, 1), (1, 1), which)
    ours = weight_grad(grad_output, input, Subset.full(50), *geometry, depthwise=True)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    chosen = [1, 7, 49]
    ours = weight_grad(grad_output, input[:, chosen], Subset.from_indices(50, chosen), *geometry, depthwise=True)
    torch.testing.assert_close(ours.double(), expected[chosen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("batch", "kernel", "padding", "filters"),
    [
        (5, (3, 3), (1, 1), 3), (24, (1, 1), (0, 0), 3), (24, (3, 3), (1, 1), 3), (70, (3, 3), (1, 1), 8),
        (20, (5, 5), (2, 2), 20), (3, (3, 3), (1, 1), "depthwise"), (9, (3, 3), (1, 1), "depthwise"),
    ],
)  # fmt: skip
def test_sums_do_not_depend_on_the_threads(batch, kernel, padding, filters):
    input, grad_output = torch.randn(batch, 40, 16, 16), torch.randn(batch, 40, 16, 16)
    depthwise = filters == "depthwise"
    filters = Subset.full(40) if depthwise else Subset.from_indices(40, list(range(0, 2 * filters, 2)))
    geometry = (filters, kernel, (1, 1), padding, (1, 1))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results += [weight_grad(grad_output, input, *geometry, depthwise=depthwise) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_long_sums_stay_accurate():
    """A block is summed by itself: all the pixels in one float32 sum would lose digits."""
    input, grad_output = torch.rand(64, 16, 32, 32), torch.rand(64, 2, 32, 32)
    geometry = (Subset.full(2), (1, 1), (1, 1), (0, 0), (1, 1))
    expected = oracle(grad_output, input, *geometry)
    error = (weight_grad(grad_output, input, *geometry).double() - expected).norm() / expected.norm()
    assert error < 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("batch", "pixels"), [(2, 100_000), (100_000, 2)])
def test_long_sums_of_biases_stay_accurate(batch, pixels):
    input, grad_output, bias = torch.rand(batch, 1, 1, pixels), torch.rand(batch, 8, 1, pixels), torch.empty(8)
    geometry, out = ((1, 1), (1, 1), (0, 0), (1, 1)), torch.empty(8, 1, 1, 1)
    compute(grad_output, input, Subset.full(8), *geometry, out, bias)
    expected = grad_output.double().sum((0, 2, 3))
    assert (bias.double() - expected).norm() / expected.norm() < 8 * torch.finfo(torch.float32).eps


def test_long_sums_of_depthwise_filters_stay_accurate():
    """Of a signal, an image of height 1, too."""
    input, grad_output = torch.rand(2, 8, 1, 100_000), torch.rand(2, 8, 1, 100_000)
    weight = torch.zeros(8, 1, 1, 11, dtype=torch.float64, requires_grad=True)
    output = F.conv2d(input.double(), weight, None, 1, (0, 5), 1, 8)
    (expected,) = torch.autograd.grad(output, weight, grad_output.double())
    ours = weight_grad(grad_output, input, Subset.full(8), (1, 11), (1, 1), (0, 5), (1, 1), depthwise=True)
    assert (ours.double() - expected).norm() / expected.norm() < 8 * torch.finfo(torch.float32).eps


def test_it_works_without_openmp():
    """Where no OpenMP is in the process, the threads are its own."""
    program = f"""
import importlib.util, ctypes, array
spec = importlib.util.spec_from_file_location("_cpu", {cpu.native.__file__ if cpu.native else ""!r})
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
assert not hasattr(ctypes.CDLL(None), "GOMP_parallel")
ones, result = array.array("f", [1] * 4 * 32 * 25), array.array("f", [0] * 32)
address = lambda a: a.buffer_info()[0]
task = native.WeightGrad((4, 32, 5, 5), (800, 25, 5, 1), (5, 5), (800, 25, 5, 1), [3], (32, 1, 1, 1), (1, 1), (1, 1),
                         (0, 0), (1, 1))
task(address(ones), address(ones), address(result), 0, 4)
assert set(result) == {{100.0}}, result
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_instructions():
    with pytest.raises(ValueError, match=r"instructions='mmx' cannot run here; choose one of .*baseline"):
        weight_grad(
            torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), Subset.full(1), *[(1, 1)] * 2, (0, 0), (1, 1), "mmx"
        )


def test_what_does_not_belong_together_is_refused():
    one = torch.zeros(1, 2, 3, 3)
    with pytest.raises(ValueError, match=r"filters=\[\] asks for the gradient of no filter"):
        compute(one, one, Subset.empty(2), *[(1, 1)] * 2, (0, 0), (1, 1), torch.zeros(0, 2, 1, 1))
    with pytest.raises(ValueError, match="bias is not computed beside depthwise filters"):
        out, bias = torch.zeros(2, 1, 1, 1), torch.zeros(2)
        compute(one, one, Subset.full(2), *[(1, 1)] * 2, (0, 0), (1, 1), out, bias, True)
    with pytest.raises(ValueError, match="2 channels for 1 depthwise filters"):
        weight_grad(one, one, Subset.from_indices(2, [1]), *[(1, 1)] * 2, (0, 0), (1, 1), depthwise=True)


def test_another_default_device_does_not_matter():
    conv, x = PartialConv2d(24, 20, 3, trainable=0.1), torch.randn(2, 24, 5, 5)
    output = conv(x)
    with torch.device("meta"):
        output.sum().backward()
    assert conv.weight_trainable.grad.device.type == "cpu"


def test_a_layer_asked_for_it_gets_the_gradient_of_its_filters():
    torch.manual_seed(0)
    conv = PartialConv2d(24, 20, 3, stride=2, padding=1, trainable=[0, 3, 19], algorithm="direct")
    x = torch.randn(3, 24, 11, 12).to(memory_format=torch.channels_last)
    output = conv(x)
    cotangent = torch.randn_like(output)
    output.backward(cotangent)
    expected = oracle(cotangent, x, conv.filters, (3, 3), (2, 2), (1, 1), (1, 1))
    torch.testing.assert_close(conv.weight_trainable.grad.double(), expected, rtol=1e-5, atol=1e-4)
    biases = cotangent.double()[:, [0, 3, 19]].sum((0, 2, 3))
    torch.testing.assert_close(conv.bias_trainable.grad.double(), biases, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trainable", [0.3, [0, 3, 19], 1.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_depthwise_layer_is_given_it(trainable, layout):
    torch.manual_seed(0)
    conv = PartialConv2d(20, 20, 3, stride=2, padding=1, groups=20, trainable=trainable).to(memory_format=layout)
    x = torch.randn(3, 20, 11, 12).contiguous(memory_format=layout)
    if trainable != 1.0:
        assert planner.plan(conv.problem(x)).algorithm == "direct"
    output = conv(x)
    cotangent = torch.randn_like(output)
    output.backward(cotangent)
    weight = conv.weight.detach().double().requires_grad_()
    expected = F.conv2d(x.double(), weight, conv.bias.double(), 2, 1, 1, 20)
    (whole,) = torch.autograd.grad(expected, weight, cotangent.double())
    torch.testing.assert_close(
        conv.weight_trainable.grad.double(), whole[list(run_indices(conv.filters.runs))], rtol=1e-5, atol=1e-4
    )


def test_double_backward_goes_through_differentiable_operations():
    input, grad_output = torch.randn(2, 3, 5, 5, requires_grad=True), torch.randn(2, 4, 5, 5, requires_grad=True)
    geometry = ((1, 3), (3, 3), (1, 1), (1, 1), (1, 1), 1, "direct")
    assert ops.conv2d_weight_grad(grad_output, input, *geometry).grad_fn is not None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "bfloat16"}, "not bfloat16 on cpu"),
        ({"device": "cuda"}, "not float32 on cuda"),
        ({"groups": 2}, "each of the 2 with learned filters; they have 8 channels and 8 filters"),
        ({"groups": 8, "filters": 16}, "each of the 8 with learned filters; they have 8 channels and 16 filters"),
    ],
)
def test_obstacles(change, reason):
    problem = Problem(
        **{"batch": 2, "channels": 8, "height": 8, "width": 8, "filters": 8, "learned": 2, "kernel_size": (3, 3)}
        | change
    )
    with pytest.raises(ValueError, match=reason):
        planner.plan(problem, "direct")


def test_backends_names_the_instructions():
    assert f"cpu: compiled, runs as {instructions()[0]}" in backends.backends()


@pytest.mark.parametrize("operand", ["input", "grad_output"])
def test_numbers_that_memory_holds_negated(operand: str):
    conv, plain = PartialConv2d(24, 20, 3, trainable=2), torch.randn(2, 24, 5, 5)
    image = torch.complex(torch.zeros(2, 24, 5, 5), plain).conj().imag if operand == "input" else plain
    output = conv(image)
    grad_output = torch.randn_like(output)
    if operand == "grad_output":
        grad_output = torch.complex(torch.zeros_like(grad_output), grad_output).conj().imag
    assert image.is_neg() or grad_output.is_neg()
    output.backward(grad_output)
    dense = conv.to_conv2d().double()
    dense(image.double()).backward(grad_output.double())
    torch.testing.assert_close(conv.weight_trainable.grad.double(), dense.weight.grad[-2:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(conv.bias_trainable.grad.double(), dense.bias.grad[-2:], rtol=1e-4, atol=1e-4)


def test_operands_without_memory_are_refused():
    task = cpu.native.WeightGrad(
        (1, 2, 3, 3), (18, 9, 3, 1), (3, 3), (18, 9, 3, 1), [0], (2, 1, 1, 1), (1, 1), (1, 1), (0, 0), (1, 1)
    )
    with pytest.raises(ValueError, match="an operand has no memory"):
        task(0, 0, torch.zeros(2).data_ptr(), 0, 1)
