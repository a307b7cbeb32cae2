"""Official checkpoints are read strictly, without executing anything."""

from __future__ import annotations

import collections
import pickle

import pytest
import torch
from safetensors.torch import load_file

from lamamba import load_official, to_official
from lamamba.models.official import read_official
from tests.files import Bomb
from tests.networks import PARITY, load_case, random_network, relative_error, small_config

CHECKPOINT = PARITY / "official_checkpoint.pt"


@torch.no_grad()
@pytest.mark.parametrize("weights", ["ema", "model", None])
def test_a_training_checkpoint(weights):
    expected = load_file(PARITY / "official_checkpoint.expected.safetensors")
    model = load_official(CHECKPOINT, weights=weights)
    config = model.architecture
    assert (config.width, config.num_heads, config.window_size, config.token_grid) == (8, 2, 8, (16, 16))
    assert (config.depths, config.bottleneck_depth, config.num_classes) == ((1, 1, 1, 1), 1, 6)
    output = model(expected["in.x"], expected["in.t"], expected["in.y"])
    assert relative_error(output, expected[f"out.{weights or 'ema'}"]) <= 2e-5


def test_the_scan_kind_is_read_from_the_file_or_assumed_with_a_warning(recwarn):
    content = read_official(CHECKPOINT)
    assert load_official(content).architecture.scan == "continuous"
    assert not recwarn
    content["config"]["MODEL"]["VSSM"]["CONTINUOUS_SCAN"] = False
    assert load_official(content).architecture.scan == "cross"
    with pytest.warns(UserWarning, match="scan kind cannot be known"):
        load_official(content["ema"])


def test_names_of_a_data_parallel_network_are_read():
    state = {f"module.{key}": tensor for key, tensor in load_case("cond_state1").weights.items()}
    assert load_official(state, load_case("cond_state1").config).architecture.width == 16


def test_nothing_in_the_file_is_executed(tmp_path):
    bomb = Bomb(tmp_path / "executed")
    torch.save({"model": {}, "args": bomb}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="nothing from a checkpoint is executed"):
        load_official(tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(bomb))
    with pytest.raises(ValueError, match="not opened|not a PyTorch file"):
        load_official(tmp_path / "plain.pt")
    assert not (tmp_path / "executed").exists()


def test_files_that_are_no_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt is not a file"):
        load_official(tmp_path / "nowhere.pt")
    (tmp_path / "short.pt").write_bytes(CHECKPOINT.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="truncated, damaged or not a PyTorch file"):
        load_official(tmp_path / "short.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list"):
        load_official(tmp_path / "list.pt")
    torch.save({"encoder": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no tensor 'pos_embed'"):
        load_official(tmp_path / "other.pt")
    with pytest.raises(ValueError, match="has no 'ema' weights, only model"):
        load_official({"model": {}}, weights="ema")


def test_every_key_counts():
    case = load_case("cond_state1")
    missing = dict(case.weights)
    del missing["final_linear.bias"]
    with pytest.raises(ValueError, match=r"missing final_linear\.bias"):
        load_official(missing, case.config)
    with pytest.raises(ValueError, match=r"unexpected layers\.9\.weight"):
        load_official({**case.weights, "layers.9.weight": torch.zeros(1)}, case.config)
    reshaped = {**case.weights, "final_linear.bias": torch.zeros(7)}
    with pytest.raises(ValueError, match=r"final_linear\.bias has shape \(7,\), the configuration needs \(8,\)"):
        load_official(reshaped, case.config)
    with pytest.raises(ValueError, match="not the table that this grid and window imply"):
        mask = "layers.0.blocks.1.attn_mask"
        load_official({**case.weights, mask: case.weights[mask] + 1}, case.config)


@pytest.mark.parametrize("changes", [{"objective": "flow"}, {"grid": (8, 12)}, {"removed_blocks": ("encoder.0.1",)}])
def test_what_the_official_code_cannot_express_is_not_written(changes):
    with pytest.raises(ValueError, match="keep our own format"):
        to_official(random_network(small_config(**changes)))


def test_a_plain_dict_and_an_ordered_one_are_the_same():
    case = load_case("patch2")
    a = load_official(case.weights, case.config)
    b = load_official(collections.OrderedDict(case.weights), case.config)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
