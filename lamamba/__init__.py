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
    from lamamba.api.simulate import SimulateResult, simulate
    from lamamba.api.train import TrainPlan, TrainResult, plan, train
    from lamamba.config import UNetConfig
    from lamamba.models.deep_cache import LaMambaCacheConfig
    from lamamba.models.layers import LaMambaLayer, SS2DLayer
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
    from lamamba.options.scaling import ClusterOptions, SimulateOptions
    from lamamba.options.training import TrainOptions
    from lamamba.pipeline import LaMambaPipeline
    from lamamba.runs.model import Model, open_model

_NAMES = {
    "api.benchmark": "BenchmarkResult benchmark",
    "api.check_data": "CheckDataResult CheckLatentsResult check_data",
    "api.compare": "CompareResult compare",
    "api.compare_criteria": "CompareCriteriaResult compare_criteria",
    "api.compress": "CompressResult PlanRemovalResult RemoveUnitsResult ScoreUnitsResult "
                    "compress plan_removal remove_units score_units",
    "api.compute_statistics": "StatisticsResult compute_statistics",
    "api.convert": "ConvertResult convert",
    "api.demo": "DemoResult demo",
    "api.doctor": "DoctorResult doctor",
    "api.encode": "EncodeResult encode",
    "api.evaluate": "EvaluateResult evaluate",
    "api.export": "ExportResult export",
    "api.info": "InfoResult info",
    "api.open_app": "AppResult open_app",
    "api.plot": "PlotResult plot",
    "api.sample": "SampleResult sample",
    "api.sample_folder": "SampleFolderResult sample_folder",
    "api.simulate": "SimulateResult simulate",
    "api.train": "TrainPlan TrainResult plan train",
    "config": "UNetConfig",
    "models.deep_cache": "LaMambaCacheConfig",
    "models.layers": "LaMambaLayer SS2DLayer",
    "models.official": "load_official to_official",
    "models.unet": "LaMambaUNet",
    "options.app": "AppOptions",
    "options.benchmark": "BenchmarkOptions",
    "options.check_data": "CheckDataOptions",
    "options.compress": "CompareCriteriaOptions CompressOptions "
                        "PlanRemovalOptions RemoveUnitsOptions ScoreUnitsOptions",
    "options.convert": "ConvertOptions",
    "options.demo": "DemoOptions",
    "options.doctor": "DoctorOptions",
    "options.encode": "EncodeOptions",
    "options.evaluation": "CompareOptions EvaluateOptions StatisticsOptions",
    "options.export": "ExportOptions",
    "options.info": "InfoOptions",
    "options.metrics": "MetricOptions",
    "options.plot": "PlotOptions",
    "options.sample_folder": "SampleFolderOptions",
    "options.sampling": "SampleOptions",
    "options.scaling": "ClusterOptions SimulateOptions",
    "options.training": "TrainOptions",
    "pipeline": "LaMambaPipeline",
    "runs.model": "Model open_model",
}
"""What each module offers here."""
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [
    "AppOptions", "AppResult", "BenchmarkOptions", "BenchmarkResult", "CheckDataOptions", "CheckDataResult",
    "CheckLatentsResult", "ClusterOptions", "CompareCriteriaOptions", "CompareCriteriaResult", "CompareOptions",
    "CompareResult", "CompressOptions", "CompressResult", "ConvertOptions", "ConvertResult", "DemoOptions",
    "DemoResult", "DoctorOptions", "DoctorResult", "EncodeOptions", "EncodeResult", "EvaluateOptions",
    "EvaluateResult", "ExportOptions", "ExportResult", "InfoOptions", "InfoResult", "LaMambaCacheConfig",
    "LaMambaLayer", "LaMambaPipeline", "LaMambaUNet", "MetricOptions", "Model", "PlanRemovalOptions",
    "PlanRemovalResult", "PlotOptions", "PlotResult", "RemoveUnitsOptions", "RemoveUnitsResult", "SS2DLayer",
    "SampleFolderOptions", "SampleFolderResult", "SampleOptions", "SampleResult", "ScoreUnitsOptions",
    "ScoreUnitsResult", "SimulateOptions", "SimulateResult", "StatisticsOptions", "StatisticsResult",
    "TrainOptions", "TrainPlan", "TrainResult", "UNetConfig", "__version__", "benchmark", "check_data", "compare",
    "compare_criteria", "compress", "compute_statistics", "convert", "demo", "doctor", "encode", "evaluate",
    "export", "info", "load_official", "open_app", "open_model", "plan", "plan_removal", "plot", "remove_units",
    "sample", "sample_folder", "score_units", "simulate", "to_official", "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lamamba' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"lamamba.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
