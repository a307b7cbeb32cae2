"""The network equals the official one to rounding error: outputs, gradients, guidance, and back to its file format.

The official code itself moves by 8e-6 (relative to its largest output) between float32 and float64.
"""

from __future__ import annotations

import pytest
import torch

from lamamba import LaMambaUNet, load_official, to_official
from lamamba.diffusion.guidance import guided
from lamamba.models.official import official_name
from lamamba.ops import use_backend
from lamamba.ops.selective_scan import OP
from tests.networks import BACKENDS, FILES, load_case, relative_error

OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 2e-4


@pytest.fixture(params=FILES)
def case(request):
    return load_case(request.param)


def test_outputs_and_gradients(case, backend):
    model = load_official(case.weights, case.config)
    x = case.tensors["in.x"].requires_grad_()
    with use_backend(backend):
        output = model(x, case.tensors["in.t"], case.labels)
        assert relative_error(output, case.tensors["out.eps_and_var"]) <= OUTPUT_TOLERANCE
        (output * case.tensors["in.w"]).mean().backward()
    gradients = {official_name(name): parameter.grad for name, parameter in model.named_parameters()}
    expected = {key: value for key, value in case.tensors.items() if key.startswith("grad.weights.")}
    assert len(expected) > 10
    assert relative_error(x.grad, case.tensors["grad.x"]) <= GRADIENT_TOLERANCE
    for key, value in expected.items():
        gradient = gradients[key.removeprefix("grad.weights.")].reshape(value.shape)
        assert relative_error(gradient, value) <= GRADIENT_TOLERANCE, key


@torch.no_grad()
def test_one_image_at_a_time(case, backend):
    model = load_official(case.weights, case.config)
    for i, x in enumerate(case.tensors["in.x"]):
        labels = None if case.labels is None else case.labels[i : i + 1]
        with use_backend(backend):
            output = model(x[None], case.tensors["in.t"][i : i + 1], labels)
        assert relative_error(output, case.tensors["out.eps_and_var"][i : i + 1]) <= OUTPUT_TOLERANCE


@torch.no_grad()
def test_to_our_format_and_back(case, tmp_path):
    load_official(case.weights, case.config).save_pretrained(tmp_path)
    model = LaMambaUNet.from_pretrained(tmp_path)
    assert model.architecture == case.config
    output = model(case.tensors["in.x"], case.tensors["in.t"], case.labels)
    assert relative_error(output, case.tensors["out.eps_and_var"]) <= OUTPUT_TOLERANCE
    state = to_official(model)
    assert state.keys() == case.weights.keys()                                 # the saved masks and indices, too
    for key, tensor in state.items():
        assert torch.equal(tensor, case.weights[key].to(tensor.dtype)), key


@torch.no_grad()
@pytest.mark.parametrize("name", ["cond_state1", "cond_state16_rgb"])
def test_guidance(name):
    case = load_case(name)
    model, tensors = load_official(case.weights, case.config), case.tensors
    predict = guided(model, tensors["cfg.y"], float(tensors["cfg.scale"]), case.config.num_classes)
    assert relative_error(predict(tensors["cfg.x"], tensors["cfg.t"]), tensors["cfg.out"]) <= OUTPUT_TOLERANCE


def test_every_back_end_is_among_those_tested():
    tested = {name.split("/")[0] for name in BACKENDS}
    assert {each.name for each in OP.backends} - tested <= {"triton"}           # which has its own files
