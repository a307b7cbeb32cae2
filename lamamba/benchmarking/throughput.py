"""Throughput of LaMamba beside its peers: networks built alike, timed in turns, each in its own process."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor, nn

from lamamba.benchmarking import product
from lamamba.benchmarking.flops import Cost, count
from lamamba.benchmarking.peers.registry import (
    PEERS,
    build_peer,
    find_peer,
    materialise,
    peer_activation_bytes,
    peer_operations,
)
from lamamba.config import LATENT_SCALE, PRESETS, UNetConfig, unknown_name
from lamamba.inference.packing import can_pack, can_pack_convolutions
from lamamba.models.unet import LaMambaUNet
from lamamba.utils.repeatable import own_random_state

Mode = Literal["forward", "train"]
Processes = Literal["auto", "together", "apart"]

MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "268435456",
}
"""glibc keeps freed memory instead of returning it: page faults are slow, above all on virtual machines."""
WARM_UP_PASSES = 2
"""After the first pass; only one where that took longer than SLOW_PASS seconds."""
SLOW_PASS = 5
MIN_PASSES = 3
SHORTEST_TURN = 0.1
"""Shortest duration in seconds of a network's turn; fast networks make several passes in a turn."""
MEMORY_SHARE = 0.85
"""Share of the free memory up to which networks are kept in memory together."""
PROCESS_BYTES = 512 * 2**20
"""Of a process on the CPU without its network: Python, torch and diffusers."""
FORWARD_SHARE = 0.25
"""Upper bound of the activations alive at once in a forward pass, as a share of those that training saves."""
TRAINING_PASSES = 3
"""Multiply-adds of a training step in units of the forward pass's: gradients of inputs and of weights come to it."""
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""In the messages of errors of the allocators, and of `Runner` for a process that was killed."""


@dataclass(frozen=True)
class Case:
    """One network at one size, and how it is timed."""

    model: str
    """A preset (s, b, l, xl; xl-n16 has state size 16), a peer, or "product", one large matrix product."""
    image_size: int
    batch: int
    dtype: str
    device: str
    mode: Mode
    compile: bool = False
    threads: int | None = None
    packed: bool = True
    """Pack weights for oneDNN where that is possible."""

    @property
    def is_peer(self) -> bool:
        return self.model in PEERS

    @property
    def tokens(self) -> int:
        """Tokens of the finest grid with products of tokens, for one image; rows of the large product."""
        if self.model == product.NAME:
            return product.product_side(self.device)
        if not self.is_peer:
            return (self.image_size // LATENT_SCALE) ** 2
        peer = find_peer(self.model)
        return (peer.side(self.image_size) // peer.token) ** 2

    @property
    def cost(self) -> Cost:
        """Of one image and one forward pass."""
        if self.model == product.NAME:
            return product.product_cost(self.tokens)
        return cost_of(self.model, self.image_size)

    @property
    def multiply_adds(self) -> int:
        """Of a pass that is timed, of all images."""
        passes = TRAINING_PASSES if self.mode == "train" else 1
        return passes * self.batch * self.cost.matrix

    def product(self) -> Case:
        """The large matrix product that this network is held against."""
        return replace(self, model=product.NAME, batch=1, mode="forward", compile=False)

    @property
    def packs_weights(self) -> bool:
        """Whether weights of Linear layers are stored in oneDNN's order once, GELU within their products."""
        return self._packs and can_pack(getattr(torch, self.dtype))

    @property
    def packs_convolutions(self) -> bool:
        """Whether weights of convolutions are stored in oneDNN's order once."""
        return self._packs and can_pack_convolutions(getattr(torch, self.dtype))

    @property
    def _packs(self) -> bool:
        return (
            self.packed and self.device == "cpu" and self.dtype != "float16" and self.mode == "forward"
            and not self.compile
        )

    def memory_estimate(self) -> int:
        """Upper estimate of the bytes that the network needs."""
        cost = self.cost
        kept = cost.activation_bytes * self.batch
        process = PROCESS_BYTES if self.device == "cpu" else 0
        if self.mode == "train":
            return process + 16 * cost.parameters + kept
        weights = cost.parameters * (2 if self.packs_weights else 1)            # while they are being packed
        return process + getattr(torch, self.dtype).itemsize * (weights + int(FORWARD_SHARE * kept) // 4)


def parse_model(name: str, image_size: int, state_size: int | None = None) -> UNetConfig:
    """The configuration of a preset's name; "-n16" at its end is a state size of 16.

    Raises:
        ValueError: for an unknown name, with the nearest one, or a size that does not fit.
    """
    preset, states = name, state_size
    if match := re.fullmatch(r"(\w+)-n(\d+)", name):
        preset, states = match[1], int(match[2])
    if preset not in PRESETS:
        raise unknown_name("model", name, PRESETS)
    return UNetConfig.preset(preset, image_size=image_size, **({} if states is None else {"state_size": states}))


@functools.cache
def cost_of(name: str, image_size: int) -> Cost:
    """Of a preset or a peer, for one image and one forward pass."""
    if name not in PEERS:
        return count(parse_model(name, image_size))
    found = peer_operations(name, image_size)
    return Cost(**asdict(found), activation_bytes=peer_activation_bytes(name, image_size))


def build(case: Case) -> nn.Module:
    """The network with random weights, made on its device and in its precision; training keeps weights in float32."""
    device = torch.device(case.device)
    dtype = torch.float32 if case.mode == "train" else getattr(torch, case.dtype)
    if case.is_peer:
        return build_peer(case.model, case.image_size, device, dtype)
    if case.model == product.NAME:
        with torch.device("meta"):
            large = product.MatrixProduct(case.tokens)
        materialise(large, device, dtype)
        return large
    config = parse_model(case.model, case.image_size)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model: nn.Module = LaMambaUNet(config)
    finally:
        torch.set_default_dtype(default)
    model.to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():                     # adaLN-Zero: x would pass
                parameter.normal_(std=0.02)
    return model


def inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x, timestep and labels, the same for every network that takes the same; channels last for convolutions."""
    random = torch.Generator().manual_seed(0)
    dtype = torch.float32 if case.mode == "train" else getattr(torch, case.dtype)
    if case.model == product.NAME:
        x = torch.randn(case.tokens, case.tokens, generator=random)
    else:
        peer = find_peer(case.model) if case.is_peer else None
        channels, side = (peer.channels, peer.side(case.image_size)) if peer else (4, case.image_size // LATENT_SCALE)
        x = torch.randn(case.batch, channels, side, side, generator=random)
        if case.is_peer:
            x = x.contiguous(memory_format=torch.channels_last)
    timestep = torch.rand(case.batch, generator=random) * 1000
    labels = torch.randint(0, 1000, (case.batch,), generator=random)
    return x.to(device, dtype), timestep.to(device), labels.to(device)


class OutOfMemory(RuntimeError):
    """A network that does not fit into memory.

    Args:
        case: the network.
        message: the reason.
    """

    def __init__(self, case: Case, message: str):
        super().__init__(message)
        self.case = case


class Runner:
    """A worker process that holds one network."""

    def __init__(self, case: Case):
        self.case, self.times, self.found = case, list[float](), dict[str, Any]()
        package = str(Path(__file__).resolve().parents[2])
        paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": paths}
        if case.device == "cpu" and sys.platform == "linux":
            environment |= MALLOC
        self._log: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8")     # noqa: SIM115 (closed in close)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lamamba.benchmarking.worker"], env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._log, text=True, encoding="utf-8",
        )
        self._send(asdict(case))

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):                              # _receive says what went wrong
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while (line := self._process.stdout.readline()) and not line.startswith("{"):
            pass                                                                # printed by a library at its import
        reply = json.loads(line) if line else {"error": self._exit_message()}
        if "error" in reply:
            self.close()
            case = self.case
            message = f"{case.model}, {case.image_size} px, batch {case.batch}, {case.mode}: {reply['error']}"
            if any(words in message for words in OUT_OF_MEMORY):
                raise OutOfMemory(case, message)
            raise RuntimeError(message)
        return reply

    def _exit_message(self) -> str:
        status = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        killed = "; probably out of memory" if status == -9 else ""
        return f"its process ended with status {status}{killed}{': ' + lines[-1] if lines else ''}"

    def wait_until_built(self) -> None:
        """Wait for the first pass.

        Raises:
            RuntimeError: when the network cannot be built or run, with the reason.
        """
        self.found |= self._receive()

    def warm_up(self) -> None:
        """Run warm-up passes, and choose the passes of a turn."""
        self._send({"passes": 1 if self.found["first_pass_seconds"] > SLOW_PASS else WARM_UP_PASSES})
        warm = min(self._receive()["ms"])
        self.passes = max(1, math.ceil(1000 * SHORTEST_TURN / warm))

    def turn(self) -> None:
        """Run the passes of one turn, and append their times in milliseconds."""
        self._send({"passes": self.passes})
        self.times += self._receive()["ms"]

    def finish(self) -> None:
        """End the process, and keep its peak memory."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self.found |= self._receive()
        self._process.wait()
        self.close()

    def close(self) -> None:
        """End the process, if it still runs."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError), self._process:               # closes its pipes and waits for it
            self._log.close()


def free_memory(device: str) -> int | None:
    """Free bytes of a device, or None where the system does not report them."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(torch.device(device))[0]
    return proc_bytes("/proc/meminfo", "MemAvailable")


def proc_bytes(path: str, field: str) -> int | None:
    """A number of Linux's /proc in bytes, or None where the system does not report it."""
    try:
        lines = dict(line.split(":", 1) for line in Path(path).read_text(encoding="ascii").splitlines())
        return int(lines[field].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def training_rate(config: UNetConfig, batch_size: int, device: torch.device, bfloat16: bool) -> float:
    """Images per second of forward and backward passes of a network, measured within seconds.

    Batches grow up to batch_size as long as they are quick: small ones say enough where they are slow.
    """
    with own_random_state(), device:
        model = LaMambaUNet(config).train()
    batch, seconds = 1, 0.0
    while True:
        x = torch.zeros(batch, config.in_channels, *config.input_size, device=device)
        t = torch.full((batch,), 500.0, device=device)
        labels = torch.zeros(batch, dtype=torch.int64, device=device) if config.num_classes else None
        for _ in range(2):                                                      # the first one warms up
            began = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                output = model(x, t, labels)
            output.float().square().sum().backward()
            float(model.label_embedding.weight.grad.sum())                      # waits for a GPU
            seconds = time.perf_counter() - began
            if seconds > SLOW_PASS:
                break
        if batch >= batch_size or seconds > SLOW_PASS / 10:
            return batch / seconds
        batch = min(2 * batch, batch_size)


def fit_together(cases: Sequence[Case]) -> bool:
    """Whether the networks (or one of them alone) are estimated to fit into the device's free memory together."""
    free = free_memory(cases[0].device)
    return free is None or sum(case.memory_estimate() for case in cases) < MEMORY_SHARE * free


def measure(
    cases: Sequence[Case], *, seconds: float = 60, processes: Processes = "auto",
    on_progress: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Time networks and one large matrix product in turns: one row for each network.

    Networks that fit into memory together take turns pass by pass; others are loaded one after the other, in two
    rounds, so that a machine that slows down does so for all.

    Args:
        cases: the networks.
        seconds: for which each network runs, without warm-up; MIN_PASSES passes at least.
        processes: "together", "apart", or "auto" by `fit_together`.
        on_progress: called with a line of text.

    Raises:
        OutOfMemory: when a network does not fit into memory.
        RuntimeError: when a network cannot be built or run, with its reason.
    """
    large = cases[0].product()
    networks, cases = cases, (*cases, large)
    together = processes == "together" or (processes == "auto" and fit_together(cases))
    rounds = [cases] if together else [[case] for case in (*cases, *cases)]
    times: dict[Case, list[float]] = {case: [] for case in cases}
    facts: dict[Case, dict[str, Any]] = {case: {} for case in cases}
    for present in rounds:
        for runner in _take_turns(present, seconds * len(present) / (1 if together else 2), on_progress):
            times[runner.case] += runner.times
            peaks = [f["peak_memory_bytes"] for f in (facts[runner.case], runner.found) if f.get("peak_memory_bytes")]
            facts[runner.case] |= {**runner.found, "peak_memory_bytes": max(peaks, default=None)}
    rate = 1000 * large.multiply_adds / statistics.median(times[large])
    return [_row(case, times[case], facts[case], together, rate) for case in networks]


def _take_turns(cases: Sequence[Case], seconds: float, on_progress: Callable[[str], None]) -> Iterator[Runner]:
    with contextlib.ExitStack() as stack:
        runners = [stack.enter_context(contextlib.closing(Runner(case))) for case in cases]  # build at the same time
        for runner in runners:
            on_progress(f"{runner.case.model} {runner.case.image_size} px: building and warming up")
            runner.wait_until_built()
        for runner in runners:
            runner.warm_up()
        began, turns = time.perf_counter(), 0
        least = math.ceil(MIN_PASSES / min(runner.passes for runner in runners))
        while turns < least or time.perf_counter() - began < seconds:
            for runner in runners:
                on_progress(f"{runner.case.model} {runner.case.image_size} px: {len(runner.times)} passes")
                runner.turn()
            turns += 1
        for runner in runners:
            runner.finish()
        yield from runners


def _row(
    case: Case, times: Sequence[float], facts: dict[str, Any], together: bool, product_rate: float
) -> dict[str, Any]:
    ms = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4)
    peak, stays, cost = facts["peak_memory_bytes"], facts["weights_bytes"], case.cost
    rate = 1000 * case.multiply_adds / ms
    return {
        "model": case.model, "image_size": case.image_size, "batch": case.batch, "dtype": case.dtype,
        "device": case.device, "mode": case.mode, "ms": ms, "ms_quartiles": [low, high], "ms_fastest": min(times),
        "passes": len(times), "images_per_second": 1000 * case.batch / ms, "peak_memory_bytes": peak,
        "activation_bytes_per_image": (peak - stays) / case.batch if peak is not None else None,
        "multiply_adds": cost.matrix, "parameters": cost.parameters, "tokens": case.tokens,
        "multiply_adds_per_second": rate, "product_multiply_adds_per_second": product_rate,
        "share_of_product": rate / product_rate, "is_peer": case.is_peer, "compiled": case.compile,
        "packed_weights": facts["packed"], "in_memory_together": together,
    }


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Images per second of each model over those of each peer, where both were timed alike and in turns."""
    same = ("image_size", "batch", "dtype", "device", "mode")
    return [
        {
            "model": row["model"], "peer": peer["model"], **{key: row[key] for key in same},
            "ratio": row["images_per_second"] / peer["images_per_second"],
        }
        for row in rows if row["model"] not in PEERS
        for peer in rows if peer["model"] in PEERS and all(peer.get(key) == row.get(key) for key in (*same, "set"))
    ]
