"""Whatever the bytes of a file that is read: its value, or one line that names the file; never another exception.

Each format has a maker of a good file and the function that reads it. Bytes are flipped, cut, repeated and inserted;
JSON and TOML get wrong values in every place of their structure.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import resource
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from lamamba.compression.plan import Plan as Removal
from lamamba.compression.plan import make_plan
from lamamba.compression.scores import Scores
from lamamba.data.codec import CodecConfig
from lamamba.data.latents import Index, LatentSet, Plan, Shard
from lamamba.data.manifest import FoundFile, Manifest
from lamamba.evaluation.images import NpzImages
from lamamba.evaluation.reference import Reference, load_statistics
from lamamba.evaluation.results import Entry, read_result, table, write_result
from lamamba.metrics.features import FeatureNetworkInfo
from lamamba.models.adapters import LORA_FILE
from lamamba.models.official import load_official, to_official
from lamamba.options.training import RECIPES, TrainConfig, load_recipe
from lamamba.runs.folder import CheckpointState, RunFolder, _hash_of_hashes, check_manifest
from lamamba.runs.lora import LORA_BASE, LoraBase, add_lora
from lamamba.runs.metadata import ModelMetadata
from lamamba.runs.model import fingerprint, open_model, open_network
from lamamba.sampling.plan import Plan as SamplesPlan
from lamamba.sampling.plan import find_plan
from lamamba.sampling.settings import ImageMetadata, Settings, png_text, read_image_metadata
from lamamba.utils.files import read_json, sha256, write_json
from lamamba.utils.tensors import read_tensors
from lamamba.viz.curves import read_metrics
from tests.autoencoders import make_kl
from tests.compression.test_plan import scores_of
from tests.networks import random_network, save_model, small_config

CONFIG = small_config(width=8, depths=(1, 1, 1, 1), in_channels=1, objective="flow")
SETTINGS = Settings(model="m", model_sha256="a", sampler="ddim", steps=3, height=8, width=8)


@dataclass(frozen=True)
class Format:
    """A kind of file."""

    make: Callable[[Path], Path]
    """Writes good ones into an empty folder; returns the one that is to be damaged."""
    read: Callable[[Path], Any]
    """Reads the file, in its folder."""


def _read_settings(path: Path) -> ImageMetadata:
    """Of JSON that is put into a picture."""
    text = PngImagePlugin.PngInfo()
    text.add_text("lamamba", path.read_text(encoding="utf-8", errors="replace").replace("\0", "?"))
    Image.new("L", (4, 4)).save(path.with_name("a.png"), pnginfo=text)
    return read_image_metadata(path.with_name("a.png"))


def _read_protocol(path: Path) -> Reference:
    """Of JSON that is put into a statistics file."""
    with np.load(path.with_name("a.npz")) as file:
        arrays = {**file, "protocol": np.array(path.read_text(encoding="utf-8", errors="replace"))}
    np.savez(path.with_name("b.npz"), **arrays)
    return load_statistics(path.with_name("b.npz"))


def _network(folder: Path, file: str) -> Path:
    return save_model(folder, random_network(CONFIG), label_names=("a", "b", "c")) / file


def _pipeline(folder: Path, file: str) -> Path:
    random_network(small_config(width=8, depths=(1, 1, 1, 1))).save_pretrained(folder / "unet")
    make_kl().save_pretrained(folder / "vae")
    write_json(folder / "model_index.json", {
        "_class_name": "LaMambaPipeline", "unet": ["lamamba", "LaMambaUNet"], "vae": ["diffusers", "AutoencoderKL"],
        "id2label": {"0": "a", "1": "b", "2": "c"}, "guidance_scale": 2.0,
        "codec": {"scale": 0.5, "shift": 0.0, "latents_mean": [], "latents_std": []}})
    return folder / file


def _statistics(folder: Path) -> Path:
    network = FeatureNetworkInfo("digits", "c", "none", 1)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(5, 3)).astype(np.float32)
    Reference("r", "f", (rows.mean(0).astype(np.float64), np.cov(rows.T)), None, rows, 5, (8, 8, 1), network).save(
        folder / "a.npz")
    return folder / "a.npz"


def _samples(folder: Path) -> Path:
    np.savez_compressed(folder / "s.npz", np.arange(192, dtype=np.uint8).reshape(1, 8, 8, 3))
    return folder / "s.npz"


def _picture(folder: Path) -> Path:
    metadata = ImageMetadata(settings=SETTINGS, seeds=(1, 2), labels=(0, 1), columns=2)
    Image.new("L", (4, 4)).save(folder / "a.png", pnginfo=png_text(metadata))
    return folder / "a.png"


def _official(folder: Path) -> Path:
    state = to_official(random_network(small_config(width=8, depths=(1, 1, 1, 1))))
    config = {"MODEL": {"VSSM": {"CONTINUOUS_SCAN": True}}}
    torch.save({"model": state, "ema": state, "config": config}, folder / "a.pt")
    return folder / "a.pt"


def _latents(folder: Path, file: str) -> Path:
    moments = torch.randn(2, 1, 2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    save_file({"moments": moments}, folder / "shard_00000.safetensors")
    plan = Plan(
        source="s", source_fingerprint="f", images=2, image_size=4, crop="c", views=1, parts=2, shape=(4, 2, 2),
        storage="float32", codec=CodecConfig(codec="latents"), compute="float32", batch_size=2, threads=1,
        shard_size=2, label_names=("a",),
    )
    shard = Shard(
        file="shard_00000.safetensors", bytes=(folder / "shard_00000.safetensors").stat().st_size,
        sha256=sha256(folder / "shard_00000.safetensors"), labels=(0, 0), files=("a", "b"), excluded={},
    )
    write_json(folder / "index.json", Index(plan, (shard,)).to_dict())
    return folder / file


def _read_latents(path: Path) -> Any:
    return LatentSet(path.parent).moments([0, 1])


def _run(folder: Path, file: str) -> Path:
    write_json(folder / "config.json", {
        "version": 3, "lamamba": "0", "train": TrainConfig().to_dict(), "architecture": CONFIG.to_dict(),
        "sampling": asdict(ModelMetadata(objective="flow", image_size=8)), "data": {"fingerprint": "f", "left_out": []},
    })
    write_json(folder / "state.json", {
        "version": 3, "step": 2, "left_out": 0, "faults": 0, "ema_decays": [0.9], "optimizer_steps": 2.0,
        "processes": 1, "device": "cpu", "torch": "2", "precision": {}, "sharding": "none",
    })
    write_json(folder / "manifest.json", {"version": 1, "files": {}, "files_sha256": _hash_of_hashes({})})
    return folder / file


def _read_run(path: Path) -> Any:
    run = RunFolder(path.parent)
    return run.architecture(), run.read_config()


def _json(folder: Path, name: str, values: Any) -> Path:
    (folder / name).write_text(json.dumps(values))
    return folder / name


def _read_metadata(path: Path) -> None:
    ModelMetadata.load(path).check_fits(CONFIG, path)


def _lines(folder: Path) -> Path:
    line = {"step": 1, "loss": 0.5, "grad_norm": 1.0, "images_per_second": 9.0, "held_out_loss": 1.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps({**line, "step": k}) + "\n" for k in range(3)))
    return folder / "metrics.jsonl"


def _plan(folder: Path) -> Path:
    plan = SamplesPlan(settings=SETTINGS, num=2, seed=0, rule="random", classes=(0, 1))
    return _json(folder, "manifest.json", {"version": 1, "plan": plan.to_dict()})


def _manifest(folder: Path) -> Path:
    Manifest(source="s", fingerprint="f", images=1, label_names=("a",), images_per_class=(1,), bad=(
        FoundFile("x", "truncated", "?"),), converted={"CMYK": 1}, converted_files=()).save(folder / "m.json")
    return folder / "m.json"


def _result(folder: Path) -> Path:
    protocol = {"images": 2, "network": {"name": "x"}, "reference": {"name": "y"}}
    entry = Entry(name="a", figures={"frechet": 1.0}, protocol=protocol)
    write_result(folder / "r.json", [entry])
    return folder / "r.json"


def _tensors(folder: Path) -> Path:
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(1, dtype=torch.int64)}, folder / "t.safetensors")
    return folder / "t.safetensors"


def _saved(folder: Path, values: Scores | Removal) -> Path:
    values.save(folder / "v.json")
    return folder / "v.json"


def _scores() -> Scores:
    return scores_of((7, 5, 9, 3, 2, 1), range(1, 8), np.diag(range(1, 8)).astype(float))


def _lora(folder: Path, file: str) -> Path:
    peft = pytest.importorskip("peft", reason="needs peft")
    network = random_network(CONFIG)
    sha256_of_base = fingerprint(network)
    network.add_adapter(peft.LoraConfig(r=1, target_modules=["linear_in"]))
    network.save_lora_adapter(folder)
    write_json(folder / LORA_BASE, asdict(LoraBase(base="b", base_sha256=sha256_of_base)))
    return folder / file


def _read_lora(path: Path) -> Any:
    network = random_network(CONFIG)
    return add_lora(network, fingerprint(network), path.parent, str(path.parent))


def _recipe(folder: Path) -> Path:
    shutil.copy(RECIPES / "digits.toml", folder / "r.toml")
    return folder / "r.toml"


def _open(path: Path) -> Any:
    return open_network(path.parent)


def _open_above(path: Path) -> Any:
    return open_model(path.parent.parent)


WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXTS = {
    "network": Format(lambda folder: _network(folder, "config.json"), _open),
    "metadata": Format(lambda folder: _network(folder, "sampling.json"), _read_metadata),
    "pipeline": Format(lambda folder: _pipeline(folder, "model_index.json"), _open),
    "autoencoder": Format(lambda folder: _pipeline(folder, "vae/config.json"), _open_above),
    "latents": Format(lambda folder: _latents(folder, "index.json"), _read_latents),
    "run": Format(lambda folder: _run(folder, "config.json"), _read_run),
    "state": Format(lambda folder: _run(folder, "state.json"), lambda path: CheckpointState.load(path.parent)),
    "checkpoint": Format(lambda folder: _run(folder, "manifest.json"), lambda path: check_manifest(path.parent)),
    "samples": Format(_plan, lambda path: find_plan(path.parent)),
    "images": Format(_manifest, Manifest.load),
    "result": Format(_result, lambda path: table(read_result(path))),
    "recipe values": Format(
        lambda folder: _json(folder, "r.json", load_recipe("digits").to_dict()),
        lambda path: TrainConfig.from_dict(read_json(path), path)),
    "settings": Format(
        lambda folder: _json(folder, "s.json", read_image_metadata(_picture(folder)).to_dict()), _read_settings),
    "scores of units": Format(
        lambda folder: _saved(folder, _scores()), lambda path: make_plan(Scores.load(path), remove=0.3)),
    "plan of units": Format(
        lambda folder: _saved(folder, make_plan(_scores(), remove=0.3)), lambda path: str(Removal.load(path))),
    "base of a LoRA": Format(lambda folder: _lora(folder, LORA_BASE), _read_lora),
    "protocol": Format(
        lambda folder: _json(folder, "p.json", json.loads(str(np.load(_statistics(folder))["protocol"]))),
        _read_protocol),
}
"""JSON."""
BYTES = {
    **TEXTS,
    "recipe": Format(_recipe, lambda path: load_recipe(str(path))),
    "metrics": Format(_lines, read_metrics),
    "picture": Format(_picture, read_image_metadata),
    "statistics": Format(_statistics, load_statistics),
    "images npz": Format(_samples, lambda path: NpzImages(path).read(range(1))),
    "official": Format(_official, load_official),
    "weights": Format(lambda folder: _network(folder, WEIGHTS), _open),
    "autoencoder's weights": Format(lambda folder: _pipeline(folder, f"vae/{WEIGHTS}"), _open_above),
    "latents' shard": Format(lambda folder: _latents(folder, "shard_00000.safetensors"), _read_latents),
    "tensors": Format(_tensors, read_tensors),
    "LoRA": Format(lambda folder: _lora(folder, LORA_FILE), _read_lora),
}
WRONG = [
    None, True, 0, -1, 1, 7, 10**5, 10**9, 10**30, -0.5, 1e300, math.nan, math.inf, "", "zz", "10", [], [None], ["a"],
    [1, 2, 3], [[1]], {}, {"a": 1},
]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A good file of a format, made once, with its content."""
    made: dict[str, tuple[Path, bytes]] = {}

    def of(name: str) -> tuple[Path, bytes]:
        if name not in made:
            folder = tmp_path_factory.mktemp("format")
            path = BYTES[name].make(folder)
            BYTES[name].read(path)                                              # what is whole is read
            made[name] = path, path.read_bytes()
        path, content = made[name]
        path.write_bytes(content)
        return path, content

    return of


@contextlib.contextmanager
def one_gigabyte():
    """No more memory than a GB beyond what the process has now."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def read_damaged(name: str, path: Path) -> None:
    """Read a file: what is refused is refused in one line with the name of the file or its folder."""
    with warnings.catch_warnings(), one_gigabyte():
        warnings.simplefilter("ignore")
        refused = None
        try:
            BYTES[name].read(path)
        except (ValueError, OSError) as error:
            refused = error
    if refused is not None:
        assert path.name in str(refused) or str(path.parent) in str(refused), f"{type(refused).__name__}: {refused}"
        assert len(str(refused)) < 2000


SETTINGS_OF_TESTS = functools.partial(
    settings, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
places = st.floats(0, 1, exclude_max=True)


@st.composite
def damage(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with bits flipped, pieces cut, repeated or overwritten."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = int(draw(places) * max(len(data), 1))
        if draw(st.booleans()):                                                 # headers and directories
            at = min(at, 400) if draw(st.booleans()) else max(0, len(data) - at % 400 - 1)
        kind = draw(st.sampled_from(("flip", "flip", "flip", "cut", "end", "repeat", "write", "empty")))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 64))]
        elif kind == "end":
            del data[at:]
        elif kind == "repeat":
            data[at:at] = data[at : at + 32]
        elif kind == "write":
            data[at : at + 8] = draw(st.binary(max_size=8))
        elif kind == "empty" and draw(st.booleans()):
            data = bytearray(draw(st.sampled_from((b"", b"\x00" * 64, b"[" * 20_000, b"\xef\xbb\xbf{}", b"null"))))
    return bytes(data)


def _places(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in nested dicts and lists."""
    inner = values.items() if isinstance(values, dict) else enumerate(values[:3]) if isinstance(values, list) else ()
    return [path, *(place for key, value in inner for place in _places(value, (*path, key)))]


@st.composite
def wrong_value(draw: st.DrawFn, values: Any) -> Any:
    """Plain values with one of them replaced, removed, or another one beside it."""
    values = json.loads(json.dumps(values))
    *path, last = draw(st.sampled_from([place for place in _places(values) if place]))
    owner = functools.reduce(lambda inner, key: inner[key], path, values)
    kind = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add")))
    if kind == "replace":
        owner[last] = draw(st.sampled_from(WRONG))
    elif kind == "remove":
        del owner[last]
    elif isinstance(owner, dict):
        owner["zz"] = draw(st.sampled_from(WRONG))
    else:
        owner.append(draw(st.sampled_from(WRONG)))
    return values


def check_bytes(name: str, good: Any, count: int) -> None:
    path, content = good(name)

    @SETTINGS_OF_TESTS(max_examples=count)
    @given(damage(content))
    def check(damaged: bytes) -> None:
        path.write_bytes(damaged)
        read_damaged(name, path)

    check()


def check_values(name: str, good: Any, count: int) -> None:
    path, content = good(name)

    @SETTINGS_OF_TESTS(max_examples=count)
    @given(wrong_value(json.loads(content)))
    def check(values: Any) -> None:
        path.write_text(json.dumps(values))
        read_damaged(name, path)

    check()


SLOW_TO_READ = {
    "weights", "network", "autoencoder", "autoencoder's weights", "official", "pipeline", "LoRA", "base of a LoRA",
}


@pytest.mark.parametrize("name", BYTES)
def test_damaged_bytes(name, good):
    check_bytes(name, good, 5 if name in SLOW_TO_READ else 30)


@pytest.mark.parametrize("name", TEXTS)
def test_wrong_values(name, good):
    check_values(name, good, 6 if name in SLOW_TO_READ else 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", BYTES)
def test_damaged_bytes_by_the_thousand(name, good):
    check_bytes(name, good, 50 if name in SLOW_TO_READ else 500)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_wrong_values_by_the_thousand(name, good):
    check_values(name, good, 50 if name in SLOW_TO_READ else 500)
