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
from tests.files import full_disk
from tests.networks import random_network, save_model, small_config
from tests.training.together import command, command_on, needs_fork_server, read_lines

REMOVED = ("encoder.1.0", "encoder.2.0", "encoder.3.0", *(f"decoder.{s}.{k}" for s in range(3) for k in range(2)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved model of digits with few units."""
    network = random_network(small_config(
        depths=(1, 1, 1, 1), in_channels=1, num_classes=10, grid=8, objective="flow", removed_blocks=REMOVED
    ))
    folder = save_model(tmp_path_factory.mktemp("model"), network, label_names=tuple("0123456789"), guidance=1.75)
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n\n# A model\n\nMade for a test.\n")
    return folder


def compress(model, out, **changes):
    options = {"data": "digits", "samples": 4, "remove": 0.3, **changes}
    return lamamba.compress(lamamba.CompressOptions(model=model, out=out, **options), progress=None)


def score(model, out, **changes):
    options = {"data": "digits", "samples": 4, **changes}
    return lamamba.score_units(lamamba.ScoreUnitsOptions(model=model, out=out, **options), progress=None).path


def plan(scores, **changes):
    options = {"remove": 0.3, **changes}
    return lamamba.plan_removal(lamamba.PlanRemovalOptions(scores=scores, **options), progress=None).plan


def test_the_whole_way_prunes_heals_and_goes_on(model, tmp_path):
    options = dict(model=model, out=tmp_path / "half", heal=2, heal_batch_size=4)
    result = compress(**options)
    assert result.plan.parameters >= 0.3
    assert result.plan.measured > 0
    assert result.healed.step == 2
    assert result.path == tmp_path / "half" / "healed"
    assert "healed" in str(result)
    assert result._repr_png_().startswith(b"\x89PNG")
    removed = result.pruned.whole_parameters * result.plan.parameters
    assert result.pruned.parameters == pytest.approx(result.pruned.whole_parameters - removed)
    lines = read_lines(result.healed.folder)
    assert "feature_loss" in lines[-1]
    assert compress(**options).plan == result.plan                              # nothing is left to do
    assert read_lines(result.healed.folder) == lines


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
    whole = compress(model, tmp_path / "c", keep=["decoder.3.0"])
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
    values = json.loads(written)
    key, figures = "output 0.3 0", next(name for name in values["entries"] if name.startswith("samples of output"))
    for entries, said in (
        ({key: {**values["entries"][key], "loss": "low"}}, f"'{key}': loss='low' must be a number"),
        ({key: {**values["entries"][key], "criterion": "random"}}, "criterion='random' is of another entry"),
        ({key: 3}, key), ({figures: {"frechet": None}}, "figures.*None must be a number"),
        ({"sets": [{"kind": "sensible"}]}, r"sets\[0\].share is missing"),
    ):
        result.path.write_text(json.dumps({**values, "entries": {**values["entries"], **entries}}))
        with pytest.raises(ValueError, match=f"compare.json is damaged, remove it to measure.*{said}") as raised:
            lamamba.compare_criteria(options, progress=None)
        assert len(str(raised.value).splitlines()) == 1


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
    assert not list(tmp_path.rglob("c/*"))                                      # before anything is scored


OBJECTIVES = {"noise": dict(num_classes=0), "v": dict(num_classes=10), "flow": dict(num_classes=10)}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_with_states_of_its_own_sampling(tmp_path, objective):
    """Also without classes, and without data."""
    network = random_network(small_config(
        depths=(1, 1, 1, 1), in_channels=1, grid=8, objective=objective, removed_blocks=REMOVED,
        **OBJECTIVES[objective],
    ))
    network.save_pretrained(tmp_path / "whole")
    result = compress(tmp_path / "whole", tmp_path / "half", data="sampling")
    assert result.plan.measured > 0
    assert open_network(result.path)[0].num_parameters() == result.pruned.parameters


@pytest.mark.parametrize("criterion", ["task", "magnitude", "hand", "random"])
def test_every_criterion_scores_and_plans(model, tmp_path, criterion):
    made = plan(score(model, tmp_path, criterion=criterion), data="digits")
    assert (made.criterion, made.predicted) == (criterion, None)
    assert made.parameters >= 0.3
    assert made.measured > 0


def test_a_plan_by_time_times_every_unit_and_the_pruned_network(model, tmp_path):
    made, again = (compress(model, tmp_path / "c", remove=0.2, by="time").plan for _ in range(2))
    assert made.time >= 0.2
    assert made.measured_time < 1
    assert made.times["seconds"].keys() > set(made.removed)
    assert "timed together" in str(made)
    assert again == made


def test_a_model_that_has_moved_and_data_that_has_changed(model, tmp_path):
    shutil.copytree(model, tmp_path / "a")
    scored = score(tmp_path / "a", tmp_path / "s")
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        plan(scored)
    assert plan(scored, model=tmp_path / "b").measured > 0
    for number in range(20):
        folder = tmp_path / "data" / str(number % 10)
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 10 * number).save(folder / f"{number}.png")
    with pytest.raises(ValueError, match="not what the units were scored on"):
        plan(scored, model=tmp_path / "b", data=tmp_path / "data")


@needs_fork_server
def test_two_processes_share_the_units_and_heal_together(model, tmp_path):
    common = ["compress", model, "--data", "digits", "--samples", "4", "--remove", "0.3", "--device", "cpu"]
    command_on(2, tmp_path, *common, "--heal", "2", "--heal-batch-size", "4", "--out", "two")
    one = compress(model, tmp_path / "one", device="cpu")
    assert Plan.load(tmp_path / "two" / "plan.json").removed == one.plan.removed
    assert read_lines(tmp_path / "two" / "healed")


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
    with full_disk(40_000), pytest.raises(OSError, match=r"pruned|unit_|units"):
        compress(model, tmp_path / "c")
    assert not (tmp_path / "c" / "pruned").exists()
    assert compress(model, tmp_path / "c").plan.measured > 0


def test_a_network_with_nan_is_refused(model, tmp_path):
    network = open_network(model)[0]
    with torch.no_grad():
        network.patch_embedding.projection.weight.fill_(1e38)
    network.save_pretrained(tmp_path / "broken")
    with pytest.raises(FloatingPointError, match="finite"):
        compress(tmp_path / "broken", tmp_path / "c")


def test_a_plan_for_another_network_is_refused(model, tmp_path, capsys):
    assert main(["compress", "score", str(model), "--criterion", "magnitude", "--out", str(tmp_path / "s")]) == 0
    assert main(["compress", "plan", str(tmp_path / "s"), "--remove", "0.2", "--no-measure"]) == 0
    command = ["compress", "apply", str(tmp_path / "s"), "--model", "shipped", "--out", str(tmp_path / "p")]
    assert main(command) == 2
    assert "another network" in capsys.readouterr().err
    assert main(["compress", "apply", str(tmp_path / "nothing"), "--out", str(tmp_path / "p")]) == 2


@pytest.fixture(scope="module")
def scored(model, tmp_path_factory):
    return score(model, tmp_path_factory.mktemp("scored"))


@pytest.mark.parametrize("name", ["plan.png", "scores.json", "."])
def test_a_plan_writes_over_neither_scores_nor_itself(scored, name):
    before = scored.read_bytes()
    with pytest.raises(ValueError, match="file of its own"):
        plan(scored, out=scored.parent / name)
    assert scored.read_bytes() == before


@pytest.mark.parametrize(("change", "said"), [
    ({"criterion": "nonsense"}, "criterion"), ({"parameters": 1}, "more than the whole network"),
    ({"energy": 1e-320}, "energy"), ({"about": {"times": 5}}, "a lower and a higher timestep"),
    ({"about": {"samples": 10**12}}, "samples"), ({"about": {"seed": "x"}}, "seed"),
    ({"about": {"teacher": None}}, "which network"), ({"about": {"criterion": "task"}}, "about says 'task'"),
    ({"unit": {"score": -1.0}}, "is a mean square, 0 or more"), ({"unit": {"score": None}}, "is a mean square"),
    ({"unit": {"by_time": [-1.0] * 10}}, "is a mean square"), ({"unit": {"score": 1e-9}}, "scores on their diagonal"),
    ({"unit": {"standard_error": -1.0}}, "standard_error is 0 or more"),
    ({"unit": {"parameters": 0}}, r"not of this network: unit encoder.0.0 has parameters: 0 there, \d+ here"),
    ({"unit": {"group": "decoder.0"}}, "unit encoder.0.0 has group: 'decoder.0' there"),
])
def test_damaged_scores_are_refused_by_name(scored, tmp_path, change, said):
    values = json.loads(scored.read_text())
    change = dict(change)
    about = {**values["about"], **change.pop("about", {})}
    values["units"][0] |= change.pop("unit", {})
    values |= {**change, "about": {key: value for key, value in about.items() if value is not None}}
    (tmp_path / "scores.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=said):
        plan(tmp_path)


@pytest.mark.parametrize(("change", "said"), [
    (lambda removed: {"removed": [*removed, removed[0]]}, "plan.json: .* is removed twice"),
    (lambda removed: {"removed": [*removed, f"{removed[0]}.scan"]}, r"plan.json: .*\.scan"),
    (lambda removed: {"removed": removed[1:]}, "plan.json: parameters=0.3.* are removed; plan again"),
    (lambda removed: {"removed": [*removed, "encoder.9"]}, "plan.json: .*encoder.9"),
    (lambda removed: {"parameters": 0.99}, "plan.json: parameters=0.99, and without its units 0.3"),
    (lambda removed: {"multiply_adds": -1}, "plan.json: multiply_adds=-1, and without"),
])
def test_plans_that_were_edited_are_refused_by_name(scored, tmp_path, change, said):
    made = plan(scored, measure=False, out=tmp_path / "plan.json")
    values = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**values, **change(list(made.removed))}))
    with pytest.raises(ValueError, match=said):
        lamamba.remove_units(lamamba.RemoveUnitsOptions(plan=tmp_path, out=tmp_path / "pruned"))
    assert not (tmp_path / "pruned").exists()


def test_a_whole_stage_stays(scored):
    made = plan(scored, remove=0.1, keep=("decoder.3", "encoder.0"), measure=False)
    assert not any(name.startswith(("decoder.3", "encoder.0")) for name in made.removed)


def test_a_plan_that_was_not_measured_and_a_network_without_units(model, scored, tmp_path):
    out = tmp_path / "c"
    shutil.copytree(scored.parent, out)
    plan(out, measure=False)
    lamamba.remove_units(lamamba.RemoveUnitsOptions(plan=out, out=out / "pruned"))
    assert "measured" not in str(compress(model, out))
    plan(out, remove=None, max_loss=1e308, measure=False)
    lamamba.remove_units(lamamba.RemoveUnitsOptions(plan=out, out=tmp_path / "bare"))
    for criterion in ("output", "random"):
        with pytest.raises(ValueError, match="no layers left"):
            score(tmp_path / "bare", tmp_path / criterion, criterion=criterion)


def test_a_strangers_config_two_folders_up_is_not_read(model, tmp_path):
    shutil.copytree(model, tmp_path / "project" / "models" / "mine")
    (tmp_path / "project" / "config.json").write_text('{"train": {"epochs": 3}}')
    score(tmp_path / "project" / "models" / "mine", tmp_path / "s", criterion="magnitude")


@pytest.mark.parametrize("name", ["random_draws", "sets"])
def test_comparisons_without_an_end_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=1000000000000 must be at most"):
        lamamba.CompareCriteriaOptions(model="shipped", **{name: 10**12})


def test_shares_that_nothing_reaches_are_not_compared(model, tmp_path):
    with pytest.raises(ValueError, match="cannot be removed"):
        lamamba.compare_criteria(lamamba.CompareCriteriaOptions(
            model=model, data="digits", samples=4, shares=(0.999,), sets=0, out=tmp_path / "c"), progress=None)
    assert not (tmp_path / "c").exists()
