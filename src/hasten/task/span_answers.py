"""From scores of tokens to answers: the loss of spans, and the best span of each question.

    scores (N, 2), batch --span_loss_sum--> scalar                 softmax over each sequence
    scores (N, 2), batch --span_log_probabilities--> (N, 2)
    several windows of a question --BestSpans--> its best span and its score of no answer

The class token stands for "no answer in this window". It and the tokens of the context are what
the model chooses from; tokens of the question have no probability.

Shapes: N tokens, S sequences (windows), Q questions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hasten.core.batch import PackedBatch
from hasten.data.spans import best_spans
from hasten.data.windows import Windows

_NEVER = -1e9
"""Score of the best span where there is none: lower than any, and finite."""


def span_loss_sum(scores_N2: Tensor, batch: PackedBatch, label_smoothing: float = 0.0) -> Tensor:
    """Returns the sum over sequences of the mean cross-entropy of an answer's start and end.

    Reductions are in float32 or wider.

    Args:
        scores_N2: of the model.
        batch: what ``Windows.pack`` made, whose targets are (S, 4).
        label_smoothing: share of each target that is spread evenly over all tokens that may be
            chosen (Szegedy et al. 2016).
    """
    assert batch.targets is not None
    allowed_N2 = _allowed_scores(scores_N2, batch)
    rows_S2 = batch.layout.offsets[:-1, None].long() + batch.targets[:, :2]
    flat_S2 = 2 * rows_S2 + torch.arange(2, device=rows_S2.device)
    right_S2 = allowed_N2.reshape(-1).index_select(0, flat_S2.reshape(-1)).reshape_as(rows_S2)
    if label_smoothing:
        is_allowed_N2 = allowed_N2 > -torch.inf
        sums_S2 = _sums(allowed_N2.where(is_allowed_N2, 0), batch)
        mean_S2 = sums_S2 / _sums(is_allowed_N2.to(sums_S2.dtype), batch)
        right_S2 = (1 - label_smoothing) * right_S2 + label_smoothing * mean_S2
    return (_log_sums(allowed_N2, batch) - right_S2).sum() / 2


def span_log_probabilities(scores_N2: Tensor, batch: PackedBatch) -> Tensor:
    """Returns (N, 2) log-probabilities of beginning and ending the answer of each sequence."""
    allowed_N2 = _allowed_scores(scores_N2, batch)
    return allowed_N2 - _log_sums(allowed_N2, batch).index_select(0, batch.layout.sequence_ids)


class BestSpans:
    """The best span of each of Q questions, over those of its windows that were seen.

    The score of a span is the log-probability of its start plus that of its end, in its window:
    other than the raw sums of Devlin et al. 2019, scores of different windows then compare. The
    rest is the recipe for SQuAD 2.0: the best span is the highest of all windows, "no answer"
    scores the lowest of all windows (the window least sure of it), and their difference decides.

    Args:
        num_questions: Q.

    Attributes:
        scores: (Q,) of the best span; very low where there is none.
        places: (Q, 2) code points [start, end) of the best span in its context.
        no_answer_scores: (Q,) of "no answer".
    """

    def __init__(self, num_questions: int) -> None:
        self.scores = np.full(num_questions, _NEVER)
        self.places = np.zeros((num_questions, 2), dtype=np.int64)
        self.no_answer_scores = np.zeros(num_questions)  # as sure as can be

    @property
    def differences(self) -> np.ndarray:
        """(Q,) score of no answer less that of the best span."""
        return self.no_answer_scores - self.scores

    def update(
        self, scores_N2: Tensor, batch: PackedBatch, windows: Windows, max_tokens: int
    ) -> None:
        """Looks at some windows.

        Args:
            scores_N2: of the model, for ``batch``.
            batch: what ``windows.pack`` made.
            windows: of all questions.
            max_tokens: the longest span.
        """
        found = span_log_probabilities(scores_N2.double(), batch).cpu().numpy()
        begin = 0
        numbers = batch.example_ids.tolist()
        for window, length in zip(numbers, batch.layout.lengths, strict=True):
            starts, ends = found[begin : begin + length].T
            begin += length
            question = windows.questions[window]
            no_answer = min(self.no_answer_scores[question], starts[0] + ends[0])
            self.no_answer_scores[question] = no_answer
            first = int(windows.context_starts[window])
            last = int(windows.context_ends[window]) - 1
            best = best_spans(starts, ends, first, last, max_tokens, 1)
            if best and best[0][2] > self.scores[question]:
                start, end, self.scores[question] = best[0]
                self.places[question] = windows.characters(window, start, end)

    def merge(self, scores: np.ndarray, places: np.ndarray, no_answer_scores: np.ndarray) -> None:
        """Looks at what was found in other windows of the same questions; see the attributes."""
        is_better = scores > self.scores
        self.scores[is_better], self.places[is_better] = scores[is_better], places[is_better]
        self.no_answer_scores = np.minimum(self.no_answer_scores, no_answer_scores)


def _allowed_scores(scores_N2: Tensor, batch: PackedBatch) -> Tensor:
    """Returns the scores, minus infinity but for the first token and those of the context."""
    assert batch.targets is not None
    first_N, end_N = batch.targets[:, 2:].index_select(0, batch.layout.sequence_ids).unbind(1)
    at_N = batch.positions
    is_allowed_N = (at_N == 0) | ((at_N >= first_N) & (at_N < end_N))
    wide = scores_N2 if scores_N2.dtype == torch.float64 else scores_N2.float()
    return wide.masked_fill(~is_allowed_N[:, None], -torch.inf)


def _log_sums(scores_N2: Tensor, batch: PackedBatch) -> Tensor:
    """Returns (S, 2), the logarithm of the sum of exponentials over each sequence."""
    offsets = batch.layout.offsets.long()
    # Subtracting each sequence's maximum keeps exp in range and cancels in the result.
    top_S2 = torch.segment_reduce(scores_N2.detach(), "max", offsets=offsets, axis=0)
    shifted_N2 = scores_N2 - top_S2.index_select(0, batch.layout.sequence_ids)
    return top_S2 + _sums(shifted_N2.exp(), batch).log()


def _sums(values_N2: Tensor, batch: PackedBatch) -> Tensor:
    """Returns (S, 2), the sum over each sequence, in the order of its tokens."""
    return torch.segment_reduce(values_N2, "sum", offsets=batch.layout.offsets.long(), axis=0)
