"""Main commands and tests on the lowest and on the newest versions that pyproject.toml allows: `make versions`.

    python tests/versions.py lowest newest --folder /tmp/versions

Each gets a virtual environment in the folder, which is kept; versions of torch that already lie in one are taken as
they are. The package runs from the checkout, with the kernels that were built there.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
EXTRAS = ("digits", "webdataset", "datasets", "export", "film", "lora", "quantize", "tensorboard")
TOOLS = ("pytest>=8.2", "hypothesis>=6.100", "tomli>=2")
TESTS = (
    "tests/test_pipeline.py", "tests/models/test_unet.py", "tests/models/test_adapters.py", "tests/diffusion",
    "tests/ops/test_selective_scan.py", "tests/ops/test_layers.py", "tests/ops/test_transforms.py", "tests/exporting",
    "tests/cli/test_sample.py", "tests/cli/test_export.py", "tests/training/test_options.py",
    "tests/api/test_evaluate.py", "tests/inference/test_quantizing.py",
)
COMMANDS = (
    "doctor", "sample --steps 2 --out digits.png", "sample --steps 2 --compile --out compiled.png",
    "train digits --steps 4 --sampling.every 4 --out run", "export run exported --images 1 --steps 2 --onnx",
    "evaluate exported --reference digits --features digits --num-images 8 --steps 2 --out figures.json",
)


def requirements(lowest: bool, extras: tuple[str, ...], core: bool) -> list[str]:
    """The project's requirements; the lowest version of each where asked for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    given = [*(project["dependencies"] if core else ()),
             *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return [re.sub(r">=([\w.]+)[^;]*", r"==\1", line) if lowest else line for line in given]


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    print("$", *command, flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(list(map(str, command)), cwd=cwd, env=environment, check=True)


def check(which: str, folder: Path) -> None:
    """Install into folder/which, then run everything there."""
    lowest, place = which == "lowest", folder / which
    if not place.exists():
        venv.create(place, with_pip=True)
    python = place / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    run(python, "-m", "pip", "install", "--quiet", *requirements(lowest, EXTRAS, core=True), *TOOLS)
    with tempfile.TemporaryDirectory() as work:
        for command in COMMANDS:
            run(python, "-m", "lamamba", *command.split(), cwd=Path(work))
    run(python, "-m", "pytest", "-p", "no:cacheprovider", *TESTS)
    # last, because gradio asks for a newer huggingface_hub than the others, and that for a newer transformers (of peft)
    run(python, "-m", "pip", "install", "--quiet", "--upgrade", *requirements(lowest, ("app",), core=False),
        "transformers")
    run(python, "-m", "pytest", "-p", "no:cacheprovider", "tests/app/test_page.py", "tests/app/test_session.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", nargs="*", default=["lowest", "newest"], choices=["lowest", "newest"])
    parser.add_argument("--folder", type=Path, default=ROOT / ".versions")
    options = parser.parse_args()
    for which in options.which:
        check(which, options.folder.resolve())


if __name__ == "__main__":
    main()
