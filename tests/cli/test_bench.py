"""lamamba bench: table, JSON file and picture; user errors in one line before anything is built."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from lamamba.benchmarking.report import table


@pytest.mark.slow
def test_the_file_holds_rows_ratios_and_environment(lamamba, tmp_path):
    files = [tmp_path / name for name in ("b.json", "b.md", "b.png", "e.png")]
    status, out, _ = lamamba(
        "bench", "--models", "s", "--peers", "dit-s-2", "--image-sizes", 32, "--batch", 1, "--device", "cpu",
        "--seconds", 0, "--dtype", "bfloat16", "--threads", 1,
        "--json", files[0], "--markdown", files[1], "--plot", files[2], "--plot-efficiency", files[3],
    )
    assert status == 0
    result = json.loads(files[0].read_text())
    assert result.keys() == {"version", "rows", "ratios", "sets", "left_out", "environment"}
    wanted = {"model", "image_size", "batch", "dtype", "device", "mode", "ms", "images_per_second",
              "peak_memory_bytes", "multiply_adds"}
    assert all(wanted <= row.keys() for row in result["rows"])
    assert [row["model"] for row in result["rows"]] == ["s", "dit-s-2"]
    (ratio,) = result["ratios"]
    assert {"model", "peer", "image_size", "batch", "dtype", "mode", "ratio"} <= ratio.keys()
    assert {"device", "versions", "commit", "date", "settings"} <= result["environment"].keys()
    assert result["environment"]["settings"]["threads"] == 1
    for text in (out, files[1].read_text()):
        assert f"{ratio['ratio']:.2f} |" in text
        assert "MALLOC_" in text or result["environment"]["settings"]["malloc"] is None
    assert all(Image.open(file).size[0] > 800 for file in files[2:])


def test_the_table():
    row = {"image_size": 256, "batch": 8, "dtype": "float32", "device": "cpu", "mode": "forward", "ms": 4000.0,
           "ms_quartiles": [3990.0, 4010.0], "images_per_second": 2.0, "peak_memory_bytes": 2**30,
           "activation_bytes_per_image": 2**24, "multiply_adds": 45.55e9,
           "multiply_adds_per_second": 7e10, "share_of_product": 0.88}
    unknown = {"peak_memory_bytes": None, "activation_bytes_per_image": None}
    ours, theirs = {**row, "model": "xl"}, {**row, "model": "dit-xl-2", **unknown}
    same = {key: row[key] for key in ("image_size", "batch", "mode")}
    ratio = {**same, "model": "xl", "peer": "dit-xl-2", "ratio": 2.04}
    heading, rule, first, second = table([ours, theirs], [ratio]).splitlines()
    assert len({len(line) for line in (heading, rule, first, second)}) == 1
    assert [cell.strip() for cell in first.split("|")[1:-1]] == [
        "xl", "256", "8", "2", "4000.0", "3990.0 - 4010.0", "1024", "16", "45.55", "70.0", "88%", "",
    ]
    assert second.rstrip("| ").endswith(" 2.04")
    assert " - |" in second


@pytest.mark.parametrize(("arguments", "said"), [
    (["--models", "xxl"], "did you mean 'xl'?"),
    (["--peers", "dit-xl2"], "did you mean 'dit-xl-2'?"),
    (["--models", "xl-16"], "model 'xl-16' is unknown"),
    (["--image-sizes", "256,100"], "the nearest is 96"),
    (["--image-sizes", "256;512"], "not a list of whole numbers"),
    (["--image-sizes", "256,512", "--batch", "8,1,1"], "give one, or one for each"),
    (["--batch", "0"], "batch[0]=0 must be at least 1"),
    (["--dtype", "bfloat"], "bfloat16"),
    (["--device", "cuda:9"], "device 'cuda:9' cannot be used here"),
    (["--mode", "backward"], "--mode"),
    (["--state-size", "0"], "state_size=0 must be at least 1"),
])
def test_user_errors_are_one_line(lamamba, tmp_path, arguments, said):
    status, _, err = lamamba("bench", *arguments)
    assert (status, len(err.strip().splitlines())) == (2, 1), err
    assert said in err
    assert not list(tmp_path.iterdir())
