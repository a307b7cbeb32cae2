"""Files of statistics and of features: any order and no other numbers, and what was damaged is not used."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest

from lamamba.cli.main import main
from lamamba.data.digits import Digits
from lamamba.evaluation.images import NpzImages
from lamamba.evaluation.reference import load_statistics

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(9, 4))
MU, SIGMA = ROWS.mean(0), np.cov(ROWS.T)
DIGITS = Digits().images[:40].transpose(0, 2, 3, 1).repeat(3, axis=3)


@pytest.mark.parametrize(("arrays", "said"), [
    (dict(mu=MU + 1j, sigma=SIGMA), "mu holds complex128"), (dict(mu=MU.astype("S8"), sigma=SIGMA), r"mu holds \|S8"),
    (dict(mu=MU > 0, sigma=SIGMA), "mu holds bool"), (dict(mu=MU[:3], sigma=SIGMA), "are no mean and covariance"),
    (dict(mu=MU * np.nan, sigma=SIGMA), "is not finite"), (dict(mu=np.float64(3), sigma=SIGMA), "are no mean"),
    (dict(mu=MU, sigma=SIGMA, protocol=np.array("{")), "protocol"),
    (dict(mu=MU, sigma=SIGMA, protocol=np.array(json.dumps({"version": 1, "count": "9"}))), "protocol: count='9' must"),
    (dict(mu=MU, sigma=SIGMA, features=ROWS[:, :3]), "features have 3 columns and mu 4"),
])
def test_statistics_are_real_numbers_that_fit_together(tmp_path, arrays, said):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=rf"a\.npz.*{said}"):
        load_statistics(tmp_path / "a.npz")


def test_arrays_stored_by_columns_are_the_same_arrays(tmp_path):
    np.savez(tmp_path / "f.npz", mu=MU, sigma=np.asfortranarray(SIGMA), features=np.asfortranarray(ROWS))
    found = load_statistics(tmp_path / "f.npz")
    assert np.array_equal(found.features[1], SIGMA)
    assert np.array_equal(found.rows, ROWS)
    np.savez(tmp_path / "c.npz", DIGITS)
    np.savez(tmp_path / "i.npz", np.asfortranarray(DIGITS))
    row, column = NpzImages(tmp_path / "c.npz"), NpzImages(tmp_path / "i.npz")
    assert np.array_equal(row.read(range(3, 9)), column.read(range(3, 9)))


def test_damaged_features_and_figures_are_made_anew(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    np.savez("s.npz", DIGITS)
    options = ["--reference", "digits", "--features", "digits", "--out", "e.json", "--keep-features"]

    def figures():
        assert main(["evaluate", "s.npz", *options]) == 0
        return json.loads(Path("e.json").read_text())["entries"][0]["figures"]

    def damage(pattern, count):
        (*_, path) = sorted(Path().glob(pattern))
        content, chance = bytearray(path.read_bytes()), random.Random(0)
        for _ in range(count):
            content[chance.randrange(300, len(content))] ^= 4
        path.write_bytes(content)

    expected = figures()
    damage("e.work/*.entry.json", 1)
    with caplog.at_level(logging.WARNING):
        assert figures() == expected
    assert "entry.json is not what was written" in caplog.text
    for shard in Path().glob("e.work/*/shard_00000.safetensors"):
        damage(str(shard), 40)
    for entry in Path().glob("e.work/*.entry.json"):
        entry.unlink()
    assert figures() == expected
