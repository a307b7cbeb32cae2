"""A recorded pass gives what the network gives; where nothing can be recorded, the network runs as it is."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lamamba.inference import conditioning, cuda_graph
from lamamba.inference.conditioning import ConditionedNetwork
from lamamba.sampling.generate import ImageGenerator, generate
from tests.networks import random_inputs, random_network, relative_error, small_config

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_with_new_inputs_and_new_weights(dtype):
    model = random_network(small_config(width=32)).to("cuda", dtype)
    recorded = None
    for seed in (1, 2):
        x, t, labels = (part.cuda() for part in random_inputs(model.architecture, batch=3, seed=seed))
        with torch.no_grad():
            rows = model.condition(t, labels)
            recorded = recorded or cuda_graph.RecordedNetwork(model, x.to(dtype), rows)
            assert relative_error(recorded(x.to(dtype), rows), model(x.to(dtype), t, labels)) <= 1e-5
            model.head.linear.weight.mul_(1.5)


@needs_gpu
def test_calls_of_another_thread_do_not_spoil_a_recording():
    model = random_network(small_config(width=32)).cuda()
    x, t, labels = (part.cuda() for part in random_inputs(model.architecture, batch=3))
    ends = threading.Event()

    def call() -> None:
        while not ends.is_set():
            torch.empty(2**26, device="cuda")
            torch.cuda.synchronize()

    thread = threading.Thread(target=call)
    thread.start()
    try:
        with torch.no_grad():
            rows = model.condition(t, labels)
            assert relative_error(cuda_graph.RecordedNetwork(model, x, rows)(x, rows), model(x, t, labels)) <= 1e-5
    finally:
        ends.set()
        thread.join()


@needs_gpu
def test_sampling_on_a_gpu_records_passes():
    model = random_network(small_config()).cuda()
    x, _, labels = (part.cuda() for part in random_inputs(model.architecture))
    network = ConditionedNetwork(model, [900.0, 500.0, 100.0], labels.tolist())
    with torch.no_grad():
        for time in (900.0, 500.0, 100.0):
            t = torch.full((2,), time)
            assert relative_error(network(x, t, labels), model(x, t, labels)) <= 1e-5
    assert network._recorded


@needs_gpu
def test_a_recording_is_replayed_after_the_grid_was_changed_and_set_again():
    model = random_network(small_config(in_channels=1, objective="flow", width=16)).cuda()
    generator = ImageGenerator(model, num_steps=3, guidance=2.0, input_size=(8, 16), labels=range(3))
    first = generator([0, 1, 2], [0, 1, 2])
    other = generate(model, [0, 1, 2], [0, 1, 2], num_steps=3, input_size=(16, 16))         # takes what memory is free
    np.testing.assert_array_equal(generator([0, 1, 2], [0, 1, 2]), first)
    assert other.shape == (3, 16, 16, 1)


def test_a_pass_that_cannot_be_recorded_runs_as_it_is(monkeypatch, caplog):
    model = random_network(small_config())
    x, _, labels = random_inputs(model.architecture)
    tried = []

    def refuse(*arguments):
        tried.append(arguments)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(conditioning, "can_record", lambda x: True)
    monkeypatch.setattr(cuda_graph, "RecordedNetwork", refuse)
    network = ConditionedNetwork(model, [900.0, 500.0, 100.0], labels.tolist())
    with torch.no_grad():
        for time in (900.0, 500.0, 100.0):
            t = torch.full((2,), time)
            torch.testing.assert_close(network(x, t, labels), model(x, t, labels))
    assert len(tried) == 1                                                      # and not again at every step
    assert "cannot be recorded as a CUDA graph" in caplog.text


def test_the_second_pass_of_every_shape_is_recorded_and_one_graph_is_kept(monkeypatch):
    """With a recorder that replays nothing."""
    model, recorded, kept = random_network(small_config(num_classes=0)), [], weakref.WeakSet()

    class Recorder:
        def __init__(self, model, x, *rest):
            assert not kept                                                     # the last one's memory is free
            kept.add(self)
            recorded.append(len(x))

        def takes(self, x, conditioning):
            return len(x) == recorded[-1]

        def __call__(self, x, conditioning, deep_features):
            return model(x, None, conditioning=conditioning)

    monkeypatch.setattr(conditioning, "can_record", lambda x: True)
    monkeypatch.setattr(cuda_graph, "RecordedNetwork", Recorder)
    network = ConditionedNetwork(model, [900.0])
    with torch.no_grad():
        for images in (70, 70, 70, 3, 3, 70, 1):
            x = torch.randn(images, *random_inputs(model.architecture)[0].shape[1:])
            t = torch.full((images,), 900.0)
            torch.testing.assert_close(network(x, t, None), model(x, t))
    assert recorded == [70, 3, 70]


def test_only_passes_without_gradients_on_a_gpu_can_be_recorded():
    with torch.no_grad():
        assert not cuda_graph.can_record(torch.empty(1))
        assert cuda_graph.can_record(_on_a_gpu())
    assert not cuda_graph.can_record(_on_a_gpu())


def _on_a_gpu():
    with FakeTensorMode():
        return torch.empty(1, device="cuda")
