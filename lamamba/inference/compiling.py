"""torch.compile for a network, where there is a compiler for it."""

from __future__ import annotations

import os
import shutil
import sys

from lamamba.models.unet import LaMambaUNet

C_COMPILERS = ("cl",) if sys.platform == "win32" else ("cc", "gcc", "clang")
CXX_COMPILERS = ("cl",) if sys.platform == "win32" else ("c++", "g++", "clang++")


def find_compiler(language: str) -> str | None:
    """The path of a C or C++ compiler ("C" or "C++"): what CC or CXX names, or the first known one on the path."""
    variable, names = {"C": ("CC", C_COMPILERS), "C++": ("CXX", CXX_COMPILERS)}[language]
    given = os.environ.get(variable, "").split()
    return next((path for name in (*given[:1], *names) if (path := shutil.which(name))), None)


def compile_network(model: LaMambaUNet) -> None:
    """Compile a network in place, as one graph; the first forward pass of each input shape then takes about a minute.

    Raises:
        RuntimeError: where the compiler that this needs is missing.
    """
    language = "C++" if model.device.type == "cpu" else "C"
    if find_compiler(language) is None:
        raise RuntimeError(
            f"compiling a network on {model.device.type} needs a {language} compiler and none was found: install one, "
            f"name it in {'CXX' if language == 'C++' else 'CC'}, or go without compile"
        )
    model.compile(fullgraph=True, dynamic=False)
