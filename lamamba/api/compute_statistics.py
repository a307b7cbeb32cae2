"""lamamba.compute_statistics: the statistics of reference images, once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lamamba.evaluation.candidates import open_images
from lamamba.evaluation.evaluator import Evaluator
from lamamba.evaluation.reference import Reference
from lamamba.metrics.networks import open_network
from lamamba.options.base import verb
from lamamba.options.evaluation import StatisticsOptions
from lamamba.utils.distributed import launched_group, local_device
from lamamba.utils.files import check_target
from lamamba.utils.progress import ProgressOption, reporting
from lamamba.utils.text import counted


@dataclass(frozen=True)
class StatisticsResult:
    """A reference for `lamamba.evaluate`."""

    path: Path
    """The npz file."""
    reference: Reference = field(repr=False)
    """Mean, covariance and features of single images."""
    features: str
    """The option that chose the feature network."""

    def __str__(self) -> str:
        size, network = len(self.reference.features[0]), self.reference.network
        return (
            f"{self.path}: {counted(size, 'feature')} of {counted(self.reference.count or 0, 'image')} by "
            f"{network.name if network else ''}\n"
            f"evaluate samples against it: lamamba evaluate SAMPLES --reference {self.path} --features {self.features}"
        )


@verb
def compute_statistics(options: StatisticsOptions, *, progress: ProgressOption = "auto") -> StatisticsResult:
    """Compute mean and covariance of the features of reference images, and save them with the features of some.

    Under a launcher all processes work together, and each returns the result. Where an earlier call was stopped, the
    same call goes on.

    Raises: as `lamamba.evaluate`.
    """
    check_target(options.out)
    images = open_images(options.images, options.image_size)
    network = open_network(options.features, options.weights, local_device(options.device))
    name = options.images if isinstance(options.images, str) else "array"
    with launched_group() as group, reporting(progress if group.is_rank_zero else None) as report:
        evaluator = Evaluator(network, options, group, report)
        with evaluator.locked():
            reference = evaluator.make_reference(images, name, options.rows)
            group.wait()                                                        # all have read their features
            if group.is_rank_zero:
                reference.save(options.out)
                evaluator.clear()
        group.wait()
    return StatisticsResult(options.out, reference, options.features)
