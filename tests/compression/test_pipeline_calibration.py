from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

from lamamba.compression.find import find_units
from lamamba.compression.pipeline_calibration import encode_images, encode_prompts, from_pipeline, read_prompts
from lamamba.compression.scores import score
from tests.compression.pipelines import TOKENS, text_conditioned, unconditional
from tests.compression.unets import PLAIN, make


def pictures(number: int = 5, size: tuple[int, int] = (20, 12)) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(number)]


def batches_equal(a, b) -> bool:
    return all(
        torch.equal(x.inputs["sample"], y.inputs["sample"]) and torch.equal(x.times, y.times)
        for x, y in zip(a.batches, b.batches, strict=True)
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_images_are_noised_by_the_pipelines_own_scheduler(kind):
    pipe = unconditional()
    pipe.scheduler = DDPMScheduler(num_train_timesteps=100, prediction_type=kind, beta_schedule="squaredcos_cap_v2")
    found = from_pipeline(pipe, images=pictures(), samples=12, batch_size=8, times=(500, 900))
    assert [len(batch.times) for batch in found.batches] == [8, 4]
    assert found.about["fingerprint"] != from_pipeline(pipe, images=pictures(4), samples=2).about["fingerprint"]
    assert 500 <= found.times.min() <= found.times.max() <= 900
    assert batches_equal(found, from_pipeline(pipe, images=pictures(), samples=12, batch_size=8, times=(500, 900)))
    batch, t = found.batches[0], found.batches[0].inputs["timestep"]
    assert t.max() < 100
    level = pipe.scheduler.alphas_cumprod[t][:, None, None, None]
    generator = torch.Generator().manual_seed(0)
    order = [torch.randperm(5, generator=generator) for _ in range(3)]
    x0 = encode_images(pipe, [pictures()[row] for row in torch.cat(order)[:8]])
    eps = (batch.inputs["sample"] - level.sqrt() * x0) / (1 - level).sqrt()
    wanted = {"epsilon": eps, "sample": x0, "v_prediction": level.sqrt() * eps - (1 - level).sqrt() * x0}[kind]
    assert batch.loss(wanted).abs().max() < 1e-10
    assert torch.allclose(batch.loss(wanted + 2), torch.tensor(4.0))


def test_a_learned_variance_does_not_count():
    pipe = DDPMPipeline(make({**PLAIN, "out_channels": 2, "num_class_embeds": None}), DDPMScheduler())
    found = from_pipeline(pipe, images=pictures(), samples=4)
    assert found.channels == 1
    assert found.predictions(pipe.unet)[0].shape == (4, 1, 8, 8)


def test_labels_of_class_conditional_networks():
    pipe = DDPMPipeline(make(PLAIN), DDPMScheduler())
    found = from_pipeline(pipe, images=pictures(3), labels=[0, 1, 2], samples=6)
    assert sorted(found.batches[0].inputs["class_labels"].tolist()) == [0, 0, 1, 1, 2, 2]
    found.predictions(pipe.unet)


def test_states_of_the_pipelines_own_sampling():
    pipe = unconditional()
    found = from_pipeline(pipe, samples=6, batch_size=4, steps=5, times=(100, 700))
    assert 100 <= found.times.min() < found.times.max() <= 700
    assert found.batches[0].loss is None
    assert batches_equal(found, from_pipeline(pipe, samples=6, batch_size=4, steps=5, times=(100, 700)))
    assert not pipe.unet._forward_pre_hooks
    scores = score(find_units(pipe.unet), found)
    assert np.isfinite(scores.values).all()
    assert scores.values.min() > 0


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_prompts_go_through_the_text_encoders_of_sd_and_sdxl(kind, tmp_path):
    pipe = text_conditioned(tmp_path, kind)
    texts = ["a", "b", "c", "d", "e"]
    found = from_pipeline(pipe, images=pictures(), prompts=texts, samples=20, batch_size=20)
    inputs = found.batches[0].inputs
    assert inputs["sample"].shape == (20, 2, 8, 8)
    width = pipe.unet.config.cross_attention_dim
    assert inputs["encoder_hidden_states"].shape == (20, TOKENS, width)
    distinct = {tuple(row.flatten().tolist()) for row in inputs["encoder_hidden_states"]}
    assert len(distinct) == 6, "five prompts and none"
    if kind == "sdxl":
        assert inputs["added_cond_kwargs"]["time_ids"][0].tolist() == [16, 16, 0, 0, 16, 16]
        assert inputs["added_cond_kwargs"]["text_embeds"].shape == (20, 6)
        nothing = encode_prompts(pipe, ["", "a"])
        assert not nothing["encoder_hidden_states"][0].any()
        assert not nothing["added_cond_kwargs"]["text_embeds"][0].any()
        assert nothing["added_cond_kwargs"]["text_embeds"][1].any()
    assert found.losses(pipe.unet)[0].shape == (20,)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_states_of_guided_sampling_are_with_and_without_prompt(kind, tmp_path):
    pipe = text_conditioned(tmp_path, kind)
    found = from_pipeline(pipe, prompts=["a", "b"], samples=8, batch_size=8, steps=3)
    inputs = found.batches[0].inputs
    assert inputs["sample"].shape == (8, 2, 8, 8)
    texts = {tuple(row.flatten().tolist()) for row in inputs["encoder_hidden_states"]}
    assert len(texts) == 3, "two prompts and none"
    if kind == "sdxl":
        assert inputs["added_cond_kwargs"]["time_ids"].shape == (8, 6)
    assert len(found.predictions(pipe.unet)) == 1


@pytest.mark.parametrize(("change", "message"), [
    ({"prompts": ["a"] * 5}, "takes no prompts, 5 came"),
    ({"labels": [1] * 5}, "takes no labels, 5 came"),
    ({"images": []}, "images is empty"),
    ({"images": None, "times": (995, 999), "steps": 3}, "widen them"),
])
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_pipeline(unconditional(), **{"images": pictures(), "samples": 4, **change})


def test_other_pipelines_are_refused():
    pipe = unconditional()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler"):
        from_pipeline(pipe, images=pictures(), samples=4)
    pipe = DDPMPipeline(make(PLAIN), DDPMScheduler())
    with pytest.raises(ValueError, match="needs labels, 0 came"):
        from_pipeline(pipe, images=pictures(), samples=4)


def test_prompts_of_a_text_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog \n", encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == ["a cat", "a dog"]
    (tmp_path / "prompts.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no prompts"):
        read_prompts(tmp_path / "prompts.txt")
