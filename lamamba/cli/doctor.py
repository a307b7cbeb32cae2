"""lamamba doctor: what this machine will run, why, what it lacks, and whether each back end is right."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import dataclass
from typing import Any

from lamamba._version import __version__
from lamamba.cli.parse import parse

DESCRIPTION = """Print versions, the back end that each op will use on each device and why, and what is missing; then
check every back end that runs here, forward and every gradient, against the plain recurrence in float64, and the
layers that are chosen here against their formulas.

The exit status is 1 when a check fails."""

DTYPES = ("float32", "bfloat16")
MAX_ERROR = 1e-4
"""Largest error over largest value that float32 may have, forward or in a gradient; right back ends have about 1e-6."""
RESULTS = ("y", "x", "dt", "B", "C", "W_dt", "b_dt", "A", "D")
PACKAGES = ("diffusers", "accelerate", "safetensors", "numpy", "triton")


@dataclass(frozen=True, kw_only=True)
class DoctorArguments:
    json: bool = False
    """Print JSON instead of text."""


def main(arguments: list[str]) -> None:
    chosen = parse(DoctorArguments, arguments, "doctor", DESCRIPTION)
    findings = examine()
    print(json.dumps(findings, indent=2) if chosen.json else _report(findings))
    if not findings["healthy"]:
        raise SystemExit(1)


def examine() -> dict[str, Any]:
    """Everything that the command reports, as plain values."""
    from lamamba.inference.compiling import find_compiler
    from lamamba.ops.selective_scan import OP

    devices = _devices()
    compilers = {language: find_compiler(language) for language in ("C", "C++")}
    ops = [_choice(OP, device, dtype) for device in devices for dtype in DTYPES]
    checks = [check for device in devices for backend in OP.backends if (check := check_backend(OP, backend, device))]
    checks += [check_layers(device) for device in devices]
    return {
        "versions": _versions(), "devices": devices, "cpu_kernels": _cpu_kernels(), "ops": ops,
        "layers": [_layers_choice(device, dtype) for device in devices for dtype in DTYPES],
        "compilers": compilers, "missing": _missing(devices, compilers), "checks": checks,
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("LAMAMBA_")},
        "healthy": all(check["passed"] for check in checks) and not any("error" in op for op in ops),
    }


def _versions() -> dict[str, str | None]:
    import torch

    from lamamba.cli.bench import commit, version_of

    return {
        "lamamba": __version__, "commit": commit(), "python": platform.python_version(), "torch": torch.__version__,
        "cuda": torch.version.cuda, **{name: version_of(name) for name in PACKAGES}, "system": platform.platform(),
    }


def _devices() -> dict[str, str]:
    import torch

    from lamamba.cli.bench import device_name

    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return {name: device_name(name) for name in names}


def _cpu_kernels() -> dict[str, Any]:
    from lamamba.ops import native

    try:
        return {"instruction_set": native.choose_instruction_set(), "threads": native.num_threads(),
                "note": native.describe()}
    except (ValueError, RuntimeError, OSError) as error:
        return {"instruction_set": None, "threads": native.num_threads(), "note": str(error)}


def _unsupported_reason(backend: Any, device: str, dtype: Any, state_size: int = 1) -> str | None:
    """Why a back end cannot run, be it a reason of its own or a setting that cannot be obeyed."""
    try:
        return backend.unsupported_reason(device.split(":")[0], dtype, state_size)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        return str(error)


def _choice(op: Any, device: str, dtype: str) -> dict[str, Any]:
    """The back end that an op will use, and for each of them why not."""
    import torch

    precision = getattr(torch, dtype)
    refusals = {backend.name: _unsupported_reason(backend, device, precision) for backend in op.backends}
    found: dict[str, Any] = {"op": op.name, "device": device, "dtype": dtype, "refusals": refusals}
    try:
        found["backend"] = op.choose(torch.empty(0, device=device, dtype=precision), 1)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        found |= {"backend": None, "error": str(error)}
        return found
    automatic = next((name for name, reason in refusals.items() if reason is None), None)
    if forced := os.environ.get("LAMAMBA_BACKEND"):
        found["reason"] = f"LAMAMBA_BACKEND={forced} asks for it" + (
            f"; by itself it would be {automatic}" if automatic != found["backend"] else ""
        )
    else:
        found["reason"] = "the fastest that can run here"
    return found


def _layers_choice(device: str, dtype: str) -> dict[str, Any]:
    """What runs norms, gates, windows and the convolution, without gradients and with them."""
    import torch

    from lamamba.ops.layers import backend_for

    x = torch.zeros((1, 1, 1, 1), device=device, dtype=getattr(torch, dtype))
    return {"device": device, "dtype": dtype, "inference": backend_for(x),
            "training": backend_for(x.requires_grad_())}


def _missing(devices: dict[str, str], compilers: dict[str, str | None]) -> list[str]:
    """What would make more things run, or run faster."""
    from lamamba.cli.bench import version_of
    from lamamba.inference.compiling import C_COMPILERS, CXX_COMPILERS

    missing = []
    has_gpu = any(device.startswith("cuda") for device in devices)
    if has_gpu and version_of("triton") is None:
        missing.append("triton is not installed: GPUs run the slow back end 'torch'; pip install triton")
    if compilers["C"] is None:
        missing.append(
            f"no C compiler ({', '.join(C_COMPILERS)}, or the variable CC): Triton needs one once, at its first start "
            f"on a GPU{'' if has_gpu else ' (there is none here)'}"
        )
    if compilers["C++"] is None:
        missing.append(
            f"no C++ compiler ({', '.join(CXX_COMPILERS)}, or the variable CXX): torch.compile on the CPU needs one "
            f"always; everything else runs without"
        )
    kernels = _cpu_kernels()
    if kernels["instruction_set"] is None:
        missing.append(f"compiled CPU kernels: {kernels['note']}")
    return missing


def check_backend(op: Any, backend: Any, device: str) -> dict[str, Any] | None:
    """Largest relative error of a back end, forward and in every gradient, in float32; None where it cannot run."""
    import torch

    from lamamba.ops.selective_scan import reference

    if _unsupported_reason(backend, device, torch.float32, state_size=2):
        return None
    began = time.perf_counter()
    inputs, grad_y = _small_inputs()
    exact = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    expected = [reference.forward(*exact), *reference.backward(grad_y.double(), *exact)]
    found: dict[str, Any] = {"op": op.name, "backend": backend.name, "device": device}
    try:
        module = backend.load()
        there, gradient = [tensor.to(device) for tensor in inputs], grad_y.to(device)
        results = [module.forward(*there), *module.backward(gradient, *there)]
        errors = {
            name: float((result.cpu().double() - truth).abs().max() / truth.abs().max())
            for name, result, truth in zip(RESULTS, results, expected, strict=True)
        }
    except Exception as error:                                                  # whatever it is, it is the finding
        return {**found, "passed": False, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))              # NaN is the worst
    gradients = [errors[name] for name in RESULTS[1:]]
    return {
        **found, "forward_error": errors["y"],
        "gradient_error": errors[worst] if worst != "y" else max(gradients),
        "worst": worst, "passed": all(error <= MAX_ERROR for error in errors.values()),
        "seconds": time.perf_counter() - began,
    }


def check_layers(device: str) -> dict[str, Any]:
    """Largest relative error of the layers as they are chosen on a device, without gradients, against the formulas."""
    import torch

    from lamamba.ops import layers

    began, random = time.perf_counter(), torch.Generator().manual_seed(0)
    (b, h, w, c), heads = (2, 5, 7, 20), 2

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    calls = {
        "modulated_norm": (normal(b, h, w, c), normal(c), normal(c), normal(b, c), normal(b, c), 1e-5),
        "gated_norm": (normal(b, h, w, c), normal(b, h, w, c), normal(c), normal(c), 1e-5),
        "local_mixing": (normal(b, h, w, c), normal(c, 1, 3, 3)),
        "window_attention": (normal(b, h, w, 3 * c), normal(heads, 16, 16), None, heads, (4, 4), (0, 0)),
    }
    found: dict[str, Any] = {"op": "layers", "device": device}
    try:
        errors = {}
        for name, arguments in calls.items():
            exact = [value.double() if isinstance(value, torch.Tensor) else value for value in arguments]
            there = [value.to(device) if isinstance(value, torch.Tensor) else value for value in arguments]
            truth = getattr(layers.reference, name)(*exact)
            with torch.no_grad():
                result = getattr(layers, name)(*there).cpu().double()
            errors[name] = float((result - truth).abs().max() / truth.abs().max())
        found["backend"] = layers.backend_for(torch.zeros((1, 1, 1, 1), device=device))
    except Exception as error:                                                  # whatever it is, it is the finding
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return {**found, "backend": "?", "passed": False, "error": message}
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    return {
        **found, "forward_error": errors[worst], "worst": worst, "seconds": time.perf_counter() - began,
        "passed": all(error <= MAX_ERROR for error in errors.values()),
    }


def _small_inputs() -> tuple[list[Any], Any]:
    """Inputs of the scan at the scale of a fresh network, on a grid whose sizes no vector width divides."""
    import torch

    from lamamba.ops.scan_paths import scan_paths

    random = torch.Generator().manual_seed(0)
    (height, width), b, c, g, n, r = (5, 7), 2, 20, 4, 2, 3

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    delta = torch.exp(torch.rand((g, c), generator=random) * 4.6 - 6.9)         # 0.001 to 0.1
    tokens = [normal(b, height * width, *rest) for rest in ((c,), (g, r), (g, n), (g, n))]
    A = -torch.arange(1.0, n + 1).expand(g, c, n).contiguous()
    parameters = [normal(g, c, r) * 0.3, torch.log(torch.expm1(delta)), A, normal(g, c)]
    return [*tokens, *parameters, scan_paths(height, width)], normal(b, height * width, c)


def _report(findings: dict[str, Any]) -> str:
    versions, kernels = findings["versions"], findings["cpu_kernels"]
    lines = ["versions"]
    lines += [f"  {name:<13}{value or _absence(name)}" for name, value in versions.items()]
    lines += ["", "devices"] + [f"  {name:<13}{what}" for name, what in findings["devices"].items()]
    lines += ["", f"CPU kernels    {kernels['note']}"]
    lines += [f"{language + ' compiler':<15}{path or 'none'}" for language, path in findings["compilers"].items()]
    for op in findings["ops"]:
        lines += ["", f"{op['op']} on {op['device']}, {op['dtype']}: "
                  + (f"{op['backend']} ({op['reason']})" if op["backend"] else f"cannot run: {op['error']}")]
        for name, reason in op["refusals"].items():
            used = "will be used" if name == op["backend"] else "can run here"
            lines.append(f"  {name:<13}{'no: ' + reason if reason else used}")
    lines += ["", "layers: norms, gates, windows, convolution (formula: several PyTorch operations)"]
    lines += [f"  {layers['device']}, {layers['dtype']}: {layers['inference']}, with gradients {layers['training']}"
              for layers in findings["layers"]]
    lines += ["", "missing" if findings["missing"] else "missing        nothing"]
    lines += [f"  - {what}" for what in findings["missing"]]
    variables = findings["environment"]
    lines += ["", "variables" if variables else "variables      none of ours is set"]
    lines += [f"  {name}={value}" for name, value in variables.items()]
    lines += ["", "checks against the formulas in float64 (largest error over largest value, float32)"]
    for check in findings["checks"]:
        verdict = "right" if check["passed"] else "WRONG"
        detail = check.get("error")
        if detail is None:
            gradients = f", gradients {check['gradient_error']:.1e}" if "gradient_error" in check else ""
            detail = f"forward {check['forward_error']:.1e}{gradients} (allowed {MAX_ERROR:.0e})"
            detail += f", {check['seconds']:.2f} s"
        lines.append(f"  {check['op']:<14} {check['backend']:<10} {check['device']:<7} {verdict}: {detail}")
    lines += ["", "all is well" if findings["healthy"] else "something is wrong: see the lines above"]
    return "\n".join(lines)


def _absence(package: str) -> str:
    """Why there is no version to print."""
    if package == "triton":
        return "not installed: only GPUs need it"
    if package == "cuda":
        return "none: this build of torch has no CUDA"
    return "not a checkout" if package == "commit" else "not installed"
