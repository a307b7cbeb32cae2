from __future__ import annotations

import hashlib
import json

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel

from lamamba.compression.pipeline_folder import compress_pipeline, open_unet, save_pipeline, unet_sha256
from lamamba.compression.plan import Plan
from lamamba.compression.pruned_unets import PrunedUNet2DModel
from tests.compression.pipelines import text_conditioned, unconditional
from tests.compression.unets import output

CARD = "---\nlicense: openrail\ntags: [digits]\n---\n# Teacher\n\nBe kind.\n"
UNIT, SAID = "up_blocks.1.resnets.0", "mid_block"


@pytest.fixture
def teacher(tmp_path):
    pipe = unconditional()
    pipe.save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher/README.md").write_text(CARD, encoding="utf-8")
    (tmp_path / "teacher/LICENSE").write_text("kindly", encoding="utf-8")
    (tmp_path / "teacher/everything.ckpt").write_bytes(b"")
    return tmp_path / "teacher"


@pytest.mark.parametrize(("form", "removed", "kind"), [
    ("pruned", [UNIT, SAID], PrunedUNet2DModel), ("stock", [SAID], UNet2DModel), ("zeros", [UNIT, SAID], UNet2DModel),
])
def test_a_pipeline_with_its_network_pruned(form, removed, kind, teacher):
    out = teacher.parent / "out"
    unet = compress_pipeline(teacher, removed, out, form=form)
    loaded = DiffusionPipeline.from_pretrained(out)
    assert type(loaded) is DDPMPipeline
    assert type(loaded.unet) is kind
    assert torch.equal(output(loaded.unet), output(unet))
    assert loaded.scheduler.config == DDPMPipeline.from_pretrained(teacher).scheduler.config
    assert (out / "LICENSE").read_text(encoding="utf-8") == "kindly"
    assert not (out / "everything.ckpt").exists()
    assert Plan.load(out / "plan.json").removed == tuple(sorted(removed))
    card = (out / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: openrail\ntags: [digits]\n---\n")
    assert all(words in card for words in (*removed, "Be kind.", "fewer parameters", "from_pretrained"))
    assert ("pip install lamamba-diff" in card) == (form == "pruned")


def test_a_pruned_pipeline_is_pruned_again(teacher):
    compress_pipeline(teacher, [UNIT], teacher.parent / "once")
    unet = compress_pipeline(teacher.parent / "once", [SAID], teacher.parent / "twice")
    assert unet.config.removed_units == (SAID, UNIT)
    assert torch.equal(output(open_unet(teacher.parent / "twice")), output(unet))


def test_precision_and_variant_of_the_weights_are_kept(teacher):
    pipe = unconditional().to(torch.float16)
    pipe.save_pretrained(teacher.parent / "half", variant="fp16")
    unet = compress_pipeline(teacher.parent / "half", [UNIT], teacher.parent / "out", variant="fp16")
    assert unet.dtype == open_unet(teacher.parent / "out").dtype == torch.float16
    assert unet_sha256(teacher.parent / "half", "fp16") != unet_sha256(teacher.parent / "out")


def test_the_hash_is_the_files_own_where_there_is_one(teacher):
    (file,) = (teacher / "unet").glob("*.safetensors")
    assert unet_sha256(teacher) == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(("removed", "more", "message"), [
    (["mid_blok"], {}, "did you mean 'mid_block'"), ([UNIT], {"form": "stock"}, "leaves out up_blocks.1.resnets.0"),
    ([UNIT], {"form": "smaller"}, "form 'smaller' is unknown"),
])
def test_nothing_is_written_of_what_is_refused(removed, more, message, teacher):
    with pytest.raises(ValueError, match=message):
        compress_pipeline(teacher, removed, teacher.parent / "out", **more)
    assert {path.name for path in teacher.parent.iterdir()} == {"teacher"}


def test_folders_that_are_no_pipelines_or_in_the_way_are_refused(teacher):
    with pytest.raises(FileExistsError, match="exists already"):
        compress_pipeline(teacher, [UNIT], teacher)
    with pytest.raises(FileNotFoundError, match=r"has no model_index.json"):
        open_unet(teacher / "unet")
    index = json.loads((teacher / "model_index.json").read_text())
    for change, said in (
        ({"_class_name": None}, "_class_name=None must be"), ({"_class_name": "a b"}, "must be the name"),
        ({"unet": "UNet2DModel"}, "unet='UNet2DModel' must be"), ({"unet": [1, 2]}, "must be library and class"),
    ):
        (teacher / "model_index.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(ValueError, match=f"model_index.json: .*{said}"):
            compress_pipeline(teacher, [UNIT], teacher.parent / "out")
        assert not (teacher.parent / "out").exists()
    (teacher / "model_index.json").write_text(json.dumps({**index, "unet": ["os", "system"]}))
    with pytest.raises(ValueError, match="the U-Net is a system of os"):
        open_unet(teacher)


def test_a_full_disk_leaves_nothing(teacher, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    unet = compress_pipeline(teacher, [UNIT], teacher.parent / "out")
    plan = Plan.load(teacher.parent / "out/plan.json")
    monkeypatch.setattr(PrunedUNet2DModel, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        save_pipeline(teacher, teacher.parent / "other", unet, plan)
    assert {path.name for path in teacher.parent.iterdir()} == {"teacher", "out"}


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_pipelines_of_sd_and_sdxl(kind, tmp_path):
    pipe = text_conditioned(tmp_path / "words", kind)
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "teacher")
    compress_pipeline(tmp_path / "teacher", [UNIT, SAID], tmp_path / "out")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(pipe)
    assert type(loaded.unet).__name__ == "PrunedUNet2DConditionModel"
    image = loaded("a", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images[0]
    assert image.shape == (16, 16, 3)
