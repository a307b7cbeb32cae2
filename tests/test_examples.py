"""Every example runs: the scripts as they are, the notebooks cell by cell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.docs


@pytest.fixture(autouse=True)
def _import_from_here(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))


ARGUMENTS = {"compress_unet_demo.py": ["--quick"]}
NEEDS = {"compress_unet_demo.py": "transformers"}
RUN_BY_ANOTHER = {"compress_unet.py"}                                           # by compress_unet_demo.py


@pytest.mark.parametrize("script", sorted({path.name for path in EXAMPLES.glob("*.py")} - RUN_BY_ANOTHER))
def test_a_script_runs(script, tmp_path):
    if script in NEEDS:
        pytest.importorskip(NEEDS[script], reason=f"{script} needs {NEEDS[script]}")
    command = [sys.executable, EXAMPLES / script, *ARGUMENTS.get(script, [])]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("notebook", sorted(path.name for path in EXAMPLES.glob("*.ipynb")))
def test_a_notebook_runs_and_was_saved_with_its_outputs(notebook, tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="notebooks need nbformat, nbclient and ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="notebooks need nbformat, nbclient and ipykernel")
    cells = nbformat.read(EXAMPLES / notebook, as_version=4)
    assert all(cell.execution_count for cell in cells.cells if cell.cell_type == "code")
    nbclient.NotebookClient(
        cells, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()


def test_each_notebook_has_a_script():
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} <= {path.stem for path in EXAMPLES.glob("*.py")}
