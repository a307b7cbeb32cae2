"""Images, figures and files are what they were before the packages were rearranged (see cases.py)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.golden.cases import make_all

FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_all(tmp_path_factory.mktemp("golden"))


def test_images_are_the_same_to_a_grey_level(made):
    """To the bit where kernels and PyTorch are those of the recording; elsewhere roundings may differ."""
    with np.load(FOLDER / "golden.npz") as golden:
        for name in golden:
            if golden[name].dtype == np.uint8:
                difference = np.abs(made[0][name].astype(int) - golden[name].astype(int))
                assert made[0][name].shape == golden[name].shape, name
                assert difference.max() <= 1, name
                assert (difference > 0).mean() < 0.02, name


def test_weights_and_figures_are_the_same(made):
    with np.load(FOLDER / "golden.npz") as golden:
        for name in golden:
            if golden[name].dtype != np.uint8:
                np.testing.assert_allclose(made[0][name], golden[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(made):
    for part in ("model", "ema"):
        np.testing.assert_array_equal(made[0][f"training resumed {part}"], made[0][f"training whole {part}"])


def test_files_and_options_are_the_same(made):
    """Options may be added, none may go; settings and manifests keep their entries."""
    golden = json.loads((FOLDER / "golden.json").read_text())
    for name, value in golden.items():
        if name.startswith("options"):
            assert set(value) <= set(made[1][name]), name
        else:
            assert made[1][name] == value, name
