"""Latents on disk: what is in them, how processes share the work, how training reads them, what damage does."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from lamamba.cli.main import main
from lamamba.data import encode as encoding
from lamamba.data.autoencoder import Autoencoder
from lamamba.data.codec import CodecConfig, to_pixels
from lamamba.data.encode import encode, make_plan
from lamamba.data.images import Images
from lamamba.data.latents import Index, LatentSet, Plan, check_latents
from lamamba.data.sets import EncodedSet, PixelSet, read_ahead
from lamamba.data.sources import FolderSource
from lamamba.evaluation.callbacks import open_decoder
from lamamba.training.draws import draw
from tests.autoencoders import make_dc, make_kl, make_tiny
from tests.data.test_images import write_images
from tests.files import hashes
from tests.training.together import command, command_on, needs_fork_server

SHAPE = (4, 8, 8)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """11 images of two classes, and autoencoders."""
    folder = tmp_path_factory.mktemp("latents")
    write_images(folder / "images" / "ant", 6, size=(20, 18))
    write_images(folder / "images" / "bee", 5, size=(16, 24), seed=1)
    for name, make in (("kl", make_kl), ("tiny", make_tiny), ("dc", make_dc)):
        make().save_pretrained(folder / name)
    make_kl(seed=1).save_pretrained(folder / "other")
    return folder


def run_encode(place, out, autoencoder="kl", **changes):
    source, network = FolderSource(place / "images"), Autoencoder(place / autoencoder)
    max_bad, excluded = changes.pop("max_bad_images", 0), changes.pop("excluded", ())
    options = dict(batch_size=2, shard_size=4, image_size=16, excluded=excluded)
    plan = make_plan(source, network, **{**options, **changes})
    return encode(source, network, out, plan, max_bad_images=max_bad)


@pytest.fixture(scope="module")
def encoded(place):
    run_encode(place, place / "encoded")
    return place / "encoded"


def test_what_is_in_the_shards(place, encoded):
    assert sorted(path.name for path in encoded.iterdir()) == [
        "index.json", *(f"shard_0000{k}.safetensors" for k in range(3)),
    ]
    index = check_latents(encoded)
    assert [len(shard.labels) for shard in index.shards] == [4, 4, 3]
    assert index.shards[1].files == ("ant/004.png", "ant/005.png", "bee/000.png", "bee/001.png")
    assert index.shards[1].labels == (0, 0, 1, 1)
    assert index.plan.label_names == ("ant", "bee")
    network = Autoencoder(place / "kl")
    assert index.plan.codec == CodecConfig(
        codec="latents", scale=0.5, shift=0.25, autoencoder=str(place / "kl"), autoencoder_sha256=network.sha256
    )
    pictures, _ = Images(FolderSource(place / "images"), 16).read(range(11))
    data = LatentSet(encoded, mirror=True)
    for view in (False, True):
        flags = np.full(11, view)
        mean, std = network.moments(to_pixels(pictures, flags))
        stored = data.moments(range(11), flags)
        assert stored.dtype == torch.float16
        torch.testing.assert_close(stored[:, 0].float(), mean, rtol=2**-11, atol=1e-6)
        torch.testing.assert_close(stored[:, 1].float(), std, rtol=2**-11, atol=1e-6)


def test_every_read_draws_anew_and_each_draw_is_repeatable(place, encoded):
    data = LatentSet(encoded, mirror=True, image_size=16, autoencoder=str(place / "kl"))
    assert (len(data), data.channels, data.input_size, data.label_names) == (11, 4, 8, ("ant", "bee"))
    draws = draw(0, [5, 700], SHAPE, latent=True)
    x0, labels = data.read([9, 9], draws)
    again, _ = data.read([9, 9], draw(0, [5, 700], SHAPE, latent=True))
    assert torch.equal(x0, again)
    assert not torch.equal(x0[0], x0[1])
    assert labels.tolist() == [1, 1]
    moments = data.moments([9, 9], draws.mirror).float()
    expected = (moments[:, 0] + moments[:, 1] * draws.latent - 0.25) * 0.5
    torch.testing.assert_close(x0, expected)
    assert data.files([9, 0]) == ["bee/003.png", "ant/000.png"]


@pytest.mark.parametrize("kind", ["tiny", "dc"])
def test_autoencoders_without_a_posterior_store_latents_alone(place, tmp_path, kind):
    run_encode(place, tmp_path / "out", kind, mirror=False)
    data = LatentSet(tmp_path / "out")
    assert (data.plan.parts, data.plan.views, data.draws_latents) == (1, 1, False)
    x0, _ = data.read([3], draw(0, [0], SHAPE))
    pictures, _ = Images(FolderSource(place / "images"), 16).read([3])
    network = Autoencoder(place / kind)
    expected, _ = network.moments(to_pixels(pictures))
    torch.testing.assert_close(x0, expected * CodecConfig.of(network).scale, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="made without mirror images"):
        LatentSet(tmp_path / "out", mirror=True)


def test_encoding_on_the_fly_is_the_same_up_to_storage(place, encoded):
    images = Images(FolderSource(place / "images"), 16)
    live, stored = EncodedSet(images, Autoencoder(place / "kl"), mirror=True), LatentSet(encoded, mirror=True)
    draws = draw(3, range(6), SHAPE, latent=True)
    for name in ("codec", "channels", "input_size", "image_size", "label_names", "draws_latents"):
        assert getattr(live, name) == getattr(stored, name), name
    a, labels = live.read([0, 10, 3, 3, 7, 1], draws)
    b, same = stored.read([0, 10, 3, 3, 7, 1], draws)
    assert torch.equal(labels, same)
    torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-3)
    assert live.fingerprint != EncodedSet(images, Autoencoder(place / "other"), mirror=True).fingerprint
    with pytest.raises(ValueError, match=r"reads 3 channels, the images have 1; use data\.channels=3"):
        EncodedSet(Images(FolderSource(place / "images"), 16, 1), Autoencoder(place / "kl"))


def test_a_cache_of_another_autoencoder_or_size_is_refused_with_both_named(place, encoded):
    with pytest.raises(ValueError, match=r"of 16 x 16 pixels, this training wants 32 x 32"):
        LatentSet(encoded, image_size=32)
    with pytest.raises(ValueError, match=rf"made with the autoencoder {place / 'kl'} .*wants {place / 'other'} "):
        LatentSet(encoded, autoencoder=str(place / "other"))


def test_an_autoencoder_that_has_moved_is_found_where_training_says(place, encoded, tmp_path):
    make_kl().save_pretrained(tmp_path / "moved")
    facts = LatentSet(encoded, autoencoder=str(tmp_path / "moved")).codec
    assert facts == dataclasses.replace(LatentSet(encoded).codec, autoencoder=str(tmp_path / "moved"))
    with pytest.raises(OSError, match=r"data\.autoencoder, or train without them"):
        open_decoder(dataclasses.replace(facts, autoencoder=str(tmp_path / "gone")), torch.device("cpu"))
    assert open_decoder(facts, torch.device("meta")).autoencoder.device.type == "meta"
    assert open_decoder(CodecConfig(), torch.device("cpu")) is None              # pixels


@pytest.mark.parametrize("kind", ["kl", "tiny", "dc"])
def test_a_size_that_would_come_back_smaller_is_refused(place, kind):
    network = Autoencoder(place / kind)
    assert network.latent_shape(16)[1:] == (8, 8)
    with pytest.raises(ValueError, match="17 x 17 pixels.*multiple of 8"):
        network.latent_shape(17)


def test_float32_is_exact_and_float16_nearly(place, encoded, tmp_path):
    run_encode(place, tmp_path / "exact", storage="float32")
    exact, half = LatentSet(tmp_path / "exact"), LatentSet(encoded)
    a, b = exact.moments(range(11)), half.moments(range(11))
    assert torch.equal(a.half(), b)
    assert a.dtype == torch.float32


def test_the_same_bytes_again_and_nothing_is_done_twice(place, encoded, tmp_path, monkeypatch):
    run_encode(place, tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(encoded)
    monkeypatch.setattr(encoding._EncodingJob, "make_shard", lambda self, number, advance: pytest.fail("encoded again"))
    run_encode(place, tmp_path / "again")


def test_latents_made_otherwise_are_not_mixed(place, encoded, tmp_path):
    for change, said in (
        ({"image_size": 24}, "image_size: 16 there, 24 here"), ({"batch_size": 3}, "batch_size: 2 there, 3 here"),
        ({"autoencoder": "other"}, "autoencoder_sha256"),
    ):
        with pytest.raises(ValueError, match=f"made otherwise .*{said}"):
            run_encode(place, encoded, **change)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds something else \(thesis\.tex\)"):
        run_encode(place, tmp_path)


def test_a_shard_that_is_cut_off_while_it_is_read_is_named(encoded, tmp_path):
    """A mapped one would end the process by a bus error."""
    shutil.copytree(encoded, tmp_path / "latents")
    latents = LatentSet(tmp_path / "latents")
    before = latents.moments([0, 3, 5])
    shard = tmp_path / "latents" / "shard_00000.safetensors"
    os.truncate(shard, shard.stat().st_size // 2)
    assert torch.equal(latents.moments([0]), before[:1])
    with pytest.raises(ValueError, match=r"shard_00000\.safetensors ends before image 3: it is truncated"):
        latents.moments([3])


def test_bad_images_are_excluded_or_stop_the_encoding(place, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(place / "images", copy / "images")
    (copy / "images" / "ant" / "001.png").write_bytes(b"")
    (copy / "images" / "bee" / "004.png").write_text("no image")
    shutil.copytree(place / "kl", copy / "kl")
    with pytest.raises(ValueError, match=r"1 file cannot be read.*0 are allowed: ant/001\.png \(empty"):
        run_encode(copy, tmp_path / "none")
    index = run_encode(copy, tmp_path / "some", max_bad_images=2)
    assert [len(shard.labels) for shard in index.shards] == [3, 4, 2]
    assert index.shards[0].excluded == {"ant/001.png": "empty: 0 bytes"}
    data = LatentSet(tmp_path / "some")
    whole = LatentSet(place / "encoded")
    assert torch.equal(data.moments([1, 8]), whole.moments([2, 9]))
    assert run_encode(copy, tmp_path / "known", excluded=("ant/001.png", "bee/004.png")).plan.images == 9


def test_an_encoding_that_met_bad_files_goes_on_after_the_check_it_asks_for(place, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("LAMAMBA_TRACEBACK", raising=False)
    shutil.copytree(place / "images", tmp_path / "images")
    (tmp_path / "images" / "bee" / "004.png").write_text("no image")
    command = ["encode", tmp_path / "images", "--autoencoder", place / "kl", "--image-size", "16", "--shard-size", "4",
               "--batch", "2", "--device", "cpu", "--out", tmp_path / "out"]

    def call(*arguments):
        status = main(list(map(str, arguments)))
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    status, said = call(*command)
    assert (status, "bee/004.png (not an image" in said) == (2, True)
    shard = tmp_path / "out" / "shard_00000.safetensors"
    before = shard.stat().st_mtime_ns
    call("data", "check", tmp_path / "images", "--workers", 1)
    for words in ("1 files came into the manifest after", "10 images in 3 verified shards"):
        status, said = call(*command)                                           # the second finds all done
        assert (status, words in said) == (0, True), said
    assert shard.stat().st_mtime_ns == before
    assert Index.load(tmp_path / "out").shards[2].excluded.keys() == {"bee/004.png"}
    (tmp_path / "images" / "ant" / "000.png").unlink()
    assert "holds latents made otherwise" in call(*command)[1]                  # other images are still refused


def test_folders_of_the_time_before_stay_what_they_are(encoded):
    plan = Index.load(encoded).plan
    old = {key: value for key, value in plan.to_dict().items() if key != "left_out"}
    assert Plan.from_dict(old).to_dict() == old                                 # so that runs on them go on
    assert Plan.from_dict(old).differences(plan) == []


@pytest.mark.parametrize(("change", "said"), [
    (lambda shards: shards[2].update(labels=[1, 2, 1]), "labels of shard_00002.safetensors has 2, and label_names 2"),
    (lambda shards: shards.pop(1), "shards has 2 entries, and its plan 3"),
    (lambda shards: shards.insert(0, shards.pop(1)), "shard 0 is shard_00001.safetensors with 4 images and 0 left out"),
    (lambda shards: shards[0].update(labels=[0], files=["a"]), "shard 0 is shard_00000.safetensors with 1 images"),
])
def test_an_index_that_contradicts_itself_is_refused(encoded, tmp_path, change, said):
    shutil.copytree(encoded, tmp_path / "out")
    values = json.loads((tmp_path / "out" / "index.json").read_text())
    change(values["shards"])
    (tmp_path / "out" / "index.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"index\.json: {said}"):
        LatentSet(tmp_path / "out")


def test_a_scale_that_was_removed_is_not_that_of_pixels(encoded, tmp_path):
    shutil.copytree(encoded, tmp_path / "out")
    values = json.loads((tmp_path / "out" / "index.json").read_text())
    del values["plan"]["facts"]["scale"]
    (tmp_path / "out" / "index.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"index\.json: facts.scale is missing"):
        LatentSet(tmp_path / "out")


@pytest.mark.parametrize(("facts", "said"), [
    ({"scale": 1e300}, "scale=1e+300 and shift=0.25 are those of no autoencoder"),
    ({"scale": -1e-30}, "scale=-1e-30 and shift=0.25 are those"),
    ({"shift": -1e9}, "scale=0.5 and shift=-1e+09 are those"),
    ({"latents_mean": [1e9] * 4, "latents_std": [1.0] * 4}, "latents_mean=(1000000000.0,"),
    ({"latents_mean": [0.0] * 4, "latents_std": [1e-9] * 4}, "deviations lie in 1e-06 .. 1e+06"),
])
def test_scales_of_no_autoencoder_are_refused(encoded, tmp_path, facts, said):
    values = json.loads((encoded / "index.json").read_text())
    values["plan"]["facts"] |= facts
    (tmp_path / "index.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"index\.json: .*{re.escape(said)}"):
        LatentSet(tmp_path)


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_in_the_place_of_a_shard_is_named_before_any_work(place, encoded, tmp_path, monkeypatch, finished):
    shutil.copytree(encoded, tmp_path / "out")
    shard = tmp_path / "out" / "shard_00001.safetensors"
    shard.unlink()
    shard.mkdir()
    if not finished:
        (tmp_path / "out" / "index.json").unlink()
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    monkeypatch.setattr(encoding._EncodingJob, "make_shard", None)
    with pytest.raises(FileExistsError, match="shard_00001.safetensors is a folder where a file of the latents"):
        run_encode(place, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before


@pytest.mark.parametrize("note", [
    dict(left_out=[]), dict(labels=3), dict(files=None, labels=["x"]), dict(more=1), "another's"])
def test_notes_of_unfinished_shards_that_were_changed_are_made_anew(place, encoded, tmp_path, note):
    shutil.copytree(encoded, tmp_path / "out")
    index = tmp_path / "out" / "index.json"
    values, work = json.loads(index.read_text()), tmp_path / "out" / ".encoding"
    work.mkdir()
    index.unlink()
    (work / "plan.json").write_text(json.dumps({"version": 1, "plan": values["plan"]}))
    changed = values["shards"][1] if note == "another's" else {**values["shards"][0], **note}
    (work / "shard_00000.json").write_text(json.dumps({"version": 1, **changed}))
    run_encode(place, tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(encoded)


def test_a_latent_set_survives_a_fork(encoded):
    data = LatentSet(encoded)
    draws = draw(0, range(11), SHAPE, latent=True)
    expected, _ = data.read(range(11), draws)

    class Batches:
        def __getitem__(self, batch):
            return data.read(range(11), draws)[0]

        def __len__(self):
            return 1

    for context in ("fork", None):
        workers = 0 if context is None else 1
        loader = torch.utils.data.DataLoader(
            Batches(), batch_size=None, num_workers=workers, multiprocessing_context=context
        )
        assert torch.equal(next(iter(loader)), expected)


def test_reading_ahead_keeps_the_order_and_tells_of_errors():
    def slow(item):
        time.sleep(0.002 * (item % 3))
        if item == 40:
            raise ValueError("item 40")
        return item

    seen = []
    with pytest.raises(ValueError, match="item 40"):
        for item in read_ahead(slow, iter(range(10**9)), threads=4):
            seen.append(item)
    assert seen == list(range(40))


def test_pixels_have_a_fingerprint_too(place):
    def make(**options):
        return PixelSet(Images(FolderSource(place / "images"), **{"image_size": 16, **options}))

    assert make().fingerprint == make().fingerprint
    others = [make(image_size=8), make(channels=1), make(crop="random"), make(excluded=["ant/001.png"])]
    assert len({other.fingerprint for other in [make(), *others]}) == 5


# Several processes of the command.


@pytest.fixture(scope="module")
def many(place):
    """200 images in 25 shards, encoded by this process alone."""
    write_images(place / "many" / "images", 200, size=(16, 16))
    shutil.copytree(place / "kl", place / "many" / "kl")
    run_encode(place / "many", place / "many" / "alone", shard_size=8)
    return place / "many"


def encode_command(many, out):
    given = {"autoencoder": many / "kl", "image-size": 16, "batch": 2, "shard-size": 8, "out": out, "device": "cpu"}
    return ["encode", many / "images", *(word for key, value in given.items() for word in (f"--{key}", value))]


def kill_in_the_middle(process, out, shards=1):
    """SIGKILL as soon as some shards are finished."""
    while len(list(out.glob(".encoding/shard_*.json"))) < shards:
        assert process.is_alive()
        time.sleep(0.001)
    process.kill()
    process.join()


@needs_fork_server
def test_two_processes_of_a_group_make_the_same_bytes(many, tmp_path):
    printed = command_on(2, tmp_path, *encode_command(many, tmp_path / "two"))
    assert "".join(printed).count("200 images in 25 verified shards") == 1
    assert hashes(tmp_path / "two") == hashes(many / "alone")


@needs_fork_server
def test_two_of_three_processes_finish_when_one_is_killed(many, tmp_path):
    out = tmp_path / "three"
    processes = [command(tmp_path, *encode_command(many, out), output=f"{k}.txt") for k in range(3)]
    kill_in_the_middle(processes[0], out)
    for k, process in enumerate(processes[1:], 1):
        process.join(100)
        assert process.exitcode == 0, (tmp_path / f"{k}.txt").read_text()
    assert hashes(out) == hashes(many / "alone")


@needs_fork_server
def test_an_encoding_killed_in_the_middle_goes_on_with_finished_shards(many, tmp_path):
    out = tmp_path / "killed"
    process = command(tmp_path, *encode_command(many, out))
    kill_in_the_middle(process, out, shards=3)
    if process.exitcode != -signal.SIGKILL:
        pytest.skip("it was done before it could be killed")
    with pytest.raises(ValueError, match="is not finished: run the same lamamba encode command again"):
        LatentSet(out)
    finished = [path for path in out.glob("shard_*") if (out / ".encoding" / f"{path.stem}.json").is_file()]
    times = {path: path.stat().st_mtime_ns for path in finished}
    (out / ".shard_00020.safetensors.elsewhere.1.tmp").write_bytes(b"half a shard")
    unfinished = (out / ".encoding" / "shard_00021.json")
    unfinished.write_text('{"version": 1, "fi')                                  # half a note is no note
    run_encode(many, out, shard_size=8)
    assert {path: path.stat().st_mtime_ns for path in finished} == times
    assert hashes(out) == hashes(many / "alone")


def test_a_plan_says_all_that_decides_the_bytes(place, encoded):
    plan = Index.load(encoded).plan
    assert plan.from_dict(plan.to_dict()) == plan
    assert plan.differences(dataclasses.replace(plan, source="elsewhere")) == []
    found = plan.differences(dataclasses.replace(plan, storage="float32"))
    assert found == ["storage: 'float16' there, 'float32' here"]
    assert os.environ.get("RANK") is None
