"""Registers, shared memory and spills of the Triton layers, from their machine code; no GPU is needed.

    python benchmarks/layers_triton_resources.py [--quick] [--json]

Compiles every kernel as training LaMamba-XL launches it (16-bit tokens with float32 parameters; float32 throughout) for
sm_80 and sm_90, and prints registers, shared memory with what a launch adds, and spills.
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parent))

from scan_triton_resources import ARCHITECTURES, resources

from lamamba.ops.layers import triton_mixing, triton_norms, triton_windows

MODULES = {module.__name__.rsplit(".", 1)[1]: module for module in (triton_mixing, triton_norms, triton_windows)}
WIDTHS = (320, 640, 1280)
"""Channels of LaMamba-XL's blocks, 16 heads each; the scans inside have twice as many."""
NUM_HEADS = 16
FLOAT32 = frozenset(("sums", "grad_parameters", "weight", "bias"))
NOT_DIVISIBLE = frozenset(("eps", "scale", "shares", "strips", "units", "units_each", "tokens_each", "rows", "columns"))
SMALL = frozenset(("shift_h", "shift_w"))


def variants(quick: bool):
    """(name, module, kernel, constants, warps, float type of the tokens) of every launch at XL's shapes.

    quick: one of each kernel, the widest; in float32 only the one that needs most.
    """
    for variant in _all_variants(WIDTHS[-1:] if quick else WIDTHS):
        _, _, kernel, constants, _, dtype = variant
        if not quick or kernel == "_attend_backward" or (dtype == "bf16" and not constants.get("BACKWARD")):
            yield variant


def _all_variants(widths: tuple[int, ...]):
    for dtype in ("bf16", "fp32"):
        for width in widths:
            def norm(name, kernel, channels, dtype=dtype, **absent):
                block, warps = triton_norms._block(channels)
                constants = {"BLOCK": block, **absent}
                return f"{name}, {dtype} c={channels}", "triton_norms", kernel, constants, warps, dtype

            yield norm("modulated norm", "_norm", width, z=None, z_row=0)
            yield norm("modulated norm, backward", "_norm_backward", width, z=None, grad_z=None, z_row=0)
            yield norm("gated norm", "_norm", 2 * width, shift=None, scale=None, shift_row=0, scale_row=0)
            yield norm("gated norm, backward", "_norm_backward", 2 * width, scale=None, scale_row=0)
            yield norm("gated sum, backward", "_gated_sum_backward", width)
        for width in widths:
            d = width // NUM_HEADS
            constants = {"H": 8, "W": 8, "TOKENS": 64, "D": d, "CHUNK": triton_windows.CHUNK, "heads": NUM_HEADS}
            for name, kernel, warps in (("window attention", "_attend", triton_windows.FORWARD_WARPS),
                                        ("window attention, backward", "_attend_backward",
                                         triton_windows.BACKWARD_WARPS)):
                yield f"{name}, {dtype} d={d}", "triton_windows", kernel, constants, warps, dtype
        tile = {"COLUMNS": triton_mixing.COLUMNS, "BLOCK": triton_mixing.BLOCK}
        warps = triton_mixing.WARPS
        yield f"local mixing, {dtype}", "triton_mixing", "_convolve", {**tile, "BACKWARD": False}, warps, dtype
        yield (f"local mixing, backward: x, {dtype}", "triton_mixing", "_convolve", {**tile, "BACKWARD": True}, warps,
               dtype)
        yield f"local mixing, backward: s, weights, {dtype}", "triton_mixing", "_convolve_backward", tile, warps, dtype
    block = {"BLOCK": triton_norms.SUM_BLOCK}
    yield "modulated norm, vectors", "triton_norms", "_vector_gradients", block, 1, "bf16"


def compile_ahead(kernel, constants: dict, warps: int, dtype: str, arch: int):
    """A kernel specialised as a launch at XL's shapes would be."""
    attention = "heads" in kernel.arg_names
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name == "eps" or (name == "scale" and attention):
            signature[name] = "fp32"
        elif name == "mask":
            signature[name] = "*i1"
        elif name in ("x", "y", "z", "shift", "scale", "gate", "grad", "qkv") or name.startswith("grad_"):
            signature[name] = "*fp32" if name in FLOAT32 else f"*{dtype}"
        else:
            signature[name] = "*fp32" if name in FLOAT32 else "i32"
        if name not in NOT_DIVISIBLE | SMALL or signature[name].startswith("*"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": 1 if attention else 3}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def measure(job) -> dict:
    name, module, kernel, constants, warps, dtype, arch = job
    compiled = compile_ahead(getattr(MODULES[module], kernel), constants, warps, dtype, arch)
    found, _ = resources(compiled.asm["cubin"])
    return {"kernel": name, "arch": f"sm_{arch}", "warps": warps, **found,
            "shared": max(found["shared"], compiled.metadata.shared)}


def main() -> None:
    jobs = [(*variant, arch) for variant in variants("--quick" in sys.argv) for arch in ARCHITECTURES]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(measure, jobs))
    if "--json" in sys.argv:
        print(json.dumps(rows))
        return
    print(f"triton {triton.__version__}\n")
    print(f"{'kernel':46} {'arch':5} {'warps':>5} {'registers':>9} {'shared':>7} {'spills':>6}")
    for row in rows:
        print(f"{row['kernel']:46} {row['arch']:5} {row['warps']:5} {row['registers']:9} {row['shared']:7} "
              f"{row['spill_loads'] + row['spill_stores']:6}")


if __name__ == "__main__":
    main()
