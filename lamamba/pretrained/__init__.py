"""The models that come with the package: handwritten digits of 8 x 8 pixels, so that there is a picture at once."""

from __future__ import annotations

from pathlib import Path

DESCRIPTION = "handwritten digits"
SHIPPED_MODELS = {"shipped": "digits", "shipped-few-steps": "digits_few_steps"}
"""Folder of each model in the package: a flow, and its flow map for one to four steps."""


def is_shipped(path: str | Path) -> bool:
    """Whether a path is the name of a model in the package, and no folder is called so."""
    return str(path) in SHIPPED_MODELS and not Path(path).exists()


def shipped_model(name: str = "shipped") -> Path:
    """The folder of a model that comes with the package: bfloat16 safetensors, config.json, sampling.json.

    Raises:
        FileNotFoundError: when the package was installed without its data.
    """
    folder = Path(__file__).parent / SHIPPED_MODELS[name]
    if not (folder / "sampling.json").is_file():
        raise FileNotFoundError(
            f"the model of the package is missing at {folder}; install lamamba-diff again, or name a model of your own"
        )
    return folder
