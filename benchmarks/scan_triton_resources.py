"""Registers, shared memory, spills and instructions of the Triton scan, from its machine code; no GPU is needed.

    python benchmarks/scan_triton_resources.py [--quick] [--json]

Compiles every kernel as LaMamba-XL launches it (bfloat16 tokens, float32 parameters; float32 throughout) for sm_80 and
sm_90 and prints registers, shared memory and spills, and the instructions of the longest loop for each element that a
lane handles in it (a channel of a token in one direction), with the loop over the n states counted once.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lamamba.ops.selective_scan import triton_kernels as kernels

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90)
STAGES = ((640, 20), (1280, 40), (2560, 80))
"""Channels and ranks of LaMamba-XL's scans."""
STATE_SIZES = (1, 16)
FLOAT32 = frozenset((
    "b_dt", "A", "state", "starts", "states", "ends", "spans", "adjoint", "grad_B", "grad_C", "grad_b_dt", "grad_A",
    "skip", "sums",
))
SIZES = frozenset(("b", "l", "c", "g", "segments", "tiles_per_segment", "tokens", "tokens_per_program"))


def variants(quick: bool):
    """(name, kernel, constants, options, dtype of the tokens) of every launch at XL's shapes."""
    stages = STAGES[::2] if quick else STAGES
    for dtype, parts in (("bf16", 3), ("fp32", 1)):
        for channels, rank in stages if dtype == "bf16" else stages[:1]:
            for n in STATE_SIZES:
                common = {"R": rank, "N": n, "PARTS": parts, "RANK_STEP": kernels.RANK_STEP, "g": 4}
                long = {**common, "BLOCK": kernels.FORWARD_BLOCK, "TILE": kernels.TILE, "ADJOINT": False}
                back = {**common, "BLOCK": kernels.BACKWARD_BLOCK, "TILE": kernels.TILE}
                back["EXACT"] = dtype == "fp32"
                label = f"{dtype} c={channels} r={rank} n={n}"
                yield f"scan y, {label}", kernels._scan, {**long, "WRITES": "y", "segments": 1}, {}, dtype
                yield f"scan states, {label}", kernels._scan, {**long, "WRITES": "states", "segments": 1}, {}, dtype
                back["segments"] = 1
                yield f"scan backward, {label}", kernels._scan_backward, back, {"num_stages": 1}, dtype
                if rank == 20 and dtype == "bf16":
                    yield f"segments: scan y, {label}", kernels._scan, {**long, "WRITES": "y"}, {}, dtype
                    yield f"segments: ends, {label}", kernels._scan, {**long, "WRITES": "ends"}, {}, dtype
                    ends_back = {**long, "WRITES": "ends", "ADJOINT": True}
                    yield f"segments: ends, adjoint, {label}", kernels._scan, ends_back, {}, dtype
                    across = {"N": n, "BLOCK": kernels.FORWARD_BLOCK, "ADJOINT": False, "g": 4}
                    yield f"segments: scan of segments, {label}", kernels._scan_segments, across, {}, dtype
        merge = {"TOKENS": kernels.MERGE_TOKENS, "BLOCK": kernels.MERGE_BLOCK}
        yield f"merge, {dtype}", kernels._merge, {**merge, "g": 4}, {"num_warps": 4}, dtype
        yield f"products, {dtype}", kernels._products, merge, {"num_warps": 4}, dtype


def compile_ahead(kernel, constants: dict, options: dict, dtype: str, arch: int) -> bytes:
    """The machine code of a kernel specialised as a launch at XL's shapes would be."""
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in SIZES:
            signature[name] = "i32"
            divisible = name in ("l", "c", "tokens")
        else:
            signature[name] = "*i32" if name == "paths" else "*fp32" if name in FLOAT32 else f"*{dtype}"
            divisible = True
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 1, "num_stages": 3, **options}
    ).asm["cubin"]


def longest_loop(listing: str) -> Counter:
    """Count each instruction in the longest loop of a disassembly."""
    instructions, labels = [], {}
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(instructions)
        if instruction := re.search(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?(.*);", line):
            instructions.append(instruction.group(1))
    first, last = 0, 0
    for index, instruction in enumerate(instructions):
        jump = re.search(r"BRA.*(\.L_x_\d+)", instruction)
        start = labels.get(jump.group(1), index) if jump else index
        if index - start > last - first:
            first, last = start, index
    return Counter(re.split(r"[.\s]", text)[0] for text in instructions[first : last + 1])


def resources(cubin: bytes) -> tuple[dict, Counter]:
    """Registers, shared memory, stack and spills in a kernel's machine code, and its longest loop's instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "--dump-resource-usage", file.name],
                               capture_output=True, text=True, check=True).stdout
        listing = subprocess.run([TOOLS / "nvdisasm", "-c", file.name],
                                 capture_output=True, text=True, check=True).stdout
    found = {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "shared": int(re.search(r"SHARED:(\d+)", usage).group(1)),
        "stack": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "spill_loads": len(re.findall(r"\bLDL", listing)), "spill_stores": len(re.findall(r"\bSTL", listing)),
    }
    return found, longest_loop(listing)


def measure(job) -> dict:
    name, kernel, constants, options, dtype, arch = job
    found, loop = resources(compile_ahead(getattr(kernels, kernel), constants, options, dtype, arch))
    per_lane = constants.get("TILE", 0) * constants["BLOCK"] // 32
    return {
        "kernel": name, "arch": f"sm_{arch}", **found,
        "loop": sum(loop.values()), "loop_special": loop["MUFU"], "loop_elements": per_lane,
    }


def main() -> None:
    jobs = [
        (name, kernel.fn.__name__, constants, options, dtype, arch)
        for name, kernel, constants, options, dtype in variants("--quick" in sys.argv) for arch in ARCHITECTURES
    ]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(measure, jobs))
    if "--json" in sys.argv:
        print(json.dumps(rows))
        return
    print(f"triton {triton.__version__}\n")
    print(f"{'kernel':52} {'arch':5} {'registers':>9} {'shared':>6} {'spills':>6}  instructions (special) per element")
    for row in rows:
        each = f"{row['loop'] / row['loop_elements']:.0f} ({row['loop_special'] / row['loop_elements']:.1f})" if row[
            "loop_elements"] else ""
        print(f"{row['kernel']:52} {row['arch']:5} {row['registers']:9} {row['shared']:6} "
              f"{row['spill_loads'] + row['spill_stores']:6}  {each}")


if __name__ == "__main__":
    main()
