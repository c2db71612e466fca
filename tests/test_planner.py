"""The planner picks, explains what it picked, and refuses what cannot be."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from rwn_ext import PartialConv2d, convert, costs, cpu, cuda, planner
from rwn_ext.planner import ALGORITHMS, FAMILIES, Problem, explain, plan


@pytest.fixture(autouse=True)
def no_remembered_plans():
    plan.cache_clear()
    yield
    plan.cache_clear()


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch):
    """A CPU without AVX-512."""
    for limit, value in (("WIDE", False), ("DIRECT_POINTWISE_FILTERS", 24), ("FILTER_BLOCK", 8)):
        monkeypatch.setattr(planner, f"CPU_{limit}", value)


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def no_cuda_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda, "native", None)


needs_module = pytest.mark.skipif(
    cuda.native is None, reason="rwn_ext._cuda is not built here: no nvcc, or not in place"
)
LAYER = Problem(2, 64, 32, 32, 64, 6, (3, 3), padding=(1, 1), channels_last=True)
HALF = {"dtype": "bfloat16"}
OLD = replace(costs.A100, name="V100", arch=70)


@pytest.mark.parametrize(
    ("change", "picked"),
    [
        ({}, "unfold"),
        ({"learned": 0}, "none"),
        ({"learned": 64}, "full"),
        ({"learned": 32}, "gather"),
        ({"channels": 16}, "gather"),
        ({"groups": 2}, "gather"),
        ({"stride": (2, 2)}, "gather"),
        ({"channels_last": False}, "gather"),
        ({"kernel_size": (1, 1), "padding": (0, 0)}, "matmul"),
        ({"kernel_size": (1, 1), "padding": (0, 0), "channels_last": False}, "gather"),
        ({"batch": 1, "height": 4, "width": 4}, "full"),
    ],
    ids=str,
)
def test_heuristic(change: dict, picked: str, without_cpu_kernel):
    chosen = plan(replace(LAYER, **change))
    assert chosen.algorithm == picked and chosen.reason


def test_wide_registers_need_no_matrix_product(monkeypatch: pytest.MonkeyPatch, without_cpu_kernel):
    monkeypatch.setattr(planner, "CPU_WIDE", True)
    assert plan(replace(LAYER, kernel_size=(1, 1), padding=(0, 0))).algorithm == "gather"


@pytest.mark.skipif(cpu.native is None, reason="rwn_ext was built without a C++ compiler")
@pytest.mark.parametrize("limit", [3, 6])
def test_of_few_channels_few_filters_are_computed_directly(limit: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planner, "CPU_DIRECT_SHALLOW_FILTERS", limit)
    picked = [plan(replace(LAYER, channels=3, learned=count)).algorithm for count in (limit, limit + 1)]
    assert picked[0] == "direct" and picked[1] != "direct"


@pytest.mark.skipif(cpu.native is None, reason="rwn_ext was built without a C++ compiler")
@pytest.mark.parametrize(
    ("change", "direct"),
    [
        ({}, True),
        ({"learned": 63, "stride": (2, 2), "channels_last": False}, True),
        ({"batch": 1, "height": 4, "width": 4}, True),
        ({"learned": 64}, False),
        ({"channels": 3, "learned": 3}, True),
        ({"channels": 3, "learned": 7}, False),
        ({"channels": 3, "learned": 3, "kernel_size": (7, 7)}, False),
        ({"groups": 2}, False),
        ({"dtype": "bfloat16"}, False),
        ({"kernel_size": (1, 1), "padding": (0, 0)}, True),
        ({"kernel_size": (1, 1), "padding": (0, 0), "learned": 25}, False),
        ({"kernel_size": (1, 1), "padding": (0, 0), "batch": 1, "learned": 40}, True),
        ({"kernel_size": (1, 1), "padding": (0, 0), "learned": 2, "channels_last": False}, False),
        ({"channels": 1, "learned": 32}, False),
        ({"channels": 1, "learned": 64}, False),
        ({"learned": 64, "groups": 64}, True),
        ({"learned": 64, "groups": 64, "channels_last": False}, True),
        ({"learned": 64, "groups": 64, "channels_last": False, "batch": 3}, False),
        ({"learned": 64, "groups": 64, "channels_last": False, "batch": 3, "kernel_size": (5, 5)}, True),
        ({"channels": 16, "filters": 16, "learned": 16, "groups": 16, "channels_last": False, "batch": 64}, True),
        ({"filters": 128, "learned": 64, "groups": 64}, False),
        ({"learned": 64, "groups": 64, "dtype": "bfloat16"}, False),
    ],
    ids=str,
)
def test_heuristic_with_the_cpu_kernel(change: dict, direct: bool):
    assert (plan(replace(LAYER, **change)).algorithm == "direct") == direct


@pytest.mark.parametrize(
    ("change", "algorithm", "why"),
    [
        ({}, "none", "learned"),
        ({}, "matmul", "1x1"),
        ({"kernel_size": (1, 1)}, "matmul", "padding"),
        ({"kernel_size": (1, 1), "padding": (0, 0), "groups": 2}, "matmul", "2"),
        ({"groups": 4}, "unfold", "4"),
        ({"groups": 4}, "swapped", "4"),
        ({}, "pointwise", "1x1"),
        ({}, "depthwise", "64"),
        ({"dtype": "float64"}, "stationary", "float64"),
        ({"dtype": "float64"}, "triton", "float64"),
        ({"device": "cuda", "chip": replace(costs.A100, arch=75)}, "triton", "sm_75"),
        ({"device": "mps"}, "stationary", "GPU"),
        ({"batch": 2**25}, "stationary", "32 bits"),
        ({}, "cuda", "built|need a GPU, not cpu"),
        pytest.param({"device": "mps"}, "cuda_mma", "not mps", marks=needs_module),
        pytest.param({"device": "cuda", "dtype": "float64"}, "cuda", "not float64", marks=needs_module),
        pytest.param({"device": "cuda"}, "cuda_mma", "take bfloat16 and float16", marks=needs_module),
        pytest.param({"device": "cuda", "groups": 4}, "cuda", "one group", marks=needs_module),
        pytest.param(
            {"device": "cuda", "channels_last": False} | HALF, "cuda_mma", "channels_last", marks=needs_module
        ),
        pytest.param({"device": "cuda", "chip": costs.A100} | HALF, "cuda_wgmma", "9.0", marks=needs_module),
        pytest.param({"device": "cuda", "batch": 2**25}, "cuda", "32-bit", marks=needs_module),
        pytest.param({"device": "cuda"}, "cuda_depthwise", "not depthwise", marks=needs_module),
        pytest.param({"device": "cuda", "chip": OLD}, "cuda", "no code of it for this device", marks=needs_module),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_a_reason(change: dict, algorithm: str, why: str):
    problem = replace(LAYER, **change)
    with pytest.raises(ValueError, match=f"'{algorithm}' cannot compute .*: .*{why}"):
        plan(problem, algorithm)
    for name in FAMILIES.get(algorithm, (algorithm,)):
        assert any(line.strip().startswith(f"cannot be {name}: ") for line in explain(problem).splitlines())


def test_what_a_family_cannot_do_is_told_of_all_its_members_once():
    with pytest.raises(ValueError) as refused:
        plan(replace(LAYER, device="mps"), "cuda")
    assert str(refused.value).count("CUDA kernels") == 1


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_forcing_is_obeyed_and_a_layer_that_learns_nothing_needs_nothing(algorithm: str, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert plan(replace(LAYER, learned=0), algorithm).algorithm == "none"
    if algorithm == "none":
        return
    if algorithm in costs.CUDA:
        depthwise = {"groups": 64, "learned": 64} if algorithm == "cuda_depthwise" else {}
        possible = replace(LAYER, device="cuda", dtype="bfloat16", **depthwise)
    else:
        groups = 64 if algorithm == "depthwise" else 1
        possible = replace(LAYER, kernel_size=(1, 1), padding=(0, 0), groups=groups)
    if "built without" in (planner._obstacle(possible, algorithm) or ""):
        with pytest.raises(ValueError, match="built without"):
            plan(possible, algorithm)
        return
    assert plan(possible, algorithm).algorithm == algorithm


@pytest.mark.parametrize(
    ("change", "picked"),
    [
        ({}, "stationary"),
        ({"kernel_size": (1, 1), "padding": (0, 0)}, "pointwise"),
        ({"channels": 3, "learned": 64}, "swapped"),
        ({"groups": 64}, "depthwise"),
        ({"groups": 4}, "stationary"),
    ],
    ids=str,
)
def test_triton_stands_for_its_best_kernel(change: dict, picked: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    problem = replace(LAYER, batch=256, height=56, width=56, **change)
    assert plan(problem, "triton").algorithm == picked
    assert plan(replace(problem, device="cuda", dtype="bfloat16"), "triton").algorithm == picked


@pytest.mark.parametrize(
    ("change", "launches"),
    [
        ({}, 3),  # gather, product, sum of 44 splits
        ({"batch": 8, "height": 16, "width": 16}, 2),  # 4 splits: the tile that finishes last sums them
        ({"batch": 1, "height": 16, "width": 16}, 2),  # 1 split
        ({"batch": 128, "learned": 8, "kernel_size": (1, 1), "padding": (0, 0)}, 2),  # read in place
        ({"batch": 8, "height": 16, "width": 16, "learned": 8, "kernel_size": (1, 1), "padding": (0, 0)}, 2),
        ({"batch": 8, "height": 16, "width": 16, "learned": 7, "kernel_size": (1, 1), "padding": (0, 0)}, 2),
    ],
    ids=str,
)
def test_launches_are_counted_as_they_are_made(change: dict, launches: int, monkeypatch: pytest.MonkeyPatch):
    """Those of the launcher itself, on memory that no kernel touches."""
    pytest.importorskip("triton")
    from rwn_ext.kernels import weight_grad as launcher

    problem = replace(LAYER, batch=128, device="cuda", dtype="bfloat16", learned=6, chip=costs.H100)
    problem = replace(problem, **change)
    algorithm = "pointwise" if problem.kernel_size == (1, 1) else "stationary"
    n, c, h, w = problem.batch, problem.channels, problem.height, problem.width
    made = []
    kernel = type(launcher.correlate_kernel)
    monkeypatch.setattr(kernel, "__getitem__", lambda self, grid: lambda *a, **k: made.append(self))
    monkeypatch.setattr(launcher, "INTERPRETED", True)
    x, grad_output = (
        torch.empty(size, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        for size in ((n, c, h, w), (n, problem.filters, *problem.output_size))
    )
    launcher.weight_grad(
        algorithm, grad_output, x, launcher.Filters((problem.filters - problem.learned, problem.filters), 64),
        problem.kernel_size, problem.stride, problem.padding, problem.dilation,
        out=torch.empty(problem.learned, c, *problem.kernel_size),
    )  # fmt: skip
    assert len(made) == costs.TRITON[algorithm](problem).launches == launches


def test_a_norm_and_relu_before_the_layer_count_for_those_that_read_through_them():
    problem = replace(LAYER, batch=128, device="cuda", dtype="bfloat16")
    normed = replace(problem, normed=True)
    input_bytes = 2 * 128 * 64 * 32 * 32
    for name, cost in costs.LIBRARIES.items():
        plain, with_activation = cost(problem), cost(normed)
        assert with_activation.bytes - plain.bytes == 2 * input_bytes, name
        assert with_activation.launches == plain.launches + 1 and with_activation.seconds > plain.seconds
    assert costs.stationary(normed).bytes == costs.stationary(problem).bytes
    assert {*costs.TRITON, *costs.CUDA} == planner.READERS
    assert "before norm and ReLU" in str(normed) and "before norm" not in str(problem)
    assert plan(normed).algorithm in planner.READERS


def test_on_a_cpu_triton_is_never_the_planner_s_choice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for learned in range(1, 65):
        assert plan(replace(LAYER, learned=learned)).algorithm not in costs.TRITON
    assert not set(planner.candidates(LAYER)) & set(costs.TRITON)


@needs_module
@pytest.mark.parametrize(
    ("change", "picked"),
    [
        ({}, "cuda_wgmma"),
        ({"width": 55}, "cuda_mma"),
        ({"chip": costs.A100}, "cuda_mma"),
        ({"chip": replace(costs.A100, name="T4", arch=75)}, "cuda_ffma"),
        ({"dtype": "float32", "precision": "ieee"}, "cuda_ffma"),
        ({"channels": 60}, "cuda_ffma"),
        ({"groups": 64, "learned": 64}, "cuda_depthwise"),
    ],
    ids=str,
)
def test_cuda_stands_for_its_best_kernel(change: dict, picked: str):
    problem = replace(LAYER, batch=256, height=56, width=56, device="cuda", dtype="bfloat16")
    assert plan(replace(problem, **change), "cuda").algorithm == picked


@needs_module
def test_a_family_is_taken_only_where_it_is_predicted_to_gain_a_tenth(monkeypatch: pytest.MonkeyPatch):
    """Over the library, and over the families before it."""
    problem = replace(LAYER, device="cuda", dtype="bfloat16")

    def picked(library: float, triton: float, cuda: float) -> str:
        plan.cache_clear()
        for family, seconds in ((costs.LIBRARIES, library), (costs.TRITON, triton), (costs.CUDA, cuda)):
            for name in family:
                monkeypatch.setitem(family, name, lambda p, seconds=seconds: costs.Cost(seconds, 0, 0, 1))
        return plan(problem).algorithm

    assert picked(1.0, 0.91, 0.91) == "full"
    assert picked(1.0, 0.8, 0.1) == "swapped"  # CUDA kernels wait to be asked for
    monkeypatch.setattr(planner, "UNASKED", ("triton", "cuda"))
    assert picked(1.0, 0.8, 0.75) == "swapped"
    assert picked(1.0, 0.8, 0.7) == "cuda_wgmma"
    assert picked(1.0, 2.0, 0.89) == "cuda_wgmma"


@needs_module
def test_the_cost_of_a_compiled_kernel_by_hand():
    """bfloat16 on an H200, 128 x 32 x 32 pixels of 160 channels, 2 of 160 filters 3x3: 18 columns, 24 computed."""
    problem = Problem(
        128, 160, 32, 32, 160, 2, (3, 3), padding=(1, 1), device="cuda", channels_last=True, dtype="bfloat16"
    )
    native = cuda.planned(problem, "wgmma")
    assert (native.kernel, native.width, native.channels_per_block, native.columns_per_block) == ("wgmma", 3, 64, 24)
    assert native.splits == 2 * 132 // 3 and native.workspace == 3 * native.splits * 64 * 24
    pixels = 128 * 32 * 32
    cost = costs.CUDA["cuda_wgmma"](problem)
    assert cost.launches == 1 and cost.flops == 2 * pixels * 192 * 24
    # The input once (192 channels of it), each partial sum written and read, and the gradient's sectors of 32 bytes for
    # each of 3 tiles, with a halo.
    least = 2 * pixels * 192 + 8 * native.workspace + 2 * 160 * 18 + 3 * 32 * pixels
    assert least <= cost.bytes <= 1.2 * least
    assert costs.floor(problem).seconds < cost.seconds < 100e-6
    for kernel in cuda.KERNELS[:3]:
        assert f"  cuda_{kernel} predicted: " in explain(problem)


def test_without_cuda_kernels_it_says_so(no_cuda_kernels):
    on_gpu = replace(LAYER, device="cuda", dtype="bfloat16")
    with pytest.raises(
        ValueError, match=r"algorithm='cuda' cannot compute .*: rwn_ext was built without CUDA kernels;"
    ):
        plan(on_gpu, "cuda")
    assert "cannot be cuda_mma: rwn_ext was built without CUDA kernels" in explain(on_gpu)
    assert plan(on_gpu).algorithm not in costs.CUDA


def test_without_a_gpu_or_triton_it_says_so(no_interpreter, no_cuda_kernels, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="GPU, or TRITON_INTERPRET=1"):
        plan(LAYER, "triton")
    assert "cannot be stationary: Triton kernels need a GPU, or TRITON_INTERPRET=1" in explain(LAYER)
    on_gpu = replace(LAYER, batch=256, device="cuda", dtype="bfloat16", height=56, width=56)
    assert plan(on_gpu).algorithm == "stationary"
    plan.cache_clear()
    monkeypatch.setattr(planner, "TRITON_IS_INSTALLED", False)
    assert plan(on_gpu).algorithm in costs.LIBRARIES
    assert "cannot be stationary: Triton is not installed" in explain(on_gpu)


@st.composite
def gpu_problems(draw) -> Problem:
    groups = draw(st.sampled_from([1, 1, 1, 4, 32]))
    filters = groups * draw(st.integers(1, 256))
    size, kernel = draw(st.integers(1, 256)), draw(st.sampled_from([1, 3, 5, 7]))
    return Problem(
        batch=draw(st.integers(1, 256)), channels=groups * draw(st.integers(1, 256)), height=size, width=size,
        filters=filters, learned=draw(st.integers(groups, filters)), kernel_size=(kernel, kernel),
        stride=draw(st.sampled_from([(1, 1), (2, 2)])), padding=(kernel // 2, kernel // 2), groups=groups,
        device="cuda", channels_last=draw(st.booleans()), dtype=draw(st.sampled_from(["bfloat16", "float32"])),
        precision=draw(st.sampled_from(["tf32", "ieee"])), chip=draw(st.sampled_from(costs.CHIPS)),
    )  # fmt: skip


STRIDED_POINTWISE = Problem(
    78, 255, 36, 36, 1, 1, (1, 1), stride=(2, 2), padding=(0, 0), device="cuda", dtype="float32", precision="tf32"
)


@pytest.mark.parametrize(
    ("channels_last", "kernel", "dilation", "pixels"),
    [(False, 1, 1, 18 * 36), (True, 1, 1, 18 * 18), (True, 2, 1, 36 * 36), (True, 3, 2, 17 * 17 + 2 * 17 + 1)],
)
def test_the_floor_counts_what_the_filters_see_of_the_input(channels_last, kernel, dilation, pixels):
    """36 x 36 pixels, stride 2: every other row and column; where pixels are contiguous, whole rows."""
    problem = replace(
        STRIDED_POINTWISE,
        channels_last=channels_last,
        kernel_size=(kernel, kernel),
        dilation=(dilation, dilation),
    )
    height, width = problem.output_size
    chosen, result = 4 * 78 * height * width, 4 * 255 * kernel**2
    assert costs.floor(problem).bytes == 4 * 78 * 255 * pixels + chosen + result


@given(problem=gpu_problems())
@example(problem=STRIDED_POINTWISE)
def test_on_a_gpu_nothing_is_picked_that_is_predicted_slower_than_the_library(problem: Problem):
    predicted = {
        name: cost(problem).seconds for name, cost in costs.PRICED.items() if not planner._obstacle(problem, name)
    }
    picked = plan(problem).algorithm
    best = min(predicted[name] for name in costs.LIBRARIES)
    assert predicted[picked] == best or (picked not in costs.LIBRARIES and predicted[picked] < best)
    if picked in costs.CUDA:
        assert all(predicted[picked] < predicted[name] for name in costs.TRITON if name in predicted)
    floor = costs.floor(problem)
    for name, seconds in predicted.items():
        assert seconds >= floor.seconds, name


@pytest.mark.parametrize("chip", costs.CHIPS, ids=lambda chip: chip.name)
def test_chips_are_known_by_torch_s_name_for_them(chip: costs.Chip):
    found = costs.chip(f"NVIDIA {chip.name} 80GB HBM3", 100, 90)
    assert (found.bandwidth, found.half, found.multiprocessors) == (chip.bandwidth, chip.half, 100)


def test_an_unknown_chip_is_an_a100_of_its_size():
    found = costs.chip("NVIDIA L4", costs.A100.multiprocessors // 2, 89)
    assert (found.name, found.arch, found.bandwidth) == ("NVIDIA L4", 89, costs.A100.bandwidth / 2)


def test_explain_on_a_gpu_shows_times_bytes_and_the_floor(no_cuda_kernels):
    """Bytes by hand: bfloat16, 128 x 32 x 32 pixels; 160 channels of input, 2 of 160 filters, 3x3."""
    problem = Problem(
        128, 160, 32, 32, 160, 2, (3, 3), padding=(1, 1), device="cuda", channels_last=True, dtype="bfloat16"
    )
    text = explain(problem)
    least = 2 * (128 * 32 * 32 * (160 + 2) + 2 * 160 * 9)
    assert f"floor {1e6 * least / 4.3e12:.1f} us, {least / 1e6:.1f} MB at the rates of H200" in text
    assert "picked stationary" in text and "bfloat16 channels_last on H200" in text
    for name in ("full", "gather", "stationary"):
        assert f"  {name} predicted: " in text
    assert "pointwise predicted" not in text


def test_every_way_to_ask_for_cuda_is_refused_alike_without_a_gpu(monkeypatch: pytest.MonkeyPatch):
    x = torch.randn(1, 4, 5, 5)
    refused = pytest.raises(
        ValueError, match=r"algorithm='cuda' cannot compute .*(built without CUDA|need a GPU, not cpu)"
    )
    model = convert(torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3)), trainable=2, algorithm="cuda")
    with refused:
        model(x)
    with refused:
        explain(LAYER, "cuda")
    monkeypatch.setenv("RWN_EXT_ALGORITHM", "cuda")
    with refused:
        PartialConv2d(4, 8, 3, trainable=2)(x)


def test_explain_says_what_and_why(monkeypatch: pytest.MonkeyPatch, without_cpu_kernel):
    text = explain(LAYER)
    for part in (
        "6 of 64 filters 3x3",
        "(2, 64, 32, 32)",
        "float32 channels_last on cpu",
        "picked unfold",
        "54 columns",
        " MB are read",
    ):
        assert part in text
    assert "cannot be matmul: it needs 1x1" in text and "cannot be gather" not in text
    assert "picked full" in explain(LAYER, "full") and "asked for" in explain(LAYER, "full")
    monkeypatch.setenv("RWN_EXT_ALGORITHM", "gather")
    assert "picked gather" in explain(LAYER) and "picked full" in explain(LAYER, "full")


def test_unknown_names(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="algorithm='fast' is unknown; choose auto, none, full"):
        planner.requested("fast")
    with pytest.raises(ValueError, match=r"depthwise, triton, cuda$"):
        planner.requested("fast")
    assert planner.requested("triton") == "triton" and planner.requested("cuda") == "cuda"
    monkeypatch.setenv("RWN_EXT_ALGORITHM", "")
    with pytest.raises(ValueError, match="RWN_EXT_ALGORITHM=''"):
        planner.requested(None)
    assert planner.requested("full") == "full"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"trainable": 2, "padding": 1}, {"channels": 6, "filters": 12, "learned": 2, "padding": (1, 1)}),
        ({"trainable": 2, "trainable_inputs": [0, 3]}, {"channels": 2, "filters": 12, "learned": 2}),
        ({"trainable": [0, 11], "groups": 3}, {"channels": 4, "filters": 8, "learned": 2, "groups": 2}),
        ({"trainable": 0}, {"learned": 0}),
        ({"trainable": 1, "padding": "same"}, {"padding": (1, 1), "height": 9}),
        ({"trainable": 1, "padding": 2, "padding_mode": "circular"}, {"padding": (0, 0), "height": 13, "width": 15}),
    ],
    ids=str,
)
def test_a_layer_states_its_problem(arguments: dict, expected: dict):
    layer = PartialConv2d(6, 12, 3, **arguments)
    x = torch.randn(2, 6, 9, 11)
    problem = layer.problem(x)
    assert {name: getattr(problem, name) for name in expected} == expected
    assert problem.output_size == layer(x).shape[2:]
    assert problem.batch == 2 and layer.problem(x[0]).batch == 1
    assert not problem.channels_last
    # Circular padding makes a contiguous copy.
    nhwc = layer.problem(x.to(memory_format=torch.channels_last))
    assert nhwc.channels_last == (arguments.get("padding_mode") != "circular")
