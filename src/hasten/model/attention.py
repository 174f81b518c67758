"""Packed attention: one module, the kernel behind it works on groups of like length.

    x (N, D) -> q, k, v (N, H, C) -> [group: view or gather] -> kernel -> [back] -> (N, D)

Shapes: N tokens that ask, M tokens that are looked at (the same in self-attention), D hidden size,
H heads, K key/value heads, C head size, B sequences of a group, L and T the lengths of its longest
asking and looked-at sequence, P query positions of all groups, padding included.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.core.batch import GroupPlan, Places, SequenceGroup, SequenceLayout
from hasten.model.config import TransformerConfig
from hasten.model.layers import RMSNorm, drop_elements
from hasten.model.positions import Rotary, apply_rotary
from hasten.model.short_attention import attend_short, is_short

Biases = tuple[Tensor, ...]
"""For each group (H, L, T), added to the scores."""


@dataclass(frozen=True)
class AttentionSpec:
    """What a kernel has to honour; one that cannot is not chosen.

    Attributes:
        causal: a token sees itself and what comes before it. Queries and keys are one stream.
        window: how many tokens a causal token sees, itself included; another sees half as many on
            either side, rounded down. 0 for all. Queries and keys are one stream.
        scale: factor on the scores; None for ``C ** -0.5``.
        softcap: scores become ``softcap * tanh(score / softcap)`` (Gemma 2, 2024); 0 for none.
        dropout: rate on the attention weights; 0 outside training.
    """

    causal: bool = False
    window: int = 0
    scale: float | None = None
    softcap: float = 0.0
    dropout: float = 0.0


@dataclass(frozen=True)
class WantedRows:
    """One token of each sequence, where nothing else is asked for.

    Attributes:
        rows: (S,) of the stream.
        layout: of a stream that has only them.
        plan: groups in which each looks at its sequence.
    """

    rows: Tensor
    layout: SequenceLayout
    plan: GroupPlan


class Attention(nn.Module):
    """Multi-head attention within each sequence of a packed stream, or from it to its source.

    Args:
        config: of the model.
        causal: whether a token sees only itself and what comes before it.
        window: see ``AttentionSpec``.
    """

    def __init__(self, config: TransformerConfig, *, causal: bool = False, window: int = 0) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.kv_heads
        self.head_size = config.head_size
        self.dropout = config.attention_dropout
        self._spec = AttentionSpec(causal, window, config.attention_scale, config.attention_softcap)
        size, kv_size = (n * self.head_size for n in (self.num_heads, self.num_kv_heads))
        bias = config.bias if config.qkv_bias is None else config.qkv_bias
        self.query = nn.Linear(config.hidden_size, size, bias=bias)
        self.key = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.value = nn.Linear(config.hidden_size, kv_size, bias=bias)
        bias = config.bias if config.output_bias is None else config.output_bias
        self.output = nn.Linear(size, config.hidden_size, bias=bias)
        epsilon = config.norm_epsilon
        self.query_norm = RMSNorm(self.head_size, eps=epsilon) if config.qk_norm else None
        self.key_norm = RMSNorm(self.head_size, eps=epsilon) if config.qk_norm else None
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
        *,
        biases: Biases | None = None,
    ) -> Tensor:
        """Maps (N, D) to (N, D).

        Args:
            x_ND: the stream that asks.
            plan: groups of its sequences, and of those that they look at.
            rotary: cosines and sines per token; None without rotary positions.
            memory_MD: the stream that is looked at; None for ``x_ND`` itself.
            biases: for each group of the plan; None without relative positions.
        """
        q_NHC = self.queries(x_ND)
        k_MKC, v_MKC = self.keys_values(x_ND if memory_MD is None else memory_MD)
        out_NHC = self.core(q_NHC, k_MKC, v_MKC, rotary, plan, self.spec, biases)
        return self.output(out_NHC.flatten(1))

    def ask(
        self, x_SD: Tensor, memory_ND: Tensor, wanted: WantedRows, rotary: Rotary | None
    ) -> Tensor:
        """Maps one token of each sequence, (S, D), that sees all of its sequence to (S, D).

        Args:
            x_SD: the tokens that ask.
            memory_ND: their sequences.
            wanted: where they stand in them.
            rotary: cosines and sines per token of ``memory_ND``; None without rotary positions.
        """
        own = None
        if rotary is not None:
            own = rotary[0].index_select(0, wanted.rows), rotary[1].index_select(0, wanted.rows)
        q_SHC = self.queries(x_SD, own)
        k_NKC, v_NKC = self.keys_values(memory_ND, rotary)
        spec = replace(self.spec, causal=False)
        return self.output(self.core(q_SHC, k_NKC, v_NKC, None, wanted.plan, spec).flatten(1))

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
        biases: Biases | None = None,
    ) -> Tensor:
        """Returns (N, H, C); see ``attend``. With ``rotary`` queries and keys are one stream."""
        if rotary is not None:
            q_NHC, k_MKC = apply_rotary(q_NHC, *rotary), apply_rotary(k_MKC, *rotary)
        return attend(q_NHC, k_MKC, v_MKC, plan, spec, biases)


def attend(
    q_NHC: Tensor,
    k_MKC: Tensor,
    v_MKC: Tensor,
    plan: GroupPlan,
    spec: AttentionSpec,
    biases: Biases | None = None,
) -> Tensor:
    """Attention in which no sequence sees another.

    Args:
        q_NHC: (N, H, C) queries of the packed stream.
        k_MKC: (M, K, C) keys, H a multiple of K.
        v_MKC: (M, K, C) values.
        plan: groups of the sequences, such as ``SequenceLayout.group_plan``.
        spec: what else the kernel has to honour.
        biases: for each group what is added to the scores; None for nothing.

    Returns:
        (N, H, C), row n being the values of n's sequence weighted by
        ``softmax(scale * q_n . k + bias)`` (Vaswani et al. 2017, equation 1).
    """
    sizes = [(g.count * g.queries.length, g.count * g.keys.length) for g in plan.groups]
    asking, looked_at = map(list, zip(*sizes, strict=True))
    pieces = zip(
        _into_groups(q_NHC, plan.queries).split(asking),
        _into_groups(k_MKC, plan.keys).split(looked_at),
        _into_groups(v_MKC, plan.keys).split(looked_at),
        strict=True,
    )
    outputs = [
        _attend_group(*qkv, group, spec, None if biases is None else biases[i])
        for i, (group, qkv) in enumerate(zip(plan.groups, pieces, strict=True))
    ]
    out_PHC = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if plan.queries is None:
        return out_PHC
    return _Ungather.apply(out_PHC, plan.queries.restore)


def _into_groups(x: Tensor, places: Places | None) -> Tensor:
    """Returns a stream (N, heads, C) in the order of the groups' rectangles, (P, heads, C)."""
    return x if places is None else _Gather.apply(x, places.rows, places.restore)


def _attend_group(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: SequenceGroup,
    spec: AttentionSpec,
    bias_HLT: Tensor | None,
) -> Tensor:
    """Maps (B * L, H, C) and twice (B * T, K, C) to (B * L, H, C); rows of padding are junk."""
    q_BHLC, k_BKTC, v_BKTC = (x.unflatten(0, (group.count, -1)).transpose(1, 2) for x in (q, k, v))
    mask = _mask_of(group, spec, q.device)
    out_BHLC = attend_dense(q_BHLC, k_BKTC, v_BKTC, mask, spec, bias_HLT)
    return out_BHLC.transpose(1, 2).flatten(0, 1)


def _mask_of(group: SequenceGroup, spec: AttentionSpec, device: torch.device) -> Tensor | None:
    """Returns what ``attend_dense`` asks for."""
    length = group.queries.length
    # Padding follows the tokens, so a causal token sees none of it.
    padding = None if spec.causal else group.keys.mask
    reach = spec.window if spec.causal else spec.window // 2 + 1
    if not spec.window or reach >= length:
        return padding
    mask = near_mask(length, spec.window, spec.causal, device)
    if padding is None:
        return mask
    # Where a row of padding saw nothing, its softmax would be no number, nor would gradients.
    return padding & (mask | ~padding.transpose(-1, -2))


def attend_dense(
    q_BHLC: Tensor,
    k_BKTC: Tensor,
    v_BKTC: Tensor,
    mask: Tensor | None,
    spec: AttentionSpec,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of rectangles, by the fastest kernel that honours ``spec``.

    Args:
        q_BHLC: queries.
        k_BKTC: keys.
        v_BKTC: values.
        mask: bool, broadcast to (B, H, L, T), True where a query sees a key; None for all, or for
            all before it where ``spec`` is causal.
        spec: ``window`` and ``causal`` are already in ``mask`` where there is one.
        bias: broadcast to (B, H, L, T), added to the scores after their soft-cap; None for none.
    """
    if bias is not None:
        if mask is None and spec.causal:
            mask = near_mask(q_BHLC.shape[2], 0, True, q_BHLC.device)
        # What is seen and what is added are one mask of numbers.
        mask = bias.to(q_BHLC.dtype) if mask is None else _hidden(bias.to(q_BHLC.dtype), mask)
    if bias is None and not spec.softcap and is_short(q_BHLC, k_BKTC):
        if mask is None and spec.causal:
            mask = near_mask(q_BHLC.shape[2], 0, True, q_BHLC.device)
        out_BHLC = attend_short(q_BHLC, k_BKTC, v_BKTC, mask, spec.scale, spec.dropout)
        return out_BHLC.to(v_BKTC.dtype)  # processes may send it
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
        mask = near_mask(q_BHLC.shape[2], 0, True, q_BHLC.device)
    if mask is not None:
        is_bias = mask.is_floating_point()
        scores_BHLT = scores_BHLT + mask if is_bias else _hidden(scores_BHLT, mask)
    return drop_elements(scores_BHLT.softmax(-1), spec.dropout) @ v_BKTC


def _hidden(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, float("-inf"))


@lru_cache(maxsize=8)
def near_mask(length: int, window: int, causal: bool, device: torch.device) -> Tensor:
    """Returns (length, length) bool: which keys a query sees, see ``AttentionSpec``."""
    with torch.inference_mode(False):  # cached for training too
        at = torch.arange(length, device=device)
        return is_near(at[:, None] - at[None, :], window, causal)


def is_near(distances: Tensor, window: int, causal: bool) -> Tensor:
    """Returns bool: whether queries see keys so far before them; see ``AttentionSpec``."""
    if not causal:
        return distances.abs() <= window // 2
    seen = distances >= 0
    return seen & (distances < window) if window else seen


class _Gather(torch.autograd.Function):
    """Rows of a stream, padding repeating row 0.

    The backward of ``index_select`` adds row by row, many times slower than this on CPU. Here
    every real row is taken once, and a padded position's gradient is exactly zero (its key is
    masked and its output is dropped), so taking the real rows back is the whole gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, restore: Tensor) -> Tensor:
        ctx.save_for_backward(restore)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (restore,) = ctx.saved_tensors
        return grads[0].index_select(0, restore), None, None


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
