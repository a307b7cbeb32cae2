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
    from lamamba.api.compare_criteria import CompareCriteriaResult, compare_criteria
    from lamamba.api.compress import (
        CompressResult,
        PlanRemovalResult,
        RemoveUnitsResult,
        ScoreUnitsResult,
        compress,
        plan_removal,
        remove_units,
        score_units,
    )
    from lamamba.api.compute_statistics import StatisticsResult, compute_statistics
    from lamamba.api.convert import ConvertResult, convert
    from lamamba.api.demo import DemoResult, demo
    from lamamba.api.doctor import DoctorResult, doctor
    from lamamba.api.encode import EncodeResult, encode
    from lamamba.api.evaluate import EvaluateResult, evaluate
    from lamamba.api.export import ExportResult, export
    from lamamba.api.info import InfoResult, info
    from lamamba.api.open_app import AppResult, open_app
    from lamamba.api.plot import PlotResult, plot
    from lamamba.api.sample import SampleResult, sample
    from lamamba.api.sample_folder import SampleFolderResult, sample_folder
    from lamamba.api.train import TrainPlan, TrainResult, plan, train
    from lamamba.config import UNetConfig
    from lamamba.models.official import load_official, to_official
    from lamamba.models.unet import LaMambaUNet
    from lamamba.options.app import AppOptions
    from lamamba.options.benchmark import BenchmarkOptions
    from lamamba.options.check_data import CheckDataOptions
    from lamamba.options.compress import (
        CompareCriteriaOptions,
        CompressOptions,
        PlanRemovalOptions,
        RemoveUnitsOptions,
        ScoreUnitsOptions,
    )
    from lamamba.options.convert import ConvertOptions
    from lamamba.options.demo import DemoOptions
    from lamamba.options.doctor import DoctorOptions
    from lamamba.options.encode import EncodeOptions
    from lamamba.options.evaluation import CompareOptions, EvaluateOptions, StatisticsOptions
    from lamamba.options.export import ExportOptions
    from lamamba.options.info import InfoOptions
    from lamamba.options.metrics import MetricOptions
    from lamamba.options.plot import PlotOptions
    from lamamba.options.sample_folder import SampleFolderOptions
    from lamamba.options.sampling import SampleOptions
    from lamamba.options.training import TrainOptions
    from lamamba.pipeline import LaMambaPipeline
    from lamamba.runs.model import Model, open_model

_MODULES = {
    "AppOptions": "options.app",
    "AppResult": "api.open_app",
    "benchmark": "api.benchmark",
    "BenchmarkOptions": "options.benchmark",
    "BenchmarkResult": "api.benchmark",
    "check_data": "api.check_data",
    "CheckDataOptions": "options.check_data",
    "CheckDataResult": "api.check_data",
    "CheckLatentsResult": "api.check_data",
    "compare": "api.compare",
    "compare_criteria": "api.compare_criteria",
    "CompareCriteriaOptions": "options.compress",
    "CompareCriteriaResult": "api.compare_criteria",
    "CompareOptions": "options.evaluation",
    "CompareResult": "api.compare",
    "compress": "api.compress",
    "CompressOptions": "options.compress",
    "CompressResult": "api.compress",
    "compute_statistics": "api.compute_statistics",
    "convert": "api.convert",
    "ConvertOptions": "options.convert",
    "ConvertResult": "api.convert",
    "demo": "api.demo",
    "DemoOptions": "options.demo",
    "DemoResult": "api.demo",
    "doctor": "api.doctor",
    "DoctorOptions": "options.doctor",
    "DoctorResult": "api.doctor",
    "encode": "api.encode",
    "EncodeOptions": "options.encode",
    "EncodeResult": "api.encode",
    "evaluate": "api.evaluate",
    "EvaluateOptions": "options.evaluation",
    "EvaluateResult": "api.evaluate",
    "export": "api.export",
    "ExportOptions": "options.export",
    "ExportResult": "api.export",
    "info": "api.info",
    "InfoOptions": "options.info",
    "InfoResult": "api.info",
    "LaMambaPipeline": "pipeline",
    "LaMambaUNet": "models.unet",
    "load_official": "models.official",
    "MetricOptions": "options.metrics",
    "Model": "runs.model",
    "open_app": "api.open_app",
    "open_model": "runs.model",
    "plan": "api.train",
    "plan_removal": "api.compress",
    "PlanRemovalOptions": "options.compress",
    "PlanRemovalResult": "api.compress",
    "plot": "api.plot",
    "PlotOptions": "options.plot",
    "PlotResult": "api.plot",
    "remove_units": "api.compress",
    "RemoveUnitsOptions": "options.compress",
    "RemoveUnitsResult": "api.compress",
    "sample": "api.sample",
    "sample_folder": "api.sample_folder",
    "SampleFolderOptions": "options.sample_folder",
    "SampleFolderResult": "api.sample_folder",
    "SampleOptions": "options.sampling",
    "SampleResult": "api.sample",
    "score_units": "api.compress",
    "ScoreUnitsOptions": "options.compress",
    "ScoreUnitsResult": "api.compress",
    "StatisticsOptions": "options.evaluation",
    "StatisticsResult": "api.compute_statistics",
    "to_official": "models.official",
    "train": "api.train",
    "TrainOptions": "options.training",
    "TrainPlan": "api.train",
    "TrainResult": "api.train",
    "UNetConfig": "config",
}

__all__ = [
    "AppOptions",
    "AppResult",
    "BenchmarkOptions",
    "BenchmarkResult",
    "CheckDataOptions",
    "CheckDataResult",
    "CheckLatentsResult",
    "CompareCriteriaOptions",
    "CompareCriteriaResult",
    "CompareOptions",
    "CompareResult",
    "CompressOptions",
    "CompressResult",
    "ConvertOptions",
    "ConvertResult",
    "DemoOptions",
    "DemoResult",
    "DoctorOptions",
    "DoctorResult",
    "EncodeOptions",
    "EncodeResult",
    "EvaluateOptions",
    "EvaluateResult",
    "ExportOptions",
    "ExportResult",
    "InfoOptions",
    "InfoResult",
    "LaMambaPipeline",
    "LaMambaUNet",
    "MetricOptions",
    "Model",
    "PlanRemovalOptions",
    "PlanRemovalResult",
    "PlotOptions",
    "PlotResult",
    "RemoveUnitsOptions",
    "RemoveUnitsResult",
    "SampleFolderOptions",
    "SampleFolderResult",
    "SampleOptions",
    "SampleResult",
    "ScoreUnitsOptions",
    "ScoreUnitsResult",
    "StatisticsOptions",
    "StatisticsResult",
    "TrainOptions",
    "TrainPlan",
    "TrainResult",
    "UNetConfig",
    "__version__",
    "benchmark",
    "check_data",
    "compare",
    "compare_criteria",
    "compress",
    "compute_statistics",
    "convert",
    "demo",
    "doctor",
    "encode",
    "evaluate",
    "export",
    "info",
    "load_official",
    "open_app",
    "open_model",
    "plan",
    "plan_removal",
    "plot",
    "remove_units",
    "sample",
    "sample_folder",
    "score_units",
    "to_official",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lamamba' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"lamamba.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
