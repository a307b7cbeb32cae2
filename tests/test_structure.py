"""The structure of the package (docs/architecture.md): which package may import which, who prints, what a verb is.

Each test has a list of what does not satisfy it yet. A list only shrinks: what satisfies its test must leave it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import lamamba
from lamamba.cli.main import VERBS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lamamba"
LAYERS = [
    {"_version", "_native", "pretrained"},
    {"utils"},
    {"config"},
    {"options"},
    {"ops"},
    {"models", "diffusion", "data"},
    {"inference", "metrics", "viz"},
    {"runs"},
    {"training", "sampling"},
    {"pipeline"},
    {"app", "benchmarking", "evaluation", "exporting"},
    {"compression"},
    {"api"},
    {"cli"},
    {"__main__"},
]
"""From the lowest to the highest: a package imports from lower ones and from itself."""
LAYER_OF = {package: number for number, packages in enumerate(LAYERS) for package in packages}
FUNCTIONS = {
    "app": {"open_app"}, "bench": {"benchmark"},
    "compress": {"compress", "score_units", "plan_removal", "remove_units", "compare_criteria"},
    "convert": {"convert"}, "data": {"check_data"}, "demo": {"demo"},
    "doctor": {"doctor"}, "encode": {"encode"}, "evaluate": {"evaluate", "compute_statistics", "compare"},
    "export": {"export"}, "info": {"info"}, "plot": {"plot"}, "sample": {"sample", "sample_folder"},
    "train": {"train", "plan", "simulate"},
}
"""The functions of lamamba.api that each verb of the command line calls."""
MAX_FUNCTION_LINES, MAX_VERB_LINES = 60, 60
PROGRAMS = {"__main__.py", "metrics/digits_network.py", "benchmarking/worker.py", "benchmarking/simulation.py"}
"""Run by python -m: their standard output is their interface."""

# what is left to do; nothing is added here
CIRCULAR: set[str] = set()
LONG_FUNCTIONS: set[str] = set()
PRINTING: set[str] = set()
UNFINISHED_VERBS: set[str] = set()
PRIVATE_FUNCTIONS: set[str] = set()
"""Of FUNCTIONS, those that `lamamba` does not offer yet."""

FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in FILES
}


def name_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def imported_modules(tree: ast.Module) -> set[str]:
    """Modules of ours that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "a relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in inner}
    return {name for name in found if name.startswith("lamamba.")}


IMPORTS = {name: imported_modules(TREES[file]) - {name} for name, file in MODULES.items() if name != "lamamba"}


def packages(modules: Iterable[str]) -> set[str]:
    return {name.split(".")[1] for name in modules}


def calls(tree: ast.AST) -> Iterator[ast.expr]:
    """What is called or raised."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node.func
        elif isinstance(node, ast.Raise) and node.exc is not None:
            yield node.exc


def lines_of_code(file: Path) -> int:
    """Lines that are not blank, without those of docstrings and other texts of several lines."""
    texts = sum(
        node.end_lineno - node.lineno + 1 for node in ast.walk(TREES[file])
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.end_lineno is not None
        and node.end_lineno > node.lineno
    )
    return sum(bool(line.strip()) for line in file.read_text(encoding="utf-8").splitlines()) - texts


def holds_but_for(broken: set[str], unfinished: set[str]) -> None:
    """What breaks a rule is on its list, and nothing else."""
    assert not broken - unfinished
    assert not unfinished - broken, "done: take them off the list in this file"


def test_every_package_has_a_layer():
    assert packages(IMPORTS) <= LAYER_OF.keys(), "give it one in this file and in docs/architecture.md"


@pytest.mark.parametrize("package", sorted(LAYER_OF))
def test_imports_point_down(package):
    for module in IMPORTS:
        if module.split(".")[1] == package:
            for other in packages(IMPORTS[module]) - {package}:
                assert LAYER_OF[other] < LAYER_OF[package], f"{module} must not import {other}"


def test_no_module_imports_itself_in_a_circle():
    def reached(start: str) -> set[str]:
        seen, todo = set(), list(IMPORTS[start])
        while todo:
            if (name := todo.pop()) not in seen and name in IMPORTS:
                seen.add(name)
                todo += IMPORTS[name]
        return seen

    holds_but_for({name for name in IMPORTS if name in reached(name)}, CIRCULAR)


def test_private_parts_of_pytorch_stand_in_two_modules():
    private = {
        name for name, file in MODULES.items() for node in ast.walk(TREES[file])
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.") and "._" in (node.module or "")
    }
    assert private == {"lamamba.benchmarking.private_distributed", "lamamba.benchmarking.private_torch"}


def test_only_the_command_line_prints_and_exits():
    silent = [file for file in FILES if file.parts[-2] != "cli" and name_of(file) not in PROGRAMS]
    forbidden = {"print", "exit", "quit", "sys.exit", "os._exit", "SystemExit", "sys.stdout.write", "sys.stderr.write"}
    loud = {name_of(file) for file in silent if forbidden & {ast.unparse(called) for called in calls(TREES[file])}}
    holds_but_for(loud, PRINTING)


def test_only_the_command_line_imports_the_command_line():
    assert packages(name for name in IMPORTS if "cli" in packages(IMPORTS[name])) == {"cli", "__main__"}
    for folder in ("benchmarks", "examples"):
        for file in (ROOT / folder).rglob("*.py"):
            assert "lamamba.cli" not in file.read_text(encoding="utf-8"), file


def test_a_verb_parses_calls_its_function_and_shows():
    unfinished = set()
    for verb in VERBS:
        file = PACKAGE / "cli" / f"{verb}.py"
        called = {
            alias.name for node in ast.walk(TREES[file]) if isinstance(node, ast.ImportFrom)
            and (node.module or "").startswith("lamamba.api.") for alias in node.names
        }
        others = packages(IMPORTS[f"lamamba.cli.{verb}"]) - {"api", "cli", "config", "options", "utils"}
        if called != FUNCTIONS[verb] or others or lines_of_code(file) > MAX_VERB_LINES * len(called):
            unfinished.add(verb)
    holds_but_for(unfinished, UNFINISHED_VERBS)
    assert {file.stem for file in (PACKAGE / "cli").glob("[a-z]*.py")} - VERBS.keys() <= {"main", "parse"}


def test_every_verb_is_a_public_function_of_public_options_with_a_public_result():
    names = set().union(*FUNCTIONS.values())
    holds_but_for(names - set(lamamba.__all__), PRIVATE_FUNCTIONS)
    for name in names & set(lamamba.__all__):
        tree = TREES[MODULES[f"lamamba.{lamamba._MODULES[name]}"]]
        (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
        options, result = function.args.args[0].annotation, function.returns
        for annotation in (options, result):
            used = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
            assert used, f"{name} has no annotation"
            assert used <= set(lamamba.__all__), f"{name}: {ast.unparse(annotation)}"


def test_public_names_are_seen_and_exist():
    assert set(lamamba.__all__) <= set(dir(lamamba))
    assert set(lamamba.__all__) == {*lamamba._MODULES, "__version__"}
    for name in lamamba.__all__:
        assert getattr(lamamba, name) is not None
    typed = {
        alias.name for node in ast.walk(TREES[PACKAGE / "__init__.py"]) if isinstance(node, ast.If)
        for line in node.body if isinstance(line, ast.ImportFrom) for alias in line.names
    }
    assert typed == set(lamamba._MODULES), "type checkers and completion see what TYPE_CHECKING imports"


def test_no_package_has_the_name_of_a_function():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert not folders & set().union(*FUNCTIONS.values())


def test_functions_are_short():
    """But for Triton kernels."""
    holds_but_for({
        f"{name_of(file)}:{node.name}" for file in FILES if "triton" not in file.name for node in ast.walk(TREES[file])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 - len((ast.get_docstring(node) or "").splitlines()) > MAX_FUNCTION_LINES
    }, LONG_FUNCTIONS)


@pytest.mark.parametrize(("modules", "heavy"), [
    (["lamamba", "lamamba.config", "lamamba.pretrained", "lamamba.cli.main"], ["torch", "pydantic", "tyro"]),
    ([name for name in MODULES if name.startswith("lamamba.options")], ["torch", "diffusers"]),
], ids=["help", "options"])
def test_help_and_options_import_nothing_slow(modules, heavy):
    code = f"import sys, {', '.join(modules)}\nprint(*{{*{heavy}}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
