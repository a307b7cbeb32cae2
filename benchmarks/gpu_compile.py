"""Machine code of every Triton kernel, compiled as the project launches it, beside its budgets; no GPU is needed.

    python benchmarks/gpu_compile.py [--quick] [--launch PATTERN] [--arch 90,80] [--jobs 16] [--json FILE]

A stub stands in for Triton's driver, and the launch functions of the scan and the layers run on meta tensors, so that
kernels are specialised as in a real call. What is compiled lands in Triton's cache, where a GPU with that architecture
finds it. A line for each kernel of a launch, with the first case that needs it:

    registers, shared   of a thread; bytes of a program
    stack, spills       bytes; instructions that load from or store to the stack
    instr., special     instructions and special functions of the longest loop for each element (a channel of a token
                        in a direction), with a loop over the n states counted n times; for kernels with softplus
    s                   seconds of compiling, or of finding it in Triton's cache

Last comes a summary; the exit status is 1 where a budget (BUDGETS) is broken.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from lamamba.utils.files import write_atomically

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MULTIPROCESSORS = 132
"""Of an H100 or H200: launches size their grids by it."""
DIRECTIONS, NUM_HEADS, WINDOW = 4, 16, (8, 8)
BATCHES = ((64, 1), (5, 1), (1, 2))
"""Images, and the grid's side in units of a case's: sizes that need no further compilation."""
SEGMENTS = 7
"""Of a path, in the launches that cut paths."""


@dataclass(frozen=True)
class Budget:
    """The most that kernels may need."""

    launch: str
    """Pattern of the launch's name, and"""
    dtype: str
    """of the tokens' type."""
    n: int | None
    """State size; None: any."""
    quantity: str
    limit: float


BUDGETS = (                                                                     # the last one that fits a kernel counts
    Budget("*", "*", None, "spills", 0),
    Budget("*", "*", None, "stack", 0),
    Budget("*", "*", None, "shared", 48 * 1024),
    Budget("linear_gelu", "*", None, "shared", 96 * 1024),                      # two programs, as on sm_80 with its 64
    Budget("*", "*", None, "registers", 255),
    Budget("*", "*", None, "recompiled", 0),
    Budget("scan*", "*", 3, "recompiled", 1),                                   # 36 tokens are no whole tiles, 144 are
    Budget("local_mixing_backward", "float32", None, "spills", 2),
    Budget("local_mixing_backward", "float32", None, "stack", 8),
    Budget("window_attention_backward", "float32", None, "spills", 19),
    Budget("window_attention_backward", "float32", None, "stack", 40),
    Budget("scan", "bfloat16", 1, "instructions", 36),                          # 24 with 16-bit weights of rank 20
    Budget("scan, cut", "bfloat16", 1, "instructions", 54),                     # float32 weights of rank 80; else 38
    Budget("scan", "bfloat16", 16, "instructions", 140),
    Budget("scan_backward", "bfloat16", 1, "instructions", 75),
    Budget("scan_backward", "bfloat16", 16, "instructions", 520),
)


@dataclass(frozen=True)
class Case:
    """Sizes and types of a scan, or of the layers of a block (n is None)."""

    side: int
    """Of the grid, in tokens."""
    channels: int
    """Of the scan, or of the block."""
    dtype: str
    weights: str
    rank: int = 0
    n: int | None = None
    heads: int = NUM_HEADS

    def __str__(self) -> str:
        kind = f" r={self.rank} n={self.n}" if self.n else f" heads={self.heads}"
        return f"{self.dtype}/{self.weights} {self.side}x{self.side} c={self.channels}{kind}"


TYPES = (
    ("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float16", "float16"), ("float16", "float32"),
    ("float32", "float32"),
)
"""Of tokens and of weights."""
SCAN_STAGES = ((32, 640, 20), (16, 1280, 40), (8, 2560, 80))
"""LaMamba-XL at 256 pixels: side of the grid, channels and rank of the scan."""
CASES = (
    *(Case(32, 640, *types, 20, 1) for types in TYPES),
    *(Case(32, 640, *types, 20, 16) for types in (*TYPES[:3], TYPES[4])),
    *(Case(32, 640, *types, 20, 4) for types in (TYPES[0], TYPES[2], TYPES[4])),
    *(Case(s, c, *types, r, 1) for s, c, r in SCAN_STAGES[1:] for types in TYPES[:2]),
    *(Case(s, c, *TYPES[0], r, 16) for s, c, r in SCAN_STAGES[1:]),
    *(Case(6, 100, *types, 7, 3) for types in (*TYPES[:2], TYPES[4])),
    *(Case(s, c // 2, *types) for s, c, _ in SCAN_STAGES for types in TYPES),
    *(Case(10, 100, *types, heads=4) for types in TYPES),
    Case(16, 64, *TYPES[0], heads=4),
)
QUICK_CASES = (
    Case(32, 640, *TYPES[0], 20, 1), Case(32, 640, *TYPES[0], 20, 16), Case(6, 100, *TYPES[0], 7, 3),
    Case(16, 640, *TYPES[0]),
    Case(10, 100, *TYPES[4], heads=4),
    Case(8, 2560, *TYPES[1], 80, 1), Case(8, 1280, *TYPES[4]), Case(32, 320, *TYPES[0]),         # these once spilled
)


class StubDriver:
    """Triton's driver for a GPU that is not there: it can compile, and nothing else.

    Args:
        arch: compute capability, 90 for 9.0; also the device's number, by which Triton keeps compiled kernels apart.
    """

    def __init__(self, arch: int):
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return self._arch

    def get_current_stream(self, device: int) -> int:
        return 0


def launches(case: Case, images: int, scale: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of every launch function of the scan or the layers, on meta tensors."""
    return _layers(case, images, scale * case.side) if case.n is None else _scans(case, images, scale)


def _scans(case: Case, b: int, scale: int) -> Iterator[tuple[str, Callable[[], object]]]:
    from lamamba.ops.layers import triton_norms
    from lamamba.ops.selective_scan import triton_kernels as scan

    make = functools.partial(torch.empty, device="meta")
    dtype, weights = getattr(torch, case.dtype), getattr(torch, case.weights)
    l, c, g, r, n = (scale * case.side) ** 2, case.channels, DIRECTIONS, case.rank, case.n
    inputs = [
        *(make(b, l, *shape, dtype=dtype) for shape in ((c,), (g, r), (g, n), (g, n))),
        make(g, c, r, dtype=weights), make(g, c, dtype=weights), make(g, c, n), make(g, c, dtype=weights),
        make(g, l, dtype=torch.int64),
    ]
    x, z = make(2, b, scale * case.side, scale * case.side, c, dtype=dtype).unbind(0)
    norm = make(c, dtype=weights), make(c, dtype=weights), 1e-5
    yield "scan", lambda: scan.forward(*inputs)
    yield "scan_gated_norm", lambda: triton_norms.scan_gated_norm(x, z, *inputs[1:], *norm)
    yield "scan_backward", lambda: scan.backward(inputs[0], *inputs)
    if scale > 1:                                                               # few images: paths are cut
        yield "scan, cut", lambda: scan.forward(*inputs, segments=SEGMENTS)
        yield "scan_backward, cut", lambda: scan.backward(inputs[0], *inputs, segments=SEGMENTS)


def _layers(case: Case, b: int, h: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every operator of lamamba.ops.layers.gpu, with all of its optional arguments and without."""
    from lamamba.ops.layers import gpu

    for layer, module in sorted(gpu._MODULES.items()):
        if layer == "scan_gated_norm":                                          # see _scans
            continue
        if layer == "linear_gelu" and (
                case.channels > gpu.MOST_GELU_DEPTH or case.dtype == "float32" or case.dtype != case.weights):
            continue                                                            # the formula runs
        kernels = importlib.import_module(f"lamamba.ops.layers.{module}")
        for name in (layer, f"{layer}_backward"):
            if not hasattr(kernels, name):
                continue
            arguments = getattr(torch.ops.lamamba, f"gpu_{name}").default._schema.arguments
            values = [layer_input(layer, argument.name, case, b, h) for argument in arguments]
            yield name, functools.partial(getattr(kernels, name), *values)
            optional = [str(argument.type).startswith("Optional") for argument in arguments]
            if any(optional):
                values = [None if is_optional else x for is_optional, x in zip(optional, values, strict=True)]
                yield f"{name}, plain", functools.partial(getattr(kernels, name), *values)


def layer_input(layer: str, name: str, case: Case, b: int, h: int) -> Any:
    """An argument of a layer as in a block of case.channels, by its name.

    Raises:
        KeyError: for an argument that is not known here.
    """
    c, pairs = case.channels, WINDOW[0] * WINDOW[1]
    dtype, weights = getattr(torch, case.dtype), getattr(torch, case.weights)

    def tokens(width: int) -> torch.Tensor:
        return torch.empty(b, h, h, width, dtype=dtype, device="meta")

    def parameter(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=weights, device="meta")

    def vector(number: int) -> torch.Tensor:
        return torch.empty(b, 9 * c, dtype=dtype, device="meta")[:, number * c : (number + 1) * c]

    halves, windows = tokens(4 * c).chunk(2, -1), (-(-h // WINDOW[0])) * (-(-h // WINDOW[1]))
    own = {
        "gated_norm": {"x": tokens(2 * c), "grad_y": tokens(2 * c), "z": halves[1], "weight": parameter(2 * c),
                       "bias": parameter(2 * c)},
        "local_mixing": {"x": halves[0], "grad_y": tokens(2 * c), "weight": parameter(2 * c, 1, 3, 3)},
        "window_attention": {"bias": parameter(case.heads, pairs, pairs)},
        "linear_gelu": {"weight": parameter(4 * c, c), "bias": parameter(4 * c)},
    }.get(layer, {})
    common = {
        "x": tokens(c), "y": tokens(c), "grad_y": tokens(c), "qkv": tokens(3 * c), "weight": parameter(c),
        "bias": parameter(c), "shift": (4, 4) if layer == "window_attention" else vector(0), "scale": vector(1),
        "gate": vector(2), "mask": torch.empty(windows, pairs, pairs, dtype=torch.bool, device="meta"), "eps": 1e-5,
        "num_heads": case.heads, "window": WINDOW,
    }
    return own[name] if name in own else common[name]


def longest_loop(listing: str) -> tuple[list[str], list[range]]:
    """The instructions of the longest loop of a disassembly, and where the loops inside it are."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        if instruction := re.search(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?(.*);", line):
            instructions.append(instruction[1])
    loops = []
    for index, instruction in enumerate(instructions):
        jump = re.search(r"BRA.*(\.L_x_\d+)", instruction)
        if jump and labels.get(jump[1], index + 1) < index:
            loops.append(range(labels[jump[1]], index + 1))
    whole = max(loops, key=len, default=range(0))
    inside = [range(loop.start - whole.start, loop.stop - whole.start) for loop in loops
              if loop != whole and loop.start >= whole.start and loop.stop <= whole.stop]
    return [instructions[i] for i in whole], inside


def count_instructions(listing: str, n: int | None, elements: int) -> dict[str, float | None]:
    """Instructions and special functions of the longest loop for each of a lane's elements in an iteration.

    An inner loop with exponentials is over the states: it holds one an element for each state of an iteration, by which
    its iterations are known.
    """
    if not elements or not n:
        return {"instructions": None, "special": None}
    loop, inner = longest_loop(listing)
    weights = [1.0] * len(loop)
    for part in inner:
        if exponentials := sum(loop[i].startswith("MUFU.EX2") for i in part):
            for i in part:
                weights[i] = max(1.0, n * elements / exponentials)
    special = sum(weight for weight, text in zip(weights, loop, strict=True) if text.startswith("MUFU"))
    return {"instructions": sum(weights) / elements, "special": special / elements}


def resources(compiled: Any, n: int | None, elements: int) -> dict[str, Any]:
    """What the machine code of a kernel needs; elements of a lane as for its instructions, 0: these are not counted."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, listing = (
            subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return {
        "warps": compiled.metadata.num_warps, "registers": registers, "shared": compiled.metadata.shared,
        "stack": stack, "spills": len(re.findall(r"\b(?:LDL|STL)\b", listing)),
        **count_instructions(listing, n, elements),
    }


@contextlib.contextmanager
def compiling(arch: int, found: Callable[[Any, Any, float, int], None]) -> Iterator[None]:
    """Where launches compile for an architecture and do not run but call found(kernel, compiled, seconds, elements)."""
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        began = time.perf_counter()
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        tile, block = options.get("TILE", 0), options.get("BLOCK", 0)           # of the scans: tokens, channels
        found(self, compiled, time.perf_counter() - began, tile * block // 32)
        return compiled

    with replaced(JITFunction, "run", compile_only), with_multiprocessors():
        driver.set_active(StubDriver(arch))
        yield


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def with_multiprocessors() -> Iterator[None]:
    """Where the launch functions size their grids for MULTIPROCESSORS."""
    for name in ("selective_scan.triton_kernels", "layers.triton_mixing", "layers.triton_norms",
                 "layers.triton_windows"):
        importlib.import_module(f"lamamba.ops.{name}")
    with contextlib.ExitStack() as stack:
        for name, module in sorted(sys.modules.items()):
            if name.startswith("lamamba.ops.") and hasattr(module, "num_processors"):
                stack.enter_context(replaced(module, "num_processors", lambda tensor: MULTIPROCESSORS))
        yield


def compile_case(case: Case, arch: int, pattern: str = "*") -> list[dict[str, Any]]:
    """A row for each kernel of a case's launches like pattern; "recompiled" where another batch or grid needs it."""
    rows: dict[str, dict[str, Any]] = {}
    launch, is_first = "", True

    def add(function: Any, compiled: Any, seconds: float, elements: int) -> None:
        if compiled.hash not in rows:
            rows[compiled.hash] = {
                "launch": launch, "kernel": function.fn.__name__, "case": str(case), **asdict(case), "arch": arch,
                "seconds": seconds, **resources(compiled, case.n, elements), "recompiled": int(not is_first),
                "hash": compiled.hash,
            }

    with compiling(arch, add):
        for images, scale in BATCHES:
            for name, call in launches(case, images, scale):
                launch, is_first = name, (images, scale) == BATCHES[0] or name.endswith(", cut")
                if fnmatch(name, pattern):
                    call()
    return list(rows.values())


def broken(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each budget that a kernel breaks."""
    found = []
    for row in rows:
        limits = {
            budget.quantity: budget.limit for budget in BUDGETS
            if any(fnmatch(name, budget.launch) for name in (row["launch"], row["launch"].split(",")[0]))
            and fnmatch(row["dtype"], budget.dtype) and budget.n in (None, row["n"])
        }
        for quantity, limit in limits.items():
            if (row[quantity] or 0) > limit:
                found.append(f"{row['launch']} {row['kernel']} {row['case']} sm_{row['arch']}: {quantity} "
                             f"{row[quantity]:.4g}, budget {limit:g}")
    return found


def show(row: dict[str, Any]) -> None:
    counts = "".join(f"{row[key]:8.1f}" if row[key] is not None else f"{'':8}" for key in ("instructions", "special"))
    print(f"{row['launch']:33} {row['kernel']:20} {row['case']:42} sm_{row['arch']} {row['warps']:5} "
          f"{row['registers']:9} {row['shared']:6} {row['stack']:5} {row['spills']:6}{counts} {row['seconds']:5.1f}"
          f"{'  another batch compiles it' * row['recompiled']}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="eight cases, with one of every launch")
    parser.add_argument("--launch", default="*", help="a pattern of launches, such as 'scan*'")
    parser.add_argument("--arch", default="90,80", help="compute capabilities")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    architectures = [int(arch) for arch in options.arch.split(",")]
    cases = QUICK_CASES if options.quick else CASES
    began, rows, seen = time.perf_counter(), [], set()
    print(f"triton {triton.__version__}, torch {torch.__version__}")
    print(f"{'launch':33} {'kernel':20} {'tokens/weights and sizes':42} arch  warps registers shared stack spills  "
          "instr. special     s", flush=True)
    with ProcessPoolExecutor(options.jobs) as pool:
        pending = [pool.submit(compile_case, case, arch, options.launch) for arch in architectures for case in cases]
        for job in pending:
            for row in job.result():
                if (row["hash"], row["arch"]) not in seen:
                    seen.add((row["hash"], row["arch"]))
                    rows.append(row)
                    show(row)
    faults = broken(rows)
    if options.json:
        result = {"triton": triton.__version__, "rows": rows, "broken": faults}
        write_atomically(options.json, json.dumps(result, indent=1) + "\n")
    for line in faults:
        print(f"over budget: {line}")
    print(f"{len(rows)} kernels in {time.perf_counter() - began:.0f} s: {len(faults) or 'no'} over budget")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
