"""The LaMamba-Diff U-Net (paper, Section 3 and Fig. 2)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from lamamba.config import NUM_STAGES, STAGE_SCALES, STAGES, Grid, UNetConfig, as_grid, check_grid, check_known
from lamamba.models.adapters import Adapters
from lamamba.models.blocks import ConditionLinear, LaMambaBlock, ModulatedNorm, initialise_linears
from lamamba.models.deep_cache import DEEP, DeepFeatureCache, LaMambaCacheConfig
from lamamba.models.embeddings import PatchEmbedding, ScalarEmbedding, TimestepEmbedding, position_table
from lamamba.models.geometry import TABLES, Geometry, make_geometry
from lamamba.models.resample import PatchExpanding, PatchMerging
from lamamba.models.weights import check_weights, is_quantized, read_config, saved_folder
from lamamba.ops.dispatch import is_transformed
from lamamba.ops.layers import backend_for
from lamamba.pretrained import is_shipped, shipped_model
from lamamba.utils.tensors import PICKLE_ADVICE, weight_files

MAX_TIMESTEP = 1000
GEOMETRY_SCALES = (1, 2, 4)
"""Divisors of the token grid in stages 0, 1, and 2 to 3."""


Constants = Mapping[str, Mapping[str, Any]]
"""What the branches of each block compute from weights and grid alone, by the names of blocks and branches."""


class Features:
    """Outputs of inner layers that a forward pass keeps: those with these names."""

    def __init__(self, names: Sequence[str]):
        self._names = frozenset(names)
        self.kept: dict[str, Tensor] = {}

    def keep(self, name: str, x: Tensor) -> None:
        if name in self._names:
            self.kept[name] = x


class Stage(nn.Module):
    """The blocks of one resolution; every second one shifts its windows.

    Blocks are numbered as in the full network: the numbers of removed blocks are unused.
    """

    gradient_checkpointing = False
    """Whether blocks are recomputed in the backward pass; set by diffusers' enable_gradient_checkpointing."""
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(self, config: UNetConfig, name: str, stage: int, depth: int, *, is_decoder: bool = False):
        super().__init__()
        self.name = name
        projects = is_decoder or config.stage_width(stage) != config.condition_width
        self.blocks = nn.ModuleDict({
            str(i): LaMambaBlock(config, f"{name}.{i}", stage, shifted=i % 2 == 1, projects_condition=projects)
            for i in range(depth)
            if config.branches(f"{name}.{i}")
        })

    def forward(
        self, x: Tensor, c: Tensor | None, geometry: Geometry, modulations: Sequence[Tensor | None], features: Features,
        constants: Constants,
    ) -> Tensor:
        """Apply the blocks in turn; modulations holds each one's, None where it computes it from c."""
        for (number, block), modulation in zip(self.blocks.items(), modulations, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, c, geometry, modulation)
            else:
                x = block(x, c, geometry, modulation, constants.get(f"{self.name}.{number}"))
            features.keep(f"{self.name}.{number}", x)
        return x


class Head(nn.Module):
    """Patch expanding, adaptive LayerNorm, Linear: (b, h, w, c) -> (b, h p, w p, out_channels)."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        width = config.width
        self.expand = PatchExpanding(width, width, config.patch_size)
        self.condition = ConditionLinear(config.condition_width, width)
        self.modulation = ConditionLinear(width, 2 * width)
        self.norm = ModulatedNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, config.output_channels)

    def modulate(self, c: Tensor) -> Tensor:
        """shift and scale from the condition: (b, condition_width) -> (b, 2 width)."""
        return self.modulation(F.silu(self.condition(c)))

    def forward(self, x: Tensor, c: Tensor | None, modulation: Tensor | None = None) -> Tensor:
        if modulation is None:
            assert c is not None
            modulation = self.modulate(c)
        shift, scale = modulation.chunk(2, dim=-1)
        return self.linear(self.norm(self.expand(x), shift, scale))


def _common_time(timestep: Tensor | float | None) -> float:
    """The time of all images of a batch, which a cache needs to be one."""
    if timestep is None:
        raise ValueError("the cache needs the time: give timestep, also beside conditioning")
    times = torch.as_tensor(timestep).flatten()
    if (times != times[0]).any():
        raise ValueError(f"the cache needs one time for all images, not {times.tolist()}: disable_cache() for this")
    return float(times[0])


@dataclass
class UNetOutput(BaseOutput):
    """What return_dict=True gives, as diffusers' networks do."""

    sample: Tensor


class LaMambaUNet(Adapters, ModelMixin, CacheMixin, ConfigMixin):
    """LaMamba-Diff: a diffusion U-Net of selective scans and window attention (arXiv 2408.02615).

        model = LaMambaUNet(UNetConfig.preset("xl", image_size=256))
        output = model(x, timestep, class_labels)       # (b, 4, 32, 32), (b,), (b,) -> (b, 8, 32, 32)

    A diffusers model: `save_pretrained`, `from_pretrained` and `push_to_hub` work as they do there, but loading is
    strict: an unknown config key, and a missing, unexpected or reshaped tensor, are errors.
    """

    config_name = "config.json"
    _no_split_modules = [                                                       # noqa: RUF012 (diffusers' own form)
        "LaMambaBlock", "Head", "PatchEmbedding", "PatchMerging", "PatchExpanding", "TimestepEmbedding",
        "ScalarEmbedding",
    ]
    """Modules that read weights of their submodules without calling these: offloading hooks move them as a whole."""
    _supports_gradient_checkpointing = True
    _repeated_blocks = ["LaMambaBlock"]                                         # noqa: RUF012
    """What compile_repeated_blocks compiles."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        if not isinstance(config, UNetConfig):
            raise TypeError(f"LaMambaUNet takes a UNetConfig, not {type(config).__name__}; see UNetConfig.preset")
        self.register_to_config(**config.to_dict())
        self.architecture = config
        width = config.width
        self.patch_embedding = PatchEmbedding(config.in_channels, width, config.patch_size)
        self.position_embedding = nn.Parameter(torch.empty(*config.token_grid, width))
        self.timestep_embedding = TimestepEmbedding(config.condition_width)
        self.label_embedding = nn.Embedding(config.num_classes + 1, config.condition_width)
        is_flow_map, has_scale = config.objective == "flow-map", config.guidance_range is not None
        self.gap_embedding = ScalarEmbedding(config.condition_width) if is_flow_map else None
        self.guidance_embedding = ScalarEmbedding(config.condition_width) if has_scale else None

        self.encoder = nn.ModuleList(Stage(config, f"encoder.{s}", s, config.depths[s]) for s in range(NUM_STAGES))
        self.merges = nn.ModuleList(PatchMerging(width << s, width << s + 1) for s in range(2))
        self.bottleneck = Stage(config, "bottleneck", NUM_STAGES - 1, config.bottleneck_depth)
        self.expands = nn.ModuleList(PatchExpanding(width << s + 1, width << s, factor=2) for s in reversed(range(2)))
        self.decoder = nn.ModuleList(
            Stage(config, f"decoder.{s}", NUM_STAGES - 1 - s, config.decoder_depths[s], is_decoder=True)
            for s in range(NUM_STAGES)
        )
        self.head = Head(config)
        self.reset_parameters()
        self._build_geometries(config.token_grid)

    @property
    def config(self) -> FrozenDict:
        """The configuration, with sample_size for diffusers' pipelines: the input's side, or (height, width)."""
        height, width = self.architecture.input_size
        return FrozenDict({**super().config, "sample_size": height if height == width else (height, width)})

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the weights as the official code does, but the last Linear with zeros, as DiT does."""
        initialise_linears(self)
        nn.init.normal_(self.label_embedding.weight, std=0.02)
        self.position_embedding.copy_(position_table(self.architecture.token_grid, self.architecture.width))
        for module in self.modules():
            kind = type(module)                                                 # PyTorch's own layers keep their init
            if module is not self and kind.__module__.startswith("lamamba.") and "reset_parameters" in vars(kind):
                module.reset_parameters()
        for module in self._modulated():
            nn.init.zeros_(module.modulation.weight)
        nn.init.zeros_(self.head.linear.weight)

    def set_grid(self, grid: int | Grid | None) -> None:
        """Set the token grid that the network runs on; None restores the configuration's.

        The position embedding is interpolated (bicubic); the attention windows keep their trained sizes.

        Args:
            grid: (height, width) in tokens; one number means a square.

        Raises:
            ValueError: when a side is not a multiple of 4 tokens.
        """
        config = self.architecture
        run_grid = config.token_grid if grid is None else as_grid(grid)
        check_grid(run_grid, patch_size=config.patch_size)
        self._build_geometries(run_grid, self.paths_1.device)                   # offloaded weights may be elsewhere

    @property
    def run_grid(self) -> Grid:
        """The grid that the network runs on, (height, width) in tokens; see `set_grid`."""
        return self._run_grid

    def _build_geometries(self, run_grid: Grid, device: torch.device | None = None) -> None:
        """Register the tables as buffers that are not saved, of this module: hooks bring those before its forward."""
        config = self.architecture
        self._run_grid = run_grid
        self._windows: dict[int, tuple[Grid, Grid, Grid]] = {}
        for scale in GEOMETRY_SCALES:
            window = config.stage_window(STAGE_SCALES.index(scale))
            geometry = make_geometry((run_grid[0] // scale, run_grid[1] // scale), window, config.scan)
            if device is not None:
                geometry = geometry.to(device)
            self._windows[scale] = geometry[:3]
            for name in TABLES:
                if hasattr(self, f"{name}_{scale}"):
                    delattr(self, f"{name}_{scale}")
                if (table := getattr(geometry, name)) is not None:              # torch.export miscounts buffers of None
                    self.register_buffer(f"{name}_{scale}", table, persistent=False)

    @property
    def geometries(self) -> tuple[Geometry, ...]:
        """Of the grids that the network runs on: of stages 0, 1, and 2 to 3."""
        tables: Any = ([getattr(self, f"{name}_{scale}", None) for name in TABLES] for scale in GEOMETRY_SCALES)
        scales = zip(GEOMETRY_SCALES, tables, strict=True)
        return tuple(Geometry(*self._windows[scale], *of_scale) for scale, of_scale in scales)

    def _positions(self) -> Tensor:
        """The position embedding of the grid that the network runs on: (h, w, width)."""
        if self._run_grid == self.architecture.token_grid:
            return self.position_embedding
        table = self.position_embedding.permute(2, 0, 1)[None].float()
        resized = F.interpolate(table, self._run_grid, mode="bicubic", align_corners=False)
        return resized[0].permute(1, 2, 0).to(self.position_embedding.dtype)

    _cache_config: LaMambaCacheConfig | None = None
    """As diffusers' CacheMixin has it."""
    _caches: dict[str, DeepFeatureCache]
    """By the names of their contexts."""
    _cached_adapter_changes = 0
    _active_cache: DeepFeatureCache | None = None
    """Of the surrounding `cache_context`."""

    def enable_cache(self, config: Any) -> None:
        """Keep deep features between steps (LaMambaCacheConfig).

        Samplers and pipelines of ours then use it by themselves, afresh in every call. In a loop of your own, wrap the
        calls of each guidance branch: `with model.cache_context("cond"): ...`. Outside of that, all passes are full.

        Raises:
            ValueError: when a cache is enabled already, or config is of another cache.
        """
        if not isinstance(config, LaMambaCacheConfig):
            raise ValueError(
                f"{type(config).__name__} is for transformers of diffusers' own blocks and attention classes, and this "
                "is a U-Net of others: use lamamba.LaMambaCacheConfig(interval=3)"
            )
        if self.is_cache_enabled:
            raise ValueError(f"{self._cache_config} is enabled already: call disable_cache() first")
        self._cache_config, self._caches = config, {}

    def disable_cache(self) -> None:
        """Compute all depths in every pass again."""
        self._cache_config, self._caches, self._active_cache = None, {}, None

    @contextmanager
    def cache_context(self, name: str, **more: Any) -> Iterator[None]:
        """Inside it, calls of the network are evaluations of the guidance branch of this name.

        A run of a sampler goes from high times to low ones: a time above the last one's begins a new run.
        """
        if self._cache_config is None:
            yield
            return
        if self._cached_adapter_changes != self.adapter_changes:                # features of other weights
            self._cached_adapter_changes = self.adapter_changes
            self._caches.clear()
        before, self._active_cache = self._active_cache, self._caches.setdefault(
            name, DeepFeatureCache(self._cache_config))
        try:
            yield
        finally:
            self._active_cache = before

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """What diffusers' pipelines call after a run."""
        if self.is_cache_enabled:
            self._caches.clear()

    def set_attention_backend(self, backend: str) -> None:
        """Refused: attention here is over small windows, by PyTorch's product or a kernel of ours.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"set_attention_backend({backend!r}) is for diffusers' attention classes, which this U-Net has none of: "
            "its windows take PyTorch's scaled_dot_product_attention, or a kernel of ours (LAMAMBA_BACKEND)"
        )

    def _stages(self) -> list[Stage]:
        return [*self.encoder, self.bottleneck, *self.decoder]

    def _modulated(self) -> list[LaMambaBlock | Head]:
        """The modules that the condition modulates, in the order in which `forward` runs them."""
        blocks: list[Any] = [block for stage in self._stages() for block in stage.blocks.values()]
        return [*blocks, self.head]

    @property
    def condition_outputs(self) -> int:
        """Width of the conditioning vector that `condition` returns."""
        return sum(module.modulation.out_features for module in self._modulated())

    def condition(
        self, timestep: Tensor | float, class_labels: Tensor | None = None, *,
        end_timestep: Tensor | float | None = None, guidance_scale: Tensor | float | None = None,
    ) -> Tensor:
        """Compute the modulation of all blocks and the head from timestep and label: (b, condition_outputs).

        It reads a third of the parameters and does not depend on x: a sampler needs it once for each timestep and label
        of a run, whatever the number of images (lamamba.inference.conditioning).

        Args:
            timestep: (b,), or a single number for all labels.
            class_labels: (b,) int64 in 0 .. num_classes; None for an unconditional network. Interpolated classes:
                (b, num_classes + 1), the weight of each label's embedding.
            end_timestep, guidance_scale: of a flow map, see `forward`; (b,) or a single number.

        Raises:
            ValueError: when class_labels, end_timestep or guidance_scale do not fit the configuration.
        """
        timestep = torch.as_tensor(timestep, device=self.device)
        rows = class_labels.shape[0] if class_labels is not None else timestep.numel()
        self._check_labels(class_labels, rows)
        c = self._embed(timestep.expand(rows), class_labels, end_timestep, guidance_scale)
        return torch.cat([module.modulate(c) for module in self._modulated()], dim=-1)

    @torch.no_grad()
    def make_constants(self, x: Tensor) -> Constants:
        """Compute what Triton's kernels read of weights and grid alone, for `forward` while neither changes.

        Args:
            x: an input like those that come, in the network's dtype and on its device.
        """
        if backend_for(x) != "triton":
            return {}
        scales = (*STAGE_SCALES, STAGE_SCALES[-1], *reversed(STAGE_SCALES))
        at = dict(zip(GEOMETRY_SCALES, self.geometries, strict=True))
        constants = {}
        for stage, scale in zip(self._stages(), scales, strict=True):
            blocks: Mapping[str, Any] = dict(stage.blocks.items())
            for number, block in blocks.items():
                constants[f"{stage.name}.{number}"] = block.constants(at[scale].to(x.device))
        return constants

    def _embed(
        self, timestep: Tensor, class_labels: Tensor | None, end_timestep: Tensor | float | None = None,
        guidance_scale: Tensor | float | None = None,
    ) -> Tensor:
        """The condition, (b, condition_width), of timestep (b,)."""
        rows = torch.zeros_like(timestep, dtype=torch.int64) if class_labels is None else class_labels
        dtype = self.position_embedding.dtype                                   # others may be stored in fewer bits
        c = self.timestep_embedding(timestep, dtype) + self._embed_labels(rows)                     # (b, 4 width)
        if self.gap_embedding is not None:
            gap = torch.zeros_like(timestep)
            if end_timestep is not None:
                end = torch.as_tensor(end_timestep, device=timestep.device)
                gap = self._checked("timestep - end_timestep", timestep.float() - end, 0, MAX_TIMESTEP)
            c = c + self.gap_embedding(gap / MAX_TIMESTEP, dtype)
        elif end_timestep is not None:
            raise ValueError(f"end_timestep is for flow maps, this network predicts {self.architecture.objective}")
        if self.guidance_embedding is not None:
            low, high = self.architecture.guidance_range or (1.0, 1.0)
            scale = torch.full_like(timestep, low, dtype=torch.float32)
            if guidance_scale is not None:
                given = torch.as_tensor(guidance_scale, device=timestep.device).float()
                scale = self._checked("guidance_scale", given, low, high).expand_as(timestep)
            c = c + self.guidance_embedding((scale - low) / (high - low), dtype)
        elif guidance_scale is not None:
            raise ValueError("guidance_scale is for flow maps with a guidance_range; guide this network from outside")
        return c

    def _embed_labels(self, labels: Tensor) -> Tensor:
        """Embedding of labels (b,), or of mixtures (b, num_classes + 1), the weight of each: (b, condition_width)."""
        if not labels.is_floating_point():
            return self.label_embedding(labels)
        table = self.label_embedding(torch.arange(labels.shape[1], device=labels.device))           # with its adapter
        return labels.to(table.dtype) @ table

    @staticmethod
    def _checked(name: str, values: Tensor, low: float, high: float) -> Tensor:
        """The values as they are, which must lie in a range; on GPUs and in graphs that is not looked at."""
        is_readable = values.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed()
        if is_readable and not bool(((values >= low) & (values <= high)).all()):
            raise ValueError(
                f"{name} runs from {float(values.min()):g} to {float(values.max()):g}; this network takes {low:g} to "
                f"{high:g}"
            )
        return values

    def forward(
        self, x: Tensor, timestep: Tensor | float | None, class_labels: Tensor | None = None, *,
        end_timestep: Tensor | float | None = None, guidance_scale: Tensor | float | None = None,
        conditioning: Tensor | None = None, constants: Constants | None = None, deep_features: Tensor | None = None,
        return_features: bool | Sequence[str] = False, return_dict: bool | None = None,
    ) -> Any:
        """Predict noise and variance, v, the flow's velocity, or its mean between two times from a noisy input.

        Args:
            x: (b, in_channels, h, w) noisy latents or pixels.
            timestep: (b,) or a single number, 0 (clean) to 1000 (noise); fractions are fine.
            class_labels: (b,) int64 in 0 .. num_classes, where num_classes means "no class";
                None for an unconditional network.
            end_timestep: of a flow map, (b,) or a single number, 0 .. timestep: the time where the step ends; None:
                timestep itself, for the velocity at that time.
            guidance_scale: of a flow map with a guidance_range, (b,) or a single number in it; None: its lowest.
            conditioning: (b, condition_outputs) from `condition`, in place of timestep, class_labels and the above.
            constants: from `make_constants`, for passes without gradients.
            deep_features: (b, h, w, width) of the token grid, what enters the last decoder stage from below: only the
                first encoder stage, the last decoder stage and the head are computed (lamamba.models.deep_cache).
            return_features: True for the output of every stage, too, as distillation needs them; or the names of those
                to return: of stages (lamamba.config.STAGES), of blocks ("encoder.2.0"), or "deep".
            return_dict: for programs written for diffusers' networks: True gives an object with .sample, False a tuple.

        Returns:
            (b, out_channels, h, w): for objective "noise" the noise, then the variance's interpolation; for "flow" the
            velocity eps - x0; for "flow-map" its mean from timestep to end_timestep. With return_features, a pair of it
            and the features (b, h_s, w_s, c_s): for True a tuple of the stages' outputs in the order of
            lamamba.config.STAGES, for names a dictionary.

        Raises:
            ValueError: when x, timestep, class_labels, conditioning, deep_features or the names do not fit the
                configuration; for constants where gradients are computed.
        """
        self._check_input(x)
        if constants is not None and torch.is_grad_enabled():
            raise ValueError("constants are for passes without gradients: call the network under torch.no_grad()")
        constants = constants or {}
        features = Features(self._feature_names(return_features, deep_features))
        c, modulations, head_modulation = self._condition(
            x, timestep, class_labels, conditioning, end_timestep, guidance_scale)
        at = {scale: geometry.to(x.device) for scale, geometry in zip(GEOMETRY_SCALES, self.geometries, strict=True)}
        if deep_features is None and self._active_cache is not None:
            deep_features = self._active_cache.extrapolate(_common_time(timestep), x.shape[0])

        x = self.patch_embedding(x) + self._positions()                                             # (b, h, w, width)
        x = self.encoder[0](x, c, at[1], modulations[0], features, constants)
        features.keep("encoder.0", x)
        if deep_features is None:
            deep_features = self._deep_features(x, c, at, modulations, features, constants)
            if self._active_cache is not None:
                self._active_cache.keep(deep_features)
        elif deep_features.shape != x.shape:
            raise ValueError(f"deep_features has shape {tuple(deep_features.shape)}, x needs {tuple(x.shape)}")
        features.keep(DEEP, deep_features)
        x = self.decoder[-1](deep_features + x, c, at[1], modulations[-1], features, constants)
        features.keep(STAGES[-1], x)
        output = self.head(x, c, head_modulation).permute(0, 3, 1, 2)                       # (b, out_channels, h, w)
        if return_features:
            return output, tuple(features.kept.values()) if return_features is True else features.kept
        return output if return_dict is None else UNetOutput(sample=output) if return_dict else (output,)

    def _deep_features(
        self, x: Tensor, c: Tensor | None, at: Mapping[int, Geometry], modulations: Sequence[Sequence[Tensor | None]],
        features: Features, constants: Constants,
    ) -> Tensor:
        """All depths below the first encoder stage and the last decoder stage: (b, h, w, width) -> the same shape."""
        skips = []
        x = self.merges[0](x)                                                   # (b, h / 2, w / 2, 2 c)
        for s in range(1, NUM_STAGES):
            x = self.encoder[s](x, c, at[STAGE_SCALES[s]], modulations[s], features, constants)
            skips.append(x)
            features.keep(f"encoder.{s}", x)
            if s == 1:
                x = self.merges[s](x)                                           # (b, h / 4, w / 4, 4 c)
        if "bottleneck" not in self.architecture.removed_blocks:
            x = x + self.bottleneck(x, c, at[4], modulations[NUM_STAGES], features, constants)
        features.keep("bottleneck", x)
        for s in range(NUM_STAGES - 1):
            if s == 2:
                x = self.expands[0](x)                                          # (b, h / 2, w / 2, 2 c)
            scale = STAGE_SCALES[NUM_STAGES - 1 - s]
            modulation = modulations[NUM_STAGES + 1 + s]
            x = self.decoder[s](x + skips.pop(), c, at[scale], modulation, features, constants)
            features.keep(f"decoder.{s}", x)
        return self.expands[1](x)                                               # (b, h, w, c)

    def _feature_names(self, wanted: bool | Sequence[str], deep_features: Tensor | None) -> Sequence[str]:
        """The names of the features to return.

        Raises:
            ValueError: for a name of none, or of one that is not computed where deep_features are given.
        """
        if isinstance(wanted, bool):
            names: Sequence[str] = STAGES if wanted else ()
        else:
            names = (wanted,) if isinstance(wanted, str) else wanted
            known = [*STAGES, DEEP, *(f"{stage.name}.{i}" for stage in self._stages() for i in stage.blocks)]
            for name in names:
                check_known("feature", name, known)
        shallow = ("encoder.0", STAGES[-1], DEEP)
        if deep_features is not None and (lost := [n for n in names if not n.startswith(shallow)]):
            raise ValueError(f"features {', '.join(lost)} are not computed with deep_features: leave them out")
        return names

    def _condition(
        self, x: Tensor, timestep: Tensor | float | None, class_labels: Tensor | None, conditioning: Tensor | None,
        end_timestep: Tensor | float | None, guidance_scale: Tensor | float | None,
    ) -> tuple[Tensor | None, list[list[Tensor | None]], Tensor | None]:
        """The condition c, the modulations of each stage's blocks, and the head's.

        c is (b, condition_width) and all modulations None, or, with conditioning, c is None and these are its pieces.
        """
        sizes = [module.modulation.out_features for module in self._modulated()]
        pieces: list[Tensor | None] = [None] * len(sizes)
        c = None
        if conditioning is not None:
            fits = (x.shape[0], sum(sizes))
            if tuple(conditioning.shape) != fits:
                raise ValueError(
                    f"conditioning has shape {tuple(conditioning.shape)}, x needs {fits}, "
                    "a row for each image, as condition() gives them"
                )
            pieces = list(conditioning.split(sizes, dim=-1))
        elif timestep is None:
            raise ValueError("timestep is None: give the time of each image, or conditioning made by condition()")
        else:
            self._check_labels(class_labels, x.shape[0])
            times = torch.as_tensor(timestep, device=x.device).expand(x.shape[0])
            c = self._embed(times, class_labels, end_timestep, guidance_scale)
        modulations, first = [], 0
        for stage in self._stages():
            modulations.append(pieces[first : first + len(stage.blocks)])
            first += len(stage.blocks)
        return c, modulations, pieces[-1]

    def _check_input(self, x: Tensor) -> None:
        config, p = self.architecture, self.architecture.patch_size
        fits = (config.in_channels, self._run_grid[0] * p, self._run_grid[1] * p)
        if x.dim() != 4 or tuple(x.shape[1:]) != fits:
            other = ""
            if x.dim() == 4 and x.shape[1] == fits[0] and x.shape[2] % (4 * p) == 0 and x.shape[3] % (4 * p) == 0:
                other = f"; to run on this size, call model.set_grid(({x.shape[2] // p}, {x.shape[3] // p})) first"
            raise ValueError(f"x has shape {tuple(x.shape)}, the network reads (b, {', '.join(map(str, fits))}){other}")

    def _check_labels(self, class_labels: Tensor | None, batch: int) -> None:
        config = self.architecture
        if config.num_classes == 0 and class_labels is not None:
            raise ValueError("this network is unconditional (num_classes=0): pass class_labels=None")
        if config.num_classes > 0:
            if class_labels is None:
                raise ValueError(
                    f"this network is conditional: pass class_labels (b,), 0 .. {config.num_classes - 1} for a class "
                    f"or {config.num_classes} for none"
                )
            if class_labels.is_floating_point():
                if class_labels.shape != (batch, config.num_classes + 1):
                    raise ValueError(
                        f"class_labels that mix embeddings have shape {tuple(class_labels.shape)}, x needs "
                        f"({batch}, {config.num_classes + 1}), a weight for each class and for none"
                    )
                return
            if class_labels.shape != (batch,):
                raise ValueError(f"class_labels has shape {tuple(class_labels.shape)}, x needs ({batch},)")
            if class_labels.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed():
                low, high = int(class_labels.min()), int(class_labels.max())
                if low < 0 or high > config.num_classes:
                    raise ValueError(
                        f"class_labels run from {low} to {high}; they must lie in 0 .. {config.num_classes} "
                        f"({config.num_classes} means no class)"
                    )

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As diffusers' own.

        Raises:
            ValueError: with adapters, which save_lora_adapter saves.
            RuntimeError: with quantised weights, where diffusers is older than 0.39.
        """
        self.check_plain("save_pretrained")
        quantizer = getattr(self, "hf_quantizer", None)
        if quantizer is not None and not hasattr(quantizer, "get_state_dict_and_metadata"):
            raise RuntimeError(
                f"diffusers {diffusers.__version__} cannot save quantised weights, 0.39 and newer can: "
                "pip install --upgrade diffusers"
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    # pipelines look for variant and max_shard_size among its parameters
    save_pretrained.__signature__ = inspect.signature(ModelMixin.save_pretrained)  # type: ignore[attr-defined]

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs: Any):
        """Build a network with fresh weights from a saved configuration. Strict: unknown keys are errors.

        Raises:
            ValueError: for an unknown key or a configuration that does not fit together.
        """
        if config is None:
            raise ValueError("from_config needs the dictionary that load_config or model.config gives")
        given = {key: value for key, value in {**config, **kwargs}.items() if key != "sample_size"}
        quantization = given.pop("quantization_config", None)                   # diffusers' own, kept as it is
        model = cls(UNetConfig.from_dict({key: value for key, value in given.items() if not key.startswith("_")}))
        if quantization is not None:
            model.register_to_config(quantization_config=quantization)
        return (model, {}) if return_unused_kwargs else model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any):
        """Load a saved network from a folder or a hub id, as diffusers does, but strictly.

        "shipped" and "shipped-few-steps" are the networks that come with the package.

        Raises:
            ValueError: naming every missing, unexpected and reshaped tensor; when the weights are only a pickle.
            OSError: when there is no such model.
        """
        name = pretrained_model_name_or_path
        if is_shipped(name):
            name = shipped_model(str(name))
        place = Path(name, kwargs.get("subfolder") or "")
        if any((place / name).exists() for name in ("checkpoints", "state.json", "model_index.json")):
            raise OSError(
                f"{place} is a run, a checkpoint or a pipeline: lamamba.open_model({str(place)!r}).network opens it"
            )
        if kwargs.get("use_safetensors") is False:
            raise ValueError(f"use_safetensors=False: weights {PICKLE_ADVICE}")
        if not kwargs.get("variant") and not kwargs.get("quantization_config"):
            place = saved_folder(name, **kwargs) or place
            if place.is_dir() and not is_quantized(place):                      # their tensors are the quantiser's
                check_weights(cls, read_config(place), weight_files(place), place)
        kwargs["use_safetensors"] = True
        kwargs.setdefault("disable_mmap", True)
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(name, output_loading_info=True, **kwargs)
        faults = [
            f"{kind}: {', '.join(map(str, sorted(info[key], key=str)))}"
            for kind, key in (("missing", "missing_keys"), ("unexpected", "unexpected_keys"),
                              ("of another shape", "mismatched_keys"))
            if info[key]
        ]
        if faults or info["error_msgs"]:
            raise ValueError(
                f"the weights in {name} do not fit its config.json ({'; '.join(faults)}"
                f"{'; '.join(info['error_msgs'])}); save the model again with save_pretrained"
            )
        return (model, info) if wants_info else model
