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


def test_missing_inputs_of_compress_unet_are_one_line_and_no_traceback(tmp_path):
    pytest.importorskip("datasets", reason="compress_unet.py needs datasets")
    for arguments, said in ((["--remove", "2"], "must be a share"), ([], "no pipeline that diffusers can open")):
        run = subprocess.run(
            [sys.executable, EXAMPLES / "compress_unet.py", "nowhere", "--images", "x", "--out", "o", *arguments],
            cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        assert run.returncode in (1, 2)
        assert said in run.stderr
        assert "Traceback" not in run.stderr
    assert not list(tmp_path.iterdir())
