"""Weights: of absurd sizes, of other types, not finite, changed or cut off while they are used; official files, too."""

from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lamamba
from lamamba.cli.main import main
from lamamba.models.official import load_official, to_official
from lamamba.models.unet import LaMambaUNet
from lamamba.runs.model import fingerprint, open_network
from lamamba.sampling import generate
from tests.autoencoders import make_kl
from tests.faults.test_formats import one_gigabyte
from tests.networks import random_network, save_model, small_config

CONFIG = small_config(width=8, depths=(1, 1, 1, 1), in_channels=1, objective="flow")
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def saved(tmp_path):
    return save_model(tmp_path / "m", random_network(CONFIG))


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(("values", "said"), [
    (dict(width=100_000, num_heads=2), r"position_embedding has shape \(8, 8, 8\), the configuration needs \(8, 8, 10"),
    (dict(depths=[10**6, 1, 1, 1]), r"config\.json: depths=\(1000000, 1, 1, 1\) and .* make too many blocks"),
    (dict(depths=[40, 40, 40, 40]), "make 325 blocks, too many for"),
    (dict(grid=[4096, 8]), "tokens is too large: at most 2048"),
    (dict(grid=[2048, 2048]), "the configuration needs"),
    (dict(state_size=10**6), "has shape .* the configuration needs"),
    (dict(mlp_ratio=1e6), "has shape .* the configuration needs"),
    (dict(num_classes=10**7), "has shape .* the configuration needs"),
    (dict(window_size=10**6, grid=[8, 8]), r"bias_table has shape \(49, 2\), the configuration needs \(225, 2\)"),
    (dict(width="8"), r"config\.json: width='8' must be a whole number"),
    (dict(removed_blocks=[5]), r"config\.json: removed_blocks=\(5,\) must be names"),
])
def test_sizes_are_compared_with_the_header_before_anything_is_allocated(saved, values, said, capsys, monkeypatch):
    monkeypatch.delenv("LAMAMBA_TRACEBACK", raising=False)
    change(saved / "config.json", **values)
    began = time.process_time()
    with one_gigabyte():
        for open_it in (open_network, LaMambaUNet.from_pretrained):
            with pytest.raises(ValueError, match=said):
                open_it(saved)
        assert main(["sample", str(saved), "--out", str(saved / "a.png")]) == 2
    assert time.process_time() - began < 10
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(("values", "said"), [
    (dict(label_names=5), "label_names=5 must be a list"),
    (dict(label_names=["a"]), "label_names has 1 names, and the network 3 classes"),
    (dict(codec="zz"), "codec 'zz' is unknown"), (dict(image_size=-8), "image_size=-8 must be at least 1"),
    (dict(image_size=24), "image_size=24 does not fit the network's input"), (dict(scale=0.0), "decode nothing"),
    (dict(guidance="2"), "guidance='2' must be a number"), (dict(objective="noise"), "the network's is 'flow'"),
    (dict(zz=1), "option 'zz' is unknown"), (dict(version=True), "version=True must be a whole number"),
])
def test_metadata_that_does_not_fit_is_refused_by_name(saved, values, said):
    change(saved / "sampling.json", **values)
    with pytest.raises(ValueError, match=rf"sampling\.json.*{said}"):
        open_network(saved)


@pytest.mark.parametrize(("damage", "said"), [
    (lambda w: w.to(torch.int8), "head.linear.bias has type I8"),
    (lambda w: w.to(torch.complex64), "head.linear.bias has type C64"),
    (lambda w: w * torch.nan, "head.linear.bias hold NaN or infinities"),
    (lambda w: w.half(), None), (lambda w: w.double(), None),
])
def test_weights_are_finite_real_numbers(saved, damage, said):
    state = load_file(saved / FILE)
    save_file({**state, "head.linear.bias": damage(state["head.linear.bias"])}, saved / FILE, {"format": "pt"})
    if said is None:
        assert open_network(saved)[0].dtype == torch.float32
    else:
        with pytest.raises(ValueError, match=said):
            open_network(saved)


def test_a_file_that_changes_later_changes_nothing(saved):
    """A mapped one would change the pictures that carry the old hash, and end the process where it is cut off."""
    opened = [lamamba.open_model(saved).network, LaMambaUNet.from_pretrained(saved)]
    before = [fingerprint(network) for network in opened]
    images = generate(opened[0], [1], [0], num_steps=2)
    with (saved / FILE).open("r+b") as file:
        file.seek(2000)
        file.write(bytes(4000))
        file.truncate(6000)
    assert [fingerprint(network) for network in opened] == before
    assert np.array_equal(generate(opened[0], [1], [0], num_steps=2), images)


def test_weights_that_may_not_be_read_are_named(saved, monkeypatch):
    """As those of another user beside a readable config.json."""
    if os.geteuid() == 0:                                                       # who may read everything
        really = type(saved).open

        def refuse(path, *arguments, **options):
            if path.name == FILE:
                raise PermissionError(13, "Permission denied", str(path))
            return really(path, *arguments, **options)

        monkeypatch.setattr(type(saved), "open", refuse)
    else:
        (saved / FILE).chmod(0)
    with pytest.raises(PermissionError, match=f"Permission denied.*{FILE}"):
        open_network(saved)


@pytest.mark.parametrize(("values", "said"), [
    (dict(block_out_channels=[10**9, 8]), "larger than anything in the weights"),
    (dict(layers_per_block=10**6), "larger than anything in the weights"),
    (dict(block_out_channels="ab"), "block_out_channels=ab is of another type"),
    (dict(in_channels=None), "in_channels=None is of another type"),
    (dict(norm_num_groups=0), "describes no AutoencoderKL"),
    (dict(up_block_types=["zz", "zz"]), "describes no AutoencoderKL"),
    (dict(block_out_channels=[8, 16]), "do not fit its configuration: .* has shape"),
])
def test_an_autoencoder_is_compared_with_its_header(tmp_path, values, said):
    from lamamba.data.autoencoder import Autoencoder

    make_kl().save_pretrained(tmp_path / "vae")
    change(tmp_path / "vae" / "config.json", **values)
    with one_gigabyte(), pytest.raises(ValueError, match=said):
        Autoencoder(tmp_path / "vae")


OFFICIAL = to_official(random_network(small_config(width=8, depths=(1, 1, 1, 1))))
BIAS = "final_linear.bias"


@pytest.mark.parametrize(("content", "said"), [
    ({"ema": [1, 2]}, "'ema' is not a dict of tensors"), ({"ema": {}}, "'ema' is not a dict of tensors"),
    ({"model": {0: torch.zeros(1)}}, "'model' is not a dict of tensors"), ({0: torch.zeros(1)}, "holds a dict"),
    (torch.zeros(()), "holds a Tensor"), ({}, "is not a dict of tensors"), (None, "holds a NoneType"),
    ({"ema": {**OFFICIAL, "pos_embed": torch.zeros(())}}, r"pos_embed has shape \(\), and 4 dimensions fit"),
    ({"ema": {**OFFICIAL, "layers.0.blocks.1000000.norm.weight": torch.zeros(8)}}, "one numbered 1000000"),
    ({"ema": {**OFFICIAL, "layers.0.blocks.09.norm.weight": torch.zeros(8)}}, "one numbered 09"),
    ({"ema": {**OFFICIAL, BIAS: OFFICIAL[BIAS].to(torch.int8)}}, f"{BIAS} holds torch.int8"),
    ({"ema": {**OFFICIAL, BIAS: OFFICIAL[BIAS] * 1j}}, f"{BIAS} holds torch.complex64"),
    ({"ema": {**OFFICIAL, BIAS: OFFICIAL[BIAS].to_sparse()}}, f"{BIAS} is not a tensor with values"),
    ({"ema": {**OFFICIAL, BIAS: OFFICIAL[BIAS] * torch.nan}}, "head.linear.bias hold NaN"),
    ({"ema": {**OFFICIAL, BIAS: 5}}, f"{BIAS} is not a tensor"),
    ({"ema": {**OFFICIAL, "pos_embed": torch.zeros(1).expand(1, 40_000, 40_000, 8)}}, "larger than what is stored"),
    ({"ema": {**OFFICIAL, "y_embedder.embedding_table.weight": torch.zeros(0, 32)}}, "num_classes=-1"),
])
def test_official_files_of_another_content_are_refused_by_name(tmp_path, content, said):
    torch.save(content, tmp_path / "a.pt")
    with one_gigabyte(), pytest.raises(ValueError, match=rf"a\.pt.*{said}"):
        load_official(tmp_path / "a.pt")
