"""Heads: from hidden states to what a task is scored on.

Shapes: N tokens, D hidden size, S sequences, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hasten.core.batch import SequenceLayout
from hasten.model.config import TransformerConfig
from hasten.model.layers import Dropout


class ClassificationHead(nn.Module):
    """One vector per sequence, then one linear map to the classes."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.pooling = config.pooling
        rate = config.dropout if config.head_dropout is None else config.head_dropout
        self.scorer = nn.Linear(config.hidden_size, 1) if config.pooling == "attention" else None
        self.dropout = Dropout(rate)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, x_ND: Tensor, layout: SequenceLayout) -> Tensor:
        """Maps hidden states (N, D) to class scores (S, K)."""
        return self.classifier(self.dropout(self._pool(x_ND, layout)))

    def _pool(self, x_ND: Tensor, layout: SequenceLayout) -> Tensor:
        if self.pooling == "first":
            return x_ND.index_select(0, layout.offsets[:-1])
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
