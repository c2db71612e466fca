"""What a user types first: the package installs, plainly and editable, and its programs start from anywhere."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROBE = (
    "import shutil, rwn_ext, rwn_ext.kernels.tiles, rwn_ext.paper.networks\n"
    "assert (rwn_ext.cpu.native is not None) == any(map(shutil.which, ('c++', 'g++', 'clang++')))\n"
    "from rwn_ext.paper import marks, presets\n"
    "assert presets.preset('bn') and marks.mark({'net': 'wrn-28-10'}, 200)\n"
    "print(rwn_ext.__file__)"
)


def run(*command: object, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # The kernels are compiled for tests/test_csrc.py, once: not again for each kind of install.
    environment["RWN_EXT_CUDA_ARCHS"] = "none"
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def cloned(folder: Path) -> Path:
    """What git would clone, as it stands here."""
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            # rwn_ext/kernels is a link to a folder
            shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    return folder


@pytest.mark.parametrize("options", [(), ("--editable",)], ids=["plain", "editable"])
def test_package_installs_under_build_isolation(tmp_path, options):
    """Into an environment that borrows all but the package; the build fetches what it needs."""
    clone, venv = cloned(tmp_path / "clone"), tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    python = venv / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    borrowed = tmp_path / "borrowed"
    borrowed.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "rwn_ext" not in entry.name:
            (borrowed / entry.name).symlink_to(entry)
    (site / "borrowed.pth").write_text(f"{borrowed}\n")
    run(python, "-m", "pip", "install", "--no-deps", "--force-reinstall", *options, clone, cwd=tmp_path)
    place = Path(run(python, "-c", PROBE, cwd=tmp_path).strip())
    assert place.parents[1] == (clone if options else site)
    for folder in (clone, tmp_path):
        assert "train" in run(python, "-m", "rwn_ext.paper", "--help", cwd=folder)


@pytest.mark.parametrize("nvcc", [None, "#!/bin/sh\necho broken; exit 1\n"], ids=["missing", "broken"])
def test_a_toolkit_that_does_not_work_fails_the_build(tmp_path, nvcc):
    """A CUDA_HOME is meant: no silent install without kernels."""
    if nvcc:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "nvcc").write_text(nvcc)
        (tmp_path / "bin" / "nvcc").chmod(0o755)
    command = [sys.executable, "setup.py", "build", "--build-base", str(tmp_path / "build")]
    environment = os.environ | {"CUDA_HOME": str(tmp_path)}
    environment.pop("RWN_EXT_CUDA_ARCHS", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert ("does not work" if nvcc else "holds no bin/nvcc") in done.stdout + done.stderr


def built(clone: Path, **environment: str | None) -> subprocess.CompletedProcess:
    """`setup.py build` of the clone, as every way to install runs it."""
    changed = {name: value for name, value in (os.environ | environment).items() if value is not None}
    changed.pop("RWN_EXT_CUDA_ARCHS" if "RWN_EXT_CUDA_ARCHS" not in environment else "", None)
    return subprocess.run([sys.executable, "setup.py", "build"], cwd=clone, env=changed, capture_output=True, text=True)


def test_without_a_toolkit_the_package_is_plain_python_and_says_so_in_a_line(tmp_path):
    clone = cloned(tmp_path / "clone")
    done = built(clone, CUDA_HOME=None, CXX=None, PATH=f"{tmp_path}")
    assert done.returncode == 0, done.stderr
    for kernels in ("CUDA kernels", "the CPU kernel"):
        assert len(re.findall(f"built without {kernels}", done.stderr)) == 1
    assert list(clone.glob("build/lib*/rwn_ext/ops.py"))
    assert not [path for name in ("_cuda", "_cpu") for path in clone.glob(f"build/**/{name}*")]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_a_compile_error_fails_the_build(tmp_path):
    clone = cloned(tmp_path / "clone")
    (clone / "csrc/kernels.h").write_text("#error a mistake\n")
    done = built(clone, RWN_EXT_CUDA_ARCHS="80")
    assert done.returncode != 0 and "a mistake" in done.stdout + done.stderr
    assert not list(clone.glob("build/lib*/rwn_ext/_cuda*"))


def test_torch_is_not_needed_to_build():
    requirements = re.search(
        r"\[build-system\]\nrequires = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL
    )
    assert "setuptools" in requirements[1] and "torch" not in requirements[1]
