"""lamamba sample as a user types it: pictures that repeat themselves, films, paths, folders, mistakes."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from lamamba.sampling.settings import Interpolated, read_image_metadata
from lamamba.viz.films import chosen_frames, save_film
from tests.files import hashes
from tests.networks import grey_network, save_model
from tests.training.together import command, needs_fork_server

NAMES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    save_model(place / "flow", grey_network(), label_names=NAMES)
    save_model(place / "early", grey_network(1), label_names=NAMES)
    save_model(place / "noise", grey_network(objective="noise"), label_names=NAMES)
    save_model(place / "free", grey_network(num_classes=0))
    return place


@pytest.fixture
def sample(lamamba, tmp_path, models):
    """Run lamamba sample in this process, in a folder with the models: (exit status, out, err)."""
    for name in models.iterdir():
        (tmp_path / name.name).symlink_to(name)
    return lambda *arguments: lamamba("sample", *arguments)


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_a_picture_repeats_itself_and_takes_changes(sample):
    made = sample("flow", "--classes", "bee,2", "--num", 3, "--seed", 5, "--steps", 3, "--guidance", 3,
                  "--guidance-channels", "first-three", "--guidance-interval", 0.1, 0.9, "--guidance-rescale", 0.5,
                  "--autoguidance", "early", "--width", 12, "--batch-size", 4, "--out", "a.png")
    assert made[0] == 0, made[2]
    facts = read_image_metadata("a.png")
    assert (facts.labels, facts.seeds, facts.row_names) == ((1, 1, 1, 2, 2, 2), (5, 6, 7, 8, 9, 10), ("bee", "cat"))
    assert (facts.settings.height, facts.settings.width, facts.settings.autoguidance) == (8, 12, "early")
    assert sample("--like", "a.png", "--out", "b.png")[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert sample("--like", "a.png", "--out", "c.png", "--steps", 4, "--num", 2)[0] == 0
    other = read_image_metadata("c.png")
    assert (other.settings.steps, other.labels, other.seeds) == (4, (1, 1, 2, 2), (5, 6, 7, 8))
    assert other.settings.guidance == facts.settings.guidance
    assert sample("--like", "a.png", "--out", "d.png", "--sampler", "flow-heun", "--classes", "ant")[0] == 0
    other = read_image_metadata("d.png")
    assert (other.settings.sampler, other.settings.steps, other.labels) == ("flow-heun", 25, (0, 0, 0))
    assert sample("early", "--like", "a.png", "--out", "e.png")[0] == 0         # another model, named
    assert read_image_metadata("e.png").settings.model == "early"


def test_a_picture_of_a_model_that_has_changed_is_not_repeated_in_silence(sample, models, tmp_path):
    assert sample("flow", "--num", 1, "--steps", 1, "--out", "a.png")[0] == 0
    (tmp_path / "flow").unlink()
    save_model(tmp_path / "flow", grey_network(5), label_names=NAMES)
    status, _, err = sample("--like", "a.png", "--out", "b.png")
    assert (status, "flow is not the model that made a.png" in err) == (2, True)
    sample("noise", "--num", 1, "--steps", 2, "--sampler", "ddim", "--autoguidance", "noise", "--out", "d.png")
    (tmp_path / "noise").unlink()
    save_model(tmp_path / "noise", grey_network(5, objective="noise"), label_names=NAMES)
    save_model(tmp_path / "as_before", grey_network(objective="noise"), label_names=NAMES)
    status, _, err = sample("as_before", "--like", "d.png", "--autoguidance", "noise", "--out", "b.png")
    assert (status, "noise is not what made d.png: it has changed" in err) == (2, True), err
    Image.open("a.png").save("c.png")                                           # Pillow drops the text
    status, _, err = sample("--like", "c.png")
    assert (status, "c.png holds no settings" in err, len(err.splitlines())) == (2, True, 1)


def test_rows_have_the_names_of_the_model_that_draws(sample):
    save_model(Path("renamed"), grey_network(), label_names=("x", "y", "z"))
    assert sample("flow", "--classes", "ant,cat", "--num", 2, "--steps", 1, "--out", "a.png")[0] == 0
    assert sample("renamed", "--like", "a.png", "--out", "b.png")[0] == 0
    assert [read_image_metadata(f"{name}.png").row_names for name in "ab"] == [("ant", "cat"), ("x", "z")]


def test_paths_between_seeds_and_classes(sample):
    assert sample("flow", "--interpolate", "seeds:3:7", "--classes", "0,1", "--num", 4, "--steps", 2,
                  "--out", "a.png")[0] == 0
    facts = read_image_metadata("a.png")
    assert facts.labels == (0, 0, 0, 0, 1, 1, 1, 1)
    assert facts.seeds[:4] == tuple(Interpolated(3, 7, k / 3) for k in range(4))
    assert sample("flow", "--interpolate", "classes:ant:2", "--num", 3, "--steps", 2, "--out", "b.png")[0] == 0
    assert read_image_metadata("b.png").labels[:3] == tuple(Interpolated(0, 2, w) for w in (0.0, 0.5, 1.0))
    assert read_image_metadata("b.png").row_names == ("seed 0", "seed 1", "seed 2", "seed 3")
    assert sample("--like", "b.png", "--out", "c.png")[0] == 0
    assert Path("c.png").read_bytes() == Path("b.png").read_bytes()
    status, _, err = sample("--like", "b.png", "--seed", 3)
    assert (status, "shows an interpolation" in err) == (2, True)


def test_deep_features_are_kept_between_steps(sample):
    status, out, _ = sample("flow", "--num", 1, "--steps", 6, "--cache", 3, "--cache-order", 0, "--out", "a.png")
    assert (status, "guidance 2, cache 3" in out) == (0, True)
    cache = read_image_metadata("a.png").settings.cache
    assert (cache.interval, cache.order) == (3, 0)
    status, _, err = sample("flow", "--num", 1, "--steps", 1, "--cache", 3)
    assert (status, "longer than the run: the run has 1 evaluation" in err) == (2, True)
    command = ("flow", "--num", 4, "--steps", 6, "--cache", 3, "--balanced", "--out", "many")
    assert sample(*command)[0] == 0
    status, _, err = sample(*command, "--cache-order", 0)                       # made otherwise
    assert (status, "cache order" in err) == (2, True)


def test_films_have_a_frame_for_every_step(sample):
    options = ("flow", "--classes", "1", "--num", 2, "--steps", 7)
    assert sample(*options, "--out", "walk.gif")[0] == 0
    assert sample(*options, "--out", "end.png")[0] == 0
    with Image.open("walk.gif") as film:
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(film)]
        assert np.abs(np.asarray(film.convert("RGB")).astype(int) - pixels("end.png")).max() <= 2
    assert sum(durations) == pytest.approx(7 * 1000 / 12 + 1500, abs=40)        # equal frames are stored as one
    assert sample("flow", "--interpolate", "seeds:1:2", "--num", 5, "--steps", 1, "--out", "path.gif")[0] == 0
    assert Image.open("path.gif").n_frames == 5
    frames = [Image.new("L", (20, 10), 10 * k) for k in range(7)]
    save_film(frames, Path("seven.gif"), 12)
    assert Image.open("seven.gif").n_frames == 7
    assert chosen_frames(5) == [1, 2, 3, 4, 5]
    long = chosen_frames(250)
    assert (len(long), long[0], long[-1], max(np.diff(long))) == (100, 1, 250, 3)


def test_mp4(sample):
    try:
        import imageio.v3 as imageio
        import imageio_ffmpeg  # noqa: F401 (the reader needs it)
    except ModuleNotFoundError:
        status, _, err = sample("flow", "--out", "walk.mp4")
        assert (status, "pip install 'lamamba-diff[film]', or give a .gif" in err) == (2, True)
        return
    assert sample("flow", "--classes", "1", "--num", 1, "--steps", 7, "--fps", 10, "--out", "walk.mp4")[0] == 0
    assert len(imageio.imread("walk.mp4", plugin="FFMPEG")) == 7 + 15           # and a second and a half at the end


MANY = ["-n", 22, "--steps", 2, "--batch-size", 4, "--threads", 1, "--random-labels", "--format", "both"]


@needs_fork_server
def test_a_folder_of_images_by_one_process_or_by_two_that_are_killed_and_a_third(sample, tmp_path):
    status, out, err = sample("flow", *MANY, "--out", "one")
    assert (status, out.count("22 images")) == (0, 2), err                      # said before and after
    several = [
        command(tmp_path, "sample", "flow", *MANY, "--out", "several", output=f"rank{rank}.txt",
                environment={"RANK": str(rank), "WORLD_SIZE": "2"})
        for rank in range(2)
    ]
    while all(p.is_alive() for p in several) and not list(Path("several").glob(".sampling/shard_*.json")):
        time.sleep(0.01)
    for process in several:
        process.kill()
        process.join()
    assert Path("rank1.txt").read_text() == ""                                  # the first one speaks
    assert sample("flow", *MANY, "--out", "several")[0] == 0
    names = {f"{k:06d}.png" for k in range(22)} | {"samples.npz"}
    one = {name: digest for name, digest in hashes(tmp_path / "one").items() if name in names}
    assert len(one) == 23
    assert {name: hashes(tmp_path / "several")[name] for name in names} == one
    with np.load("one/samples.npz", allow_pickle=False) as file:
        images, labels = file["arr_0"].astype(int), file["arr_1"]
    assert images.shape == (22, 8, 8, 3)
    assert sample("flow", "--steps", 2, "--batch-size", 7, "--seed", 10, "--num", 12, "--random-labels",
                  "--format", "npz", "--out", "others")[0] == 0
    with np.load("others/samples.npz", allow_pickle=False) as file:             # other batches, other places
        assert np.abs(file["arr_0"].astype(int) - images[10:]).max() <= 1
        assert file["arr_1"].tolist() == labels[10:].tolist()
    assert sample("--like", "one/000013.png", "--out", "again.png")[0] == 0
    assert np.abs(pixels("again.png") - images[13, ..., 0]).max() <= 1
    status, _, err = sample("flow", *MANY, "--steps", 3, "--out", "one")
    assert (status, "steps: 2 there, 3 here" in err) == (2, True)


def test_torchrun_takes_none_of_our_options_for_its_own():
    from torch.distributed.run import parse_args

    ours = ["sample", "flow", *map(str, MANY), "--out", "two"]
    parsed = parse_args(["--nproc-per-node", "2", "-m", "lamamba", *ours])
    assert (parsed.training_script, parsed.training_script_args) == ("lamamba", ours)


def test_balanced_labels_of_an_unconditional_model_and_of_chosen_classes(sample):
    assert sample("noise", "--num", 5, "--balanced", "--classes", "cat,ant", "--sampler", "ddim", "--steps", 2,
                  "--out", "some")[0] == 0
    assert [read_image_metadata(f"some/00000{k}.png").labels for k in range(5)] == [(2,), (0,), (2,), (0,), (2,)]
    assert sample("free", "--num", 3, "--steps", 1, "--out", "free-samples")[0] == 0
    assert read_image_metadata("free-samples/000002.png").labels is None


@pytest.mark.parametrize(("arguments", "said"), [
    (["flow", "--classes", "bees"], "label 'bees' is unknown; did you mean 'bee'?"),
    (["flow", "--height", "10"], "height 10 does not fit this model: it must be a multiple of 4 pixels"),
    (["flow", "--num", "5", "--out", "folder"], "balanced (in turn) or random_labels"),
    (["flow", "--balanced"], "num=50000"),
    (["flow", "--balanced", "--num", "3", "--out", "x.png"], "give a folder's name"),
    (["flow", "--balanced", "--random-labels", "--num", "3"], "exclude each other"),
    (["free", "--balanced", "--num", "3"], "leave balanced, random_labels and classes out"),
    (["flow", "--out", "x.jpg"], "pictures are .png, films .gif or .mp4"),
    (["flow", "--interpolate", "seeds:3"], "write seeds:3:7 or classes:3:8"),
    (["flow", "--interpolate", "classes:3:ant"], "label 3 is out of range"),
    (["noise", "--interpolate", "seeds:3:4", "--sampler", "ddpm"], "no path between two seeds; use ddim"),
    (["flow", "--autoguidance", "noise"], "guiding model has objective='noise'"),
    (["flow", "--guidance-interval", "0.5", "0.1"], "guidance interval"),
    (["flow", "--guidance-interval", "0.1,0.5"], "takes 2 values with spaces between them"),
    (["flow", "--guidance-interval", "0", "x"], "--guidance-interval: '0', 'x' are not all numbers ("),
    (["flow", "--out", "x.gif", "--fps", "0.001"], "fps=0.001 must be at least 0.1"),
    (["flow", "--seed", "99999999999999999999"], "seed=99999999999999999999 is too large"),
    (["flow", "--batch-size", "0"], "batch_size=0 must be at least 1"),
    (["flow", "--num", "1000000000"], "3,000,000,000 images of 8 x 8 pixels are too many for one picture"),
    (["flow", "--balanced", "--num", "3", "--threads", "100000"], "threads=100000 must be at most 1024"),
    (["flow", "--interpolate", "seeds:\u00b2:4"], "write seeds:3:7 or classes:3:8"),
    ([""], "model: an empty path; leave it out"),
    (["flow", "--out", ""], "out: an empty path; leave it out"),
    (["--like", "nowhere.png"], "nowhere.png does not exist"),
    (["model.pt"], "a pickled checkpoint can run code, so it is not opened here: lamamba convert model.pt DIR"),
    (["broken"], "broken/diffusion_pytorch_model.safetensors is damaged"),
    (["empty"], "holds no network"),
])
def test_mistakes_are_answered_in_one_line_before_any_work(sample, arguments, said, models):
    Path("model.pt").write_bytes(b"\x80\x04.")
    Path("empty").mkdir()
    save_model(Path("broken"), grey_network(), label_names=NAMES)
    weights = Path("broken/diffusion_pytorch_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:500])
    before = {path.name for path in Path().iterdir()}
    status, _, err = sample(*arguments)
    assert (status, said in err, len(err.strip().splitlines())) == (2, True, 1), err
    assert {path.name for path in Path().iterdir()} == before


def test_without_a_model_the_shipped_one_draws_or_is_said_to_be_missing(sample):
    status, out, err = sample("--num", 1, "--classes", "3", "--steps", 2)
    if status:
        assert (status, "no MODEL was given" in err, len(err.splitlines())) == (2, True, 1)
    else:
        assert "digits model that ships with lamamba" in out
        assert read_image_metadata("samples.png").settings.model == "shipped"
        assert sample("--like", "samples.png", "--out", "again.png")[0] == 0
        assert Path("again.png").read_bytes() == Path("samples.png").read_bytes()
