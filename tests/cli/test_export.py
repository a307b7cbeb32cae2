"""A run becomes a pipeline folder that loads, samples, has a model card, and is written whole or not at all."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lamamba import ExportOptions, LaMambaPipeline, export
from lamamba.exporting.pipeline_folder import write_pipeline_folder
from lamamba.runs.folder import MANIFEST
from lamamba.runs.model import open_network
from tests.autoencoders import make_kl
from tests.files import write_manifest
from tests.networks import grey_network, save_model

RUN = Path(__file__).parent.parent / "training" / "version1" / "run"


def test_a_run_becomes_a_pipeline(lamamba):
    target = Path("there/digits")
    status, out, _ = lamamba("export", RUN, target, "--steps", 2, "--images", 3, "--licence", "cc-by-4.0")
    assert (status, "a diffusers pipeline" in out) == (0, True)
    pipe = LaMambaPipeline.from_pretrained(target)
    network, facts = open_network(RUN)
    for one, other in zip(pipe.unet.parameters(), network.parameters(), strict=True):
        assert torch.equal(one, other)
    assert pipe.label_names == facts.label_names == tuple("0123456789")
    assert type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    grid = np.asarray(Image.open(target / "samples.png"))
    assert grid.shape[0] > 10 * 48
    assert np.ptp(grid) > 100
    card = (target / "README.md").read_text()
    assert "license: cc-by-4.0" in card
    assert "![samples](samples.png)" in card
    assert "| optimizer steps done | 2 |" in card
    assert "| batch | 4 |" in card
    assert "| data | digits |" in card
    for file in target.rglob("*.json"):
        assert str(RUN) not in file.read_text()                                 # no places of this disk
    assert str(RUN) not in card
    # and lamamba sample takes it
    assert lamamba("sample", target, "--classes", 3, "--num", 2, "--steps", 2, "--out", "grid.png")[0] == 0


def test_the_cards_example_runs(lamamba):
    assert lamamba("export", RUN, "digits", "--images", 0)[0] == 0
    assert not Path("digits/samples.png").exists()
    card = Path("digits/README.md").read_text()
    assert "samples.png" not in card
    names: dict = {}
    exec(card.split("```python\n")[1].split("```")[0], names)
    assert names["image"].size == (8, 8)


def test_the_card_of_a_class_and_a_name_with_quotes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(Path("model"), grey_network(), label_names=('12" disk', "a\\b", "c"))
    export(ExportOptions(source="model", target="out", images=0, name='the "disk"|s'), progress=None)
    names: dict = {}
    card = Path("out/README.md").read_text()
    exec(card.split("```python\n")[1].split("```")[0].replace('"the \\"disk\\"|s"', "'out'"), names)
    assert names["image"].size == (8, 8)


def test_a_checkpoint_that_a_training_writes_meanwhile_does_not_mix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(RUN, "run")
    checkpoint, = Path("run/checkpoints").iterdir()

    def write_newer(*given):
        shutil.copytree(checkpoint, "run/checkpoints/step_00000009", dirs_exist_ok=True)
        file = Path("run/checkpoints/step_00000009/state.json")
        file.write_text(file.read_text().replace('"step": 2', '"step": 9'))
        write_manifest(file.parent)
        return write_pipeline_folder(*given)

    monkeypatch.setattr("lamamba.api.export.write_pipeline_folder", write_newer)
    export(ExportOptions(source="run", target="out", images=0), progress=None)
    assert "| optimizer steps done | 2 |" in Path("out/README.md").read_text()


def test_latents_take_their_autoencoder_along(lamamba):
    make_kl().save_pretrained("vae")
    save_model(Path("model"), grey_network(objective="noise", in_channels=4), image_size=16, codec="latents",
               scale=0.3, shift=0.1, autoencoder=str(Path("vae").absolute()))
    status, *_ = lamamba(
        "export", "model", "out", "--images", 2, "--steps", 2, "--sampler", "dpm++", "--dtype", "bfloat16")
    assert status == 0
    shutil.rmtree("vae")
    pipe = LaMambaPipeline.from_pretrained("out")
    assert (pipe.codec_config.scale, pipe.codec_config.shift) == (0.3, 0.1)
    assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
    weights = load_file("out/unet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert open_network("out")[1].image_size == 16


def test_names_from_a_file_and_imagenets(lamamba):
    save_model(Path("model"), grey_network())
    Path("names.txt").write_text("red panda\nblue bird\ngreen frog\n")
    assert lamamba("export", "model", "out", "--images", 0, "--labels", "names.txt")[0] == 0
    index = json.loads(Path("out/model_index.json").read_text())
    assert index["id2label"] == {"0": "red panda", "1": "blue bird", "2": "green frog"}
    status, _, err = lamamba("export", "model", "two", "--labels", "imagenet")
    assert (status, "1000 names came for 3 classes" in err) == (2, True)
    save_model(Path("large"), grey_network(num_classes=1000))
    status, *_ = lamamba("export", "large", "imagenet", "--images", 1, "--steps", 1, "--labels", "imagenet")
    assert status == 0
    assert LaMambaPipeline.from_pretrained("imagenet").get_label_ids("tabby") == [281]


@pytest.mark.parametrize(("content", "said"), [
    (b"a\nb\n", "2 names came for 3 classes"), (b"a\nb\nc\nd", "4 names came for 3 classes"),
    (b"", "line 1 is empty"), (b"a\n \nc\n", "line 2 is empty"), (b"caf\xe9\nb\nc\n", "in UTF-8"),
    (b"\xef\xbb\xbfa\r\nb, c\r\nd\r\n", ("a", "b, c", "d")), (b"a\nb\nc\n\n", ("a", "b", "c")),
])
def test_a_file_of_names_has_a_line_for_each_class(tmp_path, content, said):
    save_model(tmp_path / "model", grey_network())
    file = tmp_path / "names.txt"
    file.write_bytes(content)
    options = ExportOptions(source=tmp_path / "model", target=tmp_path / "out", images=0, labels=str(file))
    if isinstance(said, tuple):
        export(options, progress=None)
        assert LaMambaPipeline.from_pretrained(tmp_path / "out").label_names == said
    else:
        with pytest.raises(ValueError, match=rf"names\.txt.* {said}"):
            export(options, progress=None)


def test_the_models_own_guidance_scale_goes_along(tmp_path):
    save_model(tmp_path / "model", grey_network(), guidance=3.5)
    result = export(
        ExportOptions(source=tmp_path / "model", target=tmp_path / "out", images=1, steps=1, device="cpu"),
        progress=None,
    )
    assert "guidance 3.5" in (tmp_path / "out" / "README.md").read_text()
    assert LaMambaPipeline.from_pretrained(tmp_path / "out").config.guidance_scale == 3.5
    assert open_network(tmp_path / "out")[1].guidance == 3.5
    assert result._repr_png_()[1:4] == b"PNG"
    assert f"{result.num_bytes / 1e6:.1f} MB" in str(result)


def test_one_of_several_averages(lamamba):
    place = Path("checkpoint")
    save_model(place, grey_network())
    for name, seed in (("ema", 1), ("ema_0.99", 2)):
        save_model(place / name, grey_network(seed))
    (place / "state.json").write_text(json.dumps({"version": 1, "step": 7, "ema_decays": [0.9, 0.99]}))
    for decay, seed in ((None, 1), ("0.9", 1), ("0.99", 2)):
        extra = [] if decay is None else ["--ema", decay]
        assert lamamba("export", place, f"out{decay}", "--images", 0, *extra)[0] == 0
        pipe = LaMambaPipeline.from_pretrained(f"out{decay}")
        assert torch.equal(pipe.unet.position_embedding, grey_network(seed).position_embedding)
    status, _, err = lamamba("export", place, "none", "--ema", 0.5)
    assert (status, "has no average 0.5; it has 0.9, 0.99" in err) == (2, True)


@pytest.mark.parametrize(("extra", "said"), [
    (["--sampler", "ddpm"], "use flow-euler or flow-heun"),
    (["--autoencoder", "x/y"], "this model makes pixels: leave autoencoder out"),
    (["--labels", "nowhere.txt"], "neither \"imagenet\" nor a text file"),
    (["--images", "-1"], "images=-1 must be at least 0"),
    (["--guidance", "nan"], "must be finite"),
    (["--licence", "a: [b"], "licence='a: [b': give its short name"),
    (["--images", "1000000000"], "3,000,000,000 images of 8 x 8 pixels are too many for one picture"),
    (["--images", "2", "--seed", str(2**63 - 1)], "goes beyond the largest seed"),
    (["--ema", "x"], "--ema: 'x' is neither a number nor 'none' (lamamba export --help"),
])
def test_what_cannot_be_exported_leaves_nothing_behind(extra, said, lamamba):
    save_model(Path("model"), grey_network())
    status, _, err = lamamba("export", "model", "out", *extra)
    assert (status, said in err) == (2, True), err
    assert [path.name for path in Path().iterdir()] == ["model"]


def test_onnx_without_its_libraries_is_refused_at_once(lamamba, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    save_model(Path("model"), grey_network())
    status, _, err = lamamba("export", "model", "out", "--onnx")
    assert (status, "pip install lamamba-diff[export]" in err) == (2, True)


def test_nothing_is_overwritten_and_damage_is_seen(lamamba):
    Path("out").mkdir()
    status, _, err = lamamba("export", RUN, "out")
    assert (status, "exists already" in err) == (2, True)
    shutil.copytree(RUN, "run")
    (weights,) = Path().glob("run/checkpoints/*/ema/*.safetensors")
    assert (weights.parent.parent / MANIFEST).is_file()
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    status, _, err = lamamba("export", "run", "new")
    assert (status, "is damaged" in err) == (2, True)
