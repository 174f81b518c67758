"""Packed attention: one module, the kernel behind it works on groups of like length.

    x (N, D) -> q, k, v (N, H, C) -> [group: view or gather] -> SDPA -> [back] -> (N, D)

Shapes: N tokens, D hidden size, H heads, K key/value heads, C head size, B sequences of a group,
L its length, P positions of all groups, padding included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.core.batch import SequenceGroup, SequenceLayout
from hasten.model.config import TransformerConfig
from hasten.model.layers import apply_rotary, drop_elements


@dataclass(frozen=True)
class AttentionSpec:
    """What a kernel has to honour; one that cannot is not chosen.

    Attributes:
        dropout: rate on the attention weights; 0 outside training.
        scale: factor on the scores; None for ``C ** -0.5``.
    """

    dropout: float = 0.0
    scale: float | None = None


class Attention(nn.Module):
    """Multi-head self-attention within each sequence of a packed stream."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.kv_heads
        self.head_size = config.head_size
        self.dropout = config.attention_dropout
        kv_size = self.num_kv_heads * self.head_size
        self.query = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.key = nn.Linear(config.hidden_size, kv_size, bias=config.bias)
        self.value = nn.Linear(config.hidden_size, kv_size, bias=config.bias)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.query_norm = nn.RMSNorm(self.head_size, eps=1e-6) if config.qk_norm else None
        self.key_norm = nn.RMSNorm(self.head_size, eps=1e-6) if config.qk_norm else None

    def forward(
        self, x_ND: Tensor, layout: SequenceLayout, rotary: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Maps (N, D) to (N, D); ``rotary`` holds cosines and sines per token."""
        q_NHC = self.query(x_ND).unflatten(-1, (-1, self.head_size))
        k_NKC = self.key(x_ND).unflatten(-1, (-1, self.head_size))
        v_NKC = self.value(x_ND).unflatten(-1, (-1, self.head_size))
        if self.query_norm is not None and self.key_norm is not None:
            q_NHC, k_NKC = self.query_norm(q_NHC), self.key_norm(k_NKC)
        if rotary is not None:
            q_NHC, k_NKC = apply_rotary(q_NHC, *rotary), apply_rotary(k_NKC, *rotary)
        spec = AttentionSpec(dropout=self.dropout if self.training else 0.0)
        return self.output(attend(q_NHC, k_NKC, v_NKC, layout, spec).flatten(1))


def attend(
    q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, layout: SequenceLayout, spec: AttentionSpec
) -> Tensor:
    """Attention in which no sequence sees another.

    Args:
        q_NHC: (N, H, C) queries of the packed stream.
        k_NKC: (N, K, C) keys, H a multiple of K.
        v_NKC: (N, K, C) values.
        layout: where the sequences begin and end.
        spec: dropout and scale.

    Returns:
        (N, H, C), row n being the values of n's sequence weighted by
        ``softmax(scale * q_n . k)`` (Vaswani et al. 2017, equation 1).
    """
    plan = layout.group_plan
    outputs = [_attend_group(q_NHC, k_NKC, v_NKC, group, spec) for group in plan.groups]
    out_PHC = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if plan.restore is None:
        return out_PHC
    return _Ungather.apply(out_PHC, plan.restore)


def _attend_group(
    q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, group: SequenceGroup, spec: AttentionSpec
) -> Tensor:
    """Returns (B * L, H, C) for the sequences of one group, rows of padding holding junk."""
    q, k, v = (
        _take(x, group).unflatten(0, (group.count, group.length)).transpose(1, 2)
        for x in (q_NHC, k_NKC, v_NKC)
    )
    if spec.dropout and q.device.type == "cpu":
        return _attend_with_dropout(q, k, v, group, spec).transpose(1, 2).flatten(0, 1)
    out_BHLC = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=group.mask,
        dropout_p=spec.dropout,
        scale=spec.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out_BHLC.transpose(1, 2).flatten(0, 1)


def _attend_with_dropout(
    q_BHLC: Tensor, k_BKLC: Tensor, v_BKLC: Tensor, group: SequenceGroup, spec: AttentionSpec
) -> Tensor:
    """The formula as it stands, with our dropout: no fast kernel on CPU takes any."""
    if q_BHLC.shape[1] != k_BKLC.shape[1]:
        shared = q_BHLC.shape[1] // k_BKLC.shape[1]
        k_BKLC = k_BKLC.repeat_interleave(shared, dim=1)
        v_BKLC = v_BKLC.repeat_interleave(shared, dim=1)
    scale = q_BHLC.shape[-1] ** -0.5 if spec.scale is None else spec.scale
    scores_BHLL = (q_BHLC * scale) @ k_BKLC.transpose(-1, -2)
    if group.mask is not None:
        scores_BHLL = scores_BHLL.masked_fill(~group.mask, float("-inf"))
    return drop_elements(scores_BHLL.softmax(-1), spec.dropout) @ v_BKLC


def _take(x: Tensor, group: SequenceGroup) -> Tensor:
    if group.rows is None:
        return x.narrow(0, group.start or 0, group.count * group.length)
    return _Gather.apply(x, group.rows, group.mask)


class _Gather(torch.autograd.Function):
    """Rows of a stream, padding repeating row 0.

    The backward of ``index_select`` adds row by row, many times slower than this on CPU. Here
    every real row is taken once, and a padded position's gradient is exactly zero (its key is
    masked and its output is dropped), so assigning the real rows is the whole gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, mask)
        ctx.num_rows = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        rows, mask = ctx.saved_tensors
        grad = grads[0]
        if mask is not None:
            real = mask.flatten()
            rows, grad = rows[real], grad[real]
        out = grad.new_zeros(ctx.num_rows, *grad.shape[1:])
        return out.index_copy_(0, rows, grad), None, None


class _Ungather(torch.autograd.Function):
    """Group positions back to stream order; rows of padding are dropped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, restore: Tensor) -> Tensor:
        ctx.save_for_backward(restore)
        ctx.num_rows = len(x)
        return x.index_select(0, restore)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (restore,) = ctx.saved_tensors
        out = grads[0].new_zeros(ctx.num_rows, *grads[0].shape[1:])
        return out.index_copy_(0, restore, grads[0]), None
