"""A network as a graph: torch.export's with our kernels, and ONNX's of standard operations alone."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from lamamba.models.unet import LaMambaUNet
from lamamba.utils.progress import Progress, Report

OPSET = 18


def example_inputs(model: LaMambaUNet, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    """x, timestep and (for a conditional network) class_labels, as `LaMambaUNet.forward` takes them."""
    config, generator = model.architecture, torch.Generator().manual_seed(seed)
    size = [side * config.patch_size for side in model.run_grid]
    x = torch.randn(batch, config.in_channels, *size, generator=generator)
    t = torch.rand(batch, generator=generator) * 1000
    labels = torch.randint(0, config.num_classes + 1, (batch,), generator=generator)
    inputs = (x, t, labels) if config.num_classes else (x, t)
    return tuple(tensor.to(model.device, model.dtype if tensor is x else tensor.dtype) for tensor in inputs)


def extra_inputs(model: LaMambaUNet, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """end_timestep and guidance_scale, which a flow map takes by name: (b,) each."""
    config, generator = model.architecture, torch.Generator().manual_seed(seed + 1)
    inputs = {}
    if config.objective == "flow-map":
        timestep = example_inputs(model, batch, seed)[1]
        inputs["end_timestep"] = timestep * torch.rand(batch, generator=generator).to(timestep)
    if config.guidance_range is not None:
        low, high = config.guidance_range
        inputs["guidance_scale"] = (low + (high - low) * torch.rand(batch, generator=generator)).to(model.device)
    return inputs


def export_program(model: LaMambaUNet) -> ExportedProgram:
    """torch.export of the network on its device, with the kernels of its back end, for batches of any size.

    Loading a graph with our kernels needs `import lamamba.models.unet`. Under lamamba.ops.use_backend("torch") the
    scan is the only custom operator.
    """
    inputs, named = example_inputs(model), extra_inputs(model)
    with torch.no_grad():
        return torch.export.export(model.eval(), inputs, named, dynamic_shapes=_dynamic_shapes(inputs, named))


def _dynamic_shapes(inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> dict[str, dict[int, Dim]]:
    """Batches of any size, of all inputs by name."""
    batch = Dim("batch")
    names = [*("x", "timestep", "class_labels")[: len(inputs)], *named]
    return {name: {0: batch} for name in names}


def require_onnx() -> None:
    """Check that ONNX files can be written and run.

    Raises:
        RuntimeError: when onnx, onnxscript or onnxruntime are not installed.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"ONNX needs {', '.join(missing)}: pip install lamamba-diff[export]")


def export_onnx(model: LaMambaUNet, path: Path, report: Report = lambda progress: None) -> float:
    """Write the network as ONNX, for batches of any size, and compare onnxruntime's output with PyTorch's.

    Inputs x, timestep, (for a conditional network) class_labels, and (for a flow map) end_timestep and guidance_scale;
    output "output", as of `LaMambaUNet.forward`. What torch.onnx.export(model, ...) itself writes is the same, after
    ten times as long in onnxscript's optimizer.

    Returns:
        max |onnx - torch| / max |torch|, the largest over batches of 1, 2 and 5.

    Raises:
        RuntimeError: when onnx, onnxscript or onnxruntime are not installed, or onnxruntime's numbers differ.
    """
    require_onnx()
    import onnxruntime

    stages = iter(enumerate(("tracing and translating every block", "simplifying", "checking", "done")))

    def start_next() -> None:
        number, note = next(stages)
        report(Progress("writing ONNX", number, 3, "stages", note=note))

    start_next()
    with _quietly():
        _write_graph(model, path, start_next)
    start_next()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names, worst = [given.name for given in session.get_inputs()], 0.0
    for batch in (1, 2, 5):
        inputs, named = example_inputs(model, batch, seed=batch), extra_inputs(model, batch, seed=batch)
        with torch.no_grad():
            expected = model(*inputs, **named)
        tensors = (tensor.cpu().numpy() for tensor in (*inputs, *named.values()))
        (output,) = session.run(None, dict(zip(names, tensors, strict=True)))
        worst = max(worst, float((torch.from_numpy(output) - expected.cpu()).abs().max() / expected.abs().max()))
    if not worst < 1e-3:
        raise RuntimeError(f"onnxruntime's output differs from PyTorch's by {worst:.1e} of the largest value")
    start_next()
    return worst


def _write_graph(model: LaMambaUNet, path: Path, start_next: Callable[[], None]) -> None:
    from onnxscript import optimizer

    inputs, named = example_inputs(model), extra_inputs(model)
    with torch.no_grad():
        program = torch.onnx.export(
            model.eval(), inputs, kwargs=named, dynamo=True, opset_version=OPSET, output_names=["output"],
            verbose=False, dynamic_shapes=_dynamic_shapes(inputs, named), optimize=False,
        )
    assert program is not None
    start_next()
    optimizer.fold_constants(program.model, onnx_shape_inference=False)
    optimizer.remove_unused_nodes(program.model)
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(str(path))


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence the exporters' warnings of their own unfinished parts."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
