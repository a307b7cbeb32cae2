"""Damage to what is trained on: corrupt images, shards cut off, changed or gone, an autoencoder that is a pickle."""

from __future__ import annotations

import pickle
import random
import shutil

import pytest

from lamamba.data.autoencoder import Autoencoder
from lamamba.data.encode import encode, make_plan
from lamamba.data.images import Images
from lamamba.data.latents import LatentSet, check_latents
from lamamba.data.manifest import check_files, make_manifest
from lamamba.data.sets import PixelSet
from lamamba.data.sources import FolderSource
from lamamba.training.loop import train
from tests.autoencoders import make_kl
from tests.data.test_images import write_images
from tests.files import Bomb, damage
from tests.training.together import config


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_images(folder / "images", 12, size=(20, 18))
    make_kl().save_pretrained(folder / "kl")
    return folder


def spoil(path, rng):
    """Cut a file off anywhere, empty it, or overwrite it with noise."""
    content = path.read_bytes()
    kind = rng.choice(["cut", "empty", "noise"])
    new = {"cut": content[: rng.randrange(1, len(content) * 3 // 4)], "empty": b"", "noise": rng.randbytes(200)}[kind]
    path.write_bytes(new)


def test_corrupt_images_are_found_excluded_or_stop_the_run_with_their_names(place, tmp_path, count, tally):
    """The check names exactly the damaged files; training without it replaces them, or stops above the bound."""
    rng, survived, tries = random.Random(0), 0, count(3, 25)
    settings = config(batch_size=6, steps=2, checkpoint_every=2)
    for k in range(tries):
        shutil.copytree(place / "images", tmp_path / f"{k}")
        source = FolderSource(tmp_path / f"{k}")
        chosen = {source.file(index) for index in rng.sample(range(12), 3)}
        for file in chosen:
            spoil(tmp_path / f"{k}" / file, rng)
        named = {found.file for found in make_manifest(source, check_files(source, 1)).bad}
        shared = tmp_path / f"{k}.tsv"
        state = train(settings, PixelSet(Images(source, 16, max_bad_images=3, bad_files=shared)), tmp_path / f"run{k}")
        with pytest.raises(ValueError, match="3 files cannot be read as images") as caught:
            train(settings, PixelSet(Images(source, 16, max_bad_images=2)), tmp_path / f"strict{k}")
        written = {line.split("\t")[0] for line in shared.read_text().splitlines()}
        left = PixelSet(Images(source, 16, excluded=chosen))
        survived += (
            named == written == chosen and state.step == 2 and all(file in str(caught.value) for file in chosen)
            and train(settings, left, tmp_path / f"known{k}").step == 2
        )
    tally("10 corrupt images in the set: named, replaced, or the run stops above the bound", tries, survived)


@pytest.mark.parametrize("kind", ["cut", "bit", "missing"])
def test_a_damaged_shard_is_named_and_made_anew_alone(place, tmp_path, kind, count, tally):
    source, network = FolderSource(place / "images"), Autoencoder(place / "kl")
    plan = make_plan(source, network, 16, batch_size=2, shard_size=4)
    encode(source, network, tmp_path, plan)
    shards = sorted(tmp_path.glob("*.safetensors"))
    before, rng, survived, tries = [shard.read_bytes() for shard in shards], random.Random(1), 0, count(3, 25)
    for _ in range(tries):
        shard = rng.choice(shards)
        damage(shard, kind, rng)
        with pytest.raises(ValueError, match=f"{shard.name} .*damaged.*Run the same lamamba encode"):
            check_latents(tmp_path)
        if kind != "bit":                                                       # training looks at sizes, not at hashes
            with pytest.raises(ValueError, match=f"{shard.name} (is missing|has .* bytes instead of)"):
                LatentSet(tmp_path)
        untouched = {other: other.stat().st_mtime_ns for other in shards if other != shard}
        encode(source, network, tmp_path, plan)
        survived += [path.read_bytes() for path in shards] == before and all(
            path.stat().st_mtime_ns == time for path, time in untouched.items()
        )
    tally("10 latent shard cut off, changed by a bit, or missing: named and made anew", tries, survived)


@pytest.mark.parametrize("name", [
    "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors", "model.ckpt", "vae.pt",
])
def test_an_autoencoder_that_is_a_pickle_is_not_executed(place, tmp_path, name, tally):
    shutil.copytree(place / "kl", tmp_path / "kl")
    (tmp_path / "kl" / "diffusion_pytorch_model.safetensors").unlink()
    bomb, mark = tmp_path / "kl" / name, tmp_path / "mark"
    bomb.write_bytes(pickle.dumps(Bomb(mark)))
    said = "safetensors" if name.endswith("safetensors") else "as a pickle .*can run code.*not opened"
    for place_of_it in (tmp_path / "kl", bomb):
        with pytest.raises(ValueError, match=said):
            Autoencoder(place_of_it)
    tally("9 pickle offered as an autoencoder", 1, int(not mark.exists()))
    pickle.loads(bomb.read_bytes())
    assert mark.exists()                                                        # the bomb is a real one
