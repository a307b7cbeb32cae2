"""What a training run is: one frozen value, written into the run's folder. Read from a recipe, overridden by options.

No torch here: `lamamba train --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from annotated_types import Ge, Gt, Le, Lt
from typing_extensions import Self

from lamamba.config import STAGES, Objective, UNetConfig, check_known
from lamamba.options.base import (
    MAX_THREADS,
    Above0,
    FilePath,
    Name,
    OrInfinity,
    Positive,
    Threads,
    Words,
    from_dict,
    joint_checks_later,
    options,
    read_toml,
)
from lamamba.options.sampling import DenoisingOptions

RUN_VERSION = 3
"""Raised when a run's config.json can no longer be read by older code; old versions stay readable.

1: one process, one average of the weights. 2: several of both, and the excluded files of the data; sampling.num_steps.
"""

Count = Annotated[int, Ge(0)]
Share = Annotated[float, Ge(0), Lt(1)]
MAX_TARGET_DECAY = 0.998
"""Of the averaged weights that a flow map's targets come from."""


@options
class ModelOptions:
    """The network: a preset, and what differs from it. Input size, channels and classes follow the data."""

    preset: Literal["s", "b", "l", "xl"] = "s"
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
    """State size N of the scan: 1 as released, 16 as in the paper's tables."""
    patch_size: int | None = None
    """Side in input pixels of one token."""
    scan: Literal["continuous", "cross"] | None = None
    """Reading order of the grid."""
    ssm_ratio: float | None = None
    """Channels of the scan per channel of its stage."""
    mlp_ratio: float | None = None
    """Hidden channels of the MLP per channel of its stage."""
    removed_blocks: Words | None = None
    """Removed blocks and branches of a pruned network (lamamba compress): encoder.0.1, decoder.3.0.attention."""
    objective: Objective | None = None
    """"noise": DDPM with learned variance, the paper's; "v": a mix of noise and image (Salimans & Ho); "flow":
    rectified flow, quicker on small data; "flow-map": its mean velocity between two times, for one to four steps. By
    default that of start.source where the network is its, else noise."""
    guidance_range: tuple[float, float] | None = None
    """Lowest and highest guidance scale that a flow map takes as an input, such as 1 4; needs distill.teacher."""

    @classmethod
    def of(cls, config: UNetConfig) -> ModelOptions:
        """The options that build a network of this configuration from its data."""
        names = [entry.name for entry in dataclasses.fields(cls) if entry.name != "preset"]
        return cls(preset="s", **{name: getattr(config, name) for name in names})

    def build(self, *, channels: int, num_classes: int, input_size: int) -> UNetConfig:
        """The network's full configuration for images of this many channels, classes and input pixels.

        Raises:
            ValueError: when sizes do not fit together.
        """
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None and k != "preset"}
        patch = self.patch_size or 1
        if input_size % (4 * patch):
            raise ValueError(
                f"an input of {input_size} x {input_size} (data.image_size, or the side of its latents) does not fit "
                f"patch_size={patch} and two halvings; choose a multiple of {4 * patch}, such as "
                f"{max(1, round(input_size / 4 / patch)) * 4 * patch}"
            )
        return UNetConfig.preset(
            self.preset, **given, in_channels=channels, num_classes=num_classes, grid=input_size // patch
        )


@options
class DataOptions:
    """The images."""

    source: Name = "digits"
    """"digits" (1,797 handwritten ones, from scikit-learn); latents of lamamba encode; or images: a folder (one
    subfolder per class, or flat), WebDataset tars, datasets:ID@SPLIT of Hugging Face."""
    kind: Literal["auto", "images", "latents"] = "auto"
    """What the source is. "auto" looks; a recipe says it, so that --dry-run can plan where the data is missing."""
    image_size: Annotated[int, Ge(4)] = 8
    """Side in pixels; images are cropped to squares and scaled. Of latents, the size they must have been made for."""
    channels: Literal[1, 3] = 1
    """1 for grey, 3 for colour. Latents have their own."""
    autoencoder: Name | None = None
    """A diffusers autoencoder: folder or hub id. With images: encode them on every visit. With latents: refuse any made
    with another one."""
    crop: Literal["centre", "random"] = "centre"
    """"random": 80 to 100 % of the short side, anywhere (ADM). Latents are of centre crops."""
    mirror: bool = False
    """Mirror every other image left to right (not for digits or text)."""
    manifest: Name | None = None
    """The manifest of lamamba data check; its bad files are excluded. By default SOURCE/lamamba-manifest.json."""
    max_bad_images: Count = 10
    """Unforeseen bad files, met by all processes together, to replace by their neighbours before training stops with
    their names."""
    use_labels: bool = True
    """Train class by class where the data has classes; no: an unconditional model."""
    expected_images: Positive | None = None
    """Images that a recipe was written for: the plan of --dry-run, where the data is not there yet."""
    expected_classes: Count | None = None
    """Classes that a recipe was written for; data with another number is refused."""


@options
class OptimizerOptions:
    """AdamW."""

    learning_rate: Above0 = 1e-4
    """The highest; reached after the warm-up."""
    warmup_steps: Count = 0
    """Steps over which the learning rate rises from zero."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant (the paper), or half a cosine down to zero at the run's last step."""
    cooldown_share: Share = 0.0
    """Share of a constant run, at its end, over which the learning rate falls to zero along a line."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """0 as in DiT; the official LaMamba-Diff script leaves PyTorch's 0.01."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decay of the gradient's running mean and of its square's."""
    max_grad_norm: Annotated[OrInfinity, Gt(0)] = math.inf
    """Clip the gradient to this norm; inf: only measure it."""

    def __post_init__(self) -> None:
        if self.schedule == "cosine" and self.cooldown_share:
            raise ValueError("cooldown_share is for constant schedules; a cosine ends at zero by itself")


@options
class LossOptions:
    """Which times are drawn, and how much each counts."""

    timesteps: Literal["uniform", "logit-normal"] | None = None
    """How times are drawn; by default evenly for noise and v, logit-normal (Stable Diffusion 3) for flow."""
    logit_mean: float = 0.0
    """Mean of logit-normal times: below 0 more often near the image, above 0 more often near the noise."""
    logit_deviation: Above0 = 1.0
    """Standard deviation of logit-normal times, before the sigmoid."""
    weighting: Literal["none", "min-snr"] = "none"
    """"min-snr": times with little noise count less (Hang et al., 2023); for noise and v."""
    min_snr_gamma: Above0 = 5.0
    """Signal-to-noise ratio above which min-snr turns the weight down."""


@options
class FlowMapOptions:
    """How a flow map learns (model.objective flow-map): its times, and where velocities replace its own half steps."""

    noise_share: Share = 0.25
    """Share of the samples that begin at pure noise, where every image begins."""
    velocity_share: Share = 0.25
    """Share of the samples whose step has no length: they learn the velocity itself."""
    image_share: Share = 0.3
    """Share of the other samples whose step ends at the image."""
    lowest_share: Share = 0.25
    """Share of the samples with the lowest guidance scale of the range; the others lie all over it."""
    student_share: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of the samples with the highest guidance scale of the range whose step begins on the student's own path
    from noise, in place of a noised image (backward distillation); none of those with the lowest, in proportion
    between. Without a range, of all samples. It needs distill.teacher."""
    smallest_gap: Share = 0.04
    """Half steps shorter than this (all time is 1) begin with the velocity itself."""


@options
class ProcessOptions:
    """How the work is distributed. Nothing here changes what is learned, beyond rounding."""

    sharding: Literal["none", "full", "hybrid"] = "none"
    """"none": every process holds the whole network (DDP); "full": parameters, gradients, optimizer and averages are
    split among the processes (FSDP2); "hybrid": among those of a machine, and machines only sum gradients (HSDP)."""
    shard_size: Annotated[int, Ge(2)] | None = None
    """Processes that a hybrid run splits the network among; by default those of a machine."""
    accumulation_steps: Positive = 1
    """Micro-batches into which a process splits its part of the batch, one after the other, to save memory."""
    checkpoint_activations: bool = False
    """Keep only the blocks' inputs and compute the rest again for the backward pass: less memory, a third more time."""
    compile: bool = False
    """torch.compile the network: minutes at the start, faster steps on GPUs. Not with sharding."""
    threads: Annotated[Threads | None, tyro.conf.arg(aliases=("--threads",))] = None
    """CPU threads of each process that compute; by default PyTorch's choice. On a busy machine, as many as cores are
    free."""
    data_workers: Annotated[int, Ge(0), Le(MAX_THREADS)] = 0
    """Worker processes that read ahead, for each training process; 0: threads do, or nothing."""
    data_threads: Annotated[int, Ge(0), Le(MAX_THREADS)] | None = None
    """Threads that read ahead where no processes do; by default 4 for a GPU, on a CPU 0: read between the steps."""
    timeout_minutes: Annotated[float, Gt(0), Le(525_600)] = 30.0
    """How long processes wait for one another before they give up."""

    def __post_init__(self) -> None:
        if self.compile and self.sharding != "none":
            raise ValueError(f"compile does not go with sharding={self.sharding!r} yet; leave one of them out")
        if self.shard_size is not None and self.sharding != "hybrid":
            raise ValueError(
                f"shard_size={self.shard_size} is for sharding='hybrid', and sharding is {self.sharding!r}: leave one "
                "of them out")


@options
class PrecisionOptions:
    """How numbers are rounded. Recorded with the run; part of what a run is, so a restart cannot change it."""

    autocast: Literal["none", "bfloat16"] = "none"
    """"bfloat16": matrix products in bfloat16; weights, the scan's state, norms and the loss stay float32."""
    tf32: bool = True
    """Float32 products of NVIDIA GPUs may round their inputs to TF32, as in the official training. CPUs do not."""
    deterministic: bool = False
    """Only operations that give the same bits every time (torch.use_deterministic_algorithms); slower on GPUs."""


@options
class FaultOptions:
    """What happens when a loss or a gradient is not finite. The weights are never touched by such a step."""

    on_non_finite: Literal["stop", "skip", "back"] = "stop"
    """"stop" with a report; "skip" the batch; go "back" to the last checkpoint and omit all batches since."""
    max_skips: Count = 10
    """How often a run may skip or go back before it stops."""


@options
class WatchOptions:
    """What is measured and tracked besides the training loss."""

    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where metrics go besides metrics.jsonl. A tracker that cannot be reached is dropped; the run goes on."""
    project: str = "lamamba"
    """The trackers' name for a group of runs."""
    held_out: Count = 0
    """Images that are never trained on, to measure the averaged network's loss at fixed times and noise."""
    held_out_every: Positive = 1000
    """Steps between measurements of the held-out loss."""


@options
class StartOptions:
    """What training starts from, when not from fresh weights."""

    source: Name | None = None
    """A run, a checkpoint, a saved model, or an official checkpoint (.pt). Its network is trained; the model's
    options may be left out, or must describe it."""
    mode: Literal["weights", "everything"] = "weights"
    """"weights": the averaged weights only, for fine-tuning; "everything": go on with an official training checkpoint,
    its weights, averages, optimizer and step."""
    replace_labels: bool = False
    """Give the data's classes a fresh label table; needed when they are not the classes of the source."""

    def __post_init__(self) -> None:
        if self.mode == "everything" and (self.source is None or self.replace_labels):
            raise ValueError(
                "mode='everything' continues an official training checkpoint as it is: give it as start.source, "
                "without start.replace_labels"
            )


@options
class LoraOptions:
    """A LoRA (arXiv 2106.09685) of start.source, whose network it is whatever [model] says: weights W stay, and A and B
    of W + (alpha / rank) B A are learned. Needs pip install 'lamamba-diff[lora]'."""

    rank: Positive | None = None
    """Rows of A; by default there is no LoRA and all weights are trained."""
    alpha: Above0 | None = None
    """By default the rank."""
    layers: Words = ()
    """Layers by the end of their name: attention.qkv, modulation, label_embedding. By default the tokens' products of
    every block: scan.in_proj, scan.out_proj, attention.qkv, attention.out_proj, mlp.linear_in, mlp.linear_out."""

    def __post_init__(self) -> None:
        if self.rank is None and (self.alpha is not None or self.layers):
            raise ValueError("alpha and layers are of a LoRA: give its rank, too, as in lora.rank=16")


@options
class DistillOptions:
    """A teacher whose output and features the network learns besides the data (LAPTOP-Diff, arXiv 2404.11098), or whose
    velocity a flow map learns in place of the data's."""

    teacher: Name | None = None
    """A run, a checkpoint, a saved model, or "shipped"; by default there is none. It stays as it is, and is known by
    its hash."""
    task: Annotated[float, Ge(0)] = 1.0
    """Weight of the objective's own loss."""
    output: Annotated[float, Ge(0)] = 1.0
    """Weight of the output's squared distance to the teacher's."""
    feature: Annotated[float, Ge(0)] = 0.1
    """Weight of the features' distance, the sum over the stages."""
    features: Literal["normalised", "plain", "none"] = "normalised"
    """"normalised": each stage's distance over the norm of the teacher's features, so that no stage dominates;
    "plain": mean squared distances; "none": only the output."""
    stages: Words = ()
    """Stages whose features count: encoder.0 .. encoder.3, bottleneck, decoder.0 .. decoder.3; by default all."""

    def __post_init__(self) -> None:
        for stage in self.stages:
            check_known("stage", stage, STAGES)
        if self.task == self.output == 0 and (self.features == "none" or self.feature == 0):
            raise ValueError("task, output and feature are all 0: nothing would be learned")

    def weights(self) -> dict[str, float]:
        """The weight of each term of the loss."""
        return {"task": self.task, "output": self.output, "feature": self.feature}


@options
class SampleGridOptions(DenoisingOptions):
    """A picture of samples now and then. Its guidance is saved with the model as the model's own."""

    steps: Annotated[Positive | None, tyro.conf.arg(aliases=("--sampling.num-steps",))] = None
    """Sampling steps; by default the sampler's."""
    every: Count = 500
    """Steps between sample grids; 0: none."""
    per_class: Positive = 4
    """Images per class in a grid (of the first ten classes)."""


@options
class ScoreOptions:
    """A quick Frechet distance while training goes on, with the sampler of the sample grids."""

    every: Count = 0
    """Steps between scores; 0: none. Lines go into scores.jsonl, and lamamba plot draws them."""
    reference: Name | None = None
    """Statistics that lamamba evaluate stats has made (.npz), or "digits"."""
    images: Annotated[int, Ge(2)] = 1000
    """Images that are drawn for it. Fewer give larger distances: compare equal numbers only."""
    features: str = "inception"
    """The feature network, as in lamamba evaluate: inception, dinov2, digits, module:function."""
    weights: Name | None = None
    """File of the feature network's weights, where it is not downloaded."""


@options
class TrainConfig:
    """A training run. Sections and names are those of a TOML recipe."""

    model: ModelOptions = ModelOptions()
    data: DataOptions = DataOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    loss: LossOptions = LossOptions()
    flow_map: FlowMapOptions = FlowMapOptions()
    start: StartOptions = StartOptions()
    lora: LoraOptions = LoraOptions()
    distill: DistillOptions = DistillOptions()
    processes: ProcessOptions = ProcessOptions()
    precision: PrecisionOptions = PrecisionOptions()
    faults: FaultOptions = FaultOptions()
    watch: WatchOptions = WatchOptions()
    sampling: SampleGridOptions = SampleGridOptions()
    score: ScoreOptions = ScoreOptions()
    batch_size: Positive = 64
    """Images per optimizer step, over all processes together."""
    steps: Positive = 1000
    """Optimizer steps of the whole run."""
    ema_decays: Annotated[tuple[Share, ...], tyro.conf.arg(aliases=("--ema-decay",))] = (0.9999,)
    """Weight of the past in the running mean of the weights, constant; short runs need less. One mean is kept for each
    number; the first one is what samples come from."""
    label_dropout: Share = 0.1
    """Probability of training a sample without its label, which guidance needs. A flow map always has its labels."""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    """Decides initial weights, order of images, noise, times, mirrors and dropped labels."""
    log_every: Positive = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: Positive = 500
    """Steps between checkpoints; the last step always writes one."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints kept on disk."""
    keep_every: Count = 0
    """Checkpoints at multiples of so many steps are kept for good; 0: none. A multiple of checkpoint_every."""
    device: str = "auto"
    """"auto" (a GPU where there is one), or a PyTorch device such as cpu or cuda:1."""

    def __post_init__(self) -> None:
        if not self.ema_decays or len({f"{decay:g}" for decay in self.ema_decays}) < len(self.ema_decays):
            raise ValueError(
                f"ema_decays={self.ema_decays} must be one number or several different ones, in their first six digits "
                "too: these name their folders")
        if self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"keep_every={self.keep_every} must be a multiple of checkpoint_every={self.checkpoint_every}: "
                "other steps have no checkpoint to keep"
            )
        if self.loss.weighting == "min-snr" and self.model.objective in ("flow", "flow-map"):
            raise ValueError(
                "loss.weighting='min-snr' is for noise and v; for flow, loss.logit_mean moves the times instead"
            )
        if self.model.objective == "flow-map":
            self._check_flow_map()
        if self.lora.rank is not None:
            self._check_lora()

    def _check_lora(self) -> None:
        rank, start = self.lora.rank, self.start
        if start.source is None:
            raise ValueError(f"lora.rank={rank} adapts a trained network: give it as start.source")
        if start.mode != "weights" or start.replace_labels:
            raise ValueError(
                f"lora.rank={rank} trains a few products beside the weights of start.source, which stay as they are: "
                "leave start.mode and start.replace_labels out (lora.layers=label_embedding adapts the labels' table)"
            )
        if self.processes.sharding != "none":
            raise ValueError(
                f"processes.sharding={self.processes.sharding!r} splits gradients, moments and averages, which a LoRA "
                "(lora.rank) has few of: leave it out"
            )

    def _check_flow_map(self) -> None:
        if min(self.ema_decays) > MAX_TARGET_DECAY:
            raise ValueError(
                f"ema_decays={self.ema_decays}: a flow map learns from its own average, which must not lag far behind; "
                f"give one of at most {MAX_TARGET_DECAY} (it is the target; samples come from the first)"
            )
        if self.distill != dataclasses.replace(DistillOptions(), teacher=self.distill.teacher):
            raise ValueError(
                "a flow map takes the velocity of distill.teacher; leave task, output, feature, features and stages "
                "of [distill] out"
            )
        if self.model.guidance_range is not None and self.distill.teacher is None:
            raise ValueError(
                f"model.guidance_range={self.model.guidance_range} needs a guided teacher: give distill.teacher, or "
                "leave it out"
            )
        if self.flow_map.student_share and self.distill.teacher is None:
            raise ValueError(
                f"flow_map.student_share={self.flow_map.student_share} needs the velocity where no image was noised: "
                "give distill.teacher, or leave it out"
            )

    def warnings(self) -> list[str]:
        """What is allowed but probably not meant."""
        found = []
        for decay in self.ema_decays:
            initial, fitting = decay**self.steps, 1 - 5 / max(self.steps, 10)
            if initial > 0.02 and fitting < decay:
                shows = "look like noise" if self.start.source is None else f"be nearly those of {self.start.source}"
                found.append(
                    f"after {self.steps} steps, ema_decay {decay} leaves {initial:.0%} of the averaged weights at "
                    f"their initial values; samples will {shows}. ema_decays={fitting:.4g} would fit this run"
                )
        if self.steps < self.optimizer.warmup_steps:
            found.append(f"the run ends before its warm-up: steps={self.steps} of {self.optimizer.warmup_steps}")
        return found + [f"{name} has no effect {why}" for name, why in self._without_effect()]

    def _without_effect(self) -> Iterator[tuple[str, str]]:
        """Sections and options that are given and that nothing reads, and why."""
        loss, default, is_flow = self.loss, LossOptions(), self.model.objective in ("flow", "flow-map")
        if self.distill.teacher is None and self.distill != DistillOptions():
            yield "distill", "without distill.teacher"
        if self.model.objective != "flow-map" and self.flow_map != FlowMapOptions():
            yield "flow_map", f"with model.objective={self.model.objective or 'noise'!r}"
        drawn = loss.timesteps or ("logit-normal" if is_flow else "uniform")
        moved = (loss.logit_mean, loss.logit_deviation) != (default.logit_mean, default.logit_deviation)
        if drawn == "uniform" and moved:
            yield "loss.logit_mean or loss.logit_deviation", "where times are drawn evenly"
        if loss.weighting == "none" and loss.min_snr_gamma != default.min_snr_gamma:
            yield "loss.min_snr_gamma", "without loss.weighting='min-snr'"
        if not self.score.every and self.score != ScoreOptions():
            yield "score", "with score.every=0"

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of optimizer step 0, 1, ..."""
        options, rate = self.optimizer, self.optimizer.learning_rate
        if step < options.warmup_steps:
            return rate * (step + 1) / options.warmup_steps
        if options.schedule == "cosine":
            done = (step - options.warmup_steps) / max(1, self.steps - options.warmup_steps)
            return rate * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        cooldown = options.cooldown_share * self.steps
        if cooldown and step >= self.steps - cooldown:
            rate *= (self.steps - step) / (cooldown + 1)
        return rate

    def schedule_in_words(self) -> str:
        """The learning rate over the run, in one line."""
        options, rate = self.optimizer, f"{self.optimizer.learning_rate:.1e}"
        warmup = f"0 to {rate} in {options.warmup_steps:,} steps, then " if options.warmup_steps else ""
        if options.schedule == "cosine":
            return f"{warmup}{rate} to 0 along half a cosine"
        cooldown = round(options.cooldown_share * self.steps)
        return f"{warmup}constant {rate}" + (f", to 0 in the last {cooldown:,} steps" if cooldown else "")

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
    def from_dict(cls, values: Any, where: str | Path = "") -> Self:
        """Rebuild from nested plain values, also of older versions; missing ones keep their defaults.

        Args:
            values: nested, as from TOML or JSON.
            where: the file that they come from, for messages.

        Raises:
            ValueError: naming an unknown option and its nearest neighbour, or a value that does not fit.
        """
        if not isinstance(values, Mapping):
            return from_dict(cls, values, where)                                # which says what fits
        values = dict(values)
        if "ema_decay" in values and "ema_decays" not in values:                # version 1
            values["ema_decays"] = [values.pop("ema_decay")]
        sampling = values.get("sampling")
        if isinstance(sampling, Mapping) and "num_steps" in sampling and "steps" not in sampling:   # version 2
            values["sampling"] = {"steps" if key == "num_steps" else key: value for key, value in sampling.items()}
        return from_dict(cls, values, where)


@options
class TrainOptions(TrainConfig):
    """A training run and its folder."""

    out: FilePath = Path("runs/train")
    """Folder of the run; by default runs/RECIPE."""

    @property
    def config(self) -> TrainConfig:
        """The run without its folder: what is saved with it."""
        return TrainConfig(**{entry.name: getattr(self, entry.name) for entry in dataclasses.fields(TrainConfig)})

    @classmethod
    def from_recipe(cls, name: str | Path, **changes: Any) -> Self:
        """A recipe by name or path, with changes: from_recipe("digits", steps=100, optimizer={"learning_rate": 1e-3}).

        Raises:
            FileNotFoundError: for a path that does not exist.
            ValueError: for an unknown recipe or option, or a value that does not fit.
        """
        if not changes:
            load_recipe(str(name))                                              # whose message names the file
        with joint_checks_later():                                              # changes may mend a clash
            values = {"out": str(Path("runs") / Path(name).stem), **load_recipe(str(name)).to_dict()}
        for key, change in changes.items():
            if dataclasses.is_dataclass(change) and not isinstance(change, type):
                change = dataclasses.asdict(change)
            values[key] = {**values[key], **change} if isinstance(change, Mapping) and key in values else change
        return cls.from_dict(values)


def load_recipe(name_or_path: str) -> TrainConfig:
    """A recipe of the package by name ("digits"), or a TOML file by path.

    Raises:
        FileNotFoundError: for a path that does not exist.
        ValueError: for an unknown name, a file that is not TOML, or options that do not fit.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml" and path.parent == Path("."):
        check_known("recipe", name_or_path, recipe_names())
        path = RECIPES / f"{name_or_path}.toml"
    if not path.is_file():
        known = ", ".join(recipe_names())
        what = "is a folder" if path.is_dir() else "is no file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"recipe {path} {what}; give a .toml file or one of {known}")
    return TrainConfig.from_dict(read_toml(path), path)


RECIPES = Path(__file__).parent.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))
