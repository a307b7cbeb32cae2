"""The model that comes with the package: handwritten digits of 8 x 8 pixels, so that there is a picture at once."""

from __future__ import annotations

from pathlib import Path

DESCRIPTION = "handwritten digits"


def shipped_model() -> Path:
    """The folder of the model that comes with the package: bfloat16 safetensors, config.json, sampling.json.

    Raises:
        FileNotFoundError: when the package was installed without its data.
    """
    folder = Path(__file__).parent / "digits"
    if not (folder / "sampling.json").is_file():
        raise FileNotFoundError(
            f"the model of the package is missing at {folder}; install lamamba-diff again, or name a model of your own"
        )
    return folder
