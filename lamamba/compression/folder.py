"""The folder of a pruned network: weights, metadata, plan and a model card."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError

from lamamba.compression.plan import Plan
from lamamba.models.unet import LaMambaUNet
from lamamba.runs.metadata import ModelMetadata
from lamamba.utils.files import check_folder, replacing, write_atomically

PLAN = "plan.json"
CARD = "README.md"
FRONT = "---\nlibrary_name: lamamba\npipeline_tag: unconditional-image-generation\n---\n"


def write_pruned(folder: Path, network: LaMambaUNet, metadata: ModelMetadata, plan: Plan, teacher: Path | None) -> None:
    """Write a pruned network so that every opener reads it; whole or not at all.

    Args:
        folder: does not exist yet.
        network: pruned.
        metadata: of the teacher.
        plan: what was removed.
        teacher: its folder, whose model card is carried on.

    Raises:
        FileExistsError: when the folder exists.
        OSError: when it cannot be written.
    """
    check_folder(folder, is_new=True)
    with replacing(folder) as unfinished:
        try:
            network.save_pretrained(unfinished)
        except SafetensorError as error:                                        # a full disk
            raise OSError(f"{folder} cannot be written: {error}") from error
        metadata.save(unfinished / "sampling.json")
        plan.save(unfinished / PLAN)
        write_atomically(unfinished / CARD, model_card(folder.name, plan, teacher, FRONT))


def model_card(name: str, plan: Plan, teacher: Path | None, front: str, note: str = "") -> str:
    """The teacher's card (its front matter states the licence) after what was removed.

    Args:
        name: of the pruned model.
        plan: what was removed.
        teacher: its folder, where its card lies.
        front: front matter where the teacher has no card.
        note: how the model is opened.
    """
    text = ""
    if teacher is not None and (teacher / CARD).is_file():
        text = (teacher / CARD).read_text(encoding="utf-8", errors="replace")
        if text.startswith("---\n") and (end := text.find("\n---\n", 4)) > 0:
            front, text = text[: end + 5], text[end + 5 :]
        text = f"\n# The teacher's card\n\n{text.strip()}\n"
    losses = {
        "predicted by the sum of scores": plan.predicted, "predicted with cross terms": plan.predicted_with_cross_terms,
        "measured on other samples": plan.measured,
    }
    rows = "".join(f"| {what} | {loss:.3g} |\n" for what, loss in losses.items() if loss is not None)
    table = f"\n| relative output loss | |\n|---|---|\n{rows}" if rows else ""
    removed = "\n".join(f"- `{unit}`" for unit in plan.removed)
    about = plan.about
    on = f" on {about['samples']} samples of {about['data']}" if "samples" in about and "data" in about else ""
    return f"""{front}
# {name}

`{about.get("teacher", "a network")}` (SHA-256 {str(about.get("teacher_sha256", "unknown"))[:16]}) without
{len(plan.removed)} of its layers: {plan.parameters:.1%} fewer parameters, {plan.multiply_adds:.1%} fewer multiply-adds.
Chosen as in LAPTOP-Diff ([arXiv 2404.11098](https://arxiv.org/abs/2404.11098)), by criterion "{plan.criterion}"{on}.
{note}{table}
Removed:

{removed}
{text}"""
