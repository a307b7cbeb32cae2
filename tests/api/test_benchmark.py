"""lamamba.benchmark and lamamba.doctor: results as values and text; errors before anything is built."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

import lamamba
from lamamba.api import benchmark as api
from lamamba.api.benchmark import plan
from lamamba.benchmarking import turns
from lamamba.benchmarking.environment import environment
from lamamba.benchmarking.interrupted import written_alone
from lamamba.benchmarking.throughput import Case, OutOfMemory


def result() -> lamamba.BenchmarkResult:
    case = Case("s", 32, 2, "float32", "cpu", "forward", threads=1)
    row = {
        "image_size": 32, "batch": 2, "dtype": "float32", "device": "cpu", "mode": "forward", "ms": 50.0,
        "ms_quartiles": [49.0, 51.0], "peak_memory_bytes": 2**28, "activation_bytes_per_image": 2**20,
        "multiply_adds": 5e7, "multiply_adds_per_second": 4e9, "product_multiply_adds_per_second": 5e9,
        "share_of_product": 0.8, "packed_weights": False, "set": 1,
    }
    rows = [{**row, "model": "s", "images_per_second": 40.0, "is_peer": False},
            {**row, "model": "dit-s-2", "images_per_second": 20.0, "is_peer": True}]
    left_out = [{"model": "adm-256", "image_size": 32, "batch": 2, "reason": "needs about 9.0 GiB, more than is free"}]
    return lamamba.BenchmarkResult(rows, environment(case, seconds=1.0, processes="auto"), left_out)


def test_text_markdown_and_values_of_a_result():
    found = result()
    assert found.ratios[0]["ratio"] == 2
    assert json.loads(json.dumps(found.to_dict())).keys() == {
        "version", "rows", "ratios", "sets", "left_out", "environment",
    }
    assert found.to_markdown().startswith("# LaMamba beside its peers: forward pass, float32\n\n- device: ")
    for text in (str(found), found.to_markdown()):
        assert "2.00 |" in text
        assert " 80% |" in text
        assert "one large matrix product in the same turns: 5.0 G multiply-adds/s" in text
        assert "left out: adm-256 at 32 px needs about 9.0 GiB, more than is free" in text
        assert "dit-s-2: scaled_dot_product_attention" in text
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
    groups = plan(lamamba.BenchmarkOptions(models="s", peers="all", image_sizes="256,512", device="cpu"))
    names = [{case.model for case in cases} for cases in groups]
    assert "adm-256" in names[0] - names[1]
    assert "adm-512" in names[1] - names[0]
    assert {"dit-s-2", "dim-huge", "s"} <= names[0] & names[1]


@pytest.mark.parametrize(("changes", "message"), [
    ({"models": ()}, "at least one model and one image size"),
    ({"image_sizes": ()}, "at least one model and one image size"),
    ({"models": "s", "peers": "adm-512", "image_sizes": 96}, "image_size=96 is not a multiple of 64; use 64 or 128"),
    ({"plot": "a.jpg"}, "plot=a.jpg: the picture is a .png"),
    ({"models": "s,s"}, "models: 's,s' has s twice; once is enough"),
    ({"models": "s-n16,s", "state_size": 16}, "models s-n16 and s are one network; name it once"),
    ({"json": "a.png", "plot": "a.png"}, "plot_efficiency name one file twice: give each its own"),
    ({"device": "meta"}, "device 'meta' has shapes without numbers: give cpu, a GPU such as cuda:1, or auto"),
    ({"image_sizes": (256, 256)}, r"image_sizes=\(256, 256\) has a size twice"),
])
def test_errors_come_before_anything_is_built(changes, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        lamamba.benchmark(lamamba.BenchmarkOptions(**{"device": "cpu", **changes}), progress=None)
    assert not list(tmp_path.iterdir())


def rows_of(cases) -> list[dict]:
    """As `measure` gives them."""
    values = {"ms": 5.0, "ms_quartiles": [4.0, 6.0], "ms_fastest": 4.0, "passes": 3, "images_per_second": 200.0,
              "peak_memory_bytes": 1, "activation_bytes_per_image": 1, "multiply_adds": 10**9, "packed_weights": False,
              "multiply_adds_per_second": 2e11, "product_multiply_adds_per_second": 4e11, "share_of_product": 0.5,
              "parameters": 1, "tokens": 64, "compiled": False, "in_memory_together": True}
    return [{**values, "model": case.model, "image_size": case.image_size, "batch": case.batch, "dtype": case.dtype,
             "device": "cpu", "mode": "forward", "is_peer": case.is_peer} for case in cases]


def test_the_same_call_goes_on_where_it_was_interrupted(monkeypatch, tmp_path):
    """Networks that do not fit together, the second of two peers interrupted, in the middle of two sizes."""
    calls, broken = [], True

    def measure(cases, **options):
        calls.append([(case.model, case.image_size) for case in cases])
        if broken and len(calls) == 2:
            raise KeyboardInterrupt
        return rows_of(cases)

    monkeypatch.setattr(api, "measure", measure)
    monkeypatch.setattr(turns, "fit_together", lambda cases: len(cases) < 4)
    options = lamamba.BenchmarkOptions(
        models="s", peers="dit-s-2,dit-s-4", image_sizes="64,128", batch=1, device="cpu", json=tmp_path / "b.json"
    )
    with pytest.raises(KeyboardInterrupt):
        lamamba.benchmark(options, progress=None)
    broken = False
    result = lamamba.benchmark(options, progress=None)
    first, second = ([("s", size), ("dit-s-2", size)] for size in (64, 128))
    third, fourth = ([("s", size), ("dit-s-4", size)] for size in (64, 128))
    assert calls == [first, third, third, second, fourth]
    assert [(row["model"], row["image_size"]) for row in result.rows] == [
        (name, size) for size in (64, 128) for name in ("s", "dit-s-2", "dit-s-4")
    ]
    assert len(result.ratios) == 4
    assert json.loads(options.json.read_text())["rows"] == result.rows
    del calls[:]
    cases = [asdict(case) for group in plan(options) for case in group]
    saved = json.loads(options.json.read_text()) | {"plan": cases}
    rows = saved["sets"]
    for damage in (
        {"sets": None}, {"sets": [1]}, {"sets": [{"model": "s"}]}, {"environment": [1]}, {"sets": [rows[0], rows[0]]},
        *({"sets": [{**rows[0], **edit}, *rows[1:]]} for edit in (
            {"ms": -1}, {"ms": 1e300}, {"images_per_second": 400.0}, {"set": True}, {"is_peer": "no"}, {"model": "xl"},
        )),
    ):
        options.json.write_text(text := json.dumps(saved | damage))
        with pytest.raises(ValueError, match="b.json is damaged, or was edited .*: move it away to time all anew"):
            lamamba.benchmark(options, progress=None)
        assert options.json.read_text() == text
    for other, said in (
        ({"entries": []}, "b.json is no result of a benchmark and would be written over: name another file"),
        (saved | {"plan": cases[:1]}, r"an interrupted benchmark of another kind \(other networks or settings\)"),
        (saved | {"environment": saved["environment"] | {"commit": "x"}}, "of another kind .*commit: 'x' there"),
    ):
        options.json.write_text(text := json.dumps(other))
        with pytest.raises(ValueError, match=said):
            lamamba.benchmark(options, progress=None)
        assert options.json.read_text() == text
    with (written_alone(options.json),
          pytest.raises(BlockingIOError, match="another benchmark writes .*b.json; wait for it, or name another file")):
        lamamba.benchmark(options, progress=None)
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]
    options.json.write_text(json.dumps(result.to_dict()))
    lamamba.benchmark(options, progress=None)                                   # whole: it begins anew
    assert len(calls) == 4


def test_a_peer_that_runs_out_of_memory_is_left_out_and_the_others_are_timed(monkeypatch):
    def measure(cases, **options):
        for case in cases:
            if case.model == "dit-s-2":
                raise OutOfMemory(case, "its process ended with status -9; probably out of memory")
        return rows_of(cases)

    monkeypatch.setattr(api, "measure", measure)
    result = lamamba.benchmark(lamamba.BenchmarkOptions(
        models="s", peers="dit-s-2,dit-s-4", image_sizes=64, batch=1, device="cpu"), progress=None)
    assert [row["model"] for row in result.rows] == ["s", "dit-s-4"]
    assert [one["model"] for one in result.left_out] == ["dit-s-2"]
    assert "left out: dit-s-2 at 64 px its process ended" in str(result)


def test_a_network_that_only_together_runs_out_of_memory_is_timed_alone(monkeypatch):
    def measure(cases, *, processes, **options):
        if processes == "auto":
            raise OutOfMemory(cases[1], "its process ended with status -9; probably out of memory")
        return rows_of(cases)

    monkeypatch.setattr(api, "measure", measure)
    result = lamamba.benchmark(lamamba.BenchmarkOptions(
        models="s", peers="dit-s-2,dit-s-4", image_sizes=64, batch=1, device="cpu"), progress=None)
    assert [row["model"] for row in result.rows] == ["s", "dit-s-2", "dit-s-4"]
    assert not result.left_out


def test_doctor(monkeypatch):
    monkeypatch.delenv("LAMAMBA_BACKEND", raising=False)
    found = lamamba.doctor()
    assert found.healthy
    assert found.to_dict()["versions"]["lamamba"] == lamamba.__version__
    assert all(check["passed"] for check in found.findings["checks"])
    assert str(found).endswith("all is well")
