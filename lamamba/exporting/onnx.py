"""A network as a graph: torch.export's with our kernels, and ONNX's of standard operations alone."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from lamamba.models.unet import LaMambaUNet
from lamamba.ops import use_backend
from lamamba.ops.selective_scan import parallel_scan

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


def export_program(model: LaMambaUNet) -> ExportedProgram:
    """torch.export of the network on its device, with the kernels of its back end, for batches of any size.

    Loading a graph with our kernels needs `import lamamba.models.unet`. Under lamamba.ops.use_backend("torch") the
    scan is the only custom operator.
    """
    inputs = example_inputs(model)
    batch = Dim("batch")
    with torch.no_grad():
        return torch.export.export(model.eval(), inputs, dynamic_shapes=[{0: batch} for _ in inputs])


def require_onnx() -> None:
    """Check that ONNX files can be written and run.

    Raises:
        RuntimeError: when onnx, onnxscript or onnxruntime are not installed.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"ONNX needs {', '.join(missing)}: pip install lamamba-diff[export]")


def export_onnx(model: LaMambaUNet, path: Path) -> float:
    """Write the network as ONNX, for batches of any size, and compare onnxruntime's output with PyTorch's.

    Inputs x, timestep and (for a conditional network) class_labels; output "output", as of `LaMambaUNet.forward`.

    Returns:
        max |onnx - torch| / max |torch|, the largest over batches of 1, 2 and 5.

    Raises:
        RuntimeError: when onnx, onnxscript or onnxruntime are not installed, or onnxruntime's numbers differ.
    """
    require_onnx()
    import onnxruntime

    with _quietly():
        program = _with_standard_operations(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.onnx.export(
            program, (), str(path), dynamo=True, opset_version=OPSET, output_names=["output"], verbose=False,
        )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names, worst = [given.name for given in session.get_inputs()], 0.0
    for batch in (1, 2, 5):
        inputs = example_inputs(model, batch, seed=batch)
        with torch.no_grad():
            expected = model(*inputs)
        (output,) = session.run(None, dict(zip(names, (tensor.cpu().numpy() for tensor in inputs), strict=True)))
        worst = max(worst, float((torch.from_numpy(output) - expected.cpu()).abs().max() / expected.abs().max()))
    if not worst < 1e-3:
        raise RuntimeError(f"onnxruntime's output differs from PyTorch's by {worst:.1e} of the largest value")
    return worst


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


def _with_standard_operations(model: LaMambaUNet) -> ExportedProgram:
    with use_backend("torch"):
        program = export_program(model)
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.view.default:                          # decomposed attention has other strides
            node.target = torch.ops.aten.reshape.default
    program = program.run_decompositions({
        torch.ops.lamamba.selective_scan.default: _scan,
        torch.ops.aten.scaled_dot_product_attention.default: _attention,
    })
    return program


def _scan(x, dt, B, C, W_dt, b_dt, A, D, paths, backend):
    return parallel_scan.forward(x, dt, B, C, W_dt, b_dt, A, D, paths)


def _attention(q, k, v, mask):
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + mask
    return torch.softmax(scores, dim=-1) @ v
