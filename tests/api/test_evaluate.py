"""lamamba.evaluate, compute_statistics and compare as Python calls."""

from __future__ import annotations

import json

import numpy as np
import pytest

import lamamba
from lamamba.data.digits import Digits
from lamamba.runs.model import open_network
from lamamba.utils.locks import FolderLock

NETWORK = {"features": "digits", "device": "cpu"}
DIGITS = {**NETWORK, "metrics": lamamba.MetricOptions(kernel_subsets=2)}


@pytest.fixture(scope="module")
def digits():
    return Digits().images.transpose(0, 2, 3, 1)


def test_a_model_is_evaluated(tmp_path, capsys, caplog):
    reports = []
    options = lamamba.EvaluateOptions(
        samples="shipped", reference="digits", num_images=20, steps=2, shard_size=10, guidance=[1, 2],
        out=tmp_path / "result.json", **DIGITS,
    )
    with caplog.at_level("INFO", logger="lamamba"):
        result = lamamba.evaluate(options, progress=reports.append)
    assert [entry.guidance for entry in result.entries] == [1, 2]
    assert result.figures == result.best.figures == min((e.figures for e in result.entries), key=lambda f: f["frechet"])
    values = json.loads(result.path.read_text())["entries"]
    assert [value["figures"] for value in values] == [entry.figures for entry in result.entries]
    assert result.entries[1].protocol["samples"]["guidance"] == 2
    assert result.entries[0].protocol["architecture"]["width"] == open_network("shipped")[0].architecture.width
    assert result._repr_png_() == (tmp_path / "result.png").read_bytes()
    assert str(result).splitlines()[-2:] == [
        f"20 images against digits; figures and protocol: {result.path}", f"curve: {result.curve}"
    ]
    assert {report.task for report in reports} >= {"reference", "guidance 1", "distances of distributions"}
    assert {report.note for report in reports if report.task == "guidance 2"} >= {"step 1/2", "step 2/2"}
    assert caplog.messages == [f"{e.name}: FD-digits {e.figures['frechet']:.4f}" for e in result.entries]
    assert capsys.readouterr().out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json", "result.png"]


def test_a_model_is_evaluated_with_deep_features_kept(tmp_path):
    options = dict(samples="shipped", reference="digits", num_images=20, steps=6, **DIGITS)
    found = [
        lamamba.evaluate(lamamba.EvaluateOptions(out=tmp_path / f"{k}.json", **cache, **options), progress=None)
        for k, cache in enumerate(({}, {"cache": 1}, {"cache": 2, "cache_order": 0}))
    ]
    distances = [result.figures["frechet"] for result in found]
    assert distances[0] == distances[1] != distances[2]
    assert found[2].best.protocol["samples"]["cache"] == {"interval": 2, "order": 0, "warm_up": 2}
    with pytest.raises(ValueError, match="interval 7 is longer than the run"):
        lamamba.evaluate(lamamba.EvaluateOptions(cache=7, out=tmp_path / "x.json", **options), progress=None)
    with pytest.raises(ValueError, match="holds images, not a model: cache"):
        lamamba.evaluate(
            lamamba.EvaluateOptions(samples="digits", reference="digits", cache=2, out=tmp_path / "x.json", **DIGITS),
            progress=None)


def test_a_second_job_into_one_file_is_refused(tmp_path, digits):
    options = lamamba.EvaluateOptions(samples=digits[::2], reference=digits, out=tmp_path / "result.json", **DIGITS)
    statistics = lamamba.StatisticsOptions(images=digits, out=tmp_path / "result.npz", **NETWORK)
    (tmp_path / "result.work").mkdir()
    lock = FolderLock(tmp_path / "result.work")
    lock.acquire()
    for call, arguments in ((lamamba.evaluate, options), (lamamba.compute_statistics, statistics)):
        with pytest.raises(BlockingIOError, match="another job evaluates in .*result.work"):
            call(arguments, progress=None)
    lock.release()
    lamamba.evaluate(options, progress=None)
    lamamba.compute_statistics(statistics, progress=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json", "result.npz"]


def test_arrays_are_evaluated_as_files_are(tmp_path, digits):
    np.savez(tmp_path / "samples.npz", arr_0=digits[::2])
    paths = {"samples": tmp_path / "samples.npz", "reference": "digits"}
    arrays = {"samples": digits[::2], "reference": digits}
    results = [
        lamamba.evaluate(lamamba.EvaluateOptions(**images, **DIGITS, out=tmp_path / f"{k}.json"), progress=None)
        for k, images in enumerate((paths, arrays))
    ]
    assert results[0].figures == results[1].figures
    assert results[0].figures["precision"] == 1
    protocols = [result.entries[0].protocol for result in results]
    assert [protocol["samples"]["kind"] for protocol in protocols] == ["npz", "array"]
    other = lamamba.evaluate(lamamba.EvaluateOptions(
        samples=digits[1::2], reference=digits, out=tmp_path / "2.json", **DIGITS), progress=None)
    assert other.entries[0].protocol["samples"]["fingerprint"] != protocols[1]["samples"]["fingerprint"]
    with pytest.raises(ValueError, match=r"samples: float64 \(2, 8, 8, 1\) must be a name, a path, or uint8 images"):
        lamamba.EvaluateOptions(samples=np.zeros((2, 8, 8, 1)), reference="digits")


def test_statistics_stand_for_the_images(tmp_path, digits):
    statistics = lamamba.compute_statistics(
        lamamba.StatisticsOptions(images="digits", out=tmp_path / "digits.npz", **NETWORK), progress=None)
    assert str(statistics).startswith(f"{statistics.path}: 64 features of 1,797 images by digits")
    results = []
    for name, reference in (("images", "digits"), ("statistics", statistics.path)):
        out = tmp_path / f"{name}.json"
        options = lamamba.EvaluateOptions(samples=digits[::2], reference=reference, out=out, **DIGITS)
        results.append(lamamba.evaluate(options, progress=None))
    assert results[0].figures == pytest.approx(results[1].figures, rel=1e-9)
    compared = lamamba.compare(lamamba.CompareOptions(results=[result.path for result in results]))
    assert [entry.name for entry in compared.entries] == ["images", "statistics"]
    assert compared.differences == ((), ())
    assert "FD-digits" in str(compared)
    with pytest.raises(ValueError, match=r"out=digits.json must end in .npz"):
        lamamba.StatisticsOptions(images="digits", out="digits.json")


def test_every_scale_is_checked_before_the_first_is_sampled(tmp_path):
    with pytest.raises(ValueError, match="guidance 9 is out of range: this flow map takes 1 to 4"):
        lamamba.evaluate(lamamba.EvaluateOptions(
            samples="shipped-few-steps", reference="digits", features="digits", num_images=8, guidance=(1.0, 9.0),
            device="cpu", out=tmp_path / "a.json"), progress=None)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not (tmp_path / "a.json").exists()
