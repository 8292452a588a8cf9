"""How far two checkpoints' hidden states lie apart, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from gift.cli import UserError

CHUNK_TOKENS = 4096  # bounds the float64 copies


@torch.no_grad()
def compare(hidden_a: Tensor, hidden_b: Tensor) -> dict[str, Tensor]:
    """Cosine similarity and Euclidean distance of states [N, H] at the same N positions; a is the earlier checkpoint.

    Returns float64 [N] tensors, computed in float64:

        cos     <a, b> / (||a|| ||b||), in [-1, 1]; exactly 1 for equal vectors, 0 where just one of them is zero
        l2      ||a - b||, in the units of the states
        l2_rel  ||a - b|| / ||a||: comparable between backbones whose states differ in scale; inf where only a is zero

    Raises UserError if the shapes differ.
    """
    if hidden_a.shape[1] != hidden_b.shape[1]:
        raise UserError(
            f"the states have different widths: {hidden_a.shape[1]} (a) and {hidden_b.shape[1]} (b);"
            " cosine and L2 need checkpoints of one architecture"
        )
    if len(hidden_a) != len(hidden_b):
        raise UserError(f"the states cover different numbers of tokens: {len(hidden_a)} (a) and {len(hidden_b)} (b)")
    parts = [_compare(a, b) for a, b in zip(hidden_a.split(CHUNK_TOKENS), hidden_b.split(CHUNK_TOKENS), strict=True)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _compare(hidden_a: Tensor, hidden_b: Tensor) -> dict[str, Tensor]:
    a, b = hidden_a.double(), hidden_b.double()
    l2 = (a - b).norm(dim=-1)
    squares_a, squares_b = (a * a).sum(-1), (b * b).sum(-1)
    # One root of the product, not a product of roots: the root of x * x is x to the last bit, so equal vectors give 1.
    cos = ((a * b).sum(-1) / (squares_a * squares_b).sqrt()).clamp(-1, 1)
    cos = torch.where((squares_a == 0) ^ (squares_b == 0), 0.0, torch.where(l2 == 0, 1.0, cos))
    return {"cos": cos, "l2": l2, "l2_rel": torch.where(l2 == 0, 0.0, l2 / squares_a.sqrt())}
