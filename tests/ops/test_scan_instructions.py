"""Instructions of the Triton scan in its machine code for sm_90, counted as launched; no GPU is needed.

    python tests/ops/test_scan_instructions.py      prints the counts as JSON

A stub stands in for Triton's driver and launches on meta tensors only compile, so that each kernel is specialised
exactly as in a real call.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

pytestmark = pytest.mark.slow                                                   # a minute of compilation

ROOT = Path(__file__).parents[2]
MOST = {
    ("bfloat16", "bfloat16", 1): {"y": 26, "states": 25, "backward": 64},
    ("bfloat16", "float32", 1): {"y": 28, "states": 27, "backward": 67},
    ("bfloat16", "bfloat16", 16): {"y": 120, "states": 104, "backward": 480},
}
"""For each element, a channel of a token in one direction, by dtypes of tokens and weights and number of states."""


def count_per_element(listing: str, elements: int, n: int) -> float:
    """Instructions of the longest loop for each of its elements; a loop inside it, over the states, counts n times."""
    labels, loops, index = {}, [], 0
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = index
        if instruction := re.search(r"/\*[0-9a-f]{4,5}\*/\s+(.*);", line):
            jump = re.search(r"BRA.*(\.L_x_\d+)", instruction[1])
            if jump and labels.get(jump[1], index) < index:
                loops.append((labels[jump[1]], index))
            index += 1
    first, last = max(loops, key=lambda loop: loop[1] - loop[0])
    inner = [end + 1 - start for start, end in loops if first < start and end < last]
    return (last + 1 - first + (n - 1) * sum(inner)) / elements


def measure() -> list[dict]:
    """Compile the scan's kernels of the first stage of LaMamba-XL at 256 pixels."""
    import triton.runtime.jit as jit
    from triton.backends.compiler import GPUTarget

    from lamamba.ops.selective_scan import triton_kernels

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    triton.runtime.driver.set_active(Driver())
    tools, compile_or_find, rows = Path(triton.__file__).parent / "backends/nvidia/bin", jit.JITFunction.run, []

    def run(kernel, *args, grid=None, warmup=False, **options):
        compiled = compile_or_find(kernel, *args, grid=grid, warmup=True, **options)
        if kernel.fn.__name__ in ("_scan", "_scan_backward"):
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(compiled.asm["cubin"])
                file.flush()
                listing = subprocess.check_output([tools / "nvdisasm", "-c", file.name], text=True)
            elements = options["TILE"] * options["BLOCK"] // 32
            rows.append({
                "case": [tokens, weights, n], "writes": options.get("WRITES", "backward"),
                "spills": len(re.findall(r"\b(?:LDL|STL)", listing)),
                "instructions": count_per_element(listing, elements, n),
            })
        return compiled

    jit.JITFunction.run = run
    b, l, c, g, r = 64, 1024, 640, 4, 20
    for tokens, weights, n in MOST:
        def empty(*shape, dtype):
            return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

        inputs = [
            empty(b, l, c, dtype=tokens), empty(b, l, g, r, dtype=tokens), empty(b, l, g, n, dtype=tokens),
            empty(b, l, g, n, dtype=tokens), empty(g, c, r, dtype=weights), empty(g, c, dtype=weights),
            empty(g, c, n, dtype="float32"), empty(g, c, dtype=weights), empty(g, l, dtype="int64"),
        ]
        triton_kernels.forward(*inputs)
        triton_kernels.backward(inputs[0], *inputs)
    return rows


@pytest.fixture(scope="module")
def counted():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_no_element_takes_more_instructions_than_in_the_documentation(counted):
    assert len(counted) == sum(map(len, MOST.values()))
    for row in counted:
        assert row["instructions"] <= MOST[tuple(row["case"])][row["writes"]], row


def test_nothing_spills(counted):
    assert not [row for row in counted if row["spills"]]


if __name__ == "__main__":
    print(json.dumps(measure()))
