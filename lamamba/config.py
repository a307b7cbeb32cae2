"""UNetConfig: the architecture of a network as a frozen value, saved with its weights. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, get_args

from lamamba.utils.text import shown

CONFIG_VERSION = 2
"""Raised when a saved configuration can no longer be read by older code; old versions stay readable.

1: noise, v and flow, and still written for them. 2: flow maps.
"""

BRANCHES = ("scan", "attention", "mlp")
"""The three residual branches of a LaMamba block, in order."""

NUM_STAGES = 4
STAGES = (*(f"encoder.{s}" for s in range(NUM_STAGES)), "bottleneck", *(f"decoder.{s}" for s in range(NUM_STAGES)))
"""Names of the stages in the order in which the network runs them."""
STAGE_WIDTHS = (1, 2, 4, 4)
"""Width of each encoder stage in units of the base width; the decoder mirrors it."""
STAGE_SCALES = (1, 2, 4, 4)
"""How many times smaller a stage's grid is than the first one's."""

MAX_SIZE, MAX_BLOCKS, MAX_GRID, MAX_GUIDANCE = 2**24, 400, 2048, 100.0
"""Sizes, blocks of a network, tokens along a side and guidance scales beyond these are a mistake, or a damaged file."""

Objective = Literal["noise", "v", "flow", "flow-map"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
Grid = tuple[int, int]

LATENT_SCALE = 8
"""Image pixels per latent pixel, for the autoencoders of Stable Diffusion that the paper uses."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """Return a ValueError for an unknown name, with the nearest known one and all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ValueError(f"{kind} {name!r} is unknown{hint} (known: {', '.join(known) or 'none'})")


def check_known(kind: str, name: Any, known: Collection[str]) -> None:
    """Check that a name is one of those that are known.

    Raises:
        ValueError: see `unknown_name`.
    """
    if name not in known:
        raise unknown_name(kind, str(name), known)


def as_grid(value: Any, name: str = "grid") -> Grid:
    """Return an int n as (n, n) and a pair as it is.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value, value)
    if isinstance(value, list | tuple):
        value = tuple(side.item() if type(side).__module__ == "numpy" and side.ndim == 0 else side for side in value)
    if not isinstance(value, tuple) or len(value) != 2 or not all(type(side) is int for side in value):
        raise ValueError(f"{name}={shown(value)} is neither a whole number nor a pair (height, width) of them")
    return value[0], value[1]


def check_grid(grid: Grid, name: str = "grid", patch_size: int | None = None) -> None:
    """Check that a token grid can be halved twice.

    Raises:
        ValueError: with the side that does not fit and the nearest sizes that do.
    """
    for side in grid:
        if side > MAX_GRID:
            raise ValueError(f"{name}={grid[0]} x {grid[1]} tokens is too large: at most {MAX_GRID} along a side")
        if side < 4 or side % 4:
            below, above = max(4, side // 4 * 4), max(4, (side // 4 + 1) * 4)
            nearest = f"{below} or {above}" if below != above else f"{above}"
            pixels = f" (one token is {patch_size} pixel(s) of the network's input)" if patch_size else ""
            raise ValueError(
                f"{name}={grid[0]} x {grid[1]} tokens cannot be halved twice: "
                f"both sides must be multiples of 4; use {nearest} instead of {side}{pixels}"
            )


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Architecture of a LaMamba-Diff U-Net (paper, Section 3; sizes as in its Table 1).

    Raises:
        ValueError: when the sizes do not fit together; the message says which and what fits.
    """

    width: int = 320
    """Channels of the first stage; the stages have 1, 2, 4 and 4 times as many."""
    num_heads: int = 16
    """Attention heads, the same in every stage."""
    depths: tuple[int, ...] = (2, 2, 2, 2)
    """Blocks in each encoder stage; the mirrored decoder stage has one more."""
    bottleneck_depth: int = 2
    """Blocks between encoder and decoder."""
    window_size: int = 8
    """Side of an attention window in tokens; on a smaller grid the window is the grid."""
    state_size: int = 1
    """States of the scan per channel (N): 1 in the released code, 16 in the paper's tables."""
    ssm_ratio: float = 2.0
    """Channels of the scan per channel of its stage."""
    mlp_ratio: float = 4.0
    """Hidden channels of the MLP branch per channel of its stage."""
    patch_size: int = 1
    """Side of a token in input pixels."""
    in_channels: int = 4
    """Channels of the noisy input: 4 for latents, 3 for RGB pixels."""
    out_channels: int | None = None
    """Channels of the output; by default 2 * in_channels with a learned variance, else in_channels."""
    num_classes: int = 1000
    """Class labels; 0 for an unconditional network. The row after the last label means "no class"."""
    grid: int | tuple[int, int] = 32
    """Tokens along (height, width) that the network is made for; one number means a square."""
    scan: Literal["continuous", "cross"] = "continuous"
    """Scan paths: "continuous" snakes (the paper) or "cross", plain rows and columns (its ablation)."""
    objective: Objective = "noise"
    """What the network predicts: noise and variance (DDPM, the paper), v, the velocity of a rectified flow, or the mean
    velocity between two times (flow-map)."""
    guidance_range: tuple[float, float] | None = None
    """Lowest and highest guidance scale of a flow map that takes the scale as an input; None: it takes none."""
    removed_blocks: tuple[str, ...] = ()
    """Removed blocks or branches: "encoder.0.1", "decoder.3.0.attention", "bottleneck" (with its residual)."""

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in vars(self).copy():
            value = getattr(self, name)
            if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
                put(name, value.item())
            elif isinstance(value, list):
                put(name, tuple(value))
        put("grid", as_grid(self.grid))
        if not isinstance(self.removed_blocks, tuple) or not all(isinstance(name, str) for name in self.removed_blocks):
            raise ValueError(f"removed_blocks={shown(self.removed_blocks)} must be names of blocks")
        put("removed_blocks", tuple(sorted(self.removed_blocks)))
        if self.out_channels is None:
            put("out_channels", self.in_channels * (2 if self.objective == "noise" else 1))
        self._validate()

    def _validate(self) -> None:
        at_least_one = "width num_heads window_size state_size patch_size in_channels"
        for name in at_least_one.split():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value < MAX_SIZE:
                raise ValueError(f"{name}={shown(value)} must be a whole number of at least 1, below {MAX_SIZE:,}")
        if type(self.num_classes) is not int or not 0 <= self.num_classes < MAX_SIZE:
            raise ValueError(f"num_classes={shown(self.num_classes)} must be 0 (unconditional) or more")
        depths = self.depths if isinstance(self.depths, tuple) else ()
        if len(depths) != NUM_STAGES or any(type(n) is not int or n < 1 for n in depths):
            raise ValueError(f"depths={shown(self.depths)} must be {NUM_STAGES} whole numbers of at least 1")
        if type(self.bottleneck_depth) is not int or self.bottleneck_depth < 1:
            raise ValueError(f"bottleneck_depth={shown(self.bottleneck_depth)} must be a whole number of at least 1")
        if sum((*depths, self.bottleneck_depth, *self.decoder_depths)) > MAX_BLOCKS:
            raise ValueError(
                f"depths={shown(self.depths)} and bottleneck_depth={shown(self.bottleneck_depth)} make too many "
                f"blocks: {MAX_BLOCKS} at most"
            )
        check_known("scan", self.scan, ("continuous", "cross"))
        check_known("objective", self.objective, OBJECTIVES)
        if self.width % 4:
            raise ValueError(f"width={self.width} must be a multiple of 4, for sines and cosines of rows and columns")
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} does not split into num_heads={self.num_heads} equal heads")
        for name in ("ssm_ratio", "mlp_ratio"):
            ratio = getattr(self, name)
            is_number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
            if not is_number or not 0 < ratio < MAX_SIZE or (ratio * self.width) % 1:
                raise ValueError(f"{name}={ratio} times width={self.width} must be a whole number of channels")
        expected = self.in_channels * (2 if self.objective == "noise" else 1)
        if type(self.out_channels) is not int or self.out_channels != expected:        # True is 1
            raise ValueError(
                f"out_channels={self.out_channels} does not fit objective={self.objective!r} with "
                f"in_channels={self.in_channels}; it needs {expected}"
            )
        check_grid(self.token_grid)
        self._validate_guidance_range()
        self._validate_removed()

    def _validate_guidance_range(self) -> None:
        if self.guidance_range is None:
            return
        ends = self.guidance_range if isinstance(self.guidance_range, tuple) else ()
        numbers = len(ends) == 2 and all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends)
        if not numbers or not 1 <= ends[0] < ends[1] <= MAX_GUIDANCE:
            raise ValueError(f"guidance_range={shown(self.guidance_range)} must be two scales, 1 <= low < high <= "
                             f"{MAX_GUIDANCE:g}, such as (1, 4)")
        object.__setattr__(self, "guidance_range", (float(ends[0]), float(ends[1])))
        if self.objective != "flow-map" or not self.num_classes:
            raise ValueError(
                f"guidance_range={self.guidance_range} is for flow maps with classes, this network is "
                f"{self.objective} with num_classes={self.num_classes}: leave it out"
            )

    @property
    def lowest_guidance(self) -> float:
        """The lowest guidance scale that a flow map takes."""
        return (self.guidance_range or (1.0, 1.0))[0]

    def check_guidance(self, scale: float) -> None:
        """Check that a flow map takes a guidance scale; others take any.

        Raises:
            ValueError: when the scale is outside the range that it was trained for.
        """
        if self.objective != "flow-map":
            return
        low, high = self.guidance_range or (1.0, 1.0)
        if not low <= scale <= high:
            fits = f"{low:g} to {high:g}" if low < high else "1 alone (guidance was not trained into it)"
            raise ValueError(f"guidance {scale:.9g} is out of range: this flow map takes {fits}")

    def _validate_removed(self) -> None:
        known = self.removable_names() if self.removed_blocks else []
        for name in self.removed_blocks:
            check_known("removed_blocks entry", name, known)
        if len(set(self.removed_blocks)) != len(self.removed_blocks):
            raise ValueError(f"removed_blocks={self.removed_blocks} names an entry twice")

    def removable_names(self) -> list[str]:
        """Names that removed_blocks may hold: the blocks, their branches, and the whole bottleneck."""
        blocks = self._blocks()
        return ["bottleneck", *blocks, *(f"{block}.{branch}" for block in blocks for branch in BRANCHES)]

    def _blocks(self) -> list[str]:
        blocks = [f"encoder.{s}.{i}" for s in range(NUM_STAGES) for i in range(self.depths[s])]
        blocks += [f"bottleneck.{i}" for i in range(self.bottleneck_depth)]
        return blocks + [f"decoder.{s}.{i}" for s in range(NUM_STAGES) for i in range(self.decoder_depths[s])]

    @property
    def num_blocks(self) -> int:
        """Blocks that are not removed."""
        return sum(bool(self.branches(block)) for block in self._blocks())

    def branches(self, block: str) -> tuple[str, ...]:
        """Branches of a block that are not removed, in order; none when the block is removed."""
        if block in self.removed_blocks or (block.startswith("bottleneck.") and "bottleneck" in self.removed_blocks):
            return ()
        return tuple(branch for branch in BRANCHES if f"{block}.{branch}" not in self.removed_blocks)

    @property
    def token_grid(self) -> Grid:
        """grid as a pair (height, width) in tokens."""
        return as_grid(self.grid)

    @property
    def input_size(self) -> Grid:
        """Height and width of the network's input in its own pixels (latent pixels, for latents)."""
        return self.token_grid[0] * self.patch_size, self.token_grid[1] * self.patch_size

    def fit_input(self, height: int | None, width: int | None, factor: int = 1) -> Grid:
        """Return height and width of the network's input for images of height x width pixels.

        Args:
            height, width: of the image, in pixels; by default the configuration's.
            factor: image pixels along the side of an input pixel: 8 for latents of Stable Diffusion's autoencoders, 1
                without an autoencoder.

        Raises:
            ValueError: when a side does not fit, with the nearest that do.
        """
        multiple = 4 * self.patch_size * factor                                 # the grid is halved twice
        sides: list[int] = []
        for name, requested, default in (("height", height, self.input_size[0]), ("width", width, self.input_size[1])):
            side = default * factor if requested is None else requested
            if not isinstance(side, Integral):
                raise ValueError(f"{name}={shown(side)} must be a whole number of pixels")
            if side < multiple or side % multiple:
                below, above = side // multiple * multiple, (side // multiple + 1) * multiple
                nearest = f"{below} or {above}" if below > 0 else f"{max(above, multiple)}"
                raise ValueError(
                    f"{name} {side} does not fit this model: it must be a multiple of {multiple} pixels; the nearest "
                    f"is {nearest}"
                )
            sides.append(int(side // factor))
        check_grid((sides[0] // self.patch_size, sides[1] // self.patch_size), "size")
        return sides[0], sides[1]

    @property
    def output_channels(self) -> int:
        """out_channels, resolved."""
        assert self.out_channels is not None
        return self.out_channels

    @property
    def condition_width(self) -> int:
        """Width of the timestep and label embeddings: four times the base width."""
        return 4 * self.width

    @property
    def decoder_depths(self) -> tuple[int, ...]:
        """Blocks in each decoder stage, deepest first."""
        return tuple(depth + 1 for depth in reversed(self.depths))

    def stage_width(self, stage: int) -> int:
        """Channels of encoder stage 0..3 (and of the decoder stage that mirrors it)."""
        return self.width * STAGE_WIDTHS[stage]

    def scan_width(self, width: int) -> int:
        """Channels D inside the scan branch of a stage of this width."""
        return int(self.ssm_ratio * width)

    def dt_rank(self, width: int) -> int:
        """Rank R of the time-step projection in a stage of this width."""
        return math.ceil(width / 16)

    def stage_window(self, stage: int) -> Grid:
        """Attention window (height, width) of a stage: window_size, or the stage's grid where that is smaller."""
        height, width = (side // STAGE_SCALES[stage] for side in self.token_grid)
        return min(self.window_size, height), min(self.window_size, width)

    @classmethod
    def preset(cls, name: str, *, image_size: int | tuple[int, int] = 256, **overrides: Any) -> UNetConfig:
        """Return a preset ("s", "b", "l", "xl") for an image size in pixels, with any field overridden.

            UNetConfig.preset("xl", image_size=512, state_size=16)

        The grid is that of latents 8 times smaller than the image, as in the paper; give `grid` for another.

        Raises:
            ValueError: for an unknown preset or field (the nearest is named), or an image size that does not fit.
        """
        check_known("preset", name, PRESETS)
        fields = [field.name for field in dataclasses.fields(cls)]
        for key in overrides:
            check_known("configuration field", key, fields)
        if "grid" not in overrides:
            patch = overrides.get("patch_size", 1)
            multiple = LATENT_SCALE * patch * 4
            sides = as_grid(image_size, "image_size")
            for side in sides:
                if side < multiple or side % multiple:
                    nearest = max(1, round(side / multiple)) * multiple
                    raise ValueError(
                        f"image_size={side} does not fit: with latents {LATENT_SCALE} times smaller, patch_size="
                        f"{patch} and two halvings it must be a multiple of {multiple}; the nearest is {nearest}"
                    )
            overrides["grid"] = (sides[0] // (LATENT_SCALE * patch), sides[1] // (LATENT_SCALE * patch))
        return cls(**{**PRESETS[name], **overrides})

    def replace(self, **changes: Any) -> UNetConfig:
        """Return a copy with some fields changed; out_channels follows the objective unless it is given."""
        if {"objective", "in_channels"} & changes.keys():
            changes.setdefault("out_channels", None)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values for JSON, with the format's version; `from_dict` is the inverse."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        if self.objective != "flow-map":                                        # as version 1 wrote it: same hashes
            del values["guidance_range"]
        return {"config_version": CONFIG_VERSION if self.objective == "flow-map" else 1, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UNetConfig:
        """Make a config from the values of `to_dict`. Strict: an unknown key is an error, not a warning.

        Raises:
            ValueError: for an unknown key (with the nearest known) or a config of a newer format.
        """
        values = dict(values)
        version = values.pop("config_version", CONFIG_VERSION)
        if type(version) is not int or not 1 <= version <= CONFIG_VERSION:
            raise ValueError(
                f"config_version={shown(version)} is newer than this lamamba reads ({CONFIG_VERSION}); upgrade "
                "lamamba-diff"
            )
        fields = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            check_known("configuration field", key, fields)
        return cls(**values)


PRESETS: dict[str, dict[str, Any]] = {
    "s": {"width": 64, "num_heads": 4},
    "b": {"width": 128, "num_heads": 8},
    "l": {"width": 256, "num_heads": 16},
    "xl": {"width": 320, "num_heads": 16},
}
"""XL is the paper's; S, B and L are our widths, near DiT-S/2, B/2 and L/2 in size (33, 130 and 458 M)."""
