"""The paper's tables of systems (arXiv 2408.02615) as published, with what is wrong in them.

Parameters are in M, multiply-adds in G, as the paper prints them. FIDs are of 50,000 images, from each system's own
paper; rows of guided sampling ("-G") are networks of other rows, sampled with guidance.
"""

from __future__ import annotations

from dataclasses import dataclass

REMARKS = (
    "products: multiply-adds of matrix products, convolutions and attention; total: with the scans' operations and 5 "
    "for an element of a layer norm, as the paper counts LaMamba. The paper's other rows are products only.",
    '"unconditional" in the paper\'s tables means class-conditional without guidance.',
)
"""About the whole table."""


@dataclass(frozen=True)
class Published:
    """A row of the paper's tables."""

    system: str
    network: str | None = None
    """A preset or a peer that can be counted; None: only published figures."""
    parameters: float | None = None
    multiply_adds: float | None = None
    frechet: float | None = None
    wrong: str = ""
    """What is wrong with the published figures, and why."""


_NO_CODE = ("published figures: there is no code, and the descriptions do not agree (7.5 L D^2 a layer of L tokens of "
            "width D gives 296 G at 256 px)")
_LDM_4 = "391 M could not be derived: LDM-4's configuration has 400.92 M, and 0.51 M for its table of labels"
_LDM_8 = "79 is its Inception Score; 394.98 M of the parameters are the network, 0.51 M its table of labels"
_U_VIT = "the paper repeats LDM-4's IS, precision and recall here; elsewhere 263.88, 0.82 and 0.57 are printed"
_DIS = ("900 M is the unconditional network (900.71 M); 217 G could not be derived: products are 225.6 G without, "
        "225.9 G with the causal convolutions")
_DIM = ("{} G is the input projections and skip Linears alone: output projections, time steps and the scan were not "
        "counted; products are {} G without, {} G with the causal convolutions")
_OURS = "includes the scan's and the norms' operations, with 16 states; the other rows are products only"

PUBLISHED = {
    256: (
        Published("ADM", "adm-256", 554, 1120, 10.94),
        Published("ADM-U", "adm-u-256", 608, 742, 7.49),
        Published("ADM-G", frechet=4.59),
        Published("ADM-G, ADM-U", frechet=3.94),
        Published("LDM-8", "ldm-8", 395, 79, 15.51, _LDM_8),
        Published("LDM-8-G", frechet=7.76),
        Published("LDM-4", "ldm-4", 391, 103, 10.56, _LDM_4),
        Published("LDM-4-G", frechet=3.60),
        Published("DiT-XL/2", "dit-xl-2", 675, 118, 9.62),
        Published("DiT-XL/2-G", frechet=2.27),
        Published("U-ViT-H/2", "u-vit-h-2", 501, 133),
        Published("U-ViT-H/2-G", frechet=2.29, wrong=_U_VIT),
        Published("DiffuSSM-XL", None, 673, 280.3, 9.07, _NO_CODE),
        Published("DiffuSSM-XL-G", frechet=2.28),
        Published("DiS-H/2", "dis-h-2", 900, 217, None, _DIS),
        Published("DiS-H/2-G", frechet=2.10),
        Published("DiM-Huge", "dim-huge", 860, 210, None, _DIM.format(210, 307.7, 307.9)),
        Published("DiM-Huge-G", frechet=2.21),
        Published("LaMamba-Diff-XL", "xl-n16", 656, 50.46, 6.12, _OURS),
        Published("LaMamba-Diff-XL-G", frechet=2.04),
    ),
    512: (
        Published("ADM", "adm-512", frechet=23.24),
        Published("ADM-U", frechet=9.96),
        Published("ADM-G", frechet=7.72),
        Published("ADM-G, ADM-U", frechet=3.85),
        Published("DiT-XL/2", "dit-xl-2", 675, 524, 12.03),
        Published("DiT-XL/2-G", frechet=3.04),
        Published("U-ViT-H/4", "u-vit-h-4", 501, 133),
        Published("U-ViT-H/4-G", frechet=4.05),
        Published("DiffuSSM-XL", None, 673, 1066.2, None, _NO_CODE),
        Published("DiffuSSM-XL-G", frechet=3.41),
        Published("DiS-H/2", "dis-h-2"),
        Published("DiS-H/2-G", frechet=2.88),
        Published("DiM-Huge", "dim-huge", 860, 708, None, _DIM.format(708, 1034, 1034.6)),
        Published("DiM-Huge-G", frechet=3.78),
        Published("LaMamba-Diff-XL", "xl-n16", 656, 201, 7.76, _OURS),
        Published("LaMamba-Diff-XL-G", frechet=3.01),
    ),
    1024: (
        Published("DiT-XL/2", "dit-xl-2", 675, 2910.30),
        Published("DiS-H/2", "dis-h-2"),
        Published("DiM-Huge", "dim-huge"),
        Published("LaMamba-Diff-XL", "xl-n16", 656, 804.18, None, _OURS),
    ),
}
"""By the image's side in pixels."""
OTHER_SIZES = tuple(Published(row.system, row.network) for row in PUBLISHED[1024])
"""Of networks whose configuration is for any size."""


def published_rows(image_size: int) -> tuple[Published, ...]:
    """The paper's rows for a size, or those of networks for any size, without published figures."""
    return PUBLISHED.get(image_size, OTHER_SIZES)
