"""Builds the CPU kernels: plain shared libraries, one for each instruction set, tied to no version of Python or torch.

Everything else about the package is in pyproject.toml. Without a working C++ compiler the package installs all the same
and its ops run in PyTorch; LAMAMBA_REQUIRE_KERNELS=1 makes that an error, for those who build wheels for others.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

REQUIRED = os.environ.get("LAMAMBA_REQUIRE_KERNELS") == "1"
SOURCES = ["lamamba/csrc/layers.cpp", "lamamba/csrc/selective_scan.cpp"]
HEADERS = ["lamamba/csrc/parallel.h", "lamamba/csrc/vec.h"]

# Instruction set: floats in a vector, flags for GCC and Clang, flags for MSVC.
X86_BUILDS = {
    "avx512": (16, ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"], ["/arch:AVX512"]),
    "avx2": (8, ["-mavx2", "-mfma"], ["/arch:AVX2"]),
    "baseline": (4, [], []),
}
OTHER_BUILDS = {"baseline": (4, [], [])}                              # arm64: NEON is always there

# No flag of -ffast-math: some of them set the floating-point mode of the whole process, others lose NaN.
UNIX_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
              "-ffp-contract=fast"]
MSVC_FLAGS = ["/std:c++17", "/O2", "/openmp"]


class Kernels(Extension):
    """The library for one instruction set."""

    def __init__(self, name: str) -> None:
        super().__init__(f"lamamba._native.kernels_{name}", SOURCES, depends=HEADERS, language="c++",
                         optional=not REQUIRED)
        self.instruction_set = name


class BuildKernels(build_ext):
    """Builds what this processor family has, and goes on without where that fails."""

    def finalize_options(self) -> None:
        super().finalize_options()
        x86 = self.plat_name.endswith(("x86_64", "amd64"))
        self.builds = X86_BUILDS if x86 else OTHER_BUILDS
        self.extensions = [kernels for kernels in self.extensions if kernels.instruction_set in self.builds]

    def get_ext_filename(self, name: str) -> str:
        return str(Path(*name.split("."))) + (".dll" if sys.platform == "win32" else ".so")

    def get_export_symbols(self, kernels: Kernels) -> list[str]:
        return []                                                    # the source says what it exports

    def run(self) -> None:
        try:
            super().run()
        except (BaseError, CCompilerError) as error:                 # no compiler to be found at all
            self._go_on_without("the CPU kernels", error)

    def build_extension(self, kernels: Kernels) -> None:
        lanes, unix_flags, msvc_flags = self.builds[kernels.instruction_set]
        msvc = self.compiler.compiler_type == "msvc"
        kernels.extra_compile_args = MSVC_FLAGS + msvc_flags if msvc else UNIX_FLAGS + unix_flags
        kernels.define_macros = [("LAMAMBA_LANES", str(lanes))]
        # The three builds share a source: each needs its own folder for object files.
        build_temp, self.build_temp = self.build_temp, str(Path(self.build_temp) / kernels.instruction_set)
        try:
            super().build_extension(kernels)
        except (BaseError, CCompilerError) as error:
            self._go_on_without(f"the CPU kernels for {kernels.instruction_set}", error)
        finally:
            self.build_temp = build_temp

    def _go_on_without(self, what: str, error: Exception) -> None:
        if REQUIRED:
            raise error
        self.warn(
            f"could not build {what} ({error}). lamamba works without, more slowly, in PyTorch; "
            f"with a C++17 compiler (GCC 10, Clang 12, Visual Session 2022 or newer) install it again to get them."
        )


class TagWheel(bdist_wheel):
    """py3-none-<platform>: the libraries depend on the platform and on no Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Kernels(name) for name in X86_BUILDS],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": TagWheel},
)
