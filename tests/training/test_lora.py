"""Training a LoRA of a saved network: it alone learns and is kept, resumes to the bit, and draws with its base."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil

import numpy as np
import pytest
import torch

import lamamba
from lamamba import LaMambaUNet
from lamamba.benchmarking.memory import training_memory
from lamamba.models.adapters import LORA_FILE
from lamamba.options.training import DistillOptions, LoraOptions, StartOptions
from lamamba.runs.folder import RunFolder
from lamamba.runs.model import fingerprint, open_model, open_network
from lamamba.sampling import generate
from lamamba.sampling.settings import Interpolated, read_image_metadata
from lamamba.training.loop import train
from lamamba.utils.files import read_json, sha256
from lamamba.utils.tensors import read_tensors
from tests.networks import largest_difference, random_network, save_model
from tests.training.together import TINY, FewDigits, config, pytestmark, together  # noqa: F401

pytest.importorskip("peft", reason="needs peft")


def save_base(folder, model=TINY, seed=0):
    """A network of digits, of one block in the first and last stages."""
    architecture = model.build(channels=1, num_classes=10, input_size=8)
    return save_model(folder, random_network(architecture, seed), label_names=tuple("0123456789"), guidance=1.5)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "network")


def settings(base, lora=None, **changes):
    changes = {"lora": LoraOptions(**{"rank": 2, **(lora or {})}), "start": StartOptions(source=str(base)), **changes}
    return config(**changes)


LONG = dict(alpha=60.0)


def adapter_of(network):
    return {name: p.detach().clone() for name, p in network.named_parameters() if ".lora_" in name}


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """Four long steps: (folder, state)."""
    folder = tmp_path_factory.mktemp("run") / "lora"
    return folder, train(settings(base, LONG, ema_decays=(0.5, 0.9)), FewDigits(5), folder)


@pytest.fixture
def foreign(run, tmp_path):
    """The run's LoRA as another program keeps it: without lora.json."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    shutil.copy(RunFolder(run[0]).newest() / "ema" / LORA_FILE, folder)
    return folder


def test_the_lora_alone_is_trained_averaged_and_kept(base, run):
    folder, state = run
    saved = open_network(base)[0].state_dict()
    for network in (state.model, *state.averages.values()):
        frozen = {name.replace(".base_layer", ""): p for name, p in network.named_parameters() if ".lora_" not in name}
        assert frozen.keys() == saved.keys()
        assert all(torch.equal(p, saved[name]) for name, p in frozen.items())
    trained = [p for p in state.model.parameters() if p.requires_grad]
    assert len(trained) == len(adapter_of(state.model)) == 2 * 2 * 6            # two blocks of six products
    assert sum(map(len, (group["params"] for group in state.optimizer.param_groups))) == len(trained)
    assert all(p.abs().max() > 0 for p in trained)                              # B began at zero
    shared = zip(state.model.parameters(), state.ema.parameters(), strict=True)
    assert all((p is q) is not p.requires_grad for p, q in shared)              # no copies of what stays
    checkpoint = RunFolder(folder).newest()
    for part in ("model", "ema", "ema_0.9"):
        assert {path.name for path in (checkpoint / part).iterdir()} == {LORA_FILE, "lora.json"}
        assert read_json(checkpoint / part / "lora.json") == {
            "base": str(base), "base_sha256": fingerprint(open_network(base)[0]), "version": 1,
            "lora_sha256": sha256(checkpoint / part / LORA_FILE)}
    names = {name.split("/", 1)[1] for name in read_tensors(checkpoint / "optimizer.safetensors")}
    assert names == {*adapter_of(state.model), "torch"}
    assert read_json(folder / "config.json")["base"]["sha256"] == fingerprint(open_network(base)[0])


def test_averages_are_those_of_the_loras_weights(base, tmp_path):
    values = []
    train(settings(base), FewDigits(5), tmp_path, [lambda step: values.append(adapter_of(step.ema))])
    one = train(settings(base, steps=1), FewDigits(5), tmp_path / "one")
    initial = train(settings(base, steps=1, optimizer=dict(learning_rate=1e-30)), FewDigits(5), tmp_path / "zero")
    for name, value in adapter_of(one.model).items():
        expected = 0.5 * adapter_of(initial.model)[name] + 0.5 * value
        torch.testing.assert_close(values[0][name], expected)


@pytest.mark.parametrize("objective", ["flow", "noise"])
def test_a_restart_changes_nothing_to_the_bit(tmp_path, objective):
    base = save_base(tmp_path / "base", dataclasses.replace(TINY, objective=objective))
    model = dataclasses.replace(TINY, objective=objective)
    whole = train(settings(base, model=model), FewDigits(5), tmp_path / "whole")
    train(settings(base, model=model, steps=2), FewDigits(5), tmp_path / "parts")
    parts = train(settings(base, model=model), FewDigits(5), tmp_path / "parts")
    for a, b in ((whole.model, parts.model), (whole.ema, parts.ema)):
        assert all(map(torch.equal, adapter_of(a).values(), adapter_of(b).values()))
    for name in ("ema", "model"):
        files = [(tmp_path / run / "checkpoints" / "step_00000004" / name / LORA_FILE).read_bytes()
                 for run in ("whole", "parts")]
        assert files[0] == files[1]


def train_plainly(settings, folder):
    losses = []
    state = train(settings, FewDigits(7), folder, [lambda step: losses.append(step.loss)])
    return losses, {name: p.numpy() for name, p in adapter_of(state.ema).items()}


def test_two_processes_give_the_same_run(base, tmp_path):
    given = settings(base, batch_size=6)
    alone = train_plainly(given, tmp_path / "alone")
    pieces = settings(base, batch_size=6, processes=dict(accumulation_steps=2))
    for losses, ema in together(2, train_plainly, pieces, tmp_path / "two"):
        np.testing.assert_allclose(losses, alone[0], rtol=2e-5)
        for name, value in ema.items():
            np.testing.assert_allclose(value, alone[1][name], atol=1e-3)


@pytest.mark.parametrize("changes", [
    dict(processes=dict(checkpoint_activations=True)), dict(precision=dict(autocast="bfloat16")),
])
def test_other_ways_to_compute_train_it_too(base, run, tmp_path, changes):
    state = train(settings(base, LONG, **changes), FewDigits(5), tmp_path)
    for name, value in adapter_of(run[1].model).items():
        assert (adapter_of(state.model)[name] - value).abs().max() < 0.03


def test_a_flow_map_with_a_teacher_and_a_distillation_learn_by_one(base, tmp_path):
    model = dataclasses.replace(TINY, objective="flow-map", guidance_range=(1.0, 4.0))
    few = save_base(tmp_path / "flow map", model)
    distill = DistillOptions(teacher=str(base))
    for source, changes in ((few, dict(model=model)), (base, {})):
        losses = []
        out = tmp_path / f"run {source.name}"
        state = train(settings(source, distill=distill, **changes), FewDigits(5), out, [
            lambda step, losses=losses: losses.append(step.loss)])
        assert np.isfinite(losses).all()
        assert all(p.abs().max() > 0 for p in adapter_of(state.model).values())


def test_layers_and_alpha_are_the_options(base, tmp_path):
    state = train(
        settings(base, dict(alpha=0.5, layers=("attention.qkv", "label_embedding")), steps=1), FewDigits(5), tmp_path)
    assert {name.split(".lora_")[0] for name in adapter_of(state.model)} == {
        "label_embedding", "encoder.0.blocks.0.branches.attention.qkv", "decoder.3.blocks.0.branches.attention.qkv"}
    assert state.model.label_embedding.scaling == {"default": 0.25}


def draw(model, **changes):
    values = dict(model=model, classes=[1, 2], num=2, steps=3, device="cpu")
    return lamamba.sample(lamamba.SampleOptions(**{**values, **changes}), progress=None)


def test_samples_are_those_of_the_base_with_the_lora(base, run, tmp_path):
    """By run, checkpoint and folder; the base by name or by the LoRA's own word."""
    folder, state = run
    checkpoint = RunFolder(folder).newest()
    expected = generate(state.ema, [1, 1, 2, 2], range(4), num_steps=3, guidance=1.5)
    for model, lora in ((base, folder), (None, folder), (base, checkpoint), (base, checkpoint / "ema")):
        result = draw(model, lora=lora)
        assert largest_difference(result.images, expected) <= 1
    assert str(result).endswith(f"LoRA {checkpoint / 'ema'}")
    assert largest_difference(draw(base).images, expected) > 1
    again = random_network(open_network(base)[0].architecture)
    again.load_state_dict(open_network(base)[0].state_dict())
    again.load_lora_adapter(checkpoint / "ema")                                 # as diffusers' users do
    images = generate(again.eval(), [1, 1, 2, 2], range(4), num_steps=3, guidance=1.5)
    np.testing.assert_array_equal(images, expected)
    mixed = draw(base, lora=folder, interpolate="classes:1:2", num=3, classes=None)
    assert Interpolated(1, 2, 0.5) in mixed.labels
    expected = generate(state.ema, mixed.labels, mixed.seeds, num_steps=3, guidance=1.5)
    assert largest_difference(mixed.images, expected) <= 1


def test_with_bfloat16_caches_and_folders_it_is_the_same_network(base, run, tmp_path):
    folder, _ = run
    plain, cached = draw(base, steps=8, cache=3), draw(base, steps=8, cache=3, lora=folder)
    assert largest_difference(plain.images, cached.images) > 1
    half = draw(base, lora=folder, dtype="bfloat16")
    assert np.abs(half.images.astype(int) - draw(base, lora=folder).images.astype(int)).mean() < 8
    options = lamamba.SampleFolderOptions(
        model=base, lora=folder, num=4, balanced=True, classes=[1, 2], steps=3, device="cpu", out=tmp_path / "many",
        format="npz")
    result = lamamba.sample_folder(options, progress=None)
    images = np.load(result.npz)["arr_0"]
    assert largest_difference(images[0], draw(base, lora=folder).images[0, ..., 0:1]) <= 1
    with pytest.raises(ValueError, match="lora"):
        lamamba.sample_folder(dataclasses.replace(options, lora=None), progress=None)


def test_a_picture_knows_its_lora(base, run, tmp_path):
    folder, _ = run
    first = draw(base, lora=folder, out=tmp_path / "a.png")
    read = read_image_metadata(tmp_path / "a.png").settings
    assert (read.lora, read.model, len(read.lora_sha256)) == (str(folder), str(base), 64)
    assert read.model_sha256 == fingerprint(open_network(base)[0])
    again = lamamba.sample(lamamba.SampleOptions(like=tmp_path / "a.png", device="cpu"), progress=None)
    np.testing.assert_array_equal(again.images, first.images)
    np.testing.assert_array_equal(draw(base, like=tmp_path / "a.png").images, first.images)
    assert '"lora"' not in json.dumps(draw(base).metadata.to_dict())


def test_a_picture_with_another_model_says_that_its_lora_is_left_out(base, run, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="lamamba")
    draw(base, lora=run[0], out=tmp_path / "a.png")
    twin = save_base(tmp_path / "twin", seed=5)
    assert draw(twin, like=tmp_path / "a.png").metadata.settings.lora is None
    assert f"a.png was made with the LoRA {run[0]}: left out" in caplog.text


def test_a_lora_whose_numbers_were_changed_is_refused(base, run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(RunFolder(run[0]).newest() / "ema", copy)
    data = bytearray((copy / LORA_FILE).read_bytes())
    data[-3] ^= 1
    (copy / LORA_FILE).write_bytes(data)
    with pytest.raises(ValueError, match=f"{LORA_FILE} is damaged: its hash is not the one in lora.json"):
        open_model(base, lora=copy)


def test_a_picture_of_a_network_that_is_gone_names_its_lora(foreign, tmp_path):
    base = save_base(tmp_path / "base")
    draw(base, lora=foreign, out=tmp_path / "a.png")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="a.png was made by .*base, which is not here: .*MODEL, and .*foreign as lora"):
        draw(None, like=tmp_path / "a.png")


def test_the_page_and_evaluation_take_one(base, run, tmp_path):
    from lamamba.app.session import open_session

    folder, _ = run
    session = open_session(None, None, "cpu", folder)
    assert session.model.lora.name == str(folder)
    assert session.title.endswith(f"with the LoRA {folder}")
    figures = []
    for name, lora in (("plain", None), ("lora", folder)):
        options = lamamba.EvaluateOptions(
            samples=str(base), reference="digits", features="digits", num_images=16, steps=2, lora=lora, device="cpu",
            out=tmp_path / f"{name}.json")
        lamamba.evaluate(options, progress=None)
        figures.append((tmp_path / f"{name}.json").read_text())
    assert '"lora_sha256"' in figures[1]
    assert '"lora_sha256"' not in figures[0]
    images = lamamba.EvaluateOptions(samples="digits", reference="digits", features="digits", lora=folder)
    with pytest.raises(ValueError, match="digits holds images, not a model: lora cannot change them"):
        lamamba.evaluate(images, progress=None)


def test_a_lora_of_another_network_is_refused_in_one_line(run, foreign, tmp_path):
    folder, _ = run
    twin = save_base(tmp_path / "twin", seed=5)
    wide = save_base(tmp_path / "wide", dataclasses.replace(TINY, width=16))
    for model, lora, fault in (
        (twin, folder, "is a LoRA of another network: of .*network with weights .{12}, and this one's are .{12}; give "
         "that network as the model"),
        ("shipped", folder, "is a LoRA of another network: of "),
        (wide, foreign, "is a LoRA of another network: .*lora_A.weight has shape"),
        (twin, tmp_path / "nothing", "nothing does not exist"),
        (twin, RunFolder(folder).newest() / "ema" / LORA_FILE, "is a file, and a LoRA is a folder: give .*ema"),
        (twin, twin, "twin holds no LoRA; lamamba train --lora.rank 16 --start.source MODEL makes one"),
    ):
        with pytest.raises((ValueError, OSError), match=fault) as raised:
            open_model(model, lora=lora)
        assert "\n" not in str(raised.value)
    assert open_model(twin, lora=foreign).lora.name == str(foreign)
    with pytest.raises(ValueError, match="holds a LoRA and no network: give .*network as the model, and this as lora"):
        open_model(folder)


def test_what_does_not_fit_is_refused_before_the_first_step(base, run, tmp_path):
    folder, _ = run
    with pytest.raises(ValueError, match=r"lora.rank=2 adapts a trained network: give it as start.source"):
        config(lora=LoraOptions(rank=2))
    with pytest.raises(ValueError, match=r"leave start.mode and start.replace_labels out"):
        settings(base, start=StartOptions(source=str(base), replace_labels=True))
    with pytest.raises(ValueError, match=r"processes.sharding='full' splits gradients"):
        settings(base, processes=dict(sharding="full"))
    with pytest.raises(ValueError, match="alpha and layers are of a LoRA: give its rank"):
        LoraOptions(alpha=2.0)
    out = tmp_path / "out"
    for changes, fault in (
        (dict(lora=dict(layers=("attention.qvk",))), "layer for a LoRA 'attention.qvk' is unknown; did you mean"),
        (dict(lora=dict(layers=("attention.qkv",), rank=10**18)), "rank=10{18} is more than any of its layers has"),
        (dict(model=dataclasses.replace(TINY, width=16)), "is another network than this run's"),
        (dict(model=dataclasses.replace(TINY, objective="flow-map")), "is another network than this run's"),
    ):
        with pytest.raises(ValueError, match=fault):
            train(settings(base, **changes), FewDigits(5), out)
        assert not RunFolder(out).names()
    twin = save_base(tmp_path / "twin", seed=5)
    with pytest.raises(ValueError, match=r"another configuration \(.*start.source"):
        train(settings(twin, LONG, ema_decays=(0.5, 0.9), steps=5), FewDigits(5), folder)


def test_a_base_that_has_changed_is_noticed_at_a_restart(tmp_path):
    base = save_base(tmp_path / "base")
    train(settings(base, steps=2), FewDigits(5), tmp_path / "run")
    save_base(base, seed=5)
    with pytest.raises(ValueError, match=r"another configuration \(base.sha256"):
        train(settings(base), FewDigits(5), tmp_path / "run")


def test_without_peft_the_error_names_the_extra(base, tmp_path, monkeypatch):
    monkeypatch.setattr("lamamba.models.adapters.importlib.util.find_spec", lambda name: None)
    for call in (lambda: train(settings(base), FewDigits(5), tmp_path / "run"),
                 lambda: open_model(base, lora=tmp_path)):
        with pytest.raises(RuntimeError, match=r"^LoRA needs peft: pip install 'lamamba-diff\[lora\]'$"):
            call()


def test_the_plan_counts_the_lora(base, run):
    options = lamamba.TrainOptions(**{
        **{entry.name: getattr(settings(base), entry.name) for entry in dataclasses.fields(settings(base))},
        "out": base.parent / "planned", "model": dataclasses.replace(TINY, width=32, removed_blocks=())})
    plan = lamamba.plan(options)
    assert plan.architecture == open_network(base)[0].architecture
    assert plan.lora_parameters == sum(p.numel() for p in adapter_of(run[1].model).values())
    assert "M of a LoRA to train" in str(plan)
    whole = training_memory(plan.architecture, 4)
    assert plan.memory.state < 0.6 * whole.state
    assert plan.memory.peak < whole.peak
    assert not (base.parent / "planned").exists()


def test_a_lora_of_a_run_of_a_lora_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="holds a LoRA and no network"):
        train(settings(run[0]), FewDigits(5), tmp_path)


def test_networks_without_lora_are_saved_as_ever(tmp_path):
    train(config(steps=1), FewDigits(5), tmp_path)
    assert LaMambaUNet.from_pretrained(RunFolder(tmp_path).newest() / "ema").num_parameters()
    assert "base" not in read_json(tmp_path / "config.json")
