"""The loss of predicting tokens from hidden states, without holding the logits of all tokens.

    hidden (N, D) --a chunk of rows--> logits (C, V) --in place--> loss, gradient of the logits
                                                                            |--> hidden's rows
                                                                            |--> + weight's (V, D)
                                                                            `--> + bias's (V,)

With a vocabulary of V = 50,000 the logits of 16,000 tokens take 3 GB, and their gradient as much
again. Here a chunk's gradients are taken while its logits are at hand, in the forward pass; the
backward pass only scales them. The idea is that of Hsu et al. 2024, "Liger Kernel: Efficient Triton
Kernels for LLM Training", and of Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language
Models".

Shapes: N tokens that have a target, V vocabulary size, D hidden size, C rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hasten.core.shards import as_replicated, is_sharded, whole

# Measured on a CPU: below, autograd over all rows is as fast. Chunks of fewer rows lose more time
# to adding to weight's gradient than they gain in the cache.
_FEW_LOGITS = 1 << 20
_MIN_CHUNK_ROWS = 256
# Torch's own default, -100, would let a target pass unseen that is no token.
_NO_INDEX = torch.iinfo(torch.int64).min


class _Options(NamedTuple):
    label_smoothing: float
    softcap: float
    chunk_rows: int


class _Inputs(NamedTuple):
    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None


def linear_cross_entropy_sum(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """Returns the sum over tokens of the cross-entropy of ``hidden @ weight.T + bias``.

    Equals ``F.cross_entropy(logits, targets, reduction="sum", label_smoothing=...)``. The softmax
    is computed in float32 or wider. The result can be differentiated once, not twice.

    Args:
        hidden_ND: (N, D) hidden states of the tokens that have a target; N may be 0.
        weight_VD: (V, D) output matrix.
        targets_N: (N,) int64 token ids in [0, V); no value means "ignore".
        bias_V: (V,) output bias.
        label_smoothing: share of the target's probability that is spread over all V tokens.
        softcap: where above 0, logits become softcap * tanh(logits / softcap), as in Gemma Team
            2024, "Gemma 2: Improving Open Language Models at a Practical Size".
        chunk_rows: rows of a chunk; by default as many as are fast, and all of few.

    Returns:
        A scalar in nats, float32 or wider.

    Raises:
        IndexError or RuntimeError: a target is outside [0, V).
    """
    assert 0 <= label_smoothing <= 1 and softcap >= 0
    inputs = _Inputs(hidden_ND, weight_VD, bias_V)
    if is_sharded(weight_VD):
        return _shared_loss(inputs, targets_N, label_smoothing, softcap)
    if chunk_rows is None and _is_small(inputs):
        return _small_loss(inputs, targets_N, label_smoothing, softcap)
    options = _Options(label_smoothing, softcap, chunk_rows or _default_chunk_rows(inputs))
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return _LinearCrossEntropySum.apply(*inputs, targets_N, options)
    return _loss_and_gradients(inputs, targets_N, options, (False, False, False))[0]


def token_accuracy_count(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    bias_V: Tensor | None = None,
    chunk_rows: int | None = None,
) -> int:
    """Returns for how many of the N tokens the target has the highest logit; takes no gradient.

    A soft-cap keeps the order of the logits, so none is asked for. For the arguments see
    ``linear_cross_entropy_sum``.
    """
    inputs = _Inputs(hidden_ND, whole(weight_VD), bias_V)
    hits = torch.zeros((), dtype=torch.int64, device=hidden_ND.device)
    with torch.no_grad():
        for chunk in _chunks(len(hidden_ND), chunk_rows or _default_chunk_rows(inputs)):
            logits_CV = F.linear(hidden_ND[chunk], *inputs[1:])
            hits += (logits_CV.argmax(1) == targets_N[chunk]).sum()
    return int(hits)


def _is_small(inputs: _Inputs) -> bool:
    """Whether chunks would save no memory to speak of."""
    num_rows, hidden_size = inputs.hidden_ND.shape
    vocab_size = len(inputs.weight_VD)
    return num_rows * vocab_size <= _FEW_LOGITS or vocab_size <= hidden_size


def _small_loss(
    inputs: _Inputs, targets_N: Tensor, label_smoothing: float, softcap: float
) -> Tensor:
    """The loss of all rows at once, differentiated by autograd."""
    logits_NV = F.linear(*inputs)
    if logits_NV.dtype.itemsize < 4:
        logits_NV = logits_NV.float()
    if softcap:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    return F.cross_entropy(
        logits_NV,
        targets_N,
        reduction="sum",
        label_smoothing=label_smoothing,
        ignore_index=_NO_INDEX,
    )


def _shared_loss(
    inputs: _Inputs, targets_N: Tensor, label_smoothing: float, softcap: float
) -> Tensor:
    """The loss where each process has some of the vocabulary, within ``loss_parallel``.

    torch's has no label smoothing, which is added: with z the logits of a row and y its target,
    ``e (z_y - mean(z))`` (see ``_chunk_loss``).
    """
    hidden_ND, bias_V = inputs.hidden_ND, inputs.bias_V
    weight_VD: Any = inputs.weight_VD
    if len(targets_N) == 0:
        return (hidden_ND.sum() * 0).to(_wide(hidden_ND))
    mesh = weight_VD.device_mesh
    hidden_ND = as_replicated(hidden_ND, mesh)
    logits_NV = F.linear(hidden_ND, weight_VD)
    if bias_V is not None:  # a fixed one, which has no gradient to be summed
        logits_NV = logits_NV + as_replicated(bias_V, mesh)
    logits_NV = _capped(logits_NV, softcap)
    loss = F.cross_entropy(logits_NV, targets_N, reduction="sum", ignore_index=_NO_INDEX)
    if label_smoothing:
        rows_ND = as_replicated(F.embedding(as_replicated(targets_N, mesh), weight_VD), mesh)
        picked_N = (hidden_ND * rows_ND).sum(1)
        if bias_V is not None:
            picked_N = picked_N + as_replicated(bias_V[targets_N], mesh)
        picked = _capped(picked_N, softcap).sum()
        loss = loss + label_smoothing * (picked - logits_NV.sum() / logits_NV.shape[1])
    return whole(loss)


def _capped(logits: Tensor, softcap: float) -> Tensor:
    logits = logits.to(_wide(logits))
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _LinearCrossEntropySum(torch.autograd.Function):
    """Takes the gradients in the forward pass and scales them in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        options: _Options,
    ) -> Tensor:
        inputs = _Inputs(hidden_ND, weight_VD, bias_V)
        loss, gradients = _loss_and_gradients(inputs, targets_N, options, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return loss

    @staticmethod
    @once_differentiable  # its type hides the names of the parameters, hence:
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        # Not in place: with retain_graph the same gradients are asked for again.
        scaled = [
            None if gradient is None else (gradient * grad_outputs[0]).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None)


def _loss_and_gradients(
    inputs: _Inputs, targets_N: Tensor, options: _Options, needed: tuple[bool, bool, bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """Walks the chunks; returns the loss and, where needed, the gradient of each input."""
    hidden_ND, weight_VD, bias_V = inputs
    # What is summed over chunks is summed in ``wide``; each row of hidden's gradient is set once.
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    loss = torch.zeros((), dtype=wide, device=hidden_ND.device)
    grad_hidden = torch.empty_like(hidden_ND) if needed[0] else None
    grad_weight = torch.zeros_like(weight_VD, dtype=wide) if needed[1] else None
    grad_bias = torch.zeros_like(bias_V, dtype=wide) if bias_V is not None and needed[2] else None
    for chunk in _chunks(len(hidden_ND), options.chunk_rows):
        hidden_CD = hidden_ND[chunk]
        logits_CV = F.linear(hidden_CD, weight_VD, bias_V).to(wide)
        chunk_loss, gradient_CV = _chunk_loss(logits_CV, targets_N[chunk], options, any(needed))
        loss += chunk_loss
        if grad_bias is not None:
            grad_bias += gradient_CV.sum(0)
        gradient_CV = gradient_CV.to(weight_VD.dtype)
        if grad_hidden is not None:
            torch.mm(gradient_CV, weight_VD, out=grad_hidden[chunk])
        if grad_weight is not None and grad_weight.dtype == weight_VD.dtype:
            grad_weight.addmm_(gradient_CV.T, hidden_CD)
        elif grad_weight is not None:
            grad_weight += gradient_CV.T @ hidden_CD
    return loss, [grad_hidden, grad_weight, grad_bias]


def _chunk_loss(
    logits_CV: Tensor, targets_C: Tensor, options: _Options, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Returns a chunk's loss and, where wanted, the loss's gradient; overwrites the logits.

    With z the capped logits of a row, p their softmax, e the label smoothing and y the target, the
    loss is logsumexp(z) - (1 - e) z_y - e mean(z) and its gradient p - (1 - e) onehot(y) - e / V.
    """
    smoothing, softcap = options.label_smoothing, options.softcap
    targets_C1 = targets_C[:, None]
    tanh_CV = None
    if softcap:
        tanh_CV = logits_CV.div_(softcap).tanh_()
        logits_CV = tanh_CV * softcap
    # Shifting a row leaves its loss as it is; with the maximum at 0, exp cannot overflow.
    logits_CV.sub_(logits_CV.amax(1, keepdim=True))
    loss = (smoothing - 1) * logits_CV.gather(1, targets_C1).sum()
    if smoothing:
        loss -= smoothing * logits_CV.mean(1).sum()
    total_C1 = logits_CV.exp_().sum(1, keepdim=True)
    loss += total_C1.log().sum()
    if with_gradient:
        logits_CV.div_(total_C1)
        if smoothing:
            logits_CV.sub_(smoothing / logits_CV.shape[1])
        logits_CV.scatter_add_(1, targets_C1, torch.full_like(total_C1, smoothing - 1))
        if tanh_CV is not None:  # times the cap's derivative, 1 - tanh^2
            logits_CV.addcmul_(logits_CV, tanh_CV.square_(), value=-1)
    return loss, logits_CV


def _default_chunk_rows(inputs: _Inputs) -> int:
    """Returns C, the rows of chunks that are alike in size, few of them and not too large."""
    num_rows = max(len(inputs.hidden_ND), 1)
    most = max(_MIN_CHUNK_ROWS, _FEW_LOGITS // len(inputs.weight_VD))
    num_chunks = math.ceil(num_rows / most)
    return math.ceil(num_rows / num_chunks)


def _chunks(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, chunk_rows):
        yield slice(start, start + chunk_rows)
