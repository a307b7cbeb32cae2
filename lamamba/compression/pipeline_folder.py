"""Folders of diffusers pipelines with a pruned U-Net; every other part stays as it is."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from safetensors import safe_open

from lamamba.compression.diffusers_units import DiffusersUnits
from lamamba.compression.folder import CARD, PLAN, model_card
from lamamba.compression.plan import Plan, check_plan
from lamamba.compression.pruned_unets import PrunedUNet2DConditionModel, PrunedUNet2DModel, UNet
from lamamba.compression.stock_unets import stock_model, zero_filled
from lamamba.config import check_known
from lamamba.utils.files import check_folder, read_json, replacing, sha256, write_atomically, write_json
from lamamba.utils.text import shown

INDEX, UNET = "model_index.json", "unet"
CLASSES = {
    each.__name__: each for each in (UNet2DModel, UNet2DConditionModel, PrunedUNet2DModel, PrunedUNet2DConditionModel)
}
FORMS = ("pruned", "stock", "zeros")
WHOLE_MODELS = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
"""Files beside model_index.json with these endings hold the whole pipeline again, unpruned; they are not copied."""


def open_unet(folder: Path, variant: str | None = None) -> UNet:
    """The U-Net of a pipeline's folder, in the precision of its file.

    Raises:
        FileNotFoundError: when the folder holds no pipeline.
        ValueError: when its U-Net is of another class than UNet2DModel and UNet2DConditionModel.
    """
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} has no {INDEX}; name the folder of a diffusers pipeline")
    index = read_index(folder)
    library, name = index[UNET]
    if name not in CLASSES:
        raise ValueError(f"{folder / INDEX}: the U-Net is a {name} of {library}; these are known: {', '.join(CLASSES)}")
    dtype = torch.float32
    if files := _weight_files(folder, variant):
        with safe_open(files[0], "pt") as file:
            dtype = file.get_tensor(next(iter(file.keys()))).dtype
    return CLASSES[name].from_pretrained(folder / UNET, variant=variant, torch_dtype=dtype)


def read_index(folder: Path) -> dict[str, Any]:
    """The model_index.json of a pipeline with a U-Net.

    Raises:
        ValueError: when it is damaged, or names no class or no U-Net.
    """
    index = read_json(folder / INDEX)
    if not isinstance(name := index.get("_class_name"), str) or not name.isidentifier():
        raise ValueError(f"{folder / INDEX}: _class_name={shown(name)} must be the name of the pipeline's class")
    part = index.get(UNET)
    if not isinstance(part, list) or len(part) != 2 or not all(isinstance(word, str) for word in part):
        raise ValueError(f"{folder / INDEX}: {UNET}={shown(part)} must be library and class of a U-Net")
    return index


def unet_sha256(folder: Path, variant: str | None = None) -> str:
    """Of the files of a pipeline's U-Net: of their hashes where there are several."""
    hashes = [sha256(path) for path in _weight_files(folder, variant)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    names = f"*.{variant}*.safetensors" if variant else "*.safetensors"
    return sorted((folder / UNET).glob(names))


def compress_pipeline(
    folder: Path, removed: Iterable[str] | Plan, out: Path, *, form: str = "pruned", variant: str | None = None
) -> UNet:
    """Copy a pipeline's folder with its U-Net without units, and a model card that says so.

    Args:
        folder: of a diffusers pipeline with a `unet`.
        removed: the units, or a plan.
        out: does not exist yet.
        form: "pruned": a class of this package, for any units; "stock": a configuration of diffusers says what is left;
            "zeros": the same outputs from a stock network of full size.
        variant: of the U-Net's weights, as "fp16".

    Returns:
        the pruned U-Net.

    Raises:
        FileExistsError: when out exists.
        FileNotFoundError, ValueError: when the folder holds no such pipeline, a unit is unknown, or no stock
            configuration says what is left.
    """
    check_known("form", form, FORMS)
    network = DiffusersUnits(open_unet(folder, variant))
    plan = removed if isinstance(removed, Plan) else _by_name(network, removed)
    check_plan(plan, network)
    make = {"pruned": network.without, "stock": lambda names: stock_model(network.model, names),
            "zeros": lambda names: zero_filled(network.model, names)}
    unet = make[form](plan.removed)
    save_pipeline(folder, out, unet, plan)
    return unet


def _by_name(network: DiffusersUnits, names: Iterable[str]) -> Plan:
    names = network.canonical(names)
    parameters, multiply_adds = network.cost(names)
    return Plan(
        names, "parameters", "hand", parameters / network.parameters, multiply_adds / network.multiply_adds,
        None, None, None,
    )


def save_pipeline(folder: Path, out: Path, unet: UNet, plan: Plan, *, note: str = "") -> None:
    """Copy a pipeline's folder with another U-Net; whole or not at all.

    Args:
        folder: of the pipeline.
        out: does not exist yet.
        unet: pruned, perhaps healed.
        plan: what was removed.
        note: for the model card, as how it was healed.

    Raises:
        FileExistsError: when out exists.
        OSError: when it cannot be written.
        ValueError: when the folder's model_index.json is damaged.
    """
    check_folder(out, is_new=True)
    index = read_index(folder)
    name, is_ours = type(unet).__name__, type(unet).__module__.startswith("lamamba.")

    def left_out(where: str, names: list[str]) -> set[str]:
        return {each for each in names if Path(where) == folder and (each == UNET or each.endswith(WHOLE_MODELS))}

    with replacing(out) as unfinished:
        shutil.copytree(folder, unfinished, ignore=left_out)
        unet.save_pretrained(unfinished / UNET)
        index[UNET] = [type(unet).__module__ if is_ours else "diffusers", name]
        write_json(unfinished / INDEX, index)
        plan.save(unfinished / PLAN)
        front = f"---\nlibrary_name: diffusers\nbase_model: {folder.name}\n---\n"
        card = model_card(out.name, plan, folder, front, _usage(index, is_ours, note))
        write_atomically(unfinished / CARD, card)


def _usage(index: dict[str, object], is_ours: bool, note: str) -> str:
    needs = "Needs `pip install lamamba-diff`, which knows its U-Net:" if is_ours else "Opens in diffusers as it is:"
    return f"""{note and note + chr(10)}
{needs}

```python
from diffusers import {index["_class_name"]}

pipe = {index["_class_name"]}.from_pretrained("this folder")
```
"""
