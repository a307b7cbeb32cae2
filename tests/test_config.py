"""UNetConfig is validated when made, raises with what fits, and round-trips through JSON."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from lamamba.config import PRESETS, UNetConfig


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("image_size", [128, 256, 512, (512, 768)])
@pytest.mark.parametrize("state_size", [1, 16])
def test_presets_fit_every_image_size(name, image_size, state_size):
    config = UNetConfig.preset(name, image_size=image_size, state_size=state_size)
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    assert config.token_grid == (sides[0] // 8, sides[1] // 8)
    assert config.state_size == state_size


def test_a_config_is_a_frozen_value():
    assert UNetConfig() == UNetConfig()
    assert hash(UNetConfig()) == hash(UNetConfig())
    with pytest.raises(dataclasses.FrozenInstanceError):
        UNetConfig().width = 3
    with pytest.raises(TypeError):
        UNetConfig(320)


def test_round_trips_through_json():
    config = UNetConfig.preset("s", grid=(8, 12), removed_blocks=("encoder.0.1", "bottleneck"), objective="flow")
    assert UNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_still_reads_the_first_format():
    old = {
        "config_version": 1, "width": 64, "num_heads": 4, "depths": [2, 2, 2, 2], "bottleneck_depth": 2,
        "window_size": 8, "state_size": 1, "ssm_ratio": 2.0, "mlp_ratio": 4.0, "patch_size": 1, "in_channels": 4,
        "out_channels": 8, "num_classes": 1000, "grid": [32, 32], "scan": "continuous", "objective": "noise",
        "removed_blocks": [],
    }
    assert UNetConfig.from_dict(old) == UNetConfig.preset("s")


def test_output_channels_follow_the_objective():
    assert UNetConfig(in_channels=3).out_channels == 6
    assert UNetConfig(in_channels=3, objective="flow").out_channels == 3
    assert UNetConfig().replace(objective="flow").out_channels == 4


@pytest.mark.parametrize(("fields", "said"), [
    ({"grid": 30}, "use 28 or 32 instead of 30"),
    ({"grid": (32, 2)}, "use 4 instead of 2"),
    ({"grid": 3.5}, "neither a whole number nor a pair"),
    ({"width": 30, "num_heads": 2}, "multiple of 4"),
    ({"width": 320, "num_heads": 15}, "does not split into num_heads=15"),
    ({"scan": "continous"}, "did you mean 'continuous'"),
    ({"objective": "nois"}, "did you mean 'noise'"),
    ({"depths": (2, 2)}, "must be 4 whole numbers"),
    ({"depths": (1000,) * 4}, r"depths=\(1000, 1000, 1000, 1000\) and bottleneck_depth=2 make too many blocks: 400 at"),
    ({"bottleneck_depth": 10**12}, "bottleneck_depth=1000000000000 make too many blocks"),
    ({"state_size": 0}, "state_size=0"),
    ({"num_classes": -1}, "num_classes=-1"),
    ({"out_channels": 4}, "it needs 8"),
    ({"in_channels": 1, "objective": "flow", "out_channels": True}, "out_channels=True does not fit"),
    ({"mlp_ratio": 0.001}, "mlp_ratio=0.001"),
    ({"removed_blocks": ("encoder.0.7",)}, "encoder.0.7"),
    ({"removed_blocks": ("encoder.0.1.scam",)}, "did you mean 'encoder.0.1.scan'"),
])
def test_values_that_do_not_fit_raise_with_those_that_do(fields, said):
    with pytest.raises(ValueError, match=said):
        UNetConfig(**fields)


def test_unknown_names_raise_with_the_nearest():
    with pytest.raises(ValueError, match=r"preset 'xll' is unknown; did you mean 'xl'\? \(known: s, b, l, xl\)"):
        UNetConfig.preset("xll")
    with pytest.raises(ValueError, match="did you mean 'state_size'"):
        UNetConfig.preset("s", stat_size=3)
    with pytest.raises(ValueError, match="did you mean 'width'"):
        UNetConfig.from_dict({"widht": 64})
    with pytest.raises(ValueError, match="config_version=99 is newer"):
        UNetConfig.from_dict({"config_version": 99})
    with pytest.raises(ValueError, match="multiple of 32; the nearest is 256"):
        UNetConfig.preset("s", image_size=250)


def test_numbers_of_numpy_serve_and_truth_values_do_not():
    config = UNetConfig(width=np.int64(16), num_heads=np.int32(2), mlp_ratio=np.float64(2.0), grid=(np.int64(8), 8))
    assert config == UNetConfig(width=16, num_heads=2, mlp_ratio=2.0, grid=8)
    assert json.dumps(config.to_dict())
    for wrong in (dict(width=True), dict(num_classes=True), dict(depths=(True, 1, 1, 1)), dict(mlp_ratio=True),
                  dict(depths=5), dict(removed_blocks=3), dict(ssm_ratio="2"), dict(depths=(10**6, 1, 1, 1))):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            UNetConfig(**wrong)
