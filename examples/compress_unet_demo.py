"""Try compress_unet.py in minutes, on a small pipeline that draws digits: python examples/compress_unet_demo.py

Makes a StableDiffusionPipeline of tiny parts (tokenizer of letters, text encoder, autoencoder, U-Net), trains it on
captions of the handwritten digits ("a three"), and removes half of its U-Net. Needs transformers, datasets and
scikit-learn. With --quick everything is trained for a few steps, to see that it runs.
"""

import argparse
import json
import string
from pathlib import Path

import compress_unet
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lamamba.compression.pipeline_calibration import encode_images, encode_prompts, target, training_scheduler
from lamamba.data.digits import Digits

CAPTIONS = ["a zero", "a one", "a two", "a three", "a four", "a five", "a six", "a seven", "an eight", "a nine"]
SIDE, TOKENS = 16, 9


def write_images(folder: Path) -> None:
    """The digits as PNGs of 16 x 16 pixels, with captions in metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    digits, lines = Digits(), []
    for number, (image, label) in enumerate(zip(digits.images, digits.labels, strict=True)):
        picture = Image.fromarray(image[0]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        picture.convert("RGB").save(folder / f"{number:04d}.png")
        lines.append(json.dumps({"file_name": f"{number:04d}.png", "text": CAPTIONS[label]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_pipeline(folder: Path) -> StableDiffusionPipeline:
    """Tiny parts with random weights."""
    letters = string.ascii_lowercase
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=TOKENS, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1,
    ))
    vae = AutoencoderKL(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=8, sample_size=SIDE,
    )
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2, block_out_channels=(32, 64), layers_per_block=2, cross_attention_dim=32,
        attention_head_dim=4, norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return StableDiffusionPipeline(
        vae, text_encoder, CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS), unet,
        DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1), None, None,
        requires_safety_checker=False,
    )


def train_autoencoder(vae: AutoencoderKL, pixels: torch.Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    for step in range(steps):
        x = pixels[torch.randint(len(pixels), (32,))]
        posterior = vae.encode(x).latent_dist
        loss = (vae.decode(posterior.sample()).sample - x).square().mean() + 1e-4 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            print(f"autoencoder, step {step + 1}: loss {loss.item():.4f}", flush=True)
    with torch.no_grad():
        vae.register_to_config(scaling_factor=1 / vae.encode(pixels[:512]).latent_dist.mode().std().item())


def train_unet(pipe: StableDiffusionPipeline, x0: torch.Tensor, captions: list[str], steps: int) -> None:
    """The U-Net; the text encoder keeps its random weights, which tell the words apart."""
    scheduler, optimizer = training_scheduler(pipe), torch.optim.AdamW(pipe.unet.parameters(), lr=1e-3)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    known = sorted({*captions, ""})
    table = encode_prompts(pipe, known)["encoder_hidden_states"]
    rows = torch.tensor([known.index(caption) for caption in captions])
    for step in range(steps):
        batch = torch.randint(len(x0), (64,))
        chosen = rows[batch].where(torch.rand(64) > 0.1, known.index(""))
        eps, t = torch.randn_like(x0[batch]), torch.randint(1000, (64,))
        output = pipe.unet(scheduler.add_noise(x0[batch], eps, t), t, table[chosen]).sample
        loss = (output - target(scheduler, x0[batch], eps, t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pipe.unet.parameters(), 1.0)
        optimizer.step()
        rates.step()
        if step % 100 == 99:
            print(f"U-Net, step {step + 1}: loss {loss.item():.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("compressed-digits"))
    parser.add_argument("--quick", action="store_true")
    options, rest = parser.parse_known_args()                                   # the rest goes to compress_unet.py
    quick, folder = options.quick, options.out
    torch.manual_seed(0)
    if not (folder / "teacher/model_index.json").exists():
        write_images(folder / "images")
        pipe = make_pipeline(folder / "tokenizer")
        digits = Digits()
        pictures = [Image.open(path) for path in sorted((folder / "images").glob("*.png"))]
        pixels = pipe.image_processor.preprocess(pictures)
        train_autoencoder(pipe.vae, pixels, 5 if quick else 400)
        x0 = torch.cat([encode_images(pipe, pictures[row : row + 256]) for row in range(0, len(pictures), 256)])
        train_unet(pipe, x0, [CAPTIONS[label] for label in digits.labels], 5 if quick else 1000)
        pipe.save_pretrained(folder / "teacher")
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(CAPTIONS) + "\n", encoding="utf-8")
    sizes = ("16", "4", "2") if quick else ("192", "300", "30")
    compress_unet.main([
        str(folder / "teacher"), "--images", str(folder / "images"), "--prompts", str(prompts), "--batch", "32",
        "--lr", "5e-4", "--workers", "0", "--save-every", "100", "--out", str(folder / "half"),
        "--samples", sizes[0], "--steps", sizes[1], "--gallery-steps", sizes[2], *rest,
    ])
    print(f"see {folder / 'half/gallery.png'}")


if __name__ == "__main__":
    main()
