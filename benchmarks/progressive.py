r"""A rival of the flow map at equal cost: progressive distillation (Salimans and Ho, 2022, "Progressive distillation").

    python benchmarks/progressive.py --out rival --images cache --json benchmarks/results/progressive.json

A student of n steps learns to do in one step what its teacher does in two; then it is the teacher of a student of n/2:

    t = k/n, r = t - 1/n, s = (t + r)/2 for k = 1 .. n
    target = (u'(x_t, t, s) + u'(x_s, s, r))/2,  x_s = x_t - (t - s) u'(x_t, t, s)

u' is the average of the student before, and at first the flow model's velocity with the guidance scale: 32 Euler steps.
Network, guidance scale as an input, data, loss, optimizer, average, batch and number of steps are those of the recipe
digits_few_steps; each student has the same share of the steps, and a learning rate that falls to zero. A step costs a
pass forward and backward of a batch and two of targets, the flow map's one and a quarter to two.

The last three students are judged at their own number of steps, as flow_maps.py judges flow maps. A student that is
there already is not trained again, and images that are there are not drawn again.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.flow_maps import STEPS, judge
from lamamba import LaMambaUNet
from lamamba.data.codec import to_pixels
from lamamba.data.digits import Digits
from lamamba.diffusion.flow_map import draw_scale, flow_map_loss, step_to
from lamamba.diffusion.schedule import NUM_TIMESTEPS, per_image
from lamamba.options.training import TrainConfig, load_recipe
from lamamba.runs.model import open_network
from lamamba.training.checkpoint import update_ema
from lamamba.training.distill import VelocityTeacher
from lamamba.training.start import start_network

RECIPE = "digits_few_steps"
STUDENTS = (16, 8, 4, 2, 1)
MeanVelocity = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x, t, r, labels, scale) -> the step's velocity."""


def mean_velocity(network: LaMambaUNet) -> MeanVelocity:
    """A frozen student as the next one's teacher."""
    return lambda x, t, r, labels, scale: network(
        x, t * NUM_TIMESTEPS, labels, end_timestep=r * NUM_TIMESTEPS, guidance_scale=scale)


def two_steps(teacher: MeanVelocity, x: Tensor, t: Tensor, r: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """The mean velocity of the teacher's two steps from t to r: (b, c, h, w)."""
    s = (t + r) / 2
    u1 = teacher(x, t, s, labels, scale)
    return (u1 + teacher(step_to(x, u1, t, s), s, r, labels, scale)) / 2


def distill(config: TrainConfig, student: LaMambaUNet, teacher: MeanVelocity, num_steps: int) -> LaMambaUNet:
    """The average of a student of so many sampling steps, trained for as many optimizer steps as `config` has."""
    digits, generator = Digits(config.data.image_size), torch.Generator().manual_seed(config.seed)
    images, classes = to_pixels(digits.images), torch.from_numpy(digits.labels)
    guidance_range, batch = student.architecture.guidance_range, config.batch_size
    assert guidance_range is not None
    average = LaMambaUNet(student.architecture).requires_grad_(False).eval()
    average.load_state_dict(student.state_dict())
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=config.optimizer.weight_decay)
    for step in range(config.steps):
        chosen = torch.randint(len(images), (batch,), generator=generator)
        x0, labels = images[chosen], classes[chosen]
        eps = torch.randn(x0.shape, generator=generator)
        t = torch.randint(1, num_steps + 1, (batch,), generator=generator) / num_steps
        r = t - 1 / num_steps
        scale = draw_scale(torch.rand(batch, generator=generator), guidance_range, config.flow_map.lowest_share)
        xt = per_image(1 - t, x0) * x0 + per_image(t, x0) * eps
        with torch.no_grad():
            target = two_steps(teacher, xt, t, r, labels, scale)
        losses = flow_map_loss(mean_velocity(student)(xt, t, r, labels, scale), target)
        optimizer.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), config.optimizer.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        optimizer.step()
        update_ema(average, student, config.ema_decays[0])
        if (step + 1) % 100 == 0:
            loss = float(losses.detach().mean())
            print(f"student of {num_steps}: step {step + 1} of {config.steps}, loss {loss:.4f}", flush=True)
    return average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the students")
    parser.add_argument("--images", type=Path, required=True, help="folder where images are kept, as of flow_maps.py")
    parser.add_argument("--json", type=Path, help="results")
    parser.add_argument("--steps", type=int, help="of all students together; by default the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    recipe = load_recipe(RECIPE)
    network, metadata = open_network("shipped-few-steps")
    student = start_network(recipe.start, network.architecture, metadata.label_names).train()
    flow = VelocityTeacher(recipe.distill, network.architecture, metadata, torch.device("cpu"))

    def teacher(x: Tensor, t: Tensor, r: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        return flow.velocity(x, t, labels, scale)

    for number, num_steps in enumerate(STUDENTS):
        folder = options.out / f"steps-{num_steps}"
        if not folder.is_dir():
            config = dataclasses.replace(
                recipe, seed=options.seed + number, steps=(options.steps or recipe.steps) // len(STUDENTS))
            distill(config, student, teacher, num_steps).save_pretrained(folder)
        average, _ = open_network(folder)
        student.load_state_dict(average.state_dict())
        teacher = mean_velocity(average.requires_grad_(False).eval())
    print(judge([(str(options.out / f"steps-{n}"), n) for n in STEPS], options.images, options.json))


if __name__ == "__main__":
    main()
