"""The compiled kernels without a GPU: their index arithmetic, their source run on the CPU, their plans,
what the compiler made of them, and how they fail where there is no device."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from rwn_ext import PartialConv2d, cuda
from rwn_ext.planner import Problem
from rwn_ext.report import backends

CSRC = Path(__file__).parents[1] / "csrc"
FAMILIES = ["gemm_ffma", "gemm_mma", "gemm_wgmma", "depthwise"]
# As CMakeLists.txt states them to kernels.cpp.
ARCHS_BUILT = {"PLAIN": "75-virtual,80-real,90a-real", "MMA": "80-virtual,80-real,90a-real", "WGMMA": "90a-real"}
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
needs_module = pytest.mark.skipif(
    cuda.native is None, reason="rwn_ext._cuda is not built here: no nvcc, or not in place"
)

H200 = {
    "capability": 90,
    "multiprocessors": 132,
    "block_memory": 227 * 1024,
    "multiprocessor_memory": 228 * 1024,
    "bandwidth": 4300.0,
}


def compiled(folder: Path, *sources: str) -> Path:
    """A program of these sources of csrc/, kernels among them as plain C++ against the emulator."""

    def build(source: str) -> Path:
        target = folder / (source.replace("/", "_") + ".o")
        built = [f'-DRWN_{family}_ARCHS="{archs}"' for family, archs in ARCHS_BUILT.items()]
        flags = ["-std=c++17", "-O1", "-Wno-psabi", *built, "-x", "c++"]
        subprocess.run(["c++", *flags, "-c", CSRC / source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, sources))
    program = folder / "program"
    subprocess.run(["c++", *objects, "-o", program], check=True)
    return program


def run(program: Path) -> str:
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_compiler
def test_index_arithmetic_against_loop_nests(tmp_path):
    output = run(compiled(tmp_path, "plan.cpp", "checks/check_geometry.cpp"))
    assert int(re.search(r"(\d+) passed, 0 failed", output)[1]) > 1_000_000


@needs_compiler
def test_every_kernel_on_the_cpu_against_a_loop_nest(tmp_path):
    families = [f"{family}.cu" for family in FAMILIES]
    output = run(compiled(tmp_path, *families, "plan.cpp", "kernels.cpp", "checks/check_emulated.cpp"))
    assert int(re.search(r"(\d+) passed, 0 failed", output)[1]) >= 50
    assert all(name in output for name in ("ffma 32", "mma 18", "wgmma 18", "depthwise 7"))


def problem(channels=64, size=32, learned=3, batch=128, kernel=3, dtype=1, channels_last=True, **changes):
    strides = (channels * size * size, 1, size * channels, channels)
    if not channels_last:
        strides = (channels * size * size, size * size, size, 1)
    arguments = {
        "input_size": (batch, channels, size, size),
        "input_strides": strides,
        "output_size": (size, size),
        "grad_output_strides": strides,
        "result_strides": (channels * kernel**2, 1, kernel * channels, channels),
        "learned": learned,
        "kernel_size": (kernel, kernel),
        "stride": (1, 1),
        "padding": (kernel // 2,) * 2,
        "dilation": (1, 1),
        "depthwise": False,
        "aligned": True,
        "normed": False,
        "type": dtype,
        "result_type": 0,
    }
    return cuda.native.Problem(**(arguments | changes))


@needs_module
@pytest.mark.parametrize("channels, size", [(64, 32), (160, 32), (640, 8), (64, 56), (256, 14), (2048, 7)])
@pytest.mark.parametrize("learned", [1, 3, 16, 50])
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_plans_fit_the_device(channels, size, learned, multiprocessors):
    device = cuda.native.Device(**(H200 | {"multiprocessors": multiprocessors}))
    task = problem(channels, size, learned)
    for kernel in ("ffma", "mma", "wgmma"):
        if cuda.native.obstacle(task, device, kernel):
            assert kernel == "wgmma" and size % 2, "only an odd width is an obstacle here"
            continue
        plan = cuda.native.plan(task, device, kernel)
        assert plan.shared_memory <= H200["block_memory"]
        resident = plan.blocks_per_multiprocessor * (plan.shared_memory + 1024)
        assert resident <= H200["multiprocessor_memory"]
        tiles = -(-channels // plan.channels_per_block) * -(-9 * learned // plan.columns_per_block)
        assert plan.blocks == tiles * plan.splits
        if plan.splits > 1:
            assert plan.blocks <= multiprocessors * plan.blocks_per_multiprocessor, "splits wait for each other"
            assert plan.workspace == plan.blocks * plan.channels_per_block * plan.columns_per_block
            assert plan.counters == tiles
        else:
            assert plan.workspace == plan.counters == 0


@needs_module
@pytest.mark.parametrize(
    "kernel, changes, reason",
    [
        ("mma", {"dtype": 0}, "bfloat16 and float16"),
        ("mma", {"channels": 36}, "multiple of 8"),
        ("mma", {"channels_last": False}, "channels_last"),
        ("mma", {"aligned": False}, "16-byte"),
        ("wgmma", {"size": 7}, "even width"),
        ("depthwise", {}, "not depthwise"),
        ("ffma", {"normed": True}, "normalise"),
        ("ffma", {"batch": 2**22}, "32-bit"),
    ],
)
def test_obstacles_are_told(kernel, changes, reason):
    device = cuda.native.Device(**H200)
    assert reason in cuda.native.obstacle(problem(**changes), device, kernel)
    with pytest.raises(ValueError, match=reason):
        cuda.native.plan(problem(**changes), device, kernel)


@needs_module
def test_old_chips_have_no_tensor_core_path():
    device = cuda.native.Device(**(H200 | {"capability": 75}))
    assert "8.0" in cuda.native.obstacle(problem(), device, "mma")
    assert cuda.native.plan(problem(), device).kernel == "ffma"


@needs_module
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_every_call_raises_cudas_words():
    plan = cuda.native.plan(problem(batch=1, size=8), cuda.native.Device(**H200), "mma")
    pointers = dict.fromkeys(
        ("input", "grad_output", "filters", "scale", "shift", "result", "workspace", "counters"), 0
    )
    for call in (
        lambda: cuda.native.device(0),
        lambda: cuda.native.weight_grad(plan, first_filter=0, stream=0, **pointers),
    ):
        with pytest.raises(RuntimeError, match="CUDA"):
            call()


def test_launcher_refuses_what_it_would_misread():
    if cuda.native is None:
        with pytest.raises(RuntimeError, match="without CUDA kernels"):
            cuda.weight_grad(*([None] * 4))
        return
    x = torch.randn(1, 8, 4, 4)
    p = Problem(1, 8, 4, 4, 8, 1, (3, 3), padding=(1, 1))
    for grad_output, input, filters, why in (
        (x, x, (0, 1), "must be on one GPU"),
        (x[:, :, 1:], x, (0, 1), "does not fit 1 of 8 filters"),
        (x, x[:, 1:], (0, 1), "does not fit 1 of 8 filters"),
        (x, x.double(), (0, 1), "both must be float32"),
    ):
        with pytest.raises(ValueError, match=why):
            cuda.weight_grad(grad_output, input, filters, p)
    for filters in ((0, 2), (8, 9)):
        with pytest.raises(ValueError, match=r"are not 1 of the 8 channels|must be on one GPU"):
            cuda.weight_grad(x, x, filters, p)


def test_backends_are_told_in_words():
    text = backends()
    assert f"aten: torch {torch.__version__}" in text
    assert ("nvcc" in text) and ("device:" in text)


def disassembler() -> Path | None:
    on_path = shutil.which("cuobjdump")
    if on_path:
        return Path(on_path)
    try:
        import triton.backends.nvidia as backend
    except ImportError:
        return None
    beside = Path(backend.__path__[0]) / "bin" / "cuobjdump"
    return beside if beside.is_file() else None


# What every kernel of a family must show in its machine code, how often at least, by architecture: tensor cores; copies
# of X of 16 bytes or by TMA; the fences before and after the blocks' barrier; those of the mbarriers, and of each stage
# before the tensor cores read what threads wrote. All: at most 255 registers, no spills, no stack, no local memory.
MEET = {r"MEMBAR\.\S*\.GPU": 2}
PLAIN = {"FFMA": 1} | MEET
AMPERE = {r"HMMA\.16816": 1, r"LDGSTS\.E.*\.128": 1, r"LDSM\.16\.MT88\.4": 1} | MEET
HOPPER = {r"HGMMA\.64x\d+x16": 1, r"UTMALDG\.2D": 1, r"SYNCS": 1, r"FENCE\.VIEW\.ASYNC": 3} | MEET
CONTRACTS = {
    **{("gemm_ffma", arch): PLAIN for arch in ("sm_80", "sm_90a", "sm_100")},
    **{("depthwise", arch): PLAIN for arch in ("sm_80", "sm_90a", "sm_100")},
    **{("gemm_mma", arch): AMPERE for arch in ("sm_80", "sm_90a", "sm_100")},
    ("gemm_wgmma", "sm_90a"): HOPPER,
}
HALVES = ("bf16", "f16")
# The template arguments of every compiled kernel. csrc/README.md counts them.
INSTANTIATIONS = {
    "gemm_ffma": {(t, v, n) for t in ("f", *HALVES) for v in (1, 4) for n in (8, 16, 32)},
    "gemm_mma": {(t, n, 0) for t in HALVES for n in (1, 2, 3, 4, 5, 6, 7, 9, 12, 15, 18)}
    | {(t, n, 1) for t in HALVES for n in (2, 4, 7, 12, 18)},
    "gemm_wgmma": {(t, n, half) for t in HALVES for n in (2, 3, 4, 5, 7, 9, 12, 15, 18) for half in (1, 2)},
    # type, size, channels a lane, outputs at once
    "depthwise": {
        (t, r, v, once)
        for t, v in (("f", 1), *((t, v) for t in HALVES for v in (1, 2)))
        for r in (3, 5, 7)
        for once in (1, 4 if r * v < 7 else 2)
    },
}


def instantiation(name: str) -> tuple[str, tuple]:
    """The family and the template arguments of a mangled kernel name."""
    family, type_name, rest = re.search(r"(\w+?)_kernelI(?:NS_\d)?(b?f16|f)E?((?:L[ib]\d+E)+)", name).groups()
    numbers = re.findall(r"L[ib](\d+)E", rest)
    return re.sub(r"^.*?\d+(?=gemm|depth)", "", family), (type_name, *map(int, numbers))


def test_the_table_of_instantiations_is_the_one_that_is_documented():
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|$", (CSRC / "README.md").read_text(), re.MULTILINE)
    assert {family: int(count) for family, count in rows} == {f: len(rows) for f, rows in INSTANTIATIONS.items()}
    assert sum(map(len, INSTANTIATIONS.values())) <= 150


@needs_module
def test_machine_code_keeps_its_contracts():
    """No spills, no stack, no local memory; the tensor cores and wide copies that each path is there for."""
    tool = disassembler()
    if tool is None:
        pytest.skip("no cuobjdump on PATH or beside triton")
    usage = subprocess.run(
        [tool, "-res-usage", cuda.native.__file__], capture_output=True, text=True, check=True
    ).stdout
    entries = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert entries
    for name, registers, stack, _, local in entries:
        assert (int(registers) <= 255, int(stack), int(local)) == (True, 0, 0), name

    code = subprocess.run([tool, "-sass", cuda.native.__file__], capture_output=True, text=True, check=True).stdout
    compiled: dict[tuple[str, str], Counter] = {}
    for section in re.split(r"\n\s*arch = ", code)[1:]:
        arch = section.split(None, 1)[0]
        for function in re.split(r"\n\s*Function : ", section)[1:]:
            name = function.split(None, 1)[0]
            family, arguments = instantiation(name)
            compiled.setdefault((family, arch), Counter())[arguments] += 1
            for pattern, times in CONTRACTS[family, arch].items():
                assert len(re.findall(pattern, function)) >= times, f"{name} on {arch} lacks {pattern}"
            assert " LDL" not in function and " STL" not in function, f"{name} on {arch} uses local memory"
    built = cuda.native.ARCHITECTURES.split(",")
    expected = {key: Counter(INSTANTIATIONS[key[0]]) for key in CONTRACTS if key[1].removeprefix("sm_") in built}
    assert compiled == expected


@needs_module
def test_tensors_that_a_planned_kernel_cannot_read_are_given_to_another(monkeypatch):
    """The planner sees dense tensors; a view may begin anywhere."""
    monkeypatch.setattr(cuda, "_device", lambda index: cuda.native.Device(**H200))
    p = Problem(2, 64, 8, 8, 64, 3, (3, 3), padding=(1, 1), device="cuda", channels_last=True, dtype="bfloat16")
    assert cuda.planned(p, "mma").kernel == "mma"
    strides = (*cuda._dense(p)[:3],)
    assert cuda._plan(p, "mma", 101, *strides, True, False, 0).kernel == "mma"
    assert cuda._plan(p, "mma", 101, *strides, False, False, 0).kernel == "ffma"


@needs_module
@pytest.mark.parametrize("kernel, unit, normed", [("ffma", 1, 0), ("mma", 8, 0), ("mma", 8, 1), ("wgmma", 8, 0)])
def test_odd_widths_round_up_to_the_next_that_is_compiled(kernel, unit, normed):
    device = cuda.native.Device(**H200)
    rows = [arguments for arguments in INSTANTIATIONS[f"gemm_{kernel}"] if kernel != "mma" or arguments[2] == normed]
    widths = sorted({arguments[2 if kernel == "ffma" else 1] for arguments in rows})
    for learned in range(1, 60):
        plan = cuda.native.plan(problem(learned=learned, normed=bool(normed)), device, kernel)
        column_tiles = -(-9 * learned // (widths[-1] * unit))
        needed = -(-9 * learned // column_tiles)
        assert plan.width == next(width for width in widths if width * unit >= needed)


@needs_module
def test_a_device_is_given_the_code_that_this_build_holds():
    if cuda.native.ARCHITECTURES != "75,80,90a,100":
        pytest.skip(f"built for {cuda.native.ARCHITECTURES}")
    for capability in (70, 75, 80, 86, 89, 90, 100, 103, 120):
        device = cuda.native.Device(**(H200 | {"capability": capability}))
        can = {kernel for kernel in cuda.KERNELS if not cuda.native.obstacle(problem(), device, kernel)}
        first_of = {"ffma": 75, "mma": 80}
        expected = {kernel for kernel, first in first_of.items() if capability >= first}
        assert can == expected | ({"wgmma"} if capability == 90 else set())


@pytest.fixture(scope="module")
def check_kernels() -> Path:
    """The check program for GPUs, linked from the kernels that `setup.py build_ext --inplace` compiled."""
    folders = list(CSRC.parent.glob(f"build/csrc-{sys.implementation.cache_tag}-*/_cuda*.so"))
    if cuda.native is None or not folders:
        pytest.skip("rwn_ext._cuda was not built in this folder")
    folder = max(folders, key=os.path.getmtime).parent
    beside = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    subprocess.run([beside, "--build", folder, "--target", "check_kernels"], check=True, capture_output=True)
    return folder / "check_kernels"


def test_the_check_on_a_gpu_reaches_every_instantiation(check_kernels):
    kernels = {"ffma": "gemm_ffma", "mma": "gemm_mma", "wgmma": "gemm_wgmma", "depthwise": "depthwise"}
    output = subprocess.run([check_kernels, "--list", "90"], capture_output=True, text=True, check=True).stdout
    for name, family in kernels.items():
        assert f"{name}: {len(INSTANTIATIONS[family])} instantiations" in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_the_check_on_a_gpu_says_that_there_is_none(check_kernels):
    done = subprocess.run([check_kernels], capture_output=True, text=True)
    assert done.returncode == 77 and re.search("no CUDA device: .*(CUDA|device)", done.stdout)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_instantiation_on_a_gpu(check_kernels):
    run(check_kernels)


@pytest.mark.parametrize(
    "sanitizer, program, status, said",
    [
        ("exit 0", "exit 0", 0, ["memcheck: clean", "synccheck: clean"]),
        (None, "exit 0", 0, ["racecheck: skipped, no compute-sanitizer"]),
        ("echo '=== Device not supported.'; exit 1", "exit 0", 0, ["initcheck: skipped, === Device not supported."]),
        ("echo '=== Invalid read'; exit 99", "exit 0", 1, ["=== Invalid read", "memcheck: FAILED, status 99"]),
        ("exit 1", "exit 0", 1, ["synccheck: FAILED, status 1"]),
        ("exit 0", "echo no CUDA device; exit 77", 77, ["no CUDA device"]),
    ],
    ids=["clean", "absent", "refused", "found", "broken", "no device"],
)
def test_what_the_check_script_makes_of_the_sanitizer_s_answer(tmp_path, sanitizer, program, status, said):
    for name, body in (("compute-sanitizer", sanitizer), ("program", program)):
        if body is not None:
            (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run([CSRC / "checks/run", tmp_path / "program"], env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert all(text in done.stdout for text in said)


def gradients(device: str, algorithm: str, x_size: tuple, filters: int, learned, dtype: torch.dtype, **conv):
    """A layer of whole numbers, a function that computes its learned weights' gradient, and the right answer."""
    layer = PartialConv2d(
        x_size[1], filters, 3, trainable=learned, algorithm=algorithm, bias=False, device=device, dtype=dtype, **conv
    ).to(memory_format=torch.channels_last)
    x = torch.randint(-3, 4, x_size).to(device, dtype).contiguous(memory_format=torch.channels_last)
    cotangent = torch.randint(-2, 3, layer(x).shape).to(device, dtype).contiguous(memory_format=torch.channels_last)
    expected = torch.nn.grad.conv2d_weight(
        x.double(), layer.weight.shape, cotangent.double(), layer.stride, layer.padding, layer.dilation, layer.groups
    )[list(range(filters - learned, filters)) if isinstance(learned, int) else list(learned)]

    def gradient():
        return torch.autograd.grad(layer(x), layer.weight_trainable, cotangent)[0]

    return gradient, expected.to(dtype)


REAL = [
    ("cuda_wgmma", (128, 160, 32, 32), 160, 2, torch.bfloat16),
    ("cuda_wgmma", (128, 640, 8, 8), 640, 6, torch.float16),
    ("cuda_mma", (128, 160, 32, 32), 160, (3, 70), torch.bfloat16),
    ("cuda_mma", (64, 256, 14, 14), 256, 13, torch.float16),
    ("cuda_ffma", (64, 64, 28, 28), 64, 6, torch.float32),
    ("cuda_depthwise", (64, 96, 28, 28), 96, 96, torch.bfloat16),
    ("cuda", (64, 64, 56, 56), 64, 3, torch.bfloat16),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or cuda.native is None, reason="needs a CUDA device and the kernels")
@pytest.mark.parametrize("algorithm, x_size, filters, learned, dtype", REAL)
def test_real_layers_on_a_gpu(algorithm, x_size, filters, learned, dtype):
    """Through the layer: right, the same bits every time, on another stream, and replayed from a CUDA graph."""
    groups = {"groups": filters} if algorithm == "cuda_depthwise" else {}
    if algorithm == "cuda_wgmma" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma is Hopper's")
    gradient, expected = gradients("cuda", algorithm, x_size, filters, learned, dtype, padding=1, **groups)
    first = gradient()
    assert torch.equal(first, expected)
    for _ in range(10):
        assert torch.equal(gradient(), first)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        beside = gradient()
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(beside, first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradient()
    for _ in range(3):
        captured.fill_(torch.nan)
        graph.replay()
        assert torch.equal(captured, first)


def test_what_the_test_on_a_gpu_compares_with_is_right():
    """The same on a CPU, small, by a plain algorithm."""
    for learned in (2, (0, 3)):
        gradient, expected = gradients("cpu", "gather", (2, 8, 6, 5), 8, learned, torch.float32, padding=1)
        assert torch.equal(gradient(), expected)
