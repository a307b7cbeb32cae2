"""Distillation losses of LAPTOP-Diff (arXiv 2404.11098): the student's output and features against the teacher's.

    output      mean over the elements of (student - teacher)^2
    normalised  sum over feature points i of  ||s_i - t_i||^2 / ||t_i||^2       no term dominates
    plain       sum over feature points i of  mean (s_i - t_i)^2                as BK-SDM; the largest dominate

The paper weighs each term by the L2 norm of the teacher's feature; that the norm is each sample's own (so that the loss
of a sample depends on no other) is our choice. Each loss is (b,).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Features = Literal["normalised", "plain", "none"]


def output_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two outputs (b, ...): (b,). Give the prediction alone, without a learned variance."""
    return (student.float() - teacher.float()).square().flatten(1).mean(1)


def feature_losses(student: Sequence[Tensor], teacher: Sequence[Tensor], kind: Features = "normalised") -> Tensor:
    """The loss of each feature point: (points, b).

    Args:
        student, teacher: features (b, ...) of equal shapes, point by point.
        kind: "normalised" or "plain".

    Raises:
        ValueError: when the features of a point differ in shape.
    """
    terms = []
    for number, (s, t) in enumerate(zip(student, teacher, strict=True)):
        if s.shape != t.shape:
            raise ValueError(f"feature {number} is {tuple(s.shape)} in the student, {tuple(t.shape)} in the teacher")
        s, t = s.float().flatten(1), t.float().flatten(1)
        squared = (s - t).square()
        if kind == "plain":
            terms.append(squared.mean(1))
        else:
            terms.append(squared.sum(1) / t.square().sum(1).clamp(min=torch.finfo(torch.float32).tiny))
    return torch.stack(terms)
