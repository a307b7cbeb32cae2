"""Exported graphs give the network's own numbers, for batches of any size."""

from __future__ import annotations

import pytest
import torch

from lamamba.exporting.onnx import example_inputs, export_onnx, export_program, extra_inputs
from lamamba.ops import selective_scan, use_backend
from lamamba.ops.scan_paths import NUM_PATHS
from lamamba.ops.selective_scan import parallel_scan
from tests.networks import random_network, relative_error, small_config

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
BLOCKS = [f"{part}.{i}" for part, count in (
    ("encoder.1", 1), ("encoder.2", 1), ("encoder.3", 1), ("bottleneck", 1), ("decoder.0", 2), ("decoder.1", 2),
    ("decoder.2", 2), ("decoder.3", 3)) for i in range(count)]
REMOVED = (*(block for block in BLOCKS if block != "encoder.2.0"), "encoder.2.0.scan", "encoder.2.0.mlp",
            "encoder.0.1.scan", "encoder.0.1.mlp")                              # exporters take seconds for each block
SMALL = dict(
    width=8, depths=(2, 1, 1, 1), grid=(4, 8), in_channels=1, window_size=4,
    removed_blocks=REMOVED,
)


@pytest.mark.parametrize("device", DEVICES)
def test_torch_export(device, tmp_path):
    """With our kernels in the graph, saved and loaded again."""
    model = random_network(small_config(objective="noise", **SMALL)).to(device)
    torch.export.save(export_program(model), tmp_path / "unet.pt2")
    program = torch.export.load(tmp_path / "unet.pt2").module()
    for batch in (1, 2, 5):
        inputs = example_inputs(model, batch, seed=batch)
        with torch.no_grad():
            expected = model(*inputs)
            assert relative_error(program(*inputs), expected) < 1e-5


def test_torch_export_of_the_torch_backend():
    model = random_network(small_config(objective="flow", num_classes=0, **SMALL))
    with use_backend("torch"):
        program = export_program(model)
    ours = {str(node.target) for node in program.graph.nodes if "lamamba" in str(node.target)}
    assert ours == {"lamamba.selective_scan.default"}
    inputs = example_inputs(model, 3)
    assert len(inputs) == 2
    with torch.no_grad():
        assert relative_error(program.module()(*inputs), model(*inputs)) < 1e-5


def test_a_flow_map_has_two_inputs_more(tmp_path):
    pytest.importorskip("onnxruntime")
    model = random_network(small_config(objective="flow-map", guidance_range=(1.0, 4.0), **SMALL))
    assert list(extra_inputs(model, 3)) == ["end_timestep", "guidance_scale"]
    assert export_onnx(model, tmp_path / "unet.onnx") < 1e-4


@pytest.mark.parametrize("length", [1, 2, 7, 16, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_parallel_scan_equals_the_reference(length, dtype):
    b, g, c, n, r = 2, NUM_PATHS, 6, 3, 2
    torch.manual_seed(length)
    paths = torch.stack([torch.randperm(length) for _ in range(g)])
    x, dt, B, C = (torch.randn(b, length, *rest, dtype=dtype) for rest in ((c,), (g, r), (g, n), (g, n)))
    inputs = (x, dt, B, C, torch.randn(g, c, r), torch.randn(g, c), -torch.rand(g, c, n) * 5, torch.randn(g, c), paths)
    expected = selective_scan(*inputs, backend="reference")
    result = parallel_scan.forward(*inputs)
    assert result.dtype == dtype
    assert relative_error(result.float(), expected.float()) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.slow
def test_onnx(tmp_path):
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason=f"exporting a graph needs {library}")
    import onnx

    model = random_network(small_config(objective="noise", **SMALL))
    seen: list = []
    assert export_onnx(model, tmp_path / "unet.onnx", seen.append) < 1e-5
    assert [(progress.done, progress.total) for progress in seen] == [(k, 3) for k in range(4)]
    graph = onnx.load(tmp_path / "unet.onnx").graph
    assert [given.name for given in graph.input] == ["x", "timestep", "class_labels"]
    assert [made.name for made in graph.output] == ["output"]
    domains = {node.domain for node in graph.node}
    assert domains <= {"", "ai.onnx"}                                           # standard operations alone


@pytest.mark.slow
def test_torch_onnx_export_itself():
    """Traced with PyTorch's operations instead of ours."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="exporting a graph needs onnxruntime")
    pytest.importorskip("onnxscript", reason="exporting a graph needs onnxscript")
    model = random_network(small_config(objective="flow", **SMALL))
    inputs = example_inputs(model)
    with torch.no_grad():
        program = torch.onnx.export(model, inputs, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
        names = [given.name for given in session.get_inputs()]
        (output,) = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
        assert relative_error(torch.from_numpy(output), model(*inputs)) < 1e-5
