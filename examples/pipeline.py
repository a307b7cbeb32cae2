"""The pipeline in diffusers: another scheduler, pictures on the way, inpainting: python examples/pipeline.py"""

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler
from PIL import Image

from lamamba import LaMambaPipeline
from lamamba.viz.grids import grid_picture

pipe = LaMambaPipeline.from_pretrained("shipped")                               # or a run: "runs/digits"
pipe.set_progress_bar_config(disable=True)
generators = [torch.Generator().manual_seed(k) for k in range(4)]               # one each: image k depends on seed k
pictures = pipe(["3", "8", "5", "0"], generator=generators).images              # PIL images, 28 steps, own guidance

pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
frames: list[np.ndarray] = []


def keep(pipe, step, timestep, tensors):
    """Called after every step: x0 is the clean image as the network predicts it."""
    frames.append(((tensors["x0"] + 1) * 127.5).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy())
    return {}


pipe("3", num_inference_steps=6, generator=generators[:1], callback_on_step_end=keep,
     callback_on_step_end_tensor_inputs=["x0"])
mask = Image.fromarray(np.repeat([[0], [255]], 4, axis=0).repeat(8, axis=1).astype(np.uint8))     # white: drawn anew
again = pipe("3", image=pictures[0], mask_image=mask, generator=generators[:1]).images[0]
grid_picture(np.concatenate(frames), columns=len(frames)).save("way-from-noise.png")
grid_picture(np.stack([np.asarray(picture)[..., None] for picture in (*pictures, again)]), columns=5).save("digits.png")
