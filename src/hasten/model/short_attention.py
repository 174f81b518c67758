"""Attention of short sequences on a CPU: a few products over all heads at once.

    q (B, H, L, C), k, v (B, K, T, C) --products--> scores --softmax--> weights --products--> out

torch's own kernel for CPUs works through one sequence and one head after the other, each of which
is some microseconds of arithmetic where sequences are short: for sequences of 24 tokens, forward
and backward take two to three times as long as here, at 256 a sixth longer. What is kept for the
backward is the weights, (B, H, L, T), which is why long sequences do not come this way.

It computes in float32 also where matrices are multiplied in 16 bits: so small a product is slower
in those, and the softmax better off. And by torch's own library whatever multiplies elsewhere:
oneDNN makes a program for every shape, of which there are as many here as there are groups.

Shapes: B sequences, H heads that ask, K heads that are looked at, L and T lengths, C head size;
Z = B K pairs of a sequence and a head that is looked at, R = H / K L rows that ask in each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable

from hasten.core.products import using_library
from hasten.model.layers import kept_elements

_MOST_PAIRS, _MOST_PAIRS_IN_USE = 256 * 256, 128 * 128


def is_short(q_BHLC: Tensor, k_BKTC: Tensor) -> bool:
    """Returns whether ``attend_short`` is the faster way for what is asked and looked at."""
    if q_BHLC.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    is_narrow = torch.is_autocast_enabled("cpu")
    if q_BHLC.dtype not in (torch.float32, torch.float64) and not is_narrow:
        return False
    num_pairs = q_BHLC.shape[2] * k_BKTC.shape[2]
    if torch.is_grad_enabled() and q_BHLC.requires_grad:
        return num_pairs <= _MOST_PAIRS
    # One that asks by itself has its keys in a cache, which would be copied.
    return q_BHLC.shape[2] > 1 and num_pairs <= _MOST_PAIRS_IN_USE


def attend_short(
    q_BHLC: Tensor,
    k_BKTC: Tensor,
    v_BKTC: Tensor,
    mask: Tensor | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """Returns (B, H, L, C), the values weighted by ``softmax(scale * q . k)``.

    Args:
        q_BHLC: queries.
        k_BKTC: keys, H a multiple of K: neighbours among the H look at the same.
        v_BKTC: values.
        mask: bool, broadcast to (B, H, L, T), True where a query sees a key; None for all.
        scale: None for ``C ** -0.5``.
        dropout: rate on the weights.
    """
    scale = q_BHLC.shape[-1] ** -0.5 if scale is None else scale
    return _ShortAttention.apply(q_BHLC, k_BKTC, v_BKTC, mask, scale, dropout)


class _ShortAttention(torch.autograd.Function):
    """Heads that look at the same keys are rows of one product: R = H / K * L of them."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    @using_library("default")
    def forward(
        ctx: Any,
        q_BHLC: Tensor,
        k_BKTC: Tensor,
        v_BKTC: Tensor,
        mask: Tensor | None,
        scale: float,
        dropout: float,
    ) -> Tensor:
        ctx.scale, ctx.shapes = scale, (q_BHLC.shape, k_BKTC.shape)
        num_looked_at = k_BKTC.shape[0] * k_BKTC.shape[1]
        q_ZRC, k_ZTC, v_ZTC = (
            x.reshape(num_looked_at, -1, x.shape[-1]) for x in (q_BHLC, k_BKTC, v_BKTC)
        )
        weights_ZRT = _product(q_ZRC, k_ZTC.transpose(1, 2), scale)
        if mask is not None:
            weights_ZRT.view(*q_BHLC.shape[:3], -1).masked_fill_(~mask, float("-inf"))
        weights_ZRT = weights_ZRT.softmax(-1)
        keep_ZRT = kept_elements(weights_ZRT, dropout) if dropout else None
        ctx.save_for_backward(q_ZRC, k_ZTC, v_ZTC, weights_ZRT, keep_ZRT)
        used_ZRT = weights_ZRT if keep_ZRT is None else weights_ZRT * keep_ZRT
        return torch.bmm(used_ZRT, v_ZTC).view(q_BHLC.shape)

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")
    @using_library("default")
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        q_ZRC, k_ZTC, v_ZTC, weights_ZRT, keep_ZRT = ctx.saved_tensors
        q_shape, k_shape = ctx.shapes
        grad_ZRC = grads[0].reshape(q_ZRC.shape)
        of_weights_ZRT = torch.bmm(grad_ZRC, v_ZTC.transpose(1, 2))
        used_ZRT = weights_ZRT
        if keep_ZRT is not None:
            of_weights_ZRT, used_ZRT = of_weights_ZRT * keep_ZRT, weights_ZRT * keep_ZRT
        of_v_ZTC = torch.bmm(used_ZRT.transpose(1, 2), grad_ZRC)
        # Of the softmax: each weight times how much its gradient is above the row's mean.
        of_scores_ZRT = of_weights_ZRT.mul_(weights_ZRT)
        sums_ZR1 = of_scores_ZRT.sum(-1, keepdim=True)
        of_scores_ZRT.addcmul_(weights_ZRT, sums_ZR1, value=-1)
        of_q_ZRC = _product(of_scores_ZRT, k_ZTC, ctx.scale)
        of_k_ZTC = _product(of_scores_ZRT.transpose(1, 2), q_ZRC, ctx.scale)
        of_qkv = of_q_ZRC.view(q_shape), of_k_ZTC.view(k_shape), of_v_ZTC.view(k_shape)
        return *of_qkv, None, None, None


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Returns ``scale * (a @ b)`` of matrices in pairs, in one pass."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)
