"""lamamba.doctor: what this machine runs and why, what it lacks, and whether each back end is right."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from lamamba._version import __version__
from lamamba.benchmarking.checks import MAX_ERROR, check_backend, check_layers, unsupported_reason
from lamamba.benchmarking.environment import commit, device_name, variables, versions
from lamamba.inference.compiling import C_COMPILERS, CXX_COMPILERS, find_compiler
from lamamba.ops import native
from lamamba.ops.layers import backend_for
from lamamba.ops.selective_scan import OP
from lamamba.options.base import verb
from lamamba.options.doctor import DoctorOptions
from lamamba.utils.versions import version_of

DTYPES = ("float32", "bfloat16")
PACKAGES = ("diffusers", "accelerate", "safetensors", "numpy", "triton")
ABSENCES = {
    "triton": "not installed: only GPUs need it", "cuda": "none: this build of torch has no CUDA",
    "commit": "not a checkout",
}
"""Text in place of a missing version."""


@dataclass(frozen=True)
class DoctorResult:
    """Findings as plain values: versions, devices, ops, layers, compilers, missing, checks, environment."""

    findings: dict[str, Any]

    @property
    def healthy(self) -> bool:
        """Whether every check passed and every op has a back end."""
        return self.findings["healthy"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return self.findings

    def __str__(self) -> str:
        return _report(self.findings)


@verb
def doctor(options: DoctorOptions | None = None) -> DoctorResult:
    """Versions, devices, compilers, the back end of each operator and why; checks of every back end that runs here.

    Back ends of the scan are compared with the reference in float64, forward and every gradient, layers without
    gradients. A failed check is a finding, not an exception.
    """
    devices = {name: device_name(name) for name in ("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())))}
    compilers = {language: find_compiler(language) for language in ("C", "C++")}
    ops = [_choice(OP, device, dtype) for device in devices for dtype in DTYPES]
    checks = [check for device in devices for backend in OP.backends if (check := check_backend(OP, backend, device))]
    checks += [check_layers(device) for device in devices]
    return DoctorResult({
        "versions": {"lamamba": __version__, "commit": commit(), **versions(*PACKAGES)}, "devices": devices,
        "cpu_kernels": _cpu_kernels(), "ops": ops,
        "layers": [_layers_choice(device, dtype) for device in devices for dtype in DTYPES],
        "compilers": compilers, "missing": _missing(devices, compilers), "checks": checks,
        "environment": variables(),
        "healthy": all(check["passed"] for check in checks) and not any("error" in op for op in ops),
    })


def _cpu_kernels() -> dict[str, Any]:
    try:
        return {"instruction_set": native.choose_instruction_set(), "threads": native.num_threads(),
                "note": native.describe()}
    except (ValueError, RuntimeError, OSError) as error:
        return {"instruction_set": None, "threads": native.num_threads(), "note": str(error)}


def _choice(op: Any, device: str, dtype: str) -> dict[str, Any]:
    """The back end that an operator uses, and the reasons of those that cannot run."""
    precision = getattr(torch, dtype)
    refusals = {backend.name: unsupported_reason(backend, device, precision) for backend in op.backends}
    found = {"op": op.name, "device": device, "dtype": dtype, "refusals": refusals}
    try:
        backend = op.choose(torch.empty(0, device=device, dtype=precision), 1)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        return {**found, "backend": None, "error": str(error)}
    reason = "the fastest that can run here"
    if forced := os.environ.get("LAMAMBA_BACKEND"):
        automatic = next((name for name, refusal in refusals.items() if refusal is None), None)
        other = f"; by itself it would be {automatic}" if automatic != backend else ""
        reason = f"LAMAMBA_BACKEND={forced} selects it{other}"
    return {**found, "backend": backend, "reason": reason}


def _layers_choice(device: str, dtype: str) -> dict[str, Any]:
    """Back ends of norms, gates, windows and the convolution, for inference and training."""
    x = torch.zeros((1, 1, 1, 1), device=device, dtype=getattr(torch, dtype))
    return {"device": device, "dtype": dtype, "inference": backend_for(x), "training": backend_for(x.requires_grad_())}


def _missing(devices: dict[str, str], compilers: dict[str, str | None]) -> list[str]:
    """What to install for more or faster back ends."""
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


def _report(findings: dict[str, Any]) -> str:
    versions, kernels = findings["versions"], findings["cpu_kernels"]
    lines = ["versions"]
    lines += [f"  {name:<13}{value or ABSENCES.get(name, 'not installed')}" for name, value in versions.items()]
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
    lines += ["", "variables" if findings["environment"] else "variables      none of ours is set"]
    lines += [f"  {name}={value}" for name, value in findings["environment"].items()]
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
