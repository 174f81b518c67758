"""Packed attention: one module, the kernel behind it works on groups of like length.

    x (N, D) -> q, k, v (N, H, C) -> [group: view or gather] -> kernel -> [back] -> (N, D)

Shapes: N tokens that ask, M tokens that are looked at (the same in self-attention), D hidden size,
H heads, K key/value heads, C head size, B sequences of a group, L and T the lengths of its longest
asking and looked-at sequence, P query positions of all groups, padding included.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.core.batch import GroupPlan, GroupSide, SequenceGroup
from hasten.model.config import TransformerConfig
from hasten.model.layers import apply_rotary, drop_elements

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class AttentionSpec:
    """What a kernel has to honour; one that cannot is not chosen.

    Attributes:
        causal: a token sees itself and what comes before it. Queries and keys are one stream.
        window: how many tokens a causal token sees, itself included; 0 for all.
        scale: factor on the scores; None for ``C ** -0.5``.
        softcap: scores become ``softcap * tanh(score / softcap)`` (Gemma 2, 2024); 0 for none.
        dropout: rate on the attention weights; 0 outside training.
    """

    causal: bool = False
    window: int = 0
    scale: float | None = None
    softcap: float = 0.0
    dropout: float = 0.0


class Attention(nn.Module):
    """Multi-head attention within each sequence of a packed stream, or from it to its source."""

    def __init__(self, config: TransformerConfig, *, causal: bool = False) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.kv_heads
        self.head_size = config.head_size
        self.dropout = config.attention_dropout
        window = config.sliding_window if causal else 0
        self._spec = AttentionSpec(causal, window, softcap=config.attention_softcap)
        kv_size = self.num_kv_heads * self.head_size
        self.query = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.key = nn.Linear(config.hidden_size, kv_size, bias=config.bias)
        self.value = nn.Linear(config.hidden_size, kv_size, bias=config.bias)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.query_norm = nn.RMSNorm(self.head_size, eps=1e-6) if config.qk_norm else None
        self.key_norm = nn.RMSNorm(self.head_size, eps=1e-6) if config.qk_norm else None
        self.core = AttentionCore()

    @property
    def spec(self) -> AttentionSpec:
        """What the module asks of a kernel, in its present mode."""
        if not self.training or not self.dropout:
            return self._spec
        spec = self._spec
        return AttentionSpec(spec.causal, spec.window, spec.scale, spec.softcap, self.dropout)

    def forward(
        self,
        x_ND: Tensor,
        plan: GroupPlan,
        rotary: Rotary | None = None,
        memory_MD: Tensor | None = None,
    ) -> Tensor:
        """Maps (N, D) to (N, D).

        Args:
            x_ND: the stream that asks.
            plan: groups of its sequences, and of those that they look at.
            rotary: cosines and sines per token; None without rotary positions.
            memory_MD: the stream that is looked at; None for ``x_ND`` itself.
        """
        q_NHC = self.queries(x_ND)
        k_MKC, v_MKC = self.keys_values(x_ND if memory_MD is None else memory_MD)
        return self.output(self.core(q_NHC, k_MKC, v_MKC, rotary, plan, self.spec).flatten(1))

    def queries(self, x_ND: Tensor, rotary: Rotary | None = None) -> Tensor:
        """Returns the queries (N, H, C)."""
        q_NHC = self.query(x_ND).unflatten(-1, (-1, self.head_size))
        if self.query_norm is not None:
            q_NHC = self.query_norm(q_NHC)
        return q_NHC if rotary is None else apply_rotary(q_NHC, *rotary)

    def keys_values(self, x_MD: Tensor, rotary: Rotary | None = None) -> tuple[Tensor, Tensor]:
        """Returns keys and values, each (M, K, C)."""
        k_MKC = self.key(x_MD).unflatten(-1, (-1, self.head_size))
        v_MKC = self.value(x_MD).unflatten(-1, (-1, self.head_size))
        if self.key_norm is not None:
            k_MKC = self.key_norm(k_MKC)
        return (k_MKC if rotary is None else apply_rotary(k_MKC, *rotary)), v_MKC


class AttentionCore(nn.Module):
    """Attention between projections: a module, so that processes can exchange heads around it."""

    def forward(
        self,
        q_NHC: Tensor,
        k_MKC: Tensor,
        v_MKC: Tensor,
        rotary: Rotary | None,
        plan: GroupPlan,
        spec: AttentionSpec,
    ) -> Tensor:
        """Returns (N, H, C); see ``attend``. With ``rotary`` queries and keys are one stream."""
        if rotary is not None:
            q_NHC, k_MKC = apply_rotary(q_NHC, *rotary), apply_rotary(k_MKC, *rotary)
        return attend(q_NHC, k_MKC, v_MKC, plan, spec)


def attend(
    q_NHC: Tensor, k_MKC: Tensor, v_MKC: Tensor, plan: GroupPlan, spec: AttentionSpec
) -> Tensor:
    """Attention in which no sequence sees another.

    Args:
        q_NHC: (N, H, C) queries of the packed stream.
        k_MKC: (M, K, C) keys, H a multiple of K.
        v_MKC: (M, K, C) values.
        plan: groups of the sequences, such as ``SequenceLayout.group_plan``.
        spec: what else the kernel has to honour.

    Returns:
        (N, H, C), row n being the values of n's sequence weighted by
        ``softmax(scale * q_n . k)`` (Vaswani et al. 2017, equation 1).
    """
    outputs = [_attend_group(q_NHC, k_MKC, v_MKC, group, spec) for group in plan.groups]
    out_PHC = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if plan.restore is None:
        return out_PHC
    return _Ungather.apply(out_PHC, plan.restore)


def _attend_group(
    q_NHC: Tensor, k_MKC: Tensor, v_MKC: Tensor, group: SequenceGroup, spec: AttentionSpec
) -> Tensor:
    """Returns (B * L, H, C) for the sequences of one group, rows of padding holding junk."""
    q_BHLC = _take(q_NHC, group.queries, group.count)
    k_BKTC = _take(k_MKC, group.keys, group.count)
    v_BKTC = _take(v_MKC, group.keys, group.count)
    # Padding follows the tokens, so a causal token sees none of it.
    mask = group.keys.mask
    if spec.causal:
        length = group.queries.length
        mask = causal_mask(length, spec.window, q_NHC.device) if _is_masked(spec, length) else None
    out_BHLC = attend_dense(q_BHLC, k_BKTC, v_BKTC, mask, spec)
    return out_BHLC.transpose(1, 2).flatten(0, 1)


def attend_dense(
    q_BHLC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, mask: Tensor | None, spec: AttentionSpec
) -> Tensor:
    """Attention of rectangles, by the fastest kernel that honours ``spec``.

    Args:
        q_BHLC: queries.
        k_BKTC: keys.
        v_BKTC: values.
        mask: bool, broadcast to (B, H, L, T), True where a query sees a key; None for all, or for
            all before it where ``spec`` is causal.
        spec: ``window`` and ``causal`` are already in ``mask`` where there is one.
    """
    if spec.softcap or (spec.dropout and q_BHLC.device.type == "cpu"):
        return _attend_explicitly(q_BHLC, k_BKTC, v_BKTC, mask, spec)
    return F.scaled_dot_product_attention(
        q_BHLC,
        k_BKTC,
        v_BKTC,
        attn_mask=mask,
        dropout_p=spec.dropout,
        is_causal=spec.causal and mask is None,
        scale=spec.scale,
        enable_gqa=q_BHLC.shape[1] != k_BKTC.shape[1],
    )


def _attend_explicitly(
    q_BHLC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, mask: Tensor | None, spec: AttentionSpec
) -> Tensor:
    """The formula as it stands: no fast kernel has a soft-cap, and none on CPU has dropout."""
    if q_BHLC.shape[1] != k_BKTC.shape[1]:
        shared = q_BHLC.shape[1] // k_BKTC.shape[1]
        k_BKTC = k_BKTC.repeat_interleave(shared, dim=1)
        v_BKTC = v_BKTC.repeat_interleave(shared, dim=1)
    scale = q_BHLC.shape[-1] ** -0.5 if spec.scale is None else spec.scale
    scores_BHLT = (q_BHLC * scale) @ k_BKTC.transpose(-1, -2)
    if spec.softcap:
        scores_BHLT = spec.softcap * torch.tanh(scores_BHLT / spec.softcap)
    if mask is None and spec.causal:
        mask = causal_mask(q_BHLC.shape[2], 0, q_BHLC.device)
    if mask is not None:
        scores_BHLT = scores_BHLT.masked_fill(~mask, float("-inf"))
    return drop_elements(scores_BHLT.softmax(-1), spec.dropout) @ v_BKTC


def _is_masked(spec: AttentionSpec, length: int) -> bool:
    return 0 < spec.window < length


@lru_cache(maxsize=32)
def causal_mask(length: int, window: int, device: torch.device) -> Tensor:
    """Returns (length, length) bool: a token sees itself and at most ``window - 1`` before it."""
    with torch.inference_mode(False):  # cached for training too
        at = torch.arange(length, device=device)
        distance = at[:, None] - at[None, :]
        seen = distance >= 0
        return seen & (distance < window) if window else seen


def _take(x: Tensor, side: GroupSide, count: int) -> Tensor:
    """Returns a side's rectangle (B, heads, length, C) of a stream (N, heads, C)."""
    if side.rows is None:
        taken = x.narrow(0, side.start or 0, count * side.length)
    else:
        taken = _Gather.apply(x, side.rows, side.mask)
    return taken.unflatten(0, (count, side.length)).transpose(1, 2)


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
