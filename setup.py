"""Builds the native ops, lora_fast._C and lora_fast._C_cuda; pyproject.toml holds the rest.

LORA_FAST_BUILD chooses what is compiled:
    auto   what this machine has a compiler and a torch for (the default); failing is no error
    none   nothing: merges keep a copy of the weight, a CPU is as slow as torch at dropout and at
           adding to few rows
    cpu    the CPU ops, or an error
    cuda   the CPU and the CUDA ops, or an error

Both are built against torch's stable ABI and Python's limited API: one binary serves every torch
from 2.10 and every Python from 3.10.
"""

import glob
import os
import pathlib
import shutil
import subprocess
import sys

from setuptools import setup
from setuptools.command.build_py import build_py

CHOICES = ("auto", "none", "cpu", "cuda")
CHOICE = os.environ.get("LORA_FAST_BUILD", "auto")
if CHOICE not in CHOICES:
    sys.exit(f"LORA_FAST_BUILD must be one of {', '.join(CHOICES)}, got {CHOICE!r}")

LIMITED_API = [("Py_LIMITED_API", "0x030A0000"), ("TORCH_TARGET_VERSION", "0x020a000000000000")]
CXX_FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-g0", "-Wall", "-Werror=return-type"]
# Each serves the later ones of its generation, and the last as PTX all that come.
GPUS = ("7.5", "8.0", "9.0", "10.0")
# No --use_fast_math: the bits must be those of the CPU.
# USE_CUDA: without it torch's stable headers declare nothing of CUDA.
NVCC_FLAGS = ["-O3", "-std=c++20", "-lineinfo", "-DUSE_CUDA"]


def cpp_extension():
    """Return torch's build helpers, or None, with the reason, where there is no torch."""
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        if CHOICE in ("cpu", "cuda"):
            sys.exit(
                f"LORA_FAST_BUILD={CHOICE} needs torch in the building environment ({error}): "
                "install torch first, then use pip install --no-build-isolation"
            )
        print(f"lora_fast: no torch ({error}), so the ops are not compiled", file=sys.stderr)
        return None
    return cpp_extension


def extensions(cpp):
    """Return the extension modules that this machine is to build."""
    headers = glob.glob("csrc/*.h") + glob.glob("csrc/*.cuh")
    common = {"define_macros": LIMITED_API, "py_limited_api": True, "depends": headers}
    found = [
        cpp.CppExtension(
            "lora_fast._C",
            ["csrc/merge_cpu.cpp", "csrc/dropout_cpu.cpp", "csrc/lora_delta_cpu.cpp"],
            extra_compile_args=CXX_FLAGS,
            **common,
        )
    ]
    has_nvcc = cpp.CUDA_HOME is not None or shutil.which("nvcc") is not None
    if CHOICE == "cuda":
        refuse_without_cuda(cpp.CUDA_HOME)
    if CHOICE == "cuda" or (CHOICE == "auto" and has_nvcc and _torch_has_cuda()):
        name_architectures(cpp.CUDA_HOME)
        found.append(
            cpp.CUDAExtension(
                "lora_fast._C_cuda",
                ["csrc/merge_cuda.cu"],
                extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
                **common,
            )
        )
    return found


def _torch_has_cuda():
    import torch

    return torch.version.cuda is not None


def refuse_without_cuda(cuda_home):
    """End, in one line, where torch would with a traceback."""
    if not _torch_has_cuda():
        missing = "a torch with CUDA in the building environment, and this one has none"
    elif cuda_home is None:
        missing = "the CUDA toolkit, and there is none to be found: install it or set CUDA_HOME"
    elif _nvcc_of(cuda_home) is None:
        missing = f"nvcc, and there is none in {os.path.join(cuda_home, 'bin')}: set CUDA_HOME"
    else:
        return
    sys.exit(f"LORA_FAST_BUILD=cuda needs {missing}; LORA_FAST_BUILD=cpu does without")


def _nvcc_of(cuda_home):
    return shutil.which("nvcc", path=os.path.join(cuda_home, "bin") if cuda_home else None)


def name_architectures(cuda_home):
    """Name GPUs to compile for where none is to be seen: torch would find none, and fail."""
    import torch

    if os.environ.get("TORCH_CUDA_ARCH_LIST") or torch.cuda.device_count() > 0:
        return
    nvcc = _nvcc_of(cuda_home)
    if nvcc is None:
        return  # building says so
    command = [nvcc, "--list-gpu-arch"]
    known = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    names = [name for name in GPUS if f"compute_{name.replace('.', '')}" in known]
    if names:
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(names) + "+PTX"


def forgiving(build_ext):
    """Return a build_ext that goes on without an extension that does not build, for `auto`."""

    class BuildExt(build_ext):
        def run(self):
            begun_with = self.compiler, self.inplace  # an attempt changes them
            # Also the list of the distribution, which in the end has what was built.
            every, self.extensions[:] = list(self.extensions), []
            built = []
            for extension in every:
                self.compiler, self.inplace = begun_with
                self.extensions[:] = [extension]
                try:
                    super().run()
                    built.append(extension)
                except Exception as error:
                    # What an earlier build has left is of other sources.
                    self.compiler, self.inplace = begun_with
                    stale = self.get_ext_fullpath(extension.name)
                    pathlib.Path(stale).unlink(missing_ok=True)
                    self.give_up(extension, error)
            self.extensions[:] = built
            wheel = self.distribution.command_obj.get("bdist_wheel")
            if wheel is not None and not built:  # as of LORA_FAST_BUILD=none
                wheel.root_is_pure = True

        def give_up(self, extension, error):
            lost = (
                "merges on a GPU"
                if extension.name.endswith("_cuda")
                else "a CPU drops and adds to few rows as slowly as torch, and merges"
            )
            print(
                f"lora_fast: {extension.name} was not compiled: {error}\n"
                f"lora_fast: {lost} will keep a copy of the weight; LORA_FAST_BUILD=cpu or cuda "
                "makes this an error",
                file=sys.stderr,
            )

    return BuildExt


class BuildPy(build_py):
    """Builds anew."""

    def run(self):
        """Delete first what an earlier install has built: of modules, too, that are gone."""
        shutil.rmtree(os.path.join(self.build_lib, "lora_fast"), ignore_errors=True)
        super().run()


options = {"cmdclass": {"build_py": BuildPy}}
cpp = None if CHOICE == "none" else cpp_extension()
if cpp is not None:
    build_ext = cpp.BuildExtension.with_options(use_ninja=False, no_python_abi_suffix=False)
    options["ext_modules"] = extensions(cpp)
    options["cmdclass"]["build_ext"] = forgiving(build_ext) if CHOICE == "auto" else build_ext
    options["options"] = {"bdist_wheel": {"py_limited_api": "cp310"}}
setup(**options)
