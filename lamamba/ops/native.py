"""Loading of the compiled CPU kernels: shared libraries in lamamba/_native, called by ctypes.

They depend on no version of Python or torch. The source is built once per instruction set, and the best one that the
processor supports is loaded; LAMAMBA_CPU_ISA selects another. Without them (an installation without a compiler) the
PyTorch back ends run.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import sys
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from lamamba.config import check_known

logger = logging.getLogger("lamamba.ops")

FOLDER = Path(__file__).resolve().parent.parent / "_native"
SUFFIX = ".dll" if sys.platform == "win32" else ".so"
ENVIRONMENT_VARIABLE = "LAMAMBA_CPU_ISA"
INSTRUCTION_SETS = ("avx512", "avx2", "baseline")                   # best first; baseline is SSE2, or NEON on arm64

HOW_TO_BUILD = (
    "install a C++17 compiler, then lamamba-diff again from source (in a checkout: pip install -e .; else "
    "pip install --force-reinstall --no-deps --no-cache-dir --no-binary lamamba-diff lamamba-diff)"
)


def supported_instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets of this processor, best first, as torch reports them (see ATEN_CPU_CAPABILITY)."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ("baseline",)
    capability = torch.backends.cpu.get_cpu_capability()
    return INSTRUCTION_SETS[{"AVX512": 0, "AVX2": 1}.get(capability, 2):]


def _library(instruction_set: str) -> Path:
    return FOLDER / f"kernels_{instruction_set}{SUFFIX}"


def choose_instruction_set() -> str | None:
    """Return the instruction set that LAMAMBA_CPU_ISA names, else the best one that was built; None without any.

    Raises:
        ValueError: when the variable is not the name of an instruction set.
        RuntimeError: when the processor lacks it or it was not built.
    """
    supported = supported_instruction_sets()
    built = [name for name in supported if _library(name).exists()]
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    if not forced:
        return built[0] if built else None
    check_known("instruction set", forced, INSTRUCTION_SETS)
    if forced not in supported:
        raise RuntimeError(
            f"{ENVIRONMENT_VARIABLE}={forced}, but this processor runs only {', '.join(supported)}; "
            f"unset the variable or choose one of these"
        )
    if forced not in built:
        raise RuntimeError(f"{ENVIRONMENT_VARIABLE}={forced}, but {_library(forced)} was not built; {HOW_TO_BUILD}")
    return forced


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL | None:
    """Load the library of the chosen instruction set, on torch's OpenMP threads; None, with a warning, without one."""
    instruction_set = choose_instruction_set()
    if instruction_set is None:
        logger.warning("lamamba was installed without its compiled CPU kernels (none in %s), so slower PyTorch code "
                       "runs; %s", FOLDER, HOW_TO_BUILD)
        return None
    library = ctypes.CDLL(str(_library(instruction_set)))
    _share_threads(library)
    return library


def _share_threads(library: ctypes.CDLL) -> None:
    """Pass the library the OpenMP entry points of torch's own runtime; without them it runs on one thread."""
    name = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    try:
        torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        entries = [getattr(torch_library, entry)
                   for entry in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")]
    except (OSError, AttributeError):
        logger.info("torch's OpenMP runtime was not found; the CPU kernels use one thread")
        return
    library.lamamba_use_openmp(*[ctypes.cast(entry, ctypes.c_void_p) for entry in entries])


def struct(fields: str) -> type[ctypes.Structure]:
    """A struct of the kernels: names of integers, of pointers (*x) and of floats (%x)."""
    kinds = {"*": ctypes.c_void_p, "%": ctypes.c_float}
    pairs = [(name.lstrip("*%"), kinds.get(name[0], ctypes.c_int64)) for name in fields.split()]
    return type("Struct", (ctypes.Structure,), {"_fields_": pairs})


def unit_stride(x: Tensor) -> Tensor:
    """Return x with stride 1 along its last dimension, a copy only where needed; other strides are the kernels' own."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


_forked = False


def num_threads() -> int:
    """Return torch's number of threads; 1 in a forked child, where the parent's OpenMP threads do not exist."""
    return 1 if _forked else torch.get_num_threads()


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def describe() -> str:
    """Return instruction set and threads of the kernels in a line, for logs and bug reports."""
    if load() is None:
        return f"no compiled CPU kernels; {HOW_TO_BUILD}"
    return f"compiled CPU kernels for {choose_instruction_set()}, {num_threads()} threads"
