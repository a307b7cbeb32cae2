"""Real processes for tests: gloo groups, jobs to be killed. Forked from one server that has imported torch already."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import queue
import socket
import sys
import time
import traceback
from typing import Any

import pytest

from lamamba.data.digits import Digits
from lamamba.options.training import ModelOptions, OptimizerOptions, TrainConfig
from tests import networks

pytestmark = needs_fork_server = pytest.mark.skipif(sys.platform == "win32", reason="needs a fork server")


TINY = ModelOptions(**networks.TINY, window_size=4, objective="flow")


def config(**changes) -> TrainConfig:
    """A run of seconds; a section's options are given as section=dict(...)."""
    fields = dict(
        model=TINY, batch_size=4, steps=4, ema_decays=(0.5,), log_every=1, checkpoint_every=2, device="cpu",
        optimizer=OptimizerOptions(learning_rate=1e-2, max_grad_norm=1.0),
    )
    base = TrainConfig(**{**fields, **{k: v for k, v in changes.items() if not isinstance(v, dict)}})
    sections = {k: dataclasses.replace(getattr(base, k), **v) for k, v in changes.items() if isinstance(v, dict)}
    return dataclasses.replace(base, **sections)


COMMANDS = [f"lamamba.api.{verb}" for verb in ("encode", "evaluate", "sample", "train")]


class FewDigits(Digits):
    """The first few digits; every read is written down."""

    def __init__(self, count):
        super().__init__()
        self.images, self.labels, self.seen = self.images[:count], self.labels[:count], []

    def read(self, indices):
        self.seen += list(indices)
        return super().read(indices)

    def files(self, indices):
        return [f"digit-{index}.png" for index in indices]


def read_lines(folder, name="metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a run's file, as values."""
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def losses_of(folder) -> list[float]:
    return [line["loss"] for line in read_lines(folder)]


def save_teacher(folder, data, **model):
    """Save a random network like that of `config`, with other options of the model."""
    from lamamba.training.loop import describe

    architecture, metadata = describe(config(model=model), data)
    return networks.save_model(folder, networks.random_network(architecture), **vars(metadata))


def states_equal(a, b) -> bool:
    """Weights, averages, optimizer state and counts are the same to the bit."""
    import torch

    same = list(a.averages) == list(b.averages) and all(
        torch.equal(p, q)
        for one, other in ((a.model, b.model), *zip(a.averages.values(), b.averages.values(), strict=True))
        for p, q in zip(one.parameters(), other.parameters(), strict=True)
    )
    moments = all(
        torch.equal(a.optimizer.state[p][key], b.optimizer.state[q][key])
        for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True)
        for key in ("exp_avg", "exp_avg_sq", "step")
    )
    return same and moments and (a.step, a.omitted, a.faults) == (b.step, b.omitted, b.faults)


def server():
    """The fork server; its first start takes seconds, its children a hundredth of one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lamamba.training.loop", "tests.training.together", "sklearn.datasets",
                                    "torch.distributed.fsdp", *COMMANDS])
    return context


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ranks(count: int) -> list[dict[str, str]]:
    """What a launcher sets for each process of a group."""
    if count == 1:
        return [{"OMP_NUM_THREADS": "1"}]
    group = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    return [{"RANK": str(index), "LOCAL_RANK": str(index), **group} for index in range(count)]


def _command(arguments, folder, output, environment):
    import torch

    from lamamba.cli.main import main

    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    with open(output, "w", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    raise SystemExit(main(arguments))


def command(folder, *arguments, output="printed.txt", environment=None):
    """`lamamba ARGUMENTS` in a folder, what it prints in a file there: a process that ends with the command's status.

    Forked, it needs no seconds for imports.
    """
    target = (list(map(str, arguments)), folder, output, environment or {})
    process = server().Process(target=_command, args=target)
    process.start()
    return process


def command_on(count, folder, *arguments):
    """`lamamba ARGUMENTS` on each process of a group, as by a launcher: what each has printed."""
    files = [folder / f"printed.{index}.txt" for index in range(count)]
    processes = [command(folder, *arguments, output=file, environment=environment)
                 for file, environment in zip(files, ranks(count), strict=True)]
    for process in processes:
        process.join(100)
    printed = [file.read_text(encoding="utf-8") for file in files]
    for file in files:
        file.unlink()
    assert [process.exitcode for process in processes] == [0] * count, printed
    return printed


def _run(work, arguments, environment, results, index):
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    try:
        results.put((index, True, work(*arguments)))
    except BaseException as error:
        results.put((index, False, (type(error), str(error), traceback.format_exc())))
        raise SystemExit(1) from None


class Failed(Exception):
    """A process raised: its error's type, text and traceback."""


def start(work, *arguments, environment=None):
    """One process by itself: (process, queue of its result)."""
    context = server()
    results = context.Queue()
    process = context.Process(target=_run, args=(work, arguments, environment or {}, results, 0))
    process.start()
    return process, results


def together(count, work, *arguments, seconds=100):
    """Run work(*arguments) in each process of a group and give back every result, in order.

    A process that raises gives (type, text, traceback) in a `Failed` instead of its result.
    """
    context = server()
    results = context.Queue()
    processes = [
        context.Process(target=_run, args=(work, arguments, environment, results, index))
        for index, environment in enumerate(ranks(count))
    ]
    for process in processes:
        process.start()
    answers = {}
    try:
        deadline = time.monotonic() + seconds
        while len(answers) < count:
            try:
                index, is_well, value = results.get(timeout=0.5)
            except queue.Empty:
                dead = [i for i, p in enumerate(processes) if i not in answers and p.exitcode is not None]
                assert time.monotonic() < deadline, f"no answer within {seconds} s"
                assert not dead or not results.empty(), f"process {dead[0]} died: {processes[dead[0]].exitcode}"
            else:
                answers[index] = value if is_well else Failed(*value)
    finally:
        for process in processes:
            process.join(10 if len(answers) == count else 0.1)
            if process.is_alive():
                process.kill()
                process.join()
    return [answers[index] for index in range(count)]
