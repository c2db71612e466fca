"""The compiled kernels without a GPU: their index arithmetic, their source run on the CPU, their plans,
what the compiler made of them, and how they fail where there is no device."""

import re
import shutil
import subprocess
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from rwn_ext import cuda
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
            cuda.weight_grad(*([None] * 8))
        return
    x = torch.randn(1, 8, 4, 4)
    with pytest.raises(ValueError, match="must be on one GPU"):
        cuda.weight_grad(x, x, (0, 1), (3, 3), (1, 1), (1, 1), (1, 1), 1)
    assert "not cpu" in cuda.obstacle(8, 1, 1, torch.float32, "cpu")
    assert "one group" in cuda.obstacle(8, 2, 2, torch.float32, "cuda")
    assert "not torch.float64" in cuda.obstacle(8, 2, 1, torch.float64, "cuda")
    assert cuda.obstacle(8, 8, 8, torch.float32, "cuda") is None


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


# What each family's machine code must show, by architecture: "has" in every kernel of it, "lacks" in none.
CONTRACTS = {
    ("gemm_mma", "sm_80"): {"has": [r"HMMA\.16816", r"LDGSTS\.E.*\.128", r"LDSM\.16\.MT88\.4"], "registers": 255},
    ("gemm_mma", "sm_90a"): {"has": [r"HMMA\.16816", r"LDGSTS\.E.*\.128", r"LDSM\.16\.MT88\.4"], "registers": 255},
    ("gemm_mma", "sm_100"): {"has": [r"HMMA\.16816", r"LDGSTS\.E.*\.128", r"LDSM"], "registers": 255},
    ("gemm_wgmma", "sm_90a"): {"has": [r"HGMMA\.64x\d+x16", r"UTMALDG\.2D", r"SYNCS"], "registers": 255},
    **{("gemm_ffma", arch): {"has": ["FFMA"], "registers": 255} for arch in ("sm_80", "sm_90a", "sm_100")},
    **{("depthwise", arch): {"has": ["FFMA"], "registers": 255} for arch in ("sm_80", "sm_90a", "sm_100")},
}


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
    counts: dict[str, int] = defaultdict(int)
    met = set()
    for section in re.split(r"\n\s*arch = ", code)[1:]:
        arch = section.split(None, 1)[0]
        for function in re.split(r"\n\s*Function : ", section)[1:]:
            name = function.split(None, 1)[0]
            family = next(f for f in FAMILIES if f"{f}_kernel" in name)
            counts[arch] += 1
            met.add((family, arch))
            for pattern in CONTRACTS[family, arch]["has"]:
                assert re.search(pattern, function), f"{name} on {arch} lacks {pattern}"
            assert not re.search(r"\b(LDL|STL)\b", function), f"{name} on {arch} uses local memory"
    built = cuda.native.ARCHITECTURES.split(",")
    assert met == {(family, arch) for family, arch in CONTRACTS if arch.removeprefix("sm_") in built}
    assert all(count <= 150 for count in counts.values()), dict(counts)
