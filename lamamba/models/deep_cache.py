"""Deep features kept between the steps of a sampler (DeepCache, arXiv 2312.00858), extrapolated in time.

A U-Net's deep features change slowly from step to step. A full pass computes all depths and keeps the deep feature,
what enters the last decoder stage from below. A shallow pass computes the first encoder stage, the last decoder stage
and the head alone, with the deep feature of its own time t extrapolated from the last two full passes (TaylorSeer's
first order, arXiv 2503.06923):

    deep(t) = deep(t1) + (t - t1) / (t1 - t2) (deep(t1) - deep(t2))
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lamamba.options.base import Positive, record
from lamamba.utils.text import shown

DEEP = "deep"
"""Name of the deep feature among the features that a network returns."""


@record
class LaMambaCacheConfig:
    """How a network's deep features are kept between steps.

        pipe.unet.enable_cache(LaMambaCacheConfig(interval=3))

    Raises:
        ValueError: for numbers out of range.
    """

    interval: Positive = 3
    """Every so many evaluations a pass is full; 1 makes all of them full. After the warm-up the spacing of full
    passes grows from 2 by one to this: near noise the deep features change fastest."""
    order: Literal[0, 1] = 1
    """Of the extrapolation in time: 1 is linear in the last two full passes, 0 repeats the last one."""
    warm_up: Positive = 2
    """So many evaluations at the beginning are full; order 1 needs two."""

    def __post_init__(self) -> None:
        for name in ("interval", "warm_up"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"cache {name}={shown(value)} must be a whole number, 1 or more")
        if type(self.order) is not int or self.order not in (0, 1):
            raise ValueError(f"cache order={shown(self.order)} must be 1 (linear in the last two full passes) or 0")

    @property
    def first_passes(self) -> int:
        """How many evaluations at the beginning are full: the warm-up, and what the extrapolation needs."""
        return max(self.warm_up, self.order + 1)

    def full_passes(self, evaluations: int) -> int:
        """How many of a run's evaluations are full passes, where all their times differ."""
        full, latest = min(evaluations, self.first_passes), self.first_passes - 1
        while (latest := latest + self.spacing(full)) < evaluations:
            full += 1
        return full

    def spacing(self, full: int) -> int:
        """Evaluations from the latest of so many full passes to the next, after the warm-up."""
        return min(self.interval, full - self.first_passes + 2)

    def check_run(self, evaluations: int) -> None:
        """Check that a run of so many evaluations can reuse anything.

        Raises:
            ValueError: when all of its passes would be full although interval is not 1.
        """
        if self.interval == 1:
            return
        has = f"the run has {evaluations} evaluation{'s' if evaluations != 1 else ''} of the network"
        if self.interval > evaluations:
            raise ValueError(
                f"cache interval {self.interval} is longer than the run: {has}; take more steps, a shorter interval "
                "or no cache"
            )
        if self.full_passes(evaluations) == evaluations:
            raise ValueError(
                f"the cache has nothing to reuse: {has}, of which the first {self.first_passes} are always full; take "
                "more steps or no cache"
            )


class Forward(Protocol):
    """A network with all its inputs but these; see `LaMambaUNet.forward`."""

    def __call__(self, *, deep_features: Tensor | None = None, return_features: Any = False) -> Any: ...


@dataclass
class _Branch:
    """The last full passes over one guidance branch of the batch."""

    passes: list[tuple[float, Tensor]] = field(default_factory=list)
    """Time and deep feature (b, h, w, width), the latest last; of passes at one time only the latest."""
    count: int = 0
    """Full passes so far."""
    latest: int = 0
    """Number of the evaluation that was the latest full pass."""

    def is_due(self, evaluation: int, config: LaMambaCacheConfig) -> bool:
        """Whether this evaluation is to be a full pass."""
        is_warm = self.count >= config.warm_up and len(self.passes) > config.order
        return not is_warm or evaluation - self.latest >= config.spacing(self.count)

    def extrapolate(self, time: float) -> Tensor:
        t1, last = self.passes[-1]
        if len(self.passes) == 1:
            return last
        t2, before = self.passes[0]
        return torch.lerp(before, last, (time - t2) / (t1 - t2))

    def keep(self, time: float, deep: Tensor, evaluation: int, order: int) -> None:
        distinct = [each for each in self.passes if each[0] != time]
        self.passes = [*distinct[len(distinct) - order :], (time, deep)]
        self.count, self.latest = self.count + 1, evaluation


class DeepFeatureCache:
    """The deep features of one network in one run of a sampler; each guidance branch has its own."""

    def __init__(self, config: LaMambaCacheConfig):
        self.config = config
        self.reset()

    def reset(self, images: int | None = None) -> None:
        """Empty the cache: a run begins.

        Args:
            images: rows of the batch that belong to a guidance branch; guidance makes batches of two branches. By
                default all rows are one.
        """
        self._images = images
        self.restart()

    def restart(self) -> None:
        """Empty the cache; a guidance branch has as many images as before."""
        self._branches: dict[int, _Branch] = {}
        self._evaluation, self._time, self._rows = -1, math.inf, 0

    def extrapolate(self, time: float, rows: int) -> Tensor | None:
        """Begin the next evaluation: the deep feature (rows, h, w, width) for it, or None where it is a full pass.

        A time above the last one's begins a new run, and so does, without `images`, another number of rows.
        """
        if time > self._time or (self._images is None and rows != self._rows):
            self.restart()
        self._evaluation, self._time, self._rows = self._evaluation + 1, time, rows
        branches = [self._branches.setdefault(k, _Branch()) for k in range(rows // self._branch_rows)]
        if any(branch.is_due(self._evaluation, self.config) for branch in branches):
            return None
        return torch.cat([branch.extrapolate(time) for branch in branches])

    def keep(self, deep: Tensor) -> None:
        """Keep the deep feature (rows, h, w, width) of the evaluation, a full pass."""
        for k, part in enumerate(deep.detach().split(self._branch_rows)):
            self._branches[k].keep(self._time, part, self._evaluation, self.config.order)

    @property
    def _branch_rows(self) -> int:
        return self._images or self._rows

    def run(self, forward: Forward, time: float, rows: int) -> Tensor:
        """The network's output in the next evaluation, by a full or a shallow pass.

        Args:
            forward: the network with its inputs for these rows.
            time: of all of them.
            rows: of the batch.
        """
        deep = self.extrapolate(time, rows)
        if deep is not None:
            return forward(deep_features=deep)
        output, features = forward(return_features=(DEEP,))
        self.keep(features[DEEP])
        return output
