"""Errors of each back end's network against the official one: python benchmarks/parity_errors.py

Largest error over largest value, float32: outputs, the worst of all saved gradients, guidance; then whole sampling
chains from the official chains' noise, with the same analytic network.
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import torch
from diffusers.schedulers import scheduling_ddpm
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))

from lamamba import load_official
from lamamba.diffusion.denoise import denoise, make_scheduler
from lamamba.diffusion.guidance import guided
from lamamba.models.official import official_name
from lamamba.ops import use_backend
from lamamba.ops.selective_scan import OP
from tests.diffusion.test_official_values import toy
from tests.networks import FILES, PARITY, load_case, relative_error

CHAINS = (("ddpm", 25), ("ddpm", 10), ("ddim", 25))


def errors(name: str) -> tuple[float, float, float | None]:
    """Errors of outputs, gradients and guidance with the requested back end."""
    case = load_case(name)
    model, tensors = load_official(case.weights, case.config), case.tensors
    x = tensors["in.x"].requires_grad_()
    output = model(x, tensors["in.t"], case.labels)
    (output * tensors["in.w"]).mean().backward()
    found = {official_name(key): parameter.grad for key, parameter in model.named_parameters()} | {"x": x.grad}
    gradients = [
        relative_error(found[key.removeprefix("grad.").removeprefix("weights.")].reshape(value.shape), value)
        for key, value in tensors.items() if key.startswith("grad.")
    ]
    guidance = None
    if "cfg.out" in tensors:
        with torch.no_grad():
            predict = guided(model, tensors["cfg.y"], float(tensors["cfg.scale"]), case.config.num_classes)
            guidance = relative_error(predict(tensors["cfg.x"], tensors["cfg.t"]), tensors["cfg.out"])
    return relative_error(output, tensors["out.eps_and_var"]), max(gradients), guidance


def chain_error(sampler: str, num_steps: int) -> float:
    """Error of the final image of a sampler's chain."""
    official, chain = load_file(PARITY / "diffusion.safetensors"), f"{sampler}{num_steps}"
    with mock.patch.object(scheduling_ddpm, "randn_tensor", side_effect=official.get(f"{chain}.noise", ())):
        x0 = denoise(toy, make_scheduler(sampler, "noise", num_steps), official[f"{chain}.x_T"])
    return relative_error(x0, official[f"{chain}.x_0"])


def main() -> None:
    print("| file | back end | outputs | gradients | guidance |\n|---|---|---|---|---|")
    for name in FILES:
        for backend in OP.backends:
            if reason := backend.unsupported_reason("cpu", torch.float32, 1):
                print(f"({backend.name}: {reason})", file=sys.stderr)
                continue
            with use_backend(backend.name):
                output, gradient, guidance = errors(name)
            last = f"{guidance:.1e}" if guidance is not None else "-"
            print(f"| {name} | {backend.name} | {output:.1e} | {gradient:.1e} | {last} |")
    print("\n| sampler | steps | last image |\n|---|---|---|")
    for sampler, num_steps in CHAINS:
        print(f"| {sampler} | {num_steps} | {chain_error(sampler, num_steps):.1e} |")


if __name__ == "__main__":
    main()
