"""Imports only point down, and rooms of one floor do not import each other (docs/architecture.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lamamba"
FLOORS = [
    {"config", "_version", "_native", "pretrained"},
    {"options", "utils"},
    {"ops"},
    {"models", "diffusion", "data"},
    {"inference", "metrics", "viz"},
    {"runs"},
    {"training", "sampling"},
    {"app", "pipeline", "benchmarking", "evaluation", "exporting"},
    {"api"},
    {"cli"},
    {"__main__"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imported_rooms(file: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            names = [node.module or ""]
            if node.module == "lamamba":
                names = [f"lamamba.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("lamamba.")}
    return rooms


FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if file != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file):
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in FLOOR_OF, f"{room} has no floor: give it one here and in docs/architecture.md"
    for other in imported_rooms(file):
        assert other == room or FLOOR_OF[other] < FLOOR_OF[room], f"{room} must not import {other}"


@pytest.mark.parametrize("module", [
    "lamamba", "lamamba.config", "lamamba.cli.main", "lamamba.options.training", "lamamba.pretrained",
])
def test_the_ground_floor_and_help_import_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
