"""The paper's table: our counts agree with the published figures, or the table says what is wrong with them."""

from __future__ import annotations

import json

import pytest

import lamamba
from lamamba.benchmarking.comparison import compare_systems
from lamamba.benchmarking.flops import Operations, count
from lamamba.benchmarking.published import PUBLISHED, published_rows
from lamamba.benchmarking.throughput import parse_model
from lamamba.cli.main import main


@pytest.mark.parametrize("image_size", PUBLISHED)
def test_figures_that_do_not_come_out_have_a_reason(image_size):
    config = parse_model("xl", image_size)
    table = compare_systems("XL", config, Operations(1, 1, 1, 1))
    counted = [row for row in table.rows if row.counted]
    assert len(counted) >= 5
    for row in counted:
        published, found = row.published, row.counted
        pairs = [(published.parameters, found.parameters / 1e6), (published.multiply_adds, found.matrix / 1e9)]
        agrees = all(figure is None or ours == pytest.approx(figure, rel=0.013) for figure, ours in pairs)
        assert agrees or published.wrong, published.system
    assert table.rows[-1].published.system == "XL, 1 state"
    assert [row.published for row in table.rows[:-1]] == list(published_rows(image_size))


def test_the_papers_own_network_is_no_row_of_its_own():
    config = parse_model("xl-n16", 1024)
    rows = compare_systems("XL", config, Operations(1, 1, 1, 1)).rows
    assert [row.published.system for row in rows] == ["DiT-XL/2", "DiS-H/2", "DiM-Huge", "LaMamba-Diff-XL"]
    assert f"{rows[-1].counted.paper_total / 1e9:.2f}" == "804.19"


def test_the_command_prints_a_table_and_json(capsys):
    arguments = ["info", "s", "--compare", "--image-size", "512"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in lines if line.startswith("DiM-Huge  "))
    assert row == ["DiM-Huge", "863.59", "860", "1034.59", "26.85", "1061.43", "708", "-", "[2]"]
    assert sum("published only" in line for line in lines) == 10
    assert "[2] 708 G is the input projections and skip Linears alone: output projections, time steps and the scan" in \
        "\n".join(lines)
    assert max(map(len, lines)) <= 120
    assert main([*arguments, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)["comparison"]
    ours = table["rows"][-1]
    assert ours["system"] == "LaMamba-Diff-S, 1 state"
    cost = count(parse_model("s", 512))
    assert ours["counted"]["paper_total"] == cost.paper_total
    assert next(row for row in table["rows"] if row["system"] == "ADM-G")["counted"] is None


def test_models_of_pixels_have_no_table_and_those_of_the_package_are_counted():
    assert lamamba.info(lamamba.InfoOptions(model="shipped")).config.num_classes == 10
    with pytest.raises(ValueError, match="works on pixels of 1 channel, and the paper's table is of latents"):
        lamamba.info(lamamba.InfoOptions(model="shipped", compare=True))


def test_images_that_are_not_square_have_no_table():
    config = lamamba.UNetConfig.preset("s", image_size=256).replace(grid=(16, 32))
    with pytest.raises(ValueError, match="16 x 32 latents"):
        compare_systems("s", config, Operations(1, 1, 1, 1))
