"""lamamba compress: the whole way and its steps, from Python and from the command line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image

import lamamba
from lamamba.cli.main import main
from lamamba.compression.plan import Plan
from lamamba.runs.model import open_network
from tests.damage import full_disk
from tests.networks import random_network, small_config
from tests.training.together import command, command_on, needs_fork_server

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
    (["--remove", "0.3", "--max-loss", "0.1", "--data", "digits"], "one of both"),
    (["--remove", "1.2", "--data", "digits"], "remove"),
    (["--remove", "0.3", "--data", "nowhere"], "nowhere"),
])
def test_what_does_not_fit_is_refused_in_one_line(model, tmp_path, arguments, message, capsys):
    assert main(["compress", str(model), "--samples", "4", "--out", str(tmp_path / "c"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_share_is_refused_before_anything_is_scored(model, tmp_path):
    with pytest.raises(ValueError, match="cannot be removed: without every unit that may go"):
        lamamba.compress(lamamba.CompressOptions(model=model, data="digits", remove=0.999, out=tmp_path), progress=None)
    assert not list(tmp_path.rglob("*"))


OBJECTIVES = {"noise": dict(num_classes=0), "v": dict(num_classes=10), "flow": dict(num_classes=10)}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_with_states_of_its_own_sampling(tmp_path, objective):
    """Also without classes, and without data."""
    network = random_network(small_config(
        depths=(1, 1, 1, 1), in_channels=1, grid=8, objective=objective, removed_blocks=REMOVED,
        **OBJECTIVES[objective],
    ))
    network.save_pretrained(tmp_path / "whole")
    common = dict(model=tmp_path / "whole", data="sampling", samples=4)
    result = lamamba.compress(lamamba.CompressOptions(**common, remove=0.3, out=tmp_path / "half"), progress=None)
    assert result.plan.measured > 0
    assert open_network(result.path)[0].num_parameters() == result.pruned.parameters


@pytest.mark.parametrize("criterion", ["task", "magnitude", "hand", "random"])
def test_every_criterion_scores_and_plans(model, tmp_path, criterion):
    scored = lamamba.score_units(lamamba.ScoreUnitsOptions(
        model=model, data="digits", samples=4, criterion=criterion, out=tmp_path), progress=None)
    plan = lamamba.plan_removal(
        lamamba.PlanRemovalOptions(scores=scored.path, data="digits", remove=0.3), progress=None).plan
    assert (plan.criterion, plan.predicted) == (criterion, None)
    assert plan.parameters >= 0.3
    assert plan.measured > 0


def test_a_plan_by_time_times_every_unit_and_the_pruned_network(model, tmp_path):
    result = lamamba.compress(lamamba.CompressOptions(
        model=model, data="digits", samples=4, remove=0.2, by="time", out=tmp_path / "c"), progress=None)
    plan = result.plan
    assert plan.time >= 0.2
    assert plan.measured_time < 1
    assert plan.times["seconds"].keys() > set(plan.removed)
    assert "timed together" in str(plan)
    again = lamamba.CompressOptions(model=model, data="digits", samples=4, remove=0.2, by="time", out=tmp_path / "c")
    assert lamamba.compress(again, progress=None).plan == plan


def test_a_model_that_has_moved_and_data_that_has_changed(model, tmp_path):
    shutil.copytree(model, tmp_path / "a")
    scored = lamamba.score_units(lamamba.ScoreUnitsOptions(
        model=tmp_path / "a", data="digits", samples=4, out=tmp_path / "s"), progress=None)
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        lamamba.plan_removal(lamamba.PlanRemovalOptions(scores=scored.path, remove=0.3), progress=None)
    moved = lamamba.PlanRemovalOptions(scores=scored.path, remove=0.3, model=tmp_path / "b")
    assert lamamba.plan_removal(moved, progress=None).plan.measured > 0
    for number in range(20):
        folder = tmp_path / "data" / str(number % 10)
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 10 * number).save(folder / f"{number}.png")
    other = lamamba.PlanRemovalOptions(scores=scored.path, remove=0.3, model=tmp_path / "b", data=tmp_path / "data")
    with pytest.raises(ValueError, match="not what the units were scored on"):
        lamamba.plan_removal(other, progress=None)


@needs_fork_server
def test_two_processes_share_the_units_and_heal_together(model, tmp_path):
    common = ["compress", model, "--data", "digits", "--samples", "4", "--remove", "0.3", "--device", "cpu"]
    command_on(2, tmp_path, *common, "--heal", "2", "--heal-batch-size", "4", "--out", "two")
    one = lamamba.compress(lamamba.CompressOptions(
        model=model, data="digits", samples=4, remove=0.3, device="cpu", out=tmp_path / "one"), progress=None)
    assert Plan.load(tmp_path / "two" / "plan.json").removed == one.plan.removed
    assert len((tmp_path / "two" / "healed" / "metrics.jsonl").read_text().splitlines()) >= 1


@needs_fork_server
def test_killed_at_any_moment_the_same_command_goes_on(model, tmp_path):
    options = ["compress", model, "--data", "digits", "--samples", "4", "--remove", "0.3", "--device", "cpu"]
    for seconds in (0.3, 0.6, 0.9, 1.2):
        process = command(tmp_path, *options, "--out", "c")
        process.join(seconds)
        process.kill()
        process.join()
    last = command(tmp_path, *options, "--out", "c")
    last.join(60)
    assert last.exitcode == 0, (tmp_path / "printed.txt").read_text()
    assert open_network(tmp_path / "c" / "pruned")[0].num_parameters() > 0
    assert {path.name for path in (tmp_path / "c").iterdir()} >= {"scores.json", "plan.json", "units.png", "pruned"}


@needs_fork_server
def test_a_full_disk_is_named_and_nothing_is_lost(model, tmp_path):
    options = lamamba.CompressOptions(model=model, data="digits", samples=4, remove=0.3, out=tmp_path / "c")
    with full_disk(40_000), pytest.raises(OSError, match=r"pruned|unit_|units"):
        lamamba.compress(options, progress=None)
    assert not (tmp_path / "c" / "pruned").exists()
    assert lamamba.compress(options, progress=None).plan.measured > 0


def test_a_network_with_nan_is_refused(model, tmp_path):
    network = open_network(model)[0]
    with torch.no_grad():
        network.patch_embedding.projection.weight.fill_(1e38)
    network.save_pretrained(tmp_path / "broken")
    with pytest.raises(FloatingPointError, match="finite"):
        lamamba.compress(lamamba.CompressOptions(
            model=tmp_path / "broken", data="digits", samples=4, remove=0.3, out=tmp_path / "c"), progress=None)


def test_a_plan_for_another_network_is_refused(model, tmp_path, capsys):
    assert main(["compress", "score", str(model), "--criterion", "magnitude", "--out", str(tmp_path / "s")]) == 0
    assert main(["compress", "plan", str(tmp_path / "s"), "--remove", "0.2", "--no-measure"]) == 0
    command = ["compress", "apply", str(tmp_path / "s"), "--model", "shipped", "--out", str(tmp_path / "p")]
    assert main(command) == 2
    assert "another network" in capsys.readouterr().err
    assert main(["compress", "apply", str(tmp_path / "nothing"), "--out", str(tmp_path / "p")]) == 2


@pytest.fixture(scope="module")
def scored(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    return lamamba.score_units(lamamba.ScoreUnitsOptions(
        model=model, data="digits", samples=4, out=folder), progress=None).path


@pytest.mark.parametrize("name", ["plan.png", "scores.json", "."])
def test_a_plan_writes_over_neither_scores_nor_itself(scored, name):
    before = scored.read_bytes()
    with pytest.raises(ValueError, match="file of its own"):
        lamamba.plan_removal(
            lamamba.PlanRemovalOptions(scores=scored, remove=0.3, out=scored.parent / name), progress=None)
    assert scored.read_bytes() == before


@pytest.mark.parametrize(("change", "said"), [
    ({"criterion": "nonsense"}, "criterion"), ({"parameters": 1}, "more than the whole network"),
    ({"energy": 1e-320}, "energy"), ({"about": {"times": 5}}, "a lower and a higher timestep"),
    ({"about": {"samples": 10**12}}, "samples"), ({"about": {"seed": "x"}}, "seed"),
    ({"about": {"teacher": None}}, "which network"),
])
def test_damaged_scores_are_refused_by_name(scored, tmp_path, change, said):
    values = json.loads(scored.read_text())
    about = {**values["about"], **change.pop("about", {})}
    values |= {**change, "about": {key: value for key, value in about.items() if value is not None}}
    (tmp_path / "scores.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=said):
        lamamba.plan_removal(lamamba.PlanRemovalOptions(scores=tmp_path, remove=0.3), progress=None)


def test_a_whole_stage_stays(scored):
    plan = lamamba.plan_removal(lamamba.PlanRemovalOptions(
        scores=scored, remove=0.1, keep=("decoder.3", "encoder.0"), measure=False), progress=None).plan
    assert not any(name.startswith(("decoder.3", "encoder.0")) for name in plan.removed)


def test_a_plan_that_was_not_measured_and_a_network_without_units(model, scored, tmp_path):
    out = tmp_path / "c"
    shutil.copytree(scored.parent, out)
    lamamba.plan_removal(lamamba.PlanRemovalOptions(scores=out, remove=0.3, measure=False), progress=None)
    lamamba.remove_units(lamamba.RemoveUnitsOptions(plan=out, out=out / "pruned"))
    options = lamamba.CompressOptions(model=model, data="digits", samples=4, remove=0.3, out=out)
    assert "measured" not in str(lamamba.compress(options, progress=None))
    lamamba.plan_removal(lamamba.PlanRemovalOptions(scores=out, max_loss=1e308, measure=False), progress=None)
    lamamba.remove_units(lamamba.RemoveUnitsOptions(plan=out, out=tmp_path / "bare"))
    for criterion in ("output", "random"):
        with pytest.raises(ValueError, match="no layers left"):
            lamamba.score_units(lamamba.ScoreUnitsOptions(
                model=tmp_path / "bare", data="digits", samples=4, criterion=criterion, out=tmp_path / criterion),
                progress=None)


def test_a_strangers_config_two_folders_up_is_not_read(model, tmp_path):
    shutil.copytree(model, tmp_path / "project" / "models" / "mine")
    (tmp_path / "project" / "config.json").write_text('{"train": {"epochs": 3}}')
    lamamba.score_units(lamamba.ScoreUnitsOptions(
        model=tmp_path / "project" / "models" / "mine", data="digits", samples=4, criterion="magnitude",
        out=tmp_path / "s"), progress=None)


def test_shares_that_nothing_reaches_are_not_compared(model, tmp_path):
    with pytest.raises(ValueError, match="cannot be removed"):
        lamamba.compare_criteria(lamamba.CompareCriteriaOptions(
            model=model, data="digits", samples=4, shares=(0.999,), sets=0, out=tmp_path / "c"), progress=None)
    assert not (tmp_path / "c").exists()
