"""Heads: from hidden states to what a task is scored on.

    ClassificationHead    (N, D) -> (S, K) scores of classes
    TokenHead             (N, D) -> TokenOutputs, from which scores of tokens (N, V) are made
    SpanHead              (N, D) -> (N, 2) scores of beginning and ending an answer

Shapes: N tokens, D hidden size, S sequences, K classes, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.core.batch import SequenceLayout, plan_groups
from hasten.model.attention import WantedRows
from hasten.model.config import TransformerConfig
from hasten.model.layers import ACTIVATIONS, Dropout, build_norm


class ScoringHead(nn.Module):
    """From a vector to a few scores: [matrix -> activation -> norm] -> dropout -> matrix."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        size, name = config.hidden_size, config.head_activation
        self.dense = nn.Linear(size, size, bias=config.bias) if name != "none" else None
        self.activation = ACTIVATIONS[name] if self.dense is not None else None
        self.norm = build_norm(config) if config.head_norm else None
        self.dropout = Dropout(
            config.dropout if config.head_dropout is None else config.head_dropout
        )

    def prepared(self, x_ND: Tensor) -> Tensor:
        """Returns what the last matrix maps to scores, (N, D)."""
        if self.dense is not None and self.activation is not None:
            x_ND = self.activation(self.dense(x_ND))
        if self.norm is not None:
            x_ND = self.norm(x_ND)
        return self.dropout(x_ND)


class ClassificationHead(ScoringHead):
    """One vector per sequence, and from it scores of the classes."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.pooling = config.pooling
        self.scorer = nn.Linear(config.hidden_size, 1) if config.pooling == "attention" else None
        self.classifier = nn.Linear(config.hidden_size, config.num_labels, bias=config.head_bias)

    def forward(self, x_ND: Tensor, layout: SequenceLayout) -> Tensor:
        """Maps hidden states (N, D) to class scores (S, K)."""
        return self.classifier(self.prepared(self._pool(x_ND, layout)))

    def wanted_rows(self, layout: SequenceLayout) -> WantedRows | None:
        """Returns the tokens that are looked at, where that is one of each sequence."""
        if self.pooling not in ("first", "last"):
            return None
        offsets = layout.offsets
        rows = offsets[:-1] if self.pooling == "first" else offsets[1:] - 1
        alone = SequenceLayout.from_lengths([1] * len(layout.lengths), offsets.device)
        return WantedRows(rows, alone, plan_groups(alone, layout))

    def _pool(self, x_ND: Tensor, layout: SequenceLayout) -> Tensor:
        if self.pooling == "first":
            return x_ND.index_select(0, layout.offsets[:-1])
        if self.pooling == "last":
            return x_ND.index_select(0, layout.offsets[1:] - 1)
        if self.scorer is None:
            lengths_S1 = (layout.offsets[1:] - layout.offsets[:-1])[:, None]
            return _sum_by_sequence(x_ND, layout) / lengths_S1.to(x_ND.dtype)
        score_N1 = self.scorer(x_ND)
        # Subtracting each sequence's maximum keeps exp in range and cancels in the quotient.
        top_S1 = torch.segment_reduce(
            score_N1.detach(), "max", offsets=layout.offsets.long(), axis=0
        )
        weight_N1 = (score_N1 - top_S1[layout.sequence_ids]).exp()
        total_S1 = _sum_by_sequence(weight_N1, layout)
        return _sum_by_sequence(weight_N1 * x_ND, layout) / total_S1


def _sum_by_sequence(x_ND: Tensor, layout: SequenceLayout) -> Tensor:
    """Returns (S, D), the sum over each sequence's tokens, in the order of the tokens."""
    return torch.segment_reduce(x_ND, "sum", offsets=layout.offsets.long(), axis=0)


class TokenOutputs(NamedTuple):
    """What scores of tokens are made of: the loss never needs all N x V of them at once.

    Attributes:
        hidden_ND: final hidden states.
        weight_VD: one row for each token of the vocabulary.
        softcap: bound of the scores, see ``TransformerConfig.logit_softcap``; 0 for none.
        bias_V: added to the scores; None for nothing.
    """

    hidden_ND: Tensor
    weight_VD: Tensor
    softcap: float
    bias_V: Tensor | None = None

    def scores(self, rows: Tensor | None = None) -> Tensor:
        """Returns the scores (R, V) of the tokens that may follow, at the given stream rows."""
        hidden_RD = self.hidden_ND if rows is None else self.hidden_ND.index_select(0, rows)
        scores_RV = F.linear(hidden_RD, self.weight_VD, self.bias_V)
        return self.softcap * torch.tanh(scores_RV / self.softcap) if self.softcap else scores_RV


class TokenHead(nn.Module):
    """Scores every token of the vocabulary, by its embedding or by a matrix of its own."""

    bias: Tensor | None

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.scale, self.softcap = config.logit_scale, config.logit_softcap
        self.scorer = (
            None
            if config.tie_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.register_buffer("bias", torch.zeros(config.vocab_size) if config.logit_bias else None)

    def forward(self, x_ND: Tensor, embedding_VD: Tensor) -> TokenOutputs:
        """Maps hidden states (N, D) to what scores are made of."""
        weight_VD = embedding_VD if self.scorer is None else self.scorer.weight
        if self.scale != 1:
            x_ND = x_ND * self.scale
        return TokenOutputs(x_ND, weight_VD, self.softcap, self.bias)


class SpanHead(ScoringHead):
    """Scores every token as the first and as the last of an answer (Devlin et al. 2019)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.scorer = nn.Linear(config.hidden_size, 2, bias=config.head_bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Maps hidden states (N, D) to scores (N, 2)."""
        return self.scorer(self.prepared(x_ND))
