"""What is compiled, with what: the Python packages, `rwn_ext._cpu` from csrc/cpu/ where a C++ compiler is found, and
`rwn_ext._cuda` from csrc/ where an nvcc is.

CMake and ninja drive the compilers; torch is not needed to build. nvcc is sought in CUDA_HOME, on PATH and among the
packages of this Python. None: the package goes without, and says so. One that does not work, or a compile error: the
build fails. RWN_EXT_CUDA_ARCHS ("80;90a", or "none" for no kernels) overrides the architectures. What was compiled
stays in build/, so that a second build compiles what changed. Metadata stands in pyproject.toml.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = ("75", "80", "90a", "100")


def find_compiler():
    """The C++ compiler that CMake will take, or None."""
    named = os.environ.get("CXX", "").split()
    candidates = named[:1] or ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, candidates)), None)


def find_nvcc():
    """The path of nvcc, or None. A CUDA_HOME without one is an error: someone meant it."""
    home = os.environ.get("CUDA_HOME")
    if home:
        nvcc = Path(home) / "bin" / "nvcc"
        if not nvcc.is_file():
            sys.exit(f"CUDA_HOME={home!r} holds no bin/nvcc; unset it to build without CUDA kernels")
        return nvcc
    on_path = shutil.which("nvcc")
    if on_path:
        return Path(on_path)
    packages = importlib.util.find_spec("nvidia")
    for folder in packages.submodule_search_locations if packages else ():
        for nvcc in sorted(Path(folder).glob("*/bin/nvcc")):
            return nvcc
    return None


def architectures(nvcc):
    """Those asked for, else ours as far as this nvcc knows them."""
    asked = os.environ.get("RWN_EXT_CUDA_ARCHS")
    if asked is not None:
        return [arch for arch in re.split(r"[;,\s]+", asked) if arch]
    known = output_of(nvcc, "--list-gpu-arch").split()
    return [arch for arch in ARCHITECTURES if f"compute_{arch.rstrip('a')}" in known]


def output_of(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} does not work: {done.stdout}{done.stderr}")
    return done.stdout


def tool(name):
    """A build tool beside this Python, else on PATH."""
    beside = shutil.which(name, path=str(Path(sys.executable).parent))
    found = beside or shutil.which(name)
    if not found:
        sys.exit(f"building the kernels needs {name}: python -m pip install {name}")
    return found


def cpu_settings():
    """CMake's settings for csrc/cpu, and what they depend on."""
    return {}, find_compiler()


def cuda_settings():
    """Likewise for csrc."""
    nvcc = find_nvcc()
    settings = {"CMAKE_CUDA_COMPILER": nvcc, "RWN_ARCHS": ";".join(architectures(nvcc))}
    return settings, f"{nvcc} {output_of(nvcc, '--version')}"


class BuildKernels(build_ext):
    def initialize_options(self):
        super().initialize_options()
        # Both modules at once: while one is configured, the other keeps the cores busy.
        self.parallel = True
        # Set here, before there are threads: a change while another one starts a process would break that start.
        os.environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(len(os.sched_getaffinity(0))))

    def build_extension(self, extension):
        import pybind11

        source, settings_of = KERNELS[extension.name]
        settings, compiler = settings_of()
        # One folder for each Python and compiler: CMake cannot change its compiler.
        module, key = extension.name.rpartition(".")[2], hashlib.sha256(str(compiler).encode()).hexdigest()[:8]
        folder = ROOT / "build" / f"csrc{module}-{sys.implementation.cache_tag}-{key}"
        cmake, ninja = tool("cmake"), tool("ninja")
        settings |= {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        defines = [f"-D{name}={value}" for name, value in settings.items()]
        subprocess.run([cmake, "-S", ROOT / source, "-B", folder, "-G", "Ninja", *defines], check=True)
        subprocess.run([cmake, "--build", folder, "--target", module], check=True)
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        (built,) = folder.glob(f"{module}*{target.suffix}")
        shutil.copy2(built, target)


class BuildPython(build_py):
    def run(self):
        built = [extension.name for extension in self.distribution.ext_modules or ()]
        if "rwn_ext._cpu" not in built:
            print("rwn_ext: no C++ compiler in CXX or on PATH: built without the CPU kernel", file=sys.stderr)
        if "rwn_ext._cuda" not in built:
            print(
                "rwn_ext: no nvcc in CUDA_HOME or on PATH (or none wanted): built without CUDA kernels", file=sys.stderr
            )
        super().run()


# Where the source of each module lies, and how it is compiled.
KERNELS = {"rwn_ext._cpu": ("csrc/cpu", cpu_settings), "rwn_ext._cuda": ("csrc", cuda_settings)}


def modules():
    """The compiled modules that this machine can build."""
    if sys.platform == "linux" and find_compiler():
        yield "rwn_ext._cpu"
    if sys.platform == "linux" and os.environ.get("RWN_EXT_CUDA_ARCHS") != "none" and find_nvcc():
        yield "rwn_ext._cuda"


setup(
    # rwn_ext/kernels is a link to kernels: packages are named, because no search for them follows links.
    packages=["rwn_ext", "rwn_ext.kernels", "rwn_ext.lean", "rwn_ext.paper"],
    package_data={"rwn_ext.paper": ["*.toml", "figures/*.toml"]},
    ext_modules=[Extension(name, sources=[]) for name in modules()],
    cmdclass={"build_ext": BuildKernels, "build_py": BuildPython},
)
