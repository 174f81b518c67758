"""More tokens for a pretrained model: new rows of its embedding, around the mean of the old ones.

(V, E) --extend_vocabulary--> (V', E), and so the matrix and the bias that score tokens

Rows drawn like those of an untrained model would make new tokens more likely than any other, and
all scores wrong (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hasten.core.errors import UsageError
from hasten.model.heads import TokenHead
from hasten.model.transformer import Transformer

_SPREAD = 0.01  # of the old rows' own: enough for new rows to differ


@torch.no_grad()
def extend_vocabulary(model: Transformer, new: Sequence[int]) -> None:
    """Gives tokens rows of their own, in place; the model grows where it has too few.

    Args:
        model: plain, in one piece, whose source and target share their tokens.
        new: their ids; those beyond the embedding follow it without a gap.

    Raises:
        UsageError: source and target have a vocabulary each.
    """
    if model.source_embedding is not None:
        raise UsageError("tokenizer.add_tokens needs one vocabulary for source and target.")
    size = max(model.config.vocab_size, *(number + 1 for number in new))
    fresh = torch.tensor(sorted(new))
    tokens = model.embedding.tokens
    tokens.weight = _grown(tokens.weight, size, fresh)
    tokens.num_embeddings = size
    if isinstance(model.head, TokenHead):
        if model.head.scorer is not None:
            model.head.scorer.weight = _grown(model.head.scorer.weight, size, fresh)
            model.head.scorer.out_features = size
        if model.head.bias is not None:
            bias = model.head.bias
            grown = bias.new_zeros(size)
            grown[: len(bias)] = bias
            grown[fresh] = bias.mean()
            model.head.bias = grown
    model.config = dataclasses.replace(model.config, vocab_size=size)


def _grown(weight: Tensor, size: int, fresh: Tensor) -> nn.Parameter:
    """Returns (size, D), the old rows first; rows ``fresh`` are drawn."""
    is_old = torch.ones(len(weight), dtype=torch.bool)
    is_old[fresh[fresh < len(weight)]] = False
    old = weight[is_old]
    grown = weight.new_empty(size, weight.shape[1])
    grown[: len(weight)] = weight
    noise = torch.randn(len(fresh), weight.shape[1], dtype=weight.dtype)
    grown[fresh] = old.mean(0) + _SPREAD * old.std(0) * noise
    return nn.Parameter(grown)
