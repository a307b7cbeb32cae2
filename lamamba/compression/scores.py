"""Scores of units: how much the output changes without each (LAPTOP-Diff's criterion), and criteria beside it.

    d_u = f(x without u) - f(x)             the difference that removing unit u makes in the network's output f
    score_u = E ||d_u||^2                   its output loss, per element
    E ||sum of d_u||^2 = sum of G_uv        predicted for a set with cross terms, G_uv = E <d_u, d_v>
    sum of score_u                          predicted for a set by additivity: the paper's assumption
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from lamamba.compression.calibration import Calibration
from lamamba.compression.units import Removable, Unit, ancestors, canonical
from lamamba.options.base import Ge, Positive, read_record, record
from lamamba.options.compress import Criterion
from lamamba.utils.files import write_atomically
from lamamba.utils.progress import Progress, Report
from lamamba.utils.text import shown

RULES = ("magnitude", "random", "hand")
"""Criteria without samples: the sum of squared weights, random order, last blocks of the stages first (BK-SDM)."""
SCORES_VERSION = 1
WHOLE_BLOCKS = ("block", "bottleneck", "transformer", "resnet")
"""Kinds of units that are removed by hand."""
TIME_BINS = 10
"""Of equal width over the timesteps 0 .. 1000."""
KEPT_BYTES = 2**24
"""Of the differences that are kept of each unit, for the cross terms; the first samples that fit."""


@dataclass(frozen=True)
class Scores:
    """The score of every unit of a network; serves any number of plans."""

    criterion: str
    units: tuple[Unit, ...]
    values: np.ndarray
    """(u,) in the order of units; of "output" the mean squared change of an element of the output."""
    errors: np.ndarray
    """(u,) standard errors of the values over samples; 0 where there are no samples."""
    bins: np.ndarray
    """(u, TIME_BINS) means over the samples of each range of times; NaN where there were none."""
    products: np.ndarray | None
    """(u, u) means of the products of two units' differences; of "output" alone."""
    energy: float
    """Mean square of an element of the whole network's output (of "task": its mean loss); relative: value / energy."""
    parameters: int
    """Of the whole network."""
    multiply_adds: int
    about: Mapping[str, Any] = field(default_factory=dict)
    """Teacher with its hash, data, samples, seed, times."""

    def index(self, names: Iterable[str]) -> list[int]:
        order = {unit.name: number for number, unit in enumerate(self.units)}
        return [order[name] for name in canonical(self.units, names)]

    def predicted(self, names: Iterable[str]) -> float:
        """The loss of removing units together, by additivity."""
        return float(self.values[self.index(names)].sum())

    def predicted_with_cross_terms(self, names: Iterable[str]) -> float | None:
        """The same by E ||sum of differences||^2; None where differences are not known."""
        chosen = self.index(names)
        return None if self.products is None else float(self.products[np.ix_(chosen, chosen)].sum())

    def save(self, path: Path) -> None:
        write_atomically(path, self.to_json())

    def to_json(self) -> str:
        values = {
            "version": SCORES_VERSION, "criterion": self.criterion, "about": dict(self.about),
            "parameters": self.parameters, "multiply_adds": self.multiply_adds, "energy": self.energy,
            "units": [
                {
                    **dataclasses.asdict(unit), "score": float(value) if math.isfinite(value) else None,
                    "standard_error": float(error),
                    "by_time": [None if math.isnan(mean) else float(mean) for mean in bins],
                }
                for unit, value, error, bins in zip(self.units, self.values, self.errors, self.bins, strict=True)
            ],
            "products": None if self.products is None else self.products.tolist(),
        }
        return json.dumps(values, indent=1) + "\n"

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read scores.json.

        Raises:
            ValueError: when it is damaged or of a newer format.
        """
        file = read_record(_File, path, SCORES_VERSION)
        rows, fields, seen = file.units, dataclasses.fields(Unit), set[str | None]({None})
        for row in rows:
            if row.name in seen or row.parent not in seen:                      # a parent stands before its children
                raise ValueError(f"{path} is damaged: its units are not a tree of different names")
            seen.add(row.name)
        if any(not 0 <= row.parameters <= file.parameters or not 0 <= row.multiply_adds <= file.multiply_adds
               for row in rows):
            raise ValueError(f"{path} is damaged: a unit costs less than nothing, or more than the whole network")
        if any(len(row.by_time) != TIME_BINS for row in rows):
            raise ValueError(f"{path} is damaged: by_time must have {TIME_BINS} values")
        if file.products is not None and [len(row) for row in file.products] != [len(rows)] * len(rows):
            raise ValueError(f"{path} is damaged: products must be a table of {len(rows)} x {len(rows)} units")
        values = np.array([math.inf if row.score is None else row.score for row in rows])
        _check_values(path, file, values)
        return cls(
            file.criterion, tuple(Unit(**{field.name: getattr(row, field.name) for field in fields}) for row in rows),
            values,
            np.array([row.standard_error for row in rows]), np.array([row.by_time for row in rows], float),
            None if file.products is None else np.array(file.products), file.energy, file.parameters,
            file.multiply_adds, file.about,
        )


@record
class _Row(Unit):
    score: float | None
    """None: infinite, never to be removed."""
    standard_error: float
    by_time: tuple[float | None, ...]


@record
class _File:
    """scores.json."""

    version: int
    criterion: Criterion
    about: dict[str, Any]
    parameters: Positive
    multiply_adds: Positive
    energy: Annotated[float, Ge(1e-30)]
    units: tuple[_Row, ...]
    products: tuple[tuple[float, ...], ...] | None


def _check_values(path: Path, file: _File, values: np.ndarray) -> None:
    """Check what numbers of a criterion can be: mean squares are no less than 0, products lie around them."""
    by_time = [mean for row in file.units for mean in row.by_time if mean is not None]
    if file.criterion == "output" and not (np.isfinite(values).all() and min([*values, *by_time], default=0) >= 0):
        raise ValueError(f"{path} is damaged: a score of criterion output is a mean square, 0 or more")
    if any(row.standard_error < 0 for row in file.units):
        raise ValueError(f"{path} is damaged: standard_error is 0 or more")
    if file.products is not None:
        products = np.array(file.products).reshape(len(values), len(values))
        if not np.allclose(products, products.T, rtol=1e-6) or not np.allclose(products.diagonal(), values, rtol=1e-6):
            raise ValueError(f"{path} is damaged: products must be symmetric, with the scores on their diagonal")
    if (said := file.about.get("criterion", file.criterion)) != file.criterion:
        raise ValueError(f"{path} is damaged: criterion={file.criterion!r}, and about says {shown(said)}")


@dataclass(frozen=True)
class Differences:
    """What removing one unit changes, over a calibration set of n samples."""

    losses: np.ndarray
    """(n,) mean squared change of an element of the output, or change of the training loss."""
    kept: np.ndarray | None = None
    """(k, elements) float32: the change itself, of the first k samples."""


def measure_unit(
    network: Removable, name: str, calibration: Calibration, whole: list[Tensor], criterion: str = "output"
) -> Differences:
    """Remove one unit and compare.

    Args:
        network: with the unit.
        calibration: what to compare on.
        whole: of the whole network, by `Calibration.predictions`, or for "task" by `Calibration.losses`.
        criterion: "output" or "task".
    """
    with network.masked([name]) as masked:
        try:
            found = calibration.losses(masked) if criterion == "task" else calibration.predictions(masked)
        except FloatingPointError as error:
            raise FloatingPointError(f"without {name}, {error}") from error
    change = torch.cat([(without - reference).cpu() for without, reference in zip(found, whole, strict=True)])
    if criterion == "task":
        return Differences(change.double().numpy())
    change = change.flatten(1)                                                  # (n, elements)
    kept = max(1, min(len(change), KEPT_BYTES // (4 * change.shape[1])))
    return Differences(change.double().square().mean(1).numpy(), change[:kept].numpy())


def measure_whole(network: Removable, calibration: Calibration, criterion: str) -> tuple[list[Tensor], float]:
    """What units are compared with, and its size: mean square of the output, or mean training loss.

    Raises:
        ValueError: when "task" meets a calibration set without data, or the network has no units.
        FloatingPointError: when an output is not finite.
    """
    check_units(network)
    if criterion == "task":
        losses = calibration.losses(network.model)
        return losses, float(torch.cat(losses).double().mean())
    outputs = calibration.predictions(network.model)
    if (energy := energy_of(outputs)) == 0:
        raise ValueError("the network's output is zero everywhere: train it before its units are scored")
    return outputs, energy


def check_units(network: Removable) -> None:
    """Raise ValueError for a network without any unit."""
    if not network.units:
        raise ValueError("this network has no layers left that could be removed")


def gather(
    network: Removable, criterion: str, found: Mapping[str, Differences], calibration: Calibration, energy: float,
    about: Mapping[str, Any],
) -> Scores:
    """Scores from the differences of every unit, by name."""
    losses = np.stack([found[unit.name].losses for unit in network.units])                                  # (u, n)
    n = losses.shape[1]
    bin_of = np.minimum((calibration.times.double().numpy() / 1000 * TIME_BINS).astype(int), TIME_BINS - 1)
    bins = np.full((len(losses), TIME_BINS), np.nan)
    for number in set(bin_of.tolist()):
        bins[:, number] = losses[:, bin_of == number].mean(1)
    products = None
    if criterion == "output":
        flat = np.stack([np.ravel(np.asarray(found[unit.name].kept)) for unit in network.units])  # (u, k elements)
        products = (flat @ flat.T).astype(float) / flat.shape[1]
        scale = np.sqrt(losses.mean(1) / np.maximum(np.diag(products), 1e-300))             # of k samples, to all n
        products *= scale[:, None] * scale
    errors = losses.std(1, ddof=1) / math.sqrt(n) if n > 1 else np.zeros(len(losses))
    return Scores(
        criterion, network.units, losses.mean(1), errors, bins, products, energy, network.parameters,
        network.multiply_adds, about,
    )


def score(
    network: Removable, calibration: Calibration, *, criterion: str = "output", seed: int = 0,
    about: Mapping[str, Any] | None = None, report: Report = lambda progress: None,
) -> Scores:
    """Score every unit, in memory; `lamamba.compression.job` does it in a folder, resumable and by many processes.

    Args:
        network: by `find_units`.
        calibration: not read by "magnitude", "random" and "hand".
        criterion: see `lamamba.ScoreUnitsOptions`.
        seed: of "random".

    Raises:
        ValueError: when "task" meets a calibration set without data.
        FloatingPointError: when an output is not finite.
    """
    about = {**calibration.about, **(about or {})}
    if criterion in RULES:
        return by_rule(network, criterion, seed, about)
    (whole, energy), found = measure_whole(network, calibration, criterion), {}
    for number, unit in enumerate(network.units):
        found[unit.name] = measure_unit(network, unit.name, calibration, whole, criterion)
        report(Progress("scoring", number + 1, len(network.units), unit="units", note=unit.name))
    return gather(network, criterion, found, calibration, energy, about)


def energy_of(outputs: list[Tensor]) -> float:
    """Mean square of an element."""
    return float(torch.cat([output.flatten().double().cpu() for output in outputs]).square().mean())


def _by_hand(network: Removable, unit: Unit) -> float:
    """The place of a block, counted from the end of its stage; only whole blocks go, and the bottleneck as a whole."""
    around = ancestors({each.name: each for each in network.units}, unit.name)
    if unit.kind not in WHOLE_BLOCKS or any(network[name].kind in WHOLE_BLOCKS for name in around):
        return math.inf
    blocks = [each.name for each in network.units if each.group == unit.group and each.kind == unit.kind]
    return float(len(blocks) - blocks.index(unit.name))


def by_rule(network: Removable, criterion: str, seed: int, about: Mapping[str, Any]) -> Scores:
    """Scores by one of RULES."""
    check_units(network)
    if criterion == "random":
        values = np.random.default_rng(seed).random(len(network.units))
    elif criterion == "hand":
        values = np.array([_by_hand(network, unit) for unit in network.units])
    else:
        weights = (network.own_parameters(unit.name) for unit in network.units)
        values = np.array([sum(float(each.detach().double().square().sum()) for each in own) for own in weights])
    nothing = np.full((len(values), TIME_BINS), np.nan)
    return Scores(
        criterion, network.units, values, np.zeros(len(values)), nothing, None, 1.0, network.parameters,
        network.multiply_adds, about,
    )
