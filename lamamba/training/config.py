"""What a training run is: one frozen value, written into the run's folder. Read from a recipe, overridden by options.

No torch here: `lamamba train --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lamamba.config import PRESETS, Objective, UNetConfig, unknown_name

RUN_VERSION = 1
"""Raised when a run's config.json can no longer be read by older code; old versions stay readable."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The network: a preset, and what differs from it. Input size, channels and classes follow the data."""

    preset: str = "s"
    """Size to start from: s, b, l or xl."""
    width: int | None = None
    """Channels of the first stage (a multiple of 4 that num_heads divides)."""
    num_heads: int | None = None
    """Attention heads, the same in every stage."""
    depths: tuple[int, int, int, int] | None = None
    """Blocks in each of the four encoder stages; decoder stages have one more."""
    bottleneck_depth: int | None = None
    """Blocks between encoder and decoder."""
    window_size: int | None = None
    """Side of an attention window in tokens."""
    state_size: int | None = None
    """Memory of the scan in numbers per channel: 1 as released, 16 as in the paper's tables."""
    patch_size: int | None = None
    """Side in input pixels of one token."""
    scan: Literal["continuous", "cross"] | None = None
    """Reading order of the grid."""
    objective: Objective = "noise"
    """"noise": DDPM with learned variance, the paper's; "flow": rectified flow, quicker on small data."""

    def build(self, *, channels: int, num_classes: int, input_size: int) -> UNetConfig:
        """The network's full configuration for images of this many channels, classes and input pixels.

        Raises:
            ValueError: when sizes do not fit together.
        """
        if self.preset not in PRESETS:
            raise unknown_name("model.preset", self.preset, PRESETS)
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None and k != "preset"}
        patch = self.patch_size or 1
        if input_size % (4 * patch):
            raise ValueError(
                f"data.image_size={input_size} does not fit patch_size={patch} and two halvings; "
                f"choose a multiple of {4 * patch}, such as {max(1, round(input_size / 4 / patch)) * 4 * patch}"
            )
        return UNetConfig.preset(
            self.preset, **given, in_channels=channels, num_classes=num_classes, grid=input_size // patch
        )


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The images."""

    source: str = "digits"
    """"digits" (1,797 handwritten ones, from scikit-learn), or a folder: one subfolder per class, or flat."""
    image_size: int = 8
    """Side in pixels; images are cropped to squares and scaled."""
    channels: Literal[1, 3] = 1
    """1 for grey, 3 for colour."""
    mirror: bool = False
    """Mirror every other image left to right (not for digits or text)."""
    use_labels: bool = True
    """Train class by class where the data has classes; no: an unconditional model."""


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """AdamW."""

    learning_rate: float = 1e-4
    """Constant, after the warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from zero."""
    cooldown_share: float = 0.0
    """Share of the run, at its end, over which the learning rate falls to zero along a line."""
    weight_decay: float = 0.0
    """0 as in DiT; the official LaMamba-Diff script leaves PyTorch's 0.01."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the gradient's running mean and of its square's."""
    max_grad_norm: float = math.inf
    """Clip the gradient to this norm; inf: only measure it."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The picture that training shows now and then."""

    every: int = 500
    """Steps between sample grids; 0: none."""
    sampler: str | None = None
    """By default the objective's own: ddpm or flow-euler."""
    num_steps: int = 25
    """Sampling steps."""
    guidance: float = 1.5
    """Classifier-free guidance scale; 1 for none. Unconditional models use 1."""
    per_class: int = 4
    """Images per class in a grid (of the first ten classes)."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. Every option has this place in a TOML recipe, too."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    batch_size: int = 64
    """Images per optimizer step."""
    steps: int = 1000
    """Optimizer steps of the whole run."""
    ema_decay: float = 0.9999
    """Weight of the past in the running mean of the weights, constant; short runs need less."""
    label_dropout: float = 0.1
    """Probability of training a sample without its label, which guidance needs."""
    seed: int = 0
    """Decides initial weights, order of images, noise, times, mirrors and dropped labels."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step always writes one."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept on disk."""
    device: str = "auto"
    """"auto" (a GPU where there is one), or a PyTorch device such as cpu or cuda:1."""

    def __post_init__(self) -> None:
        limits = {
            "batch_size": (self.batch_size, 1), "steps": (self.steps, 1), "log_every": (self.log_every, 1),
            "checkpoint_every": (self.checkpoint_every, 1), "keep_checkpoints": (self.keep_checkpoints, 1),
            "sampling.every": (self.sampling.every, 0), "sampling.num_steps": (self.sampling.num_steps, 1),
            "sampling.per_class": (self.sampling.per_class, 1), "data.image_size": (self.data.image_size, 4),
            "optimizer.warmup_steps": (self.optimizer.warmup_steps, 0), "seed": (self.seed, 0),
        }
        for name, (value, least) in limits.items():
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        shares = {
            "ema_decay": self.ema_decay, "label_dropout": self.label_dropout,
            "optimizer.cooldown_share": self.optimizer.cooldown_share,
        }
        for name, share in shares.items():
            if not 0 <= share < 1:
                raise ValueError(f"{name}={share} must lie in [0, 1)")
        if not self.optimizer.learning_rate > 0 or not self.optimizer.max_grad_norm > 0:
            raise ValueError("optimizer.learning_rate and optimizer.max_grad_norm must be above 0")

    def warnings(self) -> list[str]:
        """What is allowed but probably not meant."""
        initial = self.ema_decay**self.steps
        if initial <= 0.02:
            return []
        fitting = 1 - 5 / max(self.steps, 10)
        return [
            f"after {self.steps} steps, ema_decay={self.ema_decay} leaves {initial:.0%} of the averaged weights at "
            f"their initial values; samples will look like noise. --ema-decay {fitting:.4g} would fit this run"
        ]

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of optimizer step 0, 1, ..."""
        options, rate = self.optimizer, self.optimizer.learning_rate
        if step < options.warmup_steps:
            rate *= (step + 1) / options.warmup_steps
        cooldown = options.cooldown_share * self.steps
        if cooldown and step >= self.steps - cooldown:
            rate *= (self.steps - step) / (cooldown + 1)
        return rate

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and TOML (infinities become the string "inf")."""
        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            if isinstance(value, tuple):
                return list(value)
            return "inf" if value == math.inf else value

        return plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Rebuild from nested plain values; missing ones keep their defaults, unknown ones are errors.

        Raises:
            ValueError: naming an unknown option and its nearest neighbour, or a value that does not fit.
        """
        return _build(cls, values, "")


_SECTIONS: dict[str, type] = {
    "model": ModelOptions, "data": DataOptions, "optimizer": OptimizerOptions, "sampling": SamplingOptions,
}


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    given: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise unknown_name("option", prefix + key, [prefix + name for name in fields])
        if not prefix and key in _SECTIONS:
            if not isinstance(value, Mapping):
                raise ValueError(f"{key}={value!r} must be a section with options of its own")
            value = _build(_SECTIONS[key], value, f"{key}.")
        elif isinstance(value, list):
            value = tuple(value)
        elif value == "inf":
            value = math.inf
        elif isinstance(value, int) and not isinstance(value, bool) and fields[key].type == "float":
            value = float(value)
        elif value is not None and (wanted := _PLAIN.get(str(fields[key].type))) and not isinstance(value, wanted):
            raise ValueError(f"{prefix}{key}={value!r} must be a {fields[key].type}")
        given[key] = value
    return cls(**given)


_PLAIN: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}


def load_recipe(name_or_path: str) -> TrainConfig:
    """A recipe of the package by name ("digits"), or a TOML file by path.

    Raises:
        FileNotFoundError: for a path that does not exist.
        ValueError: for an unknown name, a file that is not TOML, or options that do not fit.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml" and path.parent == Path("."):
        if name_or_path not in recipe_names():
            raise unknown_name("recipe", name_or_path, recipe_names())
        path = RECIPES / f"{name_or_path}.toml"
    if not path.is_file():
        known = ", ".join(recipe_names())
        raise FileNotFoundError(f"recipe {path} does not exist; give a .toml file or one of {known}")
    return TrainConfig.from_dict(_read_toml(path))


RECIPES = Path(__file__).parent.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:                                                 # Python 3.10
        import tomli as tomllib  # type: ignore[no-redef]
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from error
