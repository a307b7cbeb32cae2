"""What the README shows can be typed as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lamamba.cli.main import main
from lamamba.pretrained import shipped_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)   # all, so that they pair up
    return [text for found, text in fences if found == kind]


def test_the_library_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example, *_ = blocks("python")
    names: dict = {}
    exec(example, names)
    assert names["output"].shape == (2, 8, 32, 32)
    assert names["model"]._run_grid == (32, 48)


def test_the_example_of_calls_runs(tmp_path, monkeypatch):
    """Training, sampling and evaluation from Python, with fewer steps and images."""
    monkeypatch.chdir(tmp_path)
    _, example, _ = blocks("python")
    shorter = {"steps=900": "steps=4", "num=8": "num=8, steps=2", "num_images=2000": "num_images=8, steps=2"}
    for long, short in shorter.items():
        assert long in example
        example = example.replace(long, short)
    names: dict = {}
    exec(example, names)
    assert names["run"].folder.is_dir()
    assert names["picture"].images.shape == (16, 8, 8, 1)
    assert (tmp_path / "grid.png").exists()
    assert (tmp_path / "figures.json").exists()


def test_the_diffusers_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(shipped_model()), "exported/digits", "--images", "0"]) == 0
    *_, example = blocks("python")
    names: dict = {}
    exec(example + "\nlast = pipe('3', num_inference_steps=2, height=8, width=16).images[0]", names)
    assert len(names["pictures"]) == 2
    assert names["last"].size == (16, 8)


COMMANDS = [
    line.split("#")[0].strip() for block in blocks("") for line in block.splitlines() if line.startswith("lamamba ")
]


def test_commands_are_found():
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_every_command_exists(command, monkeypatch):
    """The words after the verb are parsed by the verb's own parser, up to the point where work would begin."""
    import importlib

    from lamamba.cli import parse as arguments

    class Parsed(Exception):
        pass

    verb, *words = shlex.split(command)[1:]
    module = importlib.import_module(f"lamamba.cli.{verb}")

    def parse_and_stop(*given, **named):
        arguments.parse(*given, **named)
        raise Parsed

    monkeypatch.setattr(module, "parse", parse_and_stop)
    with pytest.raises(Parsed):
        module.main(words)


def test_files_it_names_exist():
    for path in re.findall(r"(?:lamamba|docs|tests|benchmarks|examples)/[\w./-]+\w", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_files_that_the_docs_name_exist(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for path in re.findall(r"(?:lamamba|docs|tests|benchmarks|examples)/[\w./-]+\w", text):
        assert (ROOT / path).exists(), path
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (ROOT / "docs" / picture).exists(), picture
