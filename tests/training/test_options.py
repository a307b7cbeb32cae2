"""Options of a run: precision, activation checkpointing, averages, held-out images, trackers, starting weights."""

from __future__ import annotations

import json
import sys
import threading
import time

import numpy as np
import pytest
import torch

from lamamba import LaMambaUNet
from lamamba.data.codec import CodecConfig
from lamamba.models.official import load_official, official_name, read_official
from lamamba.options.training import ModelOptions
from lamamba.runs.folder import RunFolder
from lamamba.runs.model import open_network
from lamamba.training import trackers
from lamamba.training.checkpoint import update_ema
from lamamba.training.draws import draw, split_held_out
from lamamba.training.loop import train
from lamamba.training.trackers import Tracker
from tests.networks import PARITY
from tests.training.together import FewDigits, config, losses_of, read_lines, states_equal


def test_activations_made_again_change_the_run_by_rounding_only(tmp_path):
    train(config(), FewDigits(5), tmp_path / "kept")
    state = train(config(processes=dict(checkpoint_activations=True)), FewDigits(5), tmp_path / "again")
    assert all(stage.gradient_checkpointing for stage in (*state.model.encoder, *state.model.decoder))
    np.testing.assert_allclose(losses_of(tmp_path / "again"), losses_of(tmp_path / "kept"), rtol=1e-5)


def test_bfloat16_products_leave_float32_weights_and_nearly_the_same_losses(tmp_path):
    train(config(), FewDigits(5), tmp_path / "float32")
    state = train(config(precision=dict(autocast="bfloat16")), FewDigits(5), tmp_path / "bfloat16")
    assert {p.dtype for p in state.model.parameters()} == {torch.float32}
    ours, theirs = losses_of(tmp_path / "bfloat16"), losses_of(tmp_path / "float32")
    assert ours != theirs
    np.testing.assert_allclose(ours, theirs, rtol=0.02)
    recorded = json.loads((RunFolder(tmp_path / "bfloat16").newest() / "state.json").read_text())["precision"]
    assert recorded == {"autocast": "bfloat16", "tf32": True, "deterministic": False}


def test_the_precision_policy_is_in_force_while_training_and_gone_afterwards(tmp_path):
    seen = []

    def watch(step_state):
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.matmul.allow_tf32))

    before = (torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.matmul.allow_tf32)
    train(config(steps=1, precision=dict(deterministic=True, tf32=True)), FewDigits(5), tmp_path, [watch])
    assert seen == [(True, True)]
    assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.matmul.allow_tf32) == before


def test_several_averages_are_kept_at_once(tmp_path):
    weights = []
    state = train(config(ema_decays=(0.5, 0.9)), FewDigits(5), tmp_path, [
        lambda step_state: weights.append([p.clone() for p in step_state.ema.parameters()])])
    assert state.ema is state.averages[0.5]
    alone = train(config(ema_decays=(0.9,)), FewDigits(5), tmp_path / "alone")
    assert all(map(torch.equal, state.averages[0.9].parameters(), alone.ema.parameters()))
    assert all(map(torch.equal, weights[-1], state.averages[0.5].parameters()))
    checkpoint = RunFolder(tmp_path).newest()
    saved = LaMambaUNet.from_pretrained(checkpoint / "ema_0.9")
    assert all(map(torch.equal, saved.parameters(), state.averages[0.9].parameters()))
    with pytest.raises(ValueError, match=r"train.ema_decays: \[0.5, 0.9\] there, \[0.5\] here"):
        train(config(steps=6), FewDigits(5), tmp_path)


def test_every_nth_checkpoint_is_kept_for_good(tmp_path):
    train(config(steps=7, checkpoint_every=1, keep_checkpoints=2, keep_every=3), FewDigits(5), tmp_path)
    assert RunFolder(tmp_path).names() == ["step_00000003", "step_00000006", "step_00000007"]


def test_held_out_images_are_never_trained_on_and_their_loss_is_a_fixed_measure(tmp_path):
    digits = FewDigits(12)
    watch = dict(held_out=4, held_out_every=2)
    settings = config(steps=6, ema_decays=(0.9999,), optimizer=dict(learning_rate=1e-8), watch=watch)
    state = train(settings, digits, tmp_path / "run")
    trained, held_out = split_held_out(0, 12, 4)
    assert sorted([*trained, *held_out]) == list(range(12))
    measured = digits.seen[8:12]                                                # after two steps of four
    assert sorted(measured) == sorted(held_out)
    assert set(digits.seen[:8]) <= set(trained)
    values = [line["held_out_loss"] for line in read_lines(tmp_path / "run") if "held_out_loss" in line]
    assert len(values) == 3
    np.testing.assert_allclose(values, values[0], rtol=1e-5)                    # the network hardly moved

    from lamamba.diffusion.loss import training_loss
    from lamamba.diffusion.schedule import make_schedule

    schedule, numbers = make_schedule("flow"), draw(0, range(4), (1, 8, 8), held_out=True)
    x0 = torch.from_numpy(digits.images[held_out]).float() / 127.5 - 1
    t = schedule.timestep((torch.arange(4) + 0.5) / 4)
    xt = schedule.add_noise(x0, numbers.eps, t)
    with torch.no_grad():
        output = state.ema(xt, t, torch.from_numpy(digits.labels[held_out]))
    expected = training_loss(output, x0, xt, t, numbers.eps, schedule).mean()
    assert values[-1] == pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(ValueError, match="watch.held_out=12 leaves nothing of 12 images"):
        train(config(watch=dict(held_out=12)), FewDigits(12), tmp_path / "all")


def test_tensorboard_gets_every_line(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(config(watch=dict(trackers=("tensorboard",), project="digits")), FewDigits(5), tmp_path)
    events = EventAccumulator(str(tmp_path / "trackers" / "digits"))
    events.Reload()
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("loss")] == list(enumerate(losses_of(tmp_path), 1))
    assert "grad_norm" in events.Tags()["scalars"]


def test_a_missing_tensorboard_is_named(tmp_path, monkeypatch, caplog):
    """accelerate tries tensorboardX next, and would name that."""
    for name in ("tensorboard", "tensorboardX", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr(torch.utils, "tensorboard", raising=False)              # where another test has imported it
    assert train(config(watch=dict(trackers=("tensorboard",))), FewDigits(5), tmp_path).step == 4
    assert "tensorboard is not installed: pip install 'lamamba-diff[tensorboard]'" in caplog.text


def test_a_tracker_that_cannot_be_reached_does_not_stop_training(tmp_path, monkeypatch, caplog):
    """One raises at the start, one at every line, one never answers."""
    class Breaks:
        def log(self, values, step):
            raise ConnectionError("no route to host")

    def refuse():
        raise ConnectionError("no network")

    started = time.monotonic()
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 0.2)
    makers = {"refuses": refuse, "breaks": Breaks, "hangs": threading.Event().wait}
    monkeypatch.setattr(
        "lamamba.training.trackers.start_trackers", lambda *_: [Tracker(name, make) for name, make in makers.items()])
    assert train(config(watch=dict(trackers=("wandb",))), FewDigits(5), tmp_path).step == 4
    assert len(read_lines(tmp_path)) == 4
    assert "refuses is dropped: ConnectionError: no network" in caplog.text
    assert "breaks is dropped: ConnectionError: no route to host" in caplog.text
    assert "hangs did not answer in time" in caplog.text
    assert time.monotonic() - started < 60


def test_a_tracker_that_is_not_installed_is_dropped(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    assert train(config(watch=dict(trackers=("wandb",))), FewDigits(5), tmp_path).step == 4
    assert "tracker wandb is dropped" in caplog.text


OFFICIAL = PARITY / "official_checkpoint.pt"
OFFICIAL_MODEL = ModelOptions(width=8, num_heads=2, depths=(1, 1, 1, 1), bottleneck_depth=1, objective="noise")


class Latents:
    """Random numbers of the official file's shape, as latents would be."""

    name, image_size, channels, input_size, fingerprint = "latents", 128, 4, 16, "random"
    codec, draws_latents = CodecConfig(codec="latents", scale=0.18215), True

    def __init__(self, classes=6):
        self.label_names = tuple(map(str, range(classes)))

    def __len__(self):
        return 6

    def read(self, indices, draws):
        assert draws.latent.shape == (len(indices), 4, 16, 16)
        mean = torch.stack([torch.full((4, 16, 16), index / 6) for index in indices])
        return mean + 0.1 * draws.latent, torch.tensor(indices) % len(self.label_names)

    def files(self, indices):
        return [f"latent {index}" for index in indices]


def test_a_whole_official_checkpoint_is_continued_as_its_own_optimizer_would(tmp_path):
    """One step after loading is what PyTorch's AdamW makes of the file's own state and the same gradient."""
    content = read_official(OFFICIAL)
    begun = int(content["opt"]["state"][0]["step"])
    settings = config(
        model=OFFICIAL_MODEL, batch_size=2, steps=begun + 1, ema_decays=(0.9999, 0.9),
        start=dict(source=str(OFFICIAL), mode="everything"),
        optimizer=dict(learning_rate=1e-4, weight_decay=0.01, max_grad_norm=float("inf")),
    )
    state = train(settings, Latents(), tmp_path)
    assert state.step == begun + 1

    gradients = gradient_of_step(settings, begun)
    ours = {official_name(name): (name, p) for name, p in state.model.named_parameters()}
    theirs = {key: torch.nn.Parameter(value.clone()) for key, value in content["model"].items() if key in ours}
    optimizer = torch.optim.AdamW(theirs.values(), lr=1e-4)
    optimizer.load_state_dict(content["opt"])
    for key, parameter in theirs.items():
        parameter.grad = gradients[ours[key][0]].reshape(parameter.shape)
    optimizer.step()
    for key, parameter in theirs.items():
        mine = ours[key][1].detach()
        torch.testing.assert_close(mine, parameter.detach().reshape(mine.shape), rtol=1e-5, atol=1e-7)

    expected = load_official(content, weights="ema")
    network = load_official(content, weights="model")
    for p, q in zip(network.parameters(), state.model.parameters(), strict=True):
        p.data.copy_(q)
    update_ema(expected, network, 0.9999)
    for p, q in zip(expected.parameters(), state.ema.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-8)


def gradient_of_step(settings, step):
    """Of the official weights, on the batch that the run sees at this step: by name."""
    from lamamba.diffusion.guidance import drop_labels
    from lamamba.diffusion.loss import training_loss
    from lamamba.diffusion.schedule import make_schedule
    from lamamba.training.draws import image_indices

    model = load_official(read_official(OFFICIAL), weights="model").train()
    positions = range(step * 2, step * 2 + 2)
    numbers, schedule = draw(0, positions, (4, 16, 16), latent=True), make_schedule("noise")
    x0, labels = Latents().read(image_indices(0, positions, 6), numbers)
    t = schedule.timestep(numbers.time)
    xt = schedule.add_noise(x0, numbers.eps, t)
    output = model(xt, t, drop_labels(labels, numbers.label, settings.label_dropout, 6))
    training_loss(output, x0, xt, t, numbers.eps, schedule).mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_fine_tuning_replaces_the_label_table_and_nothing_else(tmp_path):
    official = load_official(OFFICIAL)
    settings = dict(model=OFFICIAL_MODEL, batch_size=2, steps=1, optimizer=dict(learning_rate=1e-12))
    with pytest.raises(ValueError, match=r"num_classes: 6 there, 4 here.*start.replace_labels"):
        train(config(**settings, start=dict(source=str(OFFICIAL))), Latents(4), tmp_path / "kept")
    replaced = config(**settings, start=dict(source=str(OFFICIAL), replace_labels=True))
    state = train(replaced, Latents(4), tmp_path / "tuned")
    for (name, p), q in zip(state.model.named_parameters(), official.parameters(), strict=True):
        if name == "label_embedding.weight":
            assert p.shape[0] == 5
            torch.testing.assert_close(p[-1], q[-1])                            # the row of the null label stays
            assert not torch.allclose(p[:4], q[:4])
        else:
            torch.testing.assert_close(p, q)
    again = config(model=OFFICIAL_MODEL, batch_size=2, steps=1, start=dict(source=str(tmp_path / "tuned")))
    assert train(again, Latents(4), tmp_path / "from a run").step == 1          # a run of ours is a source, too
    model, metadata = open_network(tmp_path / "tuned")
    assert (model.architecture.num_classes, metadata.codec, metadata.scale) == (4, "latents", 0.18215)


def test_sources_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"width: 8 there, 16 here.*leave out the model's options"):
        train(config(model=ModelOptions(width=16, num_heads=2, objective="noise"), start=dict(source=str(OFFICIAL))),
              Latents(), tmp_path / "wide")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        train(config(start=dict(source="nowhere")), FewDigits(5), tmp_path / "nowhere")
    bare = tmp_path / "bare.pt"
    torch.save({"model": read_official(OFFICIAL)["model"]}, bare)
    with pytest.raises(ValueError, match=r"lacks ema, opt.*start.mode='weights'"):
        train(config(model=OFFICIAL_MODEL, start=dict(source=str(bare), mode="everything")), Latents(), tmp_path / "b")
    whole = read_official(OFFICIAL)
    whole["model"] = {key: value for key, value in whole["model"].items() if "norm2" not in key}
    torch.save(whole, bad := tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"bad\.pt: the official weights do not fit .*missing .*norm2"):
        train(config(model=OFFICIAL_MODEL, start=dict(source=str(bad), mode="everything")), Latents(), tmp_path / "d")
    with pytest.raises(ValueError, match=r"latents has 6 classes, data.expected_classes=1000"):
        train(config(model=OFFICIAL_MODEL, data=dict(expected_classes=1000)), Latents(), tmp_path / "classes")


def test_workers_read_the_same_batches(tmp_path):
    alone = train(config(), FewDigits(5), tmp_path / "alone")
    assert states_equal(alone, train(config(processes=dict(data_workers=2)), FewDigits(5), tmp_path / "workers"))
