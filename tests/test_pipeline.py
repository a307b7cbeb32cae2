"""The pipeline is diffusers' own kind: what it makes, changes, saves, loads and refuses."""

from __future__ import annotations

import copy
import io
import os
import pickle
import shutil
import subprocess
import sys
import tempfile

import accelerate
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler
from PIL import Image

from lamamba import LaMambaCacheConfig, LaMambaPipeline, LaMambaUNet
from lamamba.data.codec import CodecConfig, LatentDecoder, to_uint8
from lamamba.diffusion.denoise import SAMPLERS, make_scheduler, samplers_for
from lamamba.ops import scan_paths
from lamamba.runs.model import open_network
from lamamba.sampling import generate
from tests.autoencoders import MAKERS, make_kl
from tests.networks import random_network, two_blocks

BETAS = dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
NAMES = {0: "cat, kitten", 1: "dog", 2: "bird"}
PAIRS = [(name, objective) for name, sampler in SAMPLERS.items() for objective in sampler.objectives]


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def make_pipeline(sampler=None, vae=None, codec=None, network_seed=0, **changes):
    settings = dict(in_channels=1, objective="flow", width=8) if vae is None else dict(objective="noise", width=8)
    config = two_blocks(**{**settings, **changes})
    network = random_network(config, network_seed)
    scheduler = make_scheduler(sampler or samplers_for(config.objective)[0], config.objective)
    return LaMambaPipeline(network, vae, scheduler, NAMES if config.num_classes else None, codec)


@pytest.fixture
def pipe():
    """Of a noise model, sampled by DDIM."""
    return make_pipeline("ddim", objective="noise")


def levels(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


@pytest.mark.parametrize(("sampler", "objective"), PAIRS)
def test_it_makes_what_lamamba_sample_makes_at_any_batch_size(sampler, objective):
    pipe = make_pipeline(sampler, objective=objective)
    pipe_images = levels(pipe([0, 2, 1], num_inference_steps=6, generator=seeds(5, 6, 7)).images)
    scale = 1.0 if objective == "flow-map" else 2.0
    same = generate(pipe.unet, [0, 2, 1], [5, 6, 7], sampler=sampler, num_steps=6, guidance=scale)[..., 0]
    assert np.abs(pipe_images - same).max() <= 1
    alone = levels(pipe(1, num_inference_steps=6, generator=seeds(7)).images)
    assert np.abs(alone[0] - pipe_images[2]).max() <= 1
    assert np.ptp(pipe_images) > 10


@pytest.mark.parametrize("kind", MAKERS)
def test_latents_are_decoded_as_they_were_made(kind, tmp_path):
    vae = MAKERS[kind]()
    codec = dict(scale=0.3, shift=0.1, latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 0.5, 1.5])
    vae.save_pretrained(tmp_path)
    for given in (None, codec):
        pipe = make_pipeline("ddim", vae, given)
        x0 = pipe(1, num_inference_steps=2, generator=seeds(3), output_type="latent").images
        pictures = levels(pipe(1, num_inference_steps=2, generator=seeds(3)).images)
        decoder = LatentDecoder(tmp_path)
        if given:
            decoder.config = CodecConfig(codec="latents", **{**codec, "latents_mean": tuple(codec["latents_mean"]),
                                                           "latents_std": tuple(codec["latents_std"])})
        assert np.abs(pictures - decoder.decode(x0)).max() <= 1
        assert pictures.shape[1:3] == tuple(side * pipe.pixels_per_input for side in x0.shape[2:])


def test_every_output_type():
    pipe = make_pipeline()
    made = {
        kind: pipe("dog", num_inference_steps=3, generator=seeds(1), output_type=kind).images
        for kind in ("pil", "np", "pt", "latent")
    }
    assert (made["pil"][0].mode, made["pil"][0].size) == ("L", (8, 8))
    assert made["np"].shape == (1, 8, 8, 1)
    assert made["pt"].shape == made["latent"].shape == (1, 1, 8, 8)
    np.testing.assert_allclose(made["np"][0, ..., 0], made["pt"][0, 0])
    np.testing.assert_allclose(made["pt"], (made["latent"] / 2 + 0.5).clamp(0, 1))
    assert np.abs(levels(made["pil"])[0] - 255 * made["np"][0, ..., 0]).max() <= 0.51
    (images,) = pipe("dog", num_inference_steps=3, generator=seeds(1), return_dict=False)
    assert np.array_equal(levels(images), levels(made["pil"]))
    with pytest.raises(ValueError, match="did you mean 'pil'"):
        pipe("dog", output_type="pill")


def test_labels_by_number_name_and_word():
    pipe = make_pipeline()
    assert pipe.get_label_ids(["kitten", 2, "Dog", "1"]) == [0, 2, 1, 1]
    assert len(pipe(["cat", "dog"], num_images_per_label=3, num_inference_steps=1).images) == 6
    for wrong, said in (("catt", "did you mean"), (3, "knows 0 .. 2"), (None, "or names such as 'cat'"), ([], "empty")):
        with pytest.raises(ValueError, match=said):
            pipe(wrong, num_inference_steps=1)
    with pytest.raises(ValueError, match="2 generators came for 3 images"):
        pipe([0, 1, 2], generator=seeds(0, 1))
    unconditional = make_pipeline(num_classes=0)
    assert len(unconditional(num_inference_steps=1, generator=seeds(0, 1)).images) == 2
    assert len(unconditional(num_inference_steps=1, num_images_per_label=3).images) == 3
    with pytest.raises(ValueError, match="no classes: leave class_labels out"):
        unconditional(0)


def test_any_size_and_the_grid_comes_back():
    pipe = make_pipeline("ddim", make_kl())
    image = pipe(0, num_inference_steps=2, height=24, width=32).images[0]
    assert image.size == (32, 24)
    assert pipe(0, num_inference_steps=2).images[0].size == (16, 16)
    for wrong in (dict(height=20), dict(width=4)):
        with pytest.raises(ValueError, match="must be a multiple of 8 pixels; the nearest is"):
            pipe(0, **wrong)

    def broken(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        pipe(0, num_inference_steps=2, height=32, callback_on_step_end=broken)
    assert pipe.unet._run_grid == pipe.unet.architecture.token_grid


def run(pipe, **settings):
    settings = {"num_inference_steps": 6, "generator": seeds(4), "output_type": "pt", **settings}
    return pipe(settings.pop("label", 0), **settings).images


def unclipped(pipe, **settings):
    """x0 that no picture's range cuts off."""
    return run(pipe, output_type="latent", **settings)


def test_guidance_reaches_the_network():
    pipe, other = make_pipeline("ddim", objective="noise"), make_pipeline("ddim", objective="noise", network_seed=9)
    plain, guided = unclipped(pipe, guidance_scale=1.0), unclipped(pipe, guidance_scale=3.0)
    assert not torch.allclose(plain, guided, atol=1e-3)
    never, late = (unclipped(pipe, guidance_scale=3.0, guidance_interval=(0.0, end)) for end in (0.0, 0.5))
    torch.testing.assert_close(never, plain, atol=1e-4, rtol=0)
    assert not torch.allclose(late, guided, atol=1e-3)
    assert not torch.allclose(unclipped(pipe, guidance_scale=3.0, guidance_rescale=1.0), guided, atol=1e-3)
    # a model that is guided by itself is not guided
    torch.testing.assert_close(
        unclipped(pipe, guidance_scale=3.0, guidance_model=pipe.unet), plain, atol=1e-4, rtol=0)
    assert not torch.allclose(unclipped(pipe, guidance_scale=3.0, guidance_model=other.unet), guided, atol=1e-3)
    with pytest.raises(ValueError, match="guiding model has objective='flow', the model has 'noise'"):
        unclipped(pipe, guidance_model=make_pipeline().unet)
    free, guiding = (make_pipeline("ddim", objective="noise", num_classes=0, network_seed=seed) for seed in (0, 9))
    torch.testing.assert_close(
        run(free, label=None, guidance_model=guiding.unet),
        run(free, label=None, guidance_model=guiding.unet, guidance_scale=2.0))
    assert not torch.allclose(run(free, label=None, guidance_model=guiding.unet), run(free, label=None), atol=1e-3)
    latents = make_pipeline("dpm++", make_kl())
    every, some = (
        run(latents, output_type="latent", guidance_scale=3.0, guidance_channels=channels, num_inference_steps=1)
        for channels in ("all", "first-three")
    )
    torch.testing.assert_close(every[:, :3], some[:, :3])
    assert float((every[:, 3] - some[:, 3]).abs().max()) > 0.1


def test_callbacks_see_and_change_the_steps(pipe):
    seen = []

    def watch(given_pipe, step, timestep, tensors):
        assert given_pipe is pipe
        seen.append((step, int(timestep), sorted(tensors)))
        return tensors

    plain = run(pipe)
    watched = run(pipe, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["latents", "x0"])
    assert torch.equal(plain, watched)
    assert seen == [(i, int(t), ["latents", "x0"]) for i, t in enumerate(pipe.scheduler.timesteps)]
    changed = run(
        pipe, output_type="latent", callback_on_step_end=lambda *given: {"latents": torch.ones(1, 1, 8, 8)})
    assert torch.equal(changed, torch.ones(1, 1, 8, 8))
    with pytest.raises(ValueError, match="callback tensor 'latent' is unknown; did you mean 'latents'"):
        run(pipe, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["latent"])

    def stop(given_pipe, step, timestep, tensors):
        given_pipe._interrupt = step == 1
        return tensors

    seen.clear()
    stopped = run(pipe, callback_on_step_end=stop)
    assert not torch.allclose(stopped, plain, atol=1e-3)
    assert torch.equal(run(pipe), plain)                                        # it is not stopped for ever


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++", "heun", "euler"])
def test_image_to_image_keeps_what_strength_leaves(sampler):
    pipe = make_pipeline(sampler, objective="noise")
    original = torch.from_numpy(np.asarray(picture())).float() / 255
    far, near = (
        float((run(pipe, image=picture(), strength=strength, num_inference_steps=20)[0, 0] - original).abs().mean())
        for strength in (1.0, 0.05)
    )
    assert near < 0.15 < 0.3 < far
    assert pipe.num_timesteps == 1
    same = run(pipe, image=[picture()] * 2, label=[0, 0], strength=0.5, generator=seeds(4, 4))
    torch.testing.assert_close(same[0], same[1], atol=1e-5, rtol=0)
    for wrong, said in (
        (dict(strength=0.5), "give image, too"), (dict(image=picture(), strength=0), r"must lie in \(0, 1\]"),
        (dict(image=[picture()] * 2), "2 of image came for 1 images"),
        (dict(image=torch.zeros(1, 3, 8, 8)), "image has 3 channels, this model's pictures have 1"),
        (dict(image=np.full((1, 8, 8, 1), 200.0, np.float32)), "from 200 to 200: .* 0 to 1, or bytes"),
        (dict(image=np.full((1, 8, 8, 1), 200)), "image of int64 is ambiguous"),
        (dict(image=[]), "is an empty list"),
        (dict(image=picture(), mask_image=np.full((8, 8), np.nan)), "mask_image has numbers from nan"),
        (dict(image=torch.full((1, 1, 8, 8), float("nan"))), "image has numbers from nan to nan"),
    ):
        with pytest.raises(ValueError, match=said):
            run(pipe, **wrong)


@pytest.mark.parametrize(("sampler", "objective"), [("ddpm", "noise"), ("dpm++", "v"), ("flow-heun", "flow")])
def test_inpainting_changes_the_white_part_alone(sampler, objective):
    pipe = make_pipeline(sampler, objective=objective)
    original = torch.from_numpy(np.asarray(picture())).float() / 255
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 5:] = 255
    image = run(pipe, image=picture(), mask_image=Image.fromarray(mask))[0, 0]
    torch.testing.assert_close(image[:, :5], original[:, :5])
    assert float((image[:, 5:] - original[:, 5:]).abs().mean()) > 0.1
    with pytest.raises(ValueError, match="give image, too"):
        run(pipe, mask_image=Image.fromarray(mask))


def test_masks_and_images_of_bytes_and_truth_values(pipe):
    grey, white = np.asarray(picture()), np.arange(8)[None].repeat(8, 0) > 4
    expected = run(pipe, image=picture(), mask_image=Image.fromarray(np.uint8(255) * white))
    masks = (white, np.uint8(255) * white, np.uint8(1) * white, white.astype(np.float32))
    for kind in (np.array, torch.tensor):
        for mask in masks:
            for image in (grey[None, ..., None], np.float32(grey)[None, ..., None] / 255):
                image = kind(image) if kind is np.array else kind(image).permute(0, 3, 1, 2)
                torch.testing.assert_close(run(pipe, image=image, mask_image=kind(mask)), expected, atol=1e-5, rtol=0)
    dark = np.uint8(1) * white                                                  # nearly black, also as an array
    assert torch.equal(run(pipe, image=dark[None, ..., None], strength=0.3),
                       run(pipe, image=Image.fromarray(dark), strength=0.3))


def test_names_that_diffusers_and_its_callbacks_use():
    network = random_network(two_blocks(width=8, in_channels=1, grid=(8, 12)))
    pipe = LaMambaPipeline(network, scheduler=DDIMScheduler(**BETAS, clip_sample=False))
    assert len(pipe(1, num_images_per_prompt=2, num_inference_steps=1).images) == 2
    assert type(LaMambaPipeline(network).scheduler) is type(make_scheduler("ddpm", "noise"))
    assert network.config.sample_size == (8, 12)
    assert make_pipeline().unet.config["sample_size"] == 8


def test_numbers_of_numpy_and_torch(pipe):
    plain = run(pipe, label=[1, 2], generator=seeds(1, 2), guidance_scale=1.5)
    settings = dict(num_inference_steps=np.int64(6), guidance_scale=np.float32(1.5), generator=seeds(1, 2))
    for labels in (torch.tensor([1, 2]), np.array([1, 2]), [np.int64(1), torch.tensor(2)]):
        assert torch.equal(run(pipe, label=labels, **{**settings, "generator": seeds(1, 2)}), plain)
    assert torch.equal(run(pipe, label=torch.tensor(1), **{**settings, "generator": seeds(1)}),
                       run(pipe, label=1, generator=seeds(1), guidance_scale=1.5))


def test_training_after_sampling_another_size_in_inference_mode(pipe):
    scan_paths.__globals__["_cached_paths"].cache_clear()
    with torch.inference_mode():
        run(pipe, height=16, width=12)
        pipe.unet.set_grid((16, 12))
    x = torch.randn(2, 1, 16, 12), torch.tensor([1.0, 2.0]), torch.tensor([1, 2])
    pipe.unet.train()(*x).sum().backward()
    assert all(parameter.grad is not None for parameter in pipe.unet.parameters())


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda pipe: pickle.loads(pickle.dumps(pipe))}


@pytest.mark.parametrize("way", COPIES)
def test_copies(pipe, way):
    copied = COPIES[way]
    plain = run(pipe)
    assert torch.equal(run(copied(pipe)), plain)
    if way == "deepcopy":
        for dtype, allowed in ((torch.float16, 0.02), (torch.bfloat16, 0.1)):
            assert float((run(copied(pipe).to(dtype)) - plain).abs().max()) < allowed


def test_ways_to_load(pipe, tmp_path):
    """Variants, shards, types and device maps of diffusers."""
    plain = run(pipe)
    pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    assert len(list((tmp_path / "unet").glob("*.fp16*.safetensors"))) > 2
    for given, dtype in ((dict(), torch.float32), (dict(torch_dtype=torch.float16), torch.float16),
                         (dict(device_map="cpu"), torch.float32), (dict(low_cpu_mem_usage=False), torch.float32)):
        again = LaMambaPipeline.from_pretrained(tmp_path, variant="fp16", **given)
        assert again.unet.dtype == dtype
        assert float((run(again) - plain).abs().max()) < (0.02 if dtype == torch.float16 else 1e-6)
    split = LaMambaUNet.from_pretrained(
        tmp_path / "unet", variant="fp16", device_map="auto", max_memory={"cpu": "60KB"},
        offload_folder=tmp_path / "o")
    assert set(split.hf_device_map.values()) == {"cpu", "disk"}
    pipe.unet = split
    torch.testing.assert_close(run(pipe), plain)
    assert LaMambaUNet.from_config(split.config).config == LaMambaUNet.from_config(dict(split.config)).config


def test_a_callback_changes_the_guidance(pipe):
    seen = []

    def guide(given_pipe, step, timestep, tensors):
        seen.append(given_pipe.guidance_scale)
        given_pipe._guidance_scale = 4.0 if step == 1 else 1.0
        return tensors

    changed = unclipped(pipe, guidance_scale=1.0, callback_on_step_end=guide)
    assert seen == [1.0, 1.0, 4.0, 1.0, 1.0, 1.0]
    assert not torch.allclose(changed, unclipped(pipe, guidance_scale=1.0), atol=1e-4)
    times = pipe.scheduler.timesteps / 1000
    interval = (float(times[3] + times[2]) / 2, float(times[2] + times[1]) / 2)                   # the third step alone
    same = unclipped(pipe, guidance_scale=4.0, guidance_interval=interval)
    torch.testing.assert_close(changed, same, atol=1e-5, rtol=0)


def test_transparent_and_turned_inputs_count_as_they_look(pipe):
    """An image lies on white, a mask on black: what nobody has painted stays."""
    grey = np.asarray(picture())
    levels = np.stack([grey, np.where(np.arange(8) < 4, 255, 0) * np.ones((8, 1), int)], axis=-1).astype(np.uint8)
    turned, exif = picture(), Image.Exif()
    exif[0x0112] = 6
    held = io.BytesIO()
    turned.save(held, "PNG", exif=exif)
    for given, plain in (
        (Image.fromarray(levels), Image.fromarray(np.where(levels[..., 1], grey, 255).astype(np.uint8))),
        (Image.open(held), picture().transpose(Image.Transpose.ROTATE_270)),
    ):
        assert torch.equal(run(pipe, image=[given], strength=0.3), run(pipe, image=plain, strength=0.3))
    painted = np.full((8, 8, 4), (255, 255, 255, 0), np.uint8)
    painted[:, 5:, 3] = 255
    mask = Image.fromarray(painted[..., 3])
    same = run(pipe, image=picture(), mask_image=mask)
    assert torch.equal(run(pipe, image=picture(), mask_image=Image.fromarray(painted)), same)


def test_inpainting_latents_keeps_the_known_latents():
    pipe = make_pipeline("ddim", make_kl())
    grey = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 9:] = 255                                                           # half of a latent: made anew
    settings = dict(image=Image.fromarray(grey), mask_image=Image.fromarray(mask), output_type="latent")
    latents = run(pipe, **settings)
    with torch.no_grad():
        pixels = torch.from_numpy(grey).permute(2, 0, 1)[None].float() / 127.5 - 1
        z = pipe.vae.encode(pixels).latent_dist.mode()
    expected = (z - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    torch.testing.assert_close(latents[..., :4], expected[..., :4], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(latents[..., 4:], expected[..., 4:], atol=1e-2)


def test_variations_go_from_one_seeds_picture_to_anothers(pipe):
    one, other = run(pipe, generator=seeds(1)), run(pipe, generator=seeds(2))
    assert torch.equal(run(pipe, generator=seeds(1), variation_generator=seeds(2)), one)
    whole = run(pipe, generator=seeds(1), variation_generator=seeds(2), variation_strength=1.0)
    torch.testing.assert_close(whole, other, atol=1e-5, rtol=0)
    little = run(pipe, generator=seeds(1), variation_generator=seeds(2), variation_strength=0.1)
    assert 0 < float((little - one).abs().mean()) < float((other - one).abs().mean()) / 2
    with pytest.raises(ValueError, match="needs variation_generator"):
        run(pipe, variation_strength=0.5)
    given = run(pipe, latents=torch.randn(1, 1, 8, 8, generator=seeds(1)[0]), generator=None)
    torch.testing.assert_close(given, one)
    with pytest.raises(ValueError, match=r"latents have shape \(1, 1, 4, 4\), 1 images of this size need"):
        run(pipe, latents=torch.zeros(1, 1, 4, 4))


def test_any_fitting_scheduler_of_diffusers_and_no_other(pipe):
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    together = run(pipe, label=[0, 1], generator=seeds(0, 1))
    torch.testing.assert_close(together[1:], run(pipe, label=1, generator=seeds(1)), atol=1e-5, rtol=0)
    pipe.scheduler = DDIMScheduler(beta_schedule="scaled_linear")
    with pytest.raises(ValueError, match="DDIMScheduler has other noise levels"):
        run(pipe)
    pipe.set_sampler("unipc")
    assert type(pipe.scheduler).__name__ == "UniPCMultistepScheduler"
    with pytest.raises(ValueError, match="this one was trained for noise; use ddpm"):
        pipe.set_sampler("flow-euler")
    with pytest.raises(ValueError, match="did you mean"):
        pipe.set_sampler("unipcc")
    for wrong, said in (
        (dict(num_inference_steps=2.5), "num_steps=2.5 must be a whole number from 1"),
        (dict(num_inference_steps=0), "num_steps=0 must be"),
        (dict(guidance_scale="3"), "guidance scale '3' is no finite number"),
    ):
        with pytest.raises(ValueError, match=said):
            pipe(0, **wrong)


@pytest.mark.parametrize("vae", [None, make_kl()], ids=["pixels", "latents"])
def test_a_saved_pipeline_makes_the_same_images(vae, tmp_path):
    codec = dict(scale=0.3, shift=0.1) if vae else None
    pipe = make_pipeline("ddim", vae, codec, objective="noise")
    pipe.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 2
    again = LaMambaPipeline.from_pretrained(tmp_path)
    assert torch.equal(run(pipe), run(again))
    assert again.label_names == tuple(NAMES.values())
    assert again.codec_config == pipe.codec_config
    assert set(again.components) == {"unet", "vae", "scheduler"}
    half = LaMambaPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.unet.dtype == torch.bfloat16
    assert run(half).isfinite().all()
    # lamamba sample takes it, too, and makes the same pictures
    network, facts = open_network(tmp_path)
    assert facts.label_names == ("cat", "dog", "bird")
    assert (facts.scale, facts.shift) == ((0.3, 0.1) if vae else (1.0, 0.0))
    assert facts.image_size == (16 if vae else 8)
    decode = LatentDecoder(facts.autoencoder, facts).decode if vae else to_uint8
    pictures = generate(network, [2], [7], sampler="ddim", num_steps=6, guidance=2.0, decode=decode)
    same = levels(run(pipe, label="bird", generator=seeds(7), output_type="pil"))
    assert np.abs(pictures.astype(int) - same.reshape(pictures.shape)).max() <= 1


def images_by_diffusers_alone(folder, steps, work):
    """Images of label 1 and seed 7 in each of these numbers of steps, by a process that has the folder's own code."""
    code = (
        "import sys, torch; from diffusers import DiffusionPipeline; assert 'lamamba' not in sys.modules; "
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1], custom_pipeline='pipeline', trust_remote_code=True); "
        "images = [pipe(1, num_inference_steps=int(steps), generator=[torch.Generator().manual_seed(7)], "
        "output_type='pt').images for steps in sys.argv[3:]]; torch.save(images, sys.argv[2])"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(work / "modules"), "HF_HOME": str(work / "home")}
    command = [sys.executable, "-c", code, str(folder), str(work / "images.pt"), *map(str, steps)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return torch.load(work / "images.pt", weights_only=True)


def test_diffusers_alone_loads_it_with_the_code_beside_it(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    (images,) = images_by_diffusers_alone(tmp_path / "saved", [6], tmp_path)
    assert torch.equal(images, run(pipe, label=1, generator=seeds(7)))


def test_it_is_pushed_to_a_hub_whole(pipe, monkeypatch):
    """All but the network: what is created and uploaded there is looked at here."""
    import diffusers.models.modeling_utils as of_models
    import diffusers.pipelines.pipeline_utils as of_pipelines
    import diffusers.utils.hub_utils as hub
    from huggingface_hub.errors import EntryNotFoundError

    class Repository:
        repo_id = "me/digits"

    def no_card(*_, **__):
        raise EntryNotFoundError("no card is there yet")

    def upload(*, repo_id, folder_path, **_):
        assert repo_id == "me/digits"
        shutil.copytree(folder_path, there, dirs_exist_ok=True)

    for module in (hub, of_pipelines, of_models):
        monkeypatch.setattr(module, "create_repo", lambda *_, **__: Repository)
    monkeypatch.setattr(hub, "upload_folder", upload)
    monkeypatch.setattr(hub.ModelCard, "load", no_card)
    with tempfile.TemporaryDirectory() as there:
        pipe.push_to_hub("me/digits")
        again = LaMambaPipeline.from_pretrained(there)
        assert torch.equal(run(again), run(pipe))
        assert os.path.isfile(os.path.join(there, "pipeline.py"))
    with tempfile.TemporaryDirectory() as there:
        pipe.unet.push_to_hub("me/digits")
        again = LaMambaUNet.from_pretrained(there)
        assert all(map(torch.equal, again.state_dict().values(), pipe.unet.state_dict().values()))


@pytest.mark.parametrize(("damage", "said"), [
    (lambda unet: (unet / "diffusion_pytorch_model.safetensors").rename(unet / "diffusion_pytorch_model.bin"),
     "weights as a pickle can run code"),
    (lambda unet: (unet / "config.json").write_text((unet / "config.json").read_text().replace("width", "widht")),
     "configuration field 'widht' is unknown; did you mean 'width'"),
])
def test_loading_is_strict(damage, said, tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    damage(tmp_path / "unet")
    with pytest.raises(ValueError, match=said):
        LaMambaPipeline.from_pretrained(tmp_path)


def test_what_does_not_fit_together_is_refused(tmp_path):
    network = random_network(two_blocks(width=8, in_channels=1, objective="flow"))
    scheduler = make_scheduler("flow-euler", "flow")
    for given, said in (
        (dict(vae=make_kl()), "the vae makes latents of 4 channels, the network reads 1"),
        (dict(vae=None, codec={"scale": 1.0}), "codec was given without a vae"),
        (dict(vae=None, id2label={0: "cat"}), "id2label has 1 names for 3 classes; class 1 has none"),
    ):
        with pytest.raises(ValueError, match=said):
            LaMambaPipeline(network, scheduler=scheduler, **given)
    with pytest.raises(ValueError, match="codec entry 'scal' is unknown; did you mean 'scale'"):
        make_pipeline("ddim", make_kl(), {"scal": 2.0})
    pipe = make_pipeline()
    with pytest.raises(ValueError, match="only safetensors are written"):
        pipe.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match="there is no tiling to set"):
        pipe.enable_vae_tiling()


def test_slices_and_tiles_of_the_vae_change_little():
    pipe = make_pipeline("ddim", make_kl())
    whole = run(pipe, label=[0, 1], generator=seeds(0, 1))
    pipe.enable_vae_slicing()
    torch.testing.assert_close(run(pipe, label=[0, 1], generator=seeds(0, 1)), whole, atol=1e-4, rtol=0)
    pipe.disable_vae_slicing()
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 8, 16
    pipe.enable_vae_tiling()
    tiled = run(pipe, height=32, width=32)
    pipe.disable_vae_tiling()
    assert tiled.shape == (1, 3, 32, 32)
    assert not torch.equal(tiled, run(pipe, height=32, width=32))


def test_offloaded_networks_make_the_same_images(pipe):
    """accelerate's hooks, which bring weights to the device for each call of forward."""
    plain = run(pipe)
    accelerate.cpu_offload(
        pipe.unet, execution_device=torch.device("cpu"), preload_module_classes=pipe.unet._no_split_modules)
    assert {parameter.device.type for parameter in pipe.unet.parameters()} == {"meta"}
    torch.testing.assert_close(run(pipe), plain, atol=1e-5, rtol=0)
    assert run(pipe, height=16).shape == (1, 1, 16, 8)
    torch.testing.assert_close(run(pipe), plain, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_groups_on_disk_make_the_same_images(pipe, level, tmp_path):
    """diffusers' group offloading; what is on disk is poison in memory, so whatever is not brought back shows."""
    plain = run(pipe)
    pipe.unet.enable_group_offload(
        onload_device="cpu", offload_type=level, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path))
    assert not all(parameter.isfinite().all() for parameter in pipe.unet.parameters())
    for _ in range(2):
        torch.testing.assert_close(run(pipe), plain, atol=1e-5, rtol=0)
        assert run(pipe, height=16).shape == (1, 1, 16, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_stored_in_eight_bits(pipe, dtype):
    """diffusers' layerwise casting."""
    plain = unclipped(pipe)
    pipe.unet = pipe.unet.to(dtype)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.float8_e4m3fn, dtype}
    assert 0 < float((unclipped(pipe) - plain).norm()) < 0.05 * float(plain.norm())


def test_quantised_by_torchao(tmp_path, monkeypatch):
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    monkeypatch.setattr("lamamba.ops.layers.MANY_WEIGHTS", 1)                   # a kernel for every size
    pipe = make_pipeline("ddim", objective="noise", width=64)
    plain = unclipped(pipe)
    pipe.unet.save_pretrained(tmp_path / "plain")
    given = TorchAoConfig(Int8WeightOnlyConfig())
    pipe.unet = LaMambaUNet.from_pretrained(tmp_path / "plain", quantization_config=given, torch_dtype=torch.float32)
    quantised = unclipped(pipe)
    assert 0 < float((quantised - plain).norm()) < 0.05 * float(plain.norm())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("way", ["to", "enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_on_a_gpu(way):
    pipe = make_pipeline("ddpm", make_kl())
    plain = run(pipe, label=[0, 1], generator=seeds(0, 1))
    pipe.to("cuda") if way == "to" else getattr(pipe, way)()
    images = run(pipe, label=[0, 1], generator=seeds(0, 1))
    torch.testing.assert_close(images.cpu(), plain, atol=5e-3, rtol=0)


def test_a_cache_of_deep_features_is_the_sampler_s_and_afresh_in_every_call(pipe):
    plain = run(pipe, label=[1, 2], generator=seeds(1, 2), guidance_scale=1.5)
    cache = LaMambaCacheConfig(interval=3)
    pipe.unet.enable_cache(cache)
    cached = [run(pipe, label=[1, 2], generator=seeds(1, 2), guidance_scale=1.5) for _ in range(2)]
    assert torch.equal(*cached)
    assert not torch.equal(cached[0], plain)
    pipe.unet.disable_cache()
    assert torch.equal(run(pipe, label=[1, 2], generator=seeds(1, 2), guidance_scale=1.5), plain)
    images = generate(
        pipe.unet, [1, 2], [1, 2], sampler="ddim", num_steps=6, guidance=1.5, cache=cache, input_size=(8, 8))
    expected = (cached[0] * 255).permute(0, 2, 3, 1).round().numpy().astype(int)
    assert np.abs(images.astype(int) - expected).max() <= 1
    pipe.unet.enable_cache(cache)
    with pytest.raises(ValueError, match="interval 3 is longer than the run: the run has 1 evaluation"):
        run(pipe, image=picture(), strength=0.1)


def test_grey_levels_of_16_bits_and_bfloat16_are_the_picture_s_own(pipe):
    plain = run(pipe, image=picture(), strength=0.5)
    levels = np.asarray(picture()).astype(np.uint16) * 257
    assert torch.equal(run(pipe, image=Image.fromarray(levels), strength=0.5), plain)
    assert run(pipe, image=torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16), strength=0.5).isfinite().all()
    with pytest.raises(ValueError, match="32-bit: its range is unknown"):
        run(pipe, image=Image.fromarray(levels.astype(np.float32)), strength=0.5)


@pytest.mark.parametrize(("given", "said"), [
    (dict(generator=5), "generator=5 must be a torch.Generator"), (dict(generator=[None]), "torch.Generator"),
    (dict(latents=np.zeros((1, 1, 8, 8))), "must be a tensor"), (dict(guidance_model="shipped"), "must be a network"),
    (dict(callback_on_step_end=5), "must be a function"), (dict(strength=None), "must be a number"),
    (dict(variation_strength="0.5"), "must be a number"), (dict(height="8"), "must be a whole number"),
    (dict(width=8.5), "must be a whole number"), (dict(num_images_per_prompt=1.5), "must be a whole number"),
    (dict(guidance_interval=0.3), "must be two numbers"), (dict(guidance_interval=("a", "b")), "must be two numbers"),
    (dict(guidance_rescale="x"), "rescale 'x' must lie in 0"), (dict(class_labels=b"1"), "neither a class number"),
    (dict(num_images_per_label=None), "must be a whole number"),
    (dict(callback_on_step_end=lambda *_: 3), "returned 3"),
    (dict(callback_on_step_end_tensor_inputs="x0"), "must be a list of names"),
    (dict(callback_on_step_end_tensor_inputs=None), "must be a list of names"),
    (dict(image=[picture(), np.zeros((8, 8))]), "a list of one kind"), (dict(image=["a.png"]), "a list of one kind"),
    (dict(latents=torch.full((1, 1, 8, 8), float("nan"))), "NaN"), (dict(class_labels=True), "neither a class number"),
    (dict(num_images_per_label=10**12), "must be 1 to 10,000"), (dict(num_images_per_label=True), "must be 1 to "),
    (dict(guidance_model=torch.nn.Linear(2, 2)), "is a Linear, and no network of lamamba"),
    *((dict(callback_on_step_end=lambda *_, given=given: {"latents": given}), said) for given, said in (
        ("x", "returned latents='x': give a tensor"), (torch.zeros(1, 1, 4, 4), "and not .1, 1, 8, 8. as it got"),
        (torch.empty(1, 1, 8, 8, device="meta"), "on meta"))),
])
def test_arguments_of_other_kinds_are_refused_by_name(pipe, given, said):
    with pytest.raises(ValueError, match=said):
        pipe(**{"class_labels": 1, "num_inference_steps": 2, **given})


PICTURE = torch.rand(1, 1, 8, 8)
NO_PICTURES = {
    "sparse": (PICTURE.to_sparse(), "the tensor is sparse; give a dense one"),
    "CSR": (torch.eye(8).to_sparse_csr(), "is sparse"),
    "meta": (PICTURE.to("meta"), "on meta, without values"), "complex": (PICTURE + 0j, "is complex"),
    "nothing": (torch.empty(0, 1, 8, 8), "has no pixels"), "without rows": (np.zeros((1, 0, 8, 1)), "has no pixels"),
    "PIL": (Image.new("L", (8, 0)), r"has no pixels: its size is \(8, 0\)"),
    "path": ("a.png", "='a.png' must be a PIL image"), "bytes": (b"a", "must be a PIL image"),
    "generator": (iter([PICTURE]), "must be a PIL image"), "number": (np.array(0.5), "has the shape"),
    "video": (torch.rand(1, 1, 1, 8, 8), "has the shape"), "text": (np.full((8, 8), "a"), "is ambiguous"),
    "sizes": ([torch.rand(1, 8, 8), torch.rand(1, 4, 4)], "several shapes"),
    "bytes as floats": (PICTURE * 255, "numbers"),
    "NaN": (PICTURE * float("nan"), "numbers from nan to nan"), "levels": (Image.new("F", (8, 8)), "32-bit"),
}


@pytest.mark.parametrize("kind", NO_PICTURES)
def test_images_and_masks_that_are_none_are_refused_by_name(pipe, kind):
    given, said = NO_PICTURES[kind]
    for arguments in (dict(image=given), dict(image=PICTURE, mask_image=given)):
        with pytest.raises(ValueError, match=f"^{list(arguments)[-1]}.*{said}"):
            pipe(1, num_inference_steps=2, **arguments)


def test_latents_that_are_none_are_refused_and_any_precision_is_taken(pipe):
    noise = torch.randn(1, 1, 8, 8)
    for given, said in ((noise.to_sparse(), "latents: .*sparse"), (noise + 0j, "complex"), (noise.to("meta"), "meta")):
        with pytest.raises(ValueError, match=said):
            run(pipe, latents=given)
    assert torch.equal(run(pipe, latents=noise.double()), run(pipe, latents=noise))
    assert run(pipe, latents=noise.to(torch.float8_e4m3fn)).isfinite().all()
    with pytest.raises(ValueError, match=r"latents have shape \(\)"):
        make_pipeline("ddim", objective="noise", num_classes=0)(latents=torch.tensor(1.0))


def test_arrays_of_any_byte_order_are_the_same_picture(pipe):
    plain = run(pipe, image=PICTURE.permute(0, 2, 3, 1).numpy(), strength=0.5)
    for dtype in (">f4", "longdouble"):
        array = PICTURE.permute(0, 2, 3, 1).numpy().astype(dtype)
        assert torch.equal(run(pipe, image=array, strength=0.5), plain)


def test_an_interval_may_be_a_list_or_an_array(pipe):
    plain = run(pipe, guidance_interval=(0.2, 0.8))
    for interval in ([0.2, 0.8], np.array([0.2, 0.8])):
        assert torch.equal(run(pipe, guidance_interval=interval), plain)
