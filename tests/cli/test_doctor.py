"""lamamba doctor: which back ends run and why; status 1 when one is wrong."""

from __future__ import annotations

import json

import pytest

from lamamba.ops.selective_scan import chunked


@pytest.fixture
def doctor(lamamba):
    """Run lamamba doctor: (exit status, what it printed)."""
    return lambda *arguments: lamamba("doctor", *arguments)[:2]


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in ("LAMAMBA_BACKEND", "LAMAMBA_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


def test_a_healthy_machine(doctor):
    status, out = doctor()
    assert status == 0
    assert out.endswith("all is well\n")
    for words in ("selective_scan on cpu, float32", "selective_scan on cpu, bfloat16", "C++ compiler", "right:"):
        assert words in out


@pytest.mark.parametrize("wrong", ["value", "raises"])
def test_a_wrong_layer_is_found(doctor, monkeypatch, wrong):
    from lamamba.ops import layers

    def gated_norm(*arguments):
        if wrong == "raises":
            raise RuntimeError("out of registers")
        return layers.reference.gated_norm(*arguments) + 0.01

    monkeypatch.setattr(layers, "gated_norm", gated_norm)
    status, out = doctor()
    assert status == 1
    assert "layers" in out
    assert "WRONG" in out


def test_json(doctor):
    status, out = doctor("--json")
    found = json.loads(out)
    assert (status, found["healthy"]) == (0, True)
    assert {"torch", "reference"} <= {check["backend"] for check in found["checks"] if check["passed"]}
    assert sum(check["seconds"] for check in found["checks"] if check["device"] == "cpu") < 5
    first = found["ops"][0]
    assert first["refusals"][first["backend"]] is None
    assert first["reason"] == "the fastest that can run here"


def test_a_forced_back_end_is_reported(doctor, monkeypatch):
    monkeypatch.setenv("LAMAMBA_BACKEND", "reference")
    status, out = doctor()
    assert status == 0
    assert "reference (LAMAMBA_BACKEND=reference selects it; by itself it would be" in out


@pytest.mark.parametrize(("variable", "value", "said"), [
    ("LAMAMBA_BACKEND", "pytorch", "did you mean"),
    ("LAMAMBA_BACKEND", "triton", "cannot run here"),
])
def test_a_choice_that_cannot_be_obeyed_is_unhealthy(doctor, monkeypatch, variable, value, said):
    import torch

    if value == "triton" and torch.cuda.is_available():
        pytest.skip("it can run here")
    monkeypatch.setenv(variable, value)
    status, out = doctor()
    assert status == 1
    assert said in out


@pytest.mark.parametrize("wrong", ["a little", "not a number", "raises"])
def test_a_wrong_back_end_is_found(doctor, monkeypatch, wrong):
    right = chunked.forward

    def forward(*inputs):
        if wrong == "raises":
            raise IndexError("out of registers")
        y = right(*inputs)
        y[0, 0, 0] += 0.01 if wrong == "a little" else float("nan")
        return y

    monkeypatch.setattr(chunked, "forward", forward)
    status, out = doctor()
    assert status == 1
    assert "WRONG" in out
    assert "out of registers" in out or wrong != "raises"


def test_missing_compilers_are_named(doctor, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    status, out = doctor()
    assert status == 0
    assert "no C compiler" in out
    assert "torch.compile on the CPU needs one always" in out
