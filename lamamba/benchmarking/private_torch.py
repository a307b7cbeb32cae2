"""The private parts of PyTorch that counts need; with private_distributed, no other module imports them.

Fake tensors have shapes, strides and dtypes, and no values.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

__all__ = ["FakeTensor", "FakeTensorMode", "TorchDispatchMode", "has_aliases", "tree_flatten"]


@cache
def has_aliases(operator: Any) -> bool:
    """Whether an operator writes into its arguments or returns views of them."""
    schema = operator._schema
    return any(each.alias_info is not None for each in (*schema.arguments, *schema.returns))
