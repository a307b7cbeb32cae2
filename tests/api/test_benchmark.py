"""lamamba.benchmark and lamamba.doctor: results as values and text; errors before anything is built."""

from __future__ import annotations

import json

import pytest

import lamamba
from lamamba.api.benchmark import plan
from lamamba.benchmarking.environment import environment
from lamamba.benchmarking.throughput import Case, ratios


def result() -> lamamba.BenchmarkResult:
    case = Case("s", 32, 2, "float32", "cpu", "forward", threads=1)
    row = {
        "image_size": 32, "batch": 2, "dtype": "float32", "device": "cpu", "mode": "forward", "ms": 50.0,
        "ms_quartiles": [49.0, 51.0], "peak_memory_bytes": 2**28, "activation_bytes_per_image": 2**20,
        "multiply_adds": 5e7,
    }
    rows = [{**row, "model": "s", "images_per_second": 40.0}, {**row, "model": "dit-s-2", "images_per_second": 20.0}]
    return lamamba.BenchmarkResult(rows, ratios(rows), environment(case, seconds=1.0, processes="auto"))


def test_text_markdown_and_values_of_a_result():
    found = result()
    assert found.ratios[0]["ratio"] == 2
    assert json.loads(json.dumps(found.to_dict())).keys() == {"version", "rows", "ratios", "environment"}
    assert found.to_markdown().startswith("# LaMamba beside DiT: forward pass, float32\n\n- device: ")
    for text in (str(found), found.to_markdown()):
        assert "2.00 |" in text
        assert f"lamamba {lamamba.__version__}" in text
    assert found.environment["settings"]["threads"] == 1


def test_cases_are_models_and_peers_for_each_size():
    groups = plan(lamamba.BenchmarkOptions(
        models="s,b-n16", peers=("dit-s-2",), image_sizes="32,64", batch=(4, 1), device="cpu", state_size=2,
    ))
    assert [[(case.model, case.image_size, case.batch) for case in cases] for cases in groups] == [
        [("s-n2", 32, 4), ("b-n16", 32, 4), ("dit-s-2", 32, 4)],
        [("s-n2", 64, 1), ("b-n16", 64, 1), ("dit-s-2", 64, 1)],
    ]
    assert len(plan(lamamba.BenchmarkOptions(models="s", peers="none", image_sizes=32, device="cpu"))[0]) == 1


@pytest.mark.parametrize(("changes", "message"), [
    ({"models": "xxl"}, "did you mean 'xl'"), ({"peers": ("dit-xl2",)}, "did you mean 'dit-xl-2'"),
    ({"image_sizes": (256, 100)}, "the nearest is 96"), ({"json": "nowhere/b.json"}, "does not exist"),
])
def test_errors_come_before_anything_is_built(changes, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        lamamba.benchmark(lamamba.BenchmarkOptions(device="cpu", **changes), progress=None)
    assert not list(tmp_path.iterdir())


def test_doctor(monkeypatch):
    monkeypatch.delenv("LAMAMBA_BACKEND", raising=False)
    found = lamamba.doctor()
    assert found.healthy
    assert found.to_dict()["versions"]["lamamba"] == lamamba.__version__
    assert all(check["passed"] for check in found.findings["checks"])
    assert str(found).endswith("all is well")
