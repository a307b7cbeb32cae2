"""The protocol of an evaluation: everything that its figures depend on."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from lamamba.evaluation.candidates import SampleSet
from lamamba.evaluation.reference import Reference
from lamamba.metrics.features import FeatureNetwork
from lamamba.options.evaluation import EvaluateOptions
from lamamba.utils.versions import package_versions


def make_protocol(
    sample_set: SampleSet, network: FeatureNetwork, reference: Reference, options: EvaluateOptions,
    device: torch.device,
) -> dict[str, Any]:
    """The protocol as plain values, as result files hold it."""
    images, rows = sample_set.runs[0], 0 if reference.rows is None else len(reference.rows)
    subset = min(options.metrics.kernel_subset, rows or options.metrics.kernel_subset, len(images))
    is_sampled = "seeds" in images.metadata
    excluded = {"seeds", "changed", "fingerprint"} if is_sampled else {"changed"}            # seeds: of all runs, below
    return {
        "distance_name": network.distance_name,
        "network": asdict(network.info),
        "reference": {
            "name": reference.name, "fingerprint": reference.fingerprint, "count": reference.count, "rows": rows,
        },
        "images": len(images), "image_shape": list(images.shape[:2]), "grey": options.grey,
        "settings": {**asdict(options.metrics), "kernel_subset": subset},       # the size used: no more than images
        "samples": {key: value for key, value in images.metadata.items() if key not in excluded},
        **({"architecture": sample_set.architecture} if sample_set.architecture else {}),
        "seeds": [run.metadata["seeds"] for run in sample_set.runs if "seeds" in run.metadata],
        "repeats": len(sample_set.runs),
        "pixels": "127.5 x + 128, clamped, truncated" if is_sampled else "as stored",
        "versions": package_versions("torch", "numpy", "diffusers", "pillow"),
        "device": device.type,
    }
