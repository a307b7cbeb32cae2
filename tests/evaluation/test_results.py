"""Results that compare, and those that do not."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lamamba.evaluation.results import Entry, differences, disagreements, read_result, table, write_result
from lamamba.options.metrics import MetricOptions

PROTOCOL = {
    "distance_name": "FID", "network": {"name": "inception", "sha256": "a" * 64},
    "reference": {"name": "imagenet.npz", "fingerprint": "b" * 64, "count": 9}, "images": 50000,
    "image_shape": [256, 256], "grey": "refuse", "settings": {"neighbours": 3},
    "samples": {"guidance": 1.0, "ema": 0.9999}, "seeds": [[0, 49999]], "versions": {"torch": "2.11"},
}
FIGURES = {"frechet": 2.27, "recall": 0.6, "inception_score": 250.0, "inception_score_spread": 3.5, "kernel": 0.001,
           "kernel_spread": 0.0002}
ENTRY = Entry(name="a", figures=FIGURES, protocol=PROTOCOL)


@pytest.mark.parametrize(("change", "reason"), [
    ({"network": {"name": "inception", "sha256": "c" * 64}}, "the feature network, its weights and its resize (sha256"),
    ({"images": 10000}, "the number of samples (50000 against 10000)"),
    ({"image_shape": [512, 512]}, "the size of the images ([256, 256] against [512, 512])"),
    ({"settings": {"neighbours": 5}}, "neighbours, subsets and splits (neighbours 3 against 5)"),
    ({"reference": {"name": "imagenet.npz", "fingerprint": "d" * 64, "count": 9}}, "the reference images (finger"),
    ({"grey": "repeat"}, "what is done with grey images"),
])
def test_protocols_that_must_agree_and_do_not(change, reason):
    (found,) = disagreements(PROTOCOL, {**PROTOCOL, **change})
    assert found.startswith(reason)


def test_models_samplers_and_names_may_differ():
    other = {**PROTOCOL, "reference": {**PROTOCOL["reference"], "name": "elsewhere.npz"},
             "samples": {"guidance": 1.5, "ema": 0.9999}, "seeds": [[5, 50004]]}
    assert disagreements(PROTOCOL, other) == []
    assert differences(PROTOCOL, other) == ["samples.guidance: 1.0 | 1.5", "seeds: [[0, 49999]] | [[5, 50004]]"]
    assert differences(PROTOCOL, PROTOCOL) == []


@pytest.mark.parametrize(("one", "other", "found"), [
    ({"width": 64, "depths": [2, 2, 2, 2]}, {"width": 32, "depths": [1, 1, 1, 1]},
     ["architecture.width: 64 | 32", "architecture.depths: [2, 2, 2, 2] | [1, 1, 1, 1]"]),
    ({"width": 64}, {"width": 64}, []), (None, {"width": 64}, []), (None, None, []),
])
def test_architectures_that_differ_are_shown(one, other, found):
    first, second = ({**PROTOCOL, **({"architecture": value} if value else {})} for value in (one, other))
    assert differences(first, second) == found
    assert disagreements(first, second) == []


def test_a_table_across_and_down():
    other = Entry(name="b", figures={"frechet": 3.0}, spread={"frechet": 0.25}, protocol=PROTOCOL)
    lines = table([ENTRY, other]).splitlines()
    assert [line.split() for line in lines] == [
        ["a", "b"], ["FID", "2.2700", "3.0000", "±", "0.2500"], ["Inception", "Score", "250.0000", "±", "3.5000", "-"],
        ["recall", "0.6000", "-"], ["KID", "x", "1000", "1.000", "±", "0.200", "-"],
    ]
    down = table([dataclasses.replace(ENTRY, name=f"step {k}") for k in range(4)]).splitlines()
    assert len(down) == 5
    assert down[1].startswith("step 0")
    assert len({len(line) for line in down}) == 1


def test_files(tmp_path):
    path = tmp_path / "results" / "a.json"
    write_result(path, [ENTRY])
    assert read_result(path) == [ENTRY]
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "version": 2}))
    with pytest.raises(ValueError, match="format version 2, this lamamba reads up to 1"):
        read_result(path)
    path.write_text(json.dumps({**values, "entries": [{"figures": {}}]}))
    with pytest.raises(ValueError, match=r"a\.json: entries\[0\]\.name is missing"):
        read_result(path)
    entry = values["entries"][0]
    for change, said in (({"figures": {"recall": 1.0}}, "figures has no frechet"),
                         ({"protocol": {**entry["protocol"], "reference": None}}, "protocol has no reference"),
                         ({"protocol": {}}, "protocol has no network")):
        path.write_text(json.dumps({**values, "entries": [{**entry, **change}]}))
        with pytest.raises(ValueError, match=rf"a\.json: entries\[0\]\.{said}: it is damaged, evaluate again"):
            read_result(path)
    assert disagreements(PROTOCOL, {**PROTOCOL, "grey": "a\nb"})[0].endswith(r'against "a\nb")')


def test_metric_options_are_checked():
    with pytest.raises(ValueError, match="neighbours=0 must be at least 1"):
        MetricOptions(neighbours=0)
