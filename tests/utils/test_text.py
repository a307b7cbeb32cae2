"""Words for numbers."""

from __future__ import annotations

import pytest

from lamamba.utils.text import counted


@pytest.mark.parametrize(("count", "noun", "said"), [
    (0, "class", "no classes"), (1, "class", "1 class"), (1000, "class", "1,000 classes"), (1, "image", "1 image"),
    (2, "process", "2 processes"), (2, "verified shard", "2 verified shards"),
])
def test_numbers_of_things(count, noun, said):
    assert counted(count, noun) == said
