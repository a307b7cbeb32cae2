"""LaMamba-Diff: image diffusion in linear time (arXiv 2408.02615).

    import lamamba
    config = lamamba.UNetConfig.preset("xl", image_size=256)
    model = lamamba.LaMambaUNet(config)                     # model(x, timestep, class_labels)
    print(lamamba.info(lamamba.InfoOptions(model="xl", image_size=512)))

Every verb of the command line is a function here: options in, a result out. Names are imported when they are first
used, so that `import lamamba` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lamamba._version import __version__

if TYPE_CHECKING:
    from lamamba.api.benchmark import BenchmarkResult, benchmark
    from lamamba.api.check_data import CheckDataResult, CheckLatentsResult, check_data
    from lamamba.api.compare import CompareResult, compare
    from lamamba.api.compute_statistics import StatisticsResult, compute_statistics
    from lamamba.api.doctor import DoctorResult, doctor
    from lamamba.api.encode import EncodeResult, encode
    from lamamba.api.evaluate import EvaluateResult, evaluate
    from lamamba.api.info import InfoResult, info
    from lamamba.api.sample_folder import SampleFolderResult, sample_folder
    from lamamba.config import UNetConfig
    from lamamba.models.official import load_official, to_official
    from lamamba.models.unet import LaMambaUNet
    from lamamba.options.benchmark import BenchmarkOptions
    from lamamba.options.check_data import CheckDataOptions
    from lamamba.options.doctor import DoctorOptions
    from lamamba.options.encode import EncodeOptions
    from lamamba.options.evaluation import CompareOptions, EvaluateOptions, StatisticsOptions
    from lamamba.options.info import InfoOptions
    from lamamba.options.metrics import MetricOptions
    from lamamba.options.sample_folder import SampleFolderOptions
    from lamamba.pipeline import LaMambaPipeline

_MODULES = {
    "benchmark": "api.benchmark",
    "BenchmarkOptions": "options.benchmark",
    "BenchmarkResult": "api.benchmark",
    "check_data": "api.check_data",
    "CheckDataOptions": "options.check_data",
    "CheckDataResult": "api.check_data",
    "CheckLatentsResult": "api.check_data",
    "compare": "api.compare",
    "CompareOptions": "options.evaluation",
    "CompareResult": "api.compare",
    "compute_statistics": "api.compute_statistics",
    "doctor": "api.doctor",
    "DoctorOptions": "options.doctor",
    "DoctorResult": "api.doctor",
    "encode": "api.encode",
    "EncodeOptions": "options.encode",
    "EncodeResult": "api.encode",
    "evaluate": "api.evaluate",
    "EvaluateOptions": "options.evaluation",
    "EvaluateResult": "api.evaluate",
    "info": "api.info",
    "InfoOptions": "options.info",
    "InfoResult": "api.info",
    "LaMambaPipeline": "pipeline",
    "LaMambaUNet": "models.unet",
    "load_official": "models.official",
    "MetricOptions": "options.metrics",
    "sample_folder": "api.sample_folder",
    "SampleFolderOptions": "options.sample_folder",
    "SampleFolderResult": "api.sample_folder",
    "StatisticsOptions": "options.evaluation",
    "StatisticsResult": "api.compute_statistics",
    "to_official": "models.official",
    "UNetConfig": "config",
}

__all__ = [
    "BenchmarkOptions",
    "BenchmarkResult",
    "CheckDataOptions",
    "CheckDataResult",
    "CheckLatentsResult",
    "CompareOptions",
    "CompareResult",
    "DoctorOptions",
    "DoctorResult",
    "EncodeOptions",
    "EncodeResult",
    "EvaluateOptions",
    "EvaluateResult",
    "InfoOptions",
    "InfoResult",
    "LaMambaPipeline",
    "LaMambaUNet",
    "MetricOptions",
    "SampleFolderOptions",
    "SampleFolderResult",
    "StatisticsOptions",
    "StatisticsResult",
    "UNetConfig",
    "__version__",
    "benchmark",
    "check_data",
    "compare",
    "compute_statistics",
    "doctor",
    "encode",
    "evaluate",
    "info",
    "load_official",
    "sample_folder",
    "to_official",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lamamba' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"lamamba.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
