"""lamamba.encode: latents from Python."""

from __future__ import annotations

import logging

import pytest

import lamamba
from lamamba.data.latents import LatentSet
from tests.autoencoders import make_kl
from tests.data.test_images import write_images


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encode")
    write_images(folder / "images", 5, size=(16, 16))
    make_kl().save_pretrained(folder / "kl")
    return folder


def make(place, **changes):
    values = dict(source=str(place / "images"), autoencoder=str(place / "kl"), image_size=16, batch_size=2,
                  shard_size=2, device="cpu")
    return lamamba.EncodeOptions(**{**values, **changes})


def test_the_call_encodes_reports_and_goes_on_after_an_interruption(place, tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO, "lamamba")

    def interrupt(progress):
        if progress.done >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lamamba.encode(make(place, out=tmp_path / "out"), progress=interrupt)
    seen = []
    result = lamamba.encode(make(place, out=tmp_path / "out"), progress=seen.append)
    assert (seen[0].task, seen[0].done, seen[0].total, seen[0].resumed) == ("encoding", 2, 5, 2)
    assert seen[-1].task == "verifying"
    assert (result.folder, result.num_images, result.num_excluded) == (tmp_path / "out", 5, 0)
    assert f"{result.num_bytes / 2**20:,.1f} MiB" in str(result)
    assert str(result).startswith(f"done: {tmp_path / 'out'}, 5 images in 3 verified shards, ")
    assert len(LatentSet(result.folder)) == 5
    assert "5 images of" in caplog.text
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("changes", "said"), [
    ({"image_size": 0}, "image_size=0 must be at least 1"), ({"max_bad_images": -1}, "must be at least 0"),
    ({"storage": "int8"}, "storage 'int8' is unknown"),
])
def test_options_that_do_not_fit_are_refused_when_they_are_made(place, changes, said):
    with pytest.raises(ValueError, match=said):
        make(place, **changes)
