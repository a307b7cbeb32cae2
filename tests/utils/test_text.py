"""Words for numbers and values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lamamba
from lamamba.utils.text import counted, shown


@pytest.mark.parametrize(("count", "noun", "said"), [
    (0, "class", "no classes"), (1, "class", "1 class"), (1000, "class", "1,000 classes"), (1, "image", "1 image"),
    (2, "process", "2 processes"), (2, "verified shard", "2 verified shards"),
])
def test_numbers_of_things(count, noun, said):
    assert counted(count, noun) == said


def test_values_are_shown_in_one_short_line():
    assert shown("a  b\n") == r"'a  b\n'"
    assert shown(np.eye(2)) == "array([[1., 0.], [0., 1.]])"
    assert shown(torch.zeros(9, 9), 20) == "tensor([[0., 0., ..."


@pytest.mark.parametrize("call", [
    lambda array: lamamba.UNetConfig(width=array),
    lambda array: lamamba.UNetConfig(depths=array),
    lambda array: lamamba.UNetConfig(grid=array),
    lambda array: lamamba.BenchmarkOptions(seconds=array),
    lambda array: lamamba.info(array),
    lambda array: lamamba.train(lamamba.TrainOptions.from_recipe("digits", out="run"), callbacks=array),
    lambda array: lamamba.check_data(lamamba.CheckDataOptions(source="digits"), progress=array),
])
def test_messages_about_arrays_are_one_line(call):
    with pytest.raises((ValueError, TypeError), match=r"array\(\[\[1., 1.") as raised:
        call(np.ones((5, 5)))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 250
