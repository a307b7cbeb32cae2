"""The removable units of a network, and what removing each saves.

Units form a tree: a LaMamba block holds its three branches, the bottleneck its blocks. A removed unit takes those
inside it along, and may save more than they do together: a block without branches needs no condition projection.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from lamamba.config import check_known


@dataclass(frozen=True)
class Unit:
    """Something that can be removed from a network, and nothing else with it."""

    name: str
    """As in the network's list of what is removed: "encoder.0.1.scan"."""
    kind: str
    """scan, attention, mlp, block, bottleneck; of diffusers' U-Nets resnet, transformer, self-attention, ..."""
    group: str
    """The stage that it belongs to, for pictures: "encoder.0"."""
    parent: str | None
    """The unit around it, whose removal removes it, too."""
    parameters: int
    """Fewer without it."""
    multiply_adds: int
    """Fewer without it: of products and convolutions, for one image and one forward pass."""
    is_sum: bool = False
    """Whether it goes as soon as all units inside it are removed."""


class Removable(ABC):
    """A network seen as removable units; one subclass for each family of networks."""

    model: nn.Module
    parameters: int
    """Of the whole network."""
    multiply_adds: int
    """Of the whole network, for one image and one forward pass."""
    units: tuple[Unit, ...]

    def __getitem__(self, name: str) -> Unit:
        known = {unit.name: unit for unit in self.units}
        check_known("unit", name, known)
        return known[name]

    def canonical(self, names: Iterable[str]) -> tuple[str, ...]:
        """The shortest list that removes the same: sorted, without what goes along with a unit around it.

        Raises:
            ValueError: for an unknown name, with the nearest.
        """
        return canonical(self.units, names)

    def cost(self, names: Iterable[str]) -> tuple[int, int]:
        """Parameters and multiply-adds saved by removing units together."""
        chosen = [self[name] for name in self.canonical(names)]
        return sum(unit.parameters for unit in chosen), sum(unit.multiply_adds for unit in chosen)

    @contextmanager
    def masked(self, names: Iterable[str]) -> Iterator[nn.Module]:
        """The network as if units were removed, to the bit, for a while: their modules are not computed."""
        replaced = [pair for name in self.canonical(names) for pair in self.bypass(name)]
        try:
            for module, forward in replaced:
                module.forward = forward                                        # on the instance: the class's is below
            yield self.model
        finally:
            for module, _ in replaced:
                module.__dict__.pop("forward", None)

    @abstractmethod
    def bypass(self, name: str) -> list[tuple[nn.Module, Callable[..., Tensor]]]:
        """The modules of a unit, with what to compute in place of each."""

    @abstractmethod
    def without(self, names: Iterable[str]) -> nn.Module:
        """A new network without units, with the weights of the rest."""

    @abstractmethod
    def own_parameters(self, name: str) -> Sequence[Tensor]:
        """The weights that a unit consists of."""


def canonical(units: Sequence[Unit], names: Iterable[str]) -> tuple[str, ...]:
    """See `Removable.canonical`."""
    known = {unit.name: unit for unit in units}
    chosen = set(names)
    for name in chosen:
        check_known("unit", name, known)
    for unit in reversed(units):                                                # a unit stands before those inside it
        inside = {other.name for other in units if other.parent == unit.name}
        if unit.is_sum and inside and inside <= chosen:
            chosen = chosen - inside | {unit.name}
    return tuple(sorted(name for name in chosen if not chosen & set(ancestors(known, name))))


def ancestors(units: dict[str, Unit], name: str) -> list[str]:
    """The units around a unit, from the inside."""
    found = []
    while (parent := units[name].parent) is not None:
        found.append(parent)
        name = parent
    return found
