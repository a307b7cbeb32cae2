"""lamamba compress: the whole way and its steps, from Python and from the command line."""

from __future__ import annotations

import json

import pytest
import torch

import lamamba
from lamamba.cli.main import main
from lamamba.compression.plan import Plan
from lamamba.runs.model import open_network
from tests.networks import random_network, small_config

REMOVED = ("encoder.1.0", "encoder.2.0", "encoder.3.0", *(f"decoder.{s}.{k}" for s in range(3) for k in range(2)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved model of digits with few units."""
    folder = tmp_path_factory.mktemp("model")
    _, metadata = open_network("shipped")
    random_network(small_config(
        depths=(1, 1, 1, 1), in_channels=1, num_classes=10, grid=8, objective="flow", removed_blocks=REMOVED
    )).save_pretrained(folder)
    metadata.save(folder / "sampling.json")
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n\n# A model\n\nMade for a test.\n")
    return folder


def test_the_whole_way_prunes_heals_and_goes_on(model, tmp_path):
    options = lamamba.CompressOptions(
        model=model, data="digits", samples=4, remove=0.3, heal=2, heal_batch_size=4, out=tmp_path / "half"
    )
    result = lamamba.compress(options, progress=None)
    assert result.plan.parameters >= 0.3
    assert result.plan.measured > 0
    assert result.healed.step == 2
    assert result.path == tmp_path / "half" / "healed"
    assert "healed" in str(result)
    assert result._repr_png_().startswith(b"\x89PNG")
    removed = result.pruned.whole_parameters * result.plan.parameters
    assert result.pruned.parameters == pytest.approx(result.pruned.whole_parameters - removed)
    lines = (result.healed.folder / "metrics.jsonl").read_text().splitlines()
    assert "feature_loss" in json.loads(lines[-1])
    again = lamamba.compress(options, progress=None)                            # nothing is left to do
    assert again.plan == result.plan
    assert (result.healed.folder / "metrics.jsonl").read_text().splitlines() == lines


def test_the_pruned_folder_is_a_model(model, tmp_path, capsys):
    common = ["--data", "digits", "--samples", "4", "--remove", "0.3"]
    assert main(["compress", str(model), *common, "--out", str(tmp_path / "c")]) == 0
    assert "fewer multiply-adds" in capsys.readouterr().out
    pruned = tmp_path / "c" / "pruned"
    assert main(["sample", str(pruned), "--num", "1", "--steps", "2", "--out", str(tmp_path / "a.png")]) == 0
    card = (pruned / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\n---")
    assert "Made for a test." in card
    assert all(f"`{name}`" in card for name in Plan.load(pruned / "plan.json").removed)
    assert main(["convert", str(pruned), str(tmp_path / "official.pt")]) == 2
    assert "removed" in capsys.readouterr().err


def test_step_by_step_equals_the_whole_way(model, tmp_path, capsys):
    common = ["--data", "digits", "--samples", "4"]
    assert main(["compress", "score", str(model), *common, "--out", str(tmp_path / "s")]) == 0
    assert main(["compress", "plan", str(tmp_path / "s"), "--remove", "0.3", "--keep", "decoder.3.0"]) == 0
    assert main(["compress", "apply", str(tmp_path / "s"), "--out", str(tmp_path / "p")]) == 0
    out = capsys.readouterr().out
    assert "lowest first" in out
    assert "with cross terms" in out
    assert "lamamba sample" in out
    options = lamamba.CompressOptions(
        model=model, data="digits", samples=4, remove=0.3, keep=["decoder.3.0"], out=tmp_path / "c"
    )
    whole = lamamba.compress(options, progress=None)
    assert Plan.load(tmp_path / "s" / "plan.json") == whole.plan
    a, b = (open_network(path)[0].state_dict() for path in (tmp_path / "p", whole.pruned.path))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_criteria_are_compared(model, tmp_path):
    options = lamamba.CompareCriteriaOptions(
        model=model, data="digits", samples=4, criteria=["output", "magnitude", "random"], shares=[0.3], random_draws=2,
        sets=4, reference="digits", features="digits", num_images=8, out=tmp_path / "compare",
    )
    result = lamamba.compare_criteria(options, progress=None)
    assert [point["criterion"] for point in result.points] == ["output", "magnitude", "random", "random"]
    assert all(point["loss"] > 0 and "frechet" in point and "accuracy" in point for point in result.points)
    assert len(result.sets) == 4
    assert all(picture.is_file() for picture in result.pictures)
    written = result.path.read_bytes()
    assert str(lamamba.compare_criteria(options, progress=None)) == str(result)
    assert result.path.read_bytes() == written


@pytest.mark.parametrize(("arguments", "message"), [
    (["--remove", "0.999", "--data", "digits"], "cannot be removed"),
    (["--remove", "0.3"], "name it as data"),
    (["--data", "digits"], "say how much to remove"),
    (["--remove", "0.3", "--data", "digits", "--keep", "bottelneck"], "did you mean 'bottleneck'"),
    (["--remove", "0.3", "--data", "digits", "--times", "900,100"], "a lower and a higher timestep"),
])
def test_what_does_not_fit_is_refused_in_one_line(model, tmp_path, arguments, message, capsys):
    assert main(["compress", str(model), "--samples", "4", "--out", str(tmp_path / "c"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_plan_for_another_network_is_refused(model, tmp_path, capsys):
    assert main(["compress", "score", str(model), "--criterion", "magnitude", "--out", str(tmp_path / "s")]) == 0
    assert main(["compress", "plan", str(tmp_path / "s"), "--remove", "0.2", "--no-measure"]) == 0
    command = ["compress", "apply", str(tmp_path / "s"), "--model", "shipped", "--out", str(tmp_path / "p")]
    assert main(command) == 2
    assert "another network" in capsys.readouterr().err
    assert main(["compress", "apply", str(tmp_path / "nothing"), "--out", str(tmp_path / "p")]) == 2
