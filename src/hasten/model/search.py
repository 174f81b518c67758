"""Finds continuations by a model's scores: greedy decoding, sampling and beam search.

    scores of each row's next token (B, V)
       |  choose: the best token, a drawn one, or each input's best beams
       v
    (row, token) of what goes on --select rows--> --advance by tokens--> scores of the next
       `--> what ended, was stopped or reached its limit: hypotheses, best first

It knows nothing of Transformers: a ``Stepper`` holds the sequences and computes their scores. A
row is one sequence being continued. What is finished leaves the batch at once, and nothing that
is chosen depends on what else is in the batch.

Shapes: B rows, V vocabulary, K candidates of a row.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from hasten.core.errors import DivergenceError, UsageError
from hasten.core.seeds import derive_seed
from hasten.model.sampling import (
    DecodingSettings,
    best_tokens,
    draw_tokens,
    filter_logits,
    penalise_repetition,
)


class Stepper(Protocol):
    """B sequences being continued.

    Attributes:
        logits: (B, V) scores of each sequence's next token, float32 or float64.
    """

    logits: Tensor

    def advance(self, tokens_B: Tensor) -> None:
        """Appends one token (B,), int64, to each sequence and computes the next scores."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keeps, repeats or reorders sequences: row i becomes what row ``rows[i]`` was."""
        ...


@dataclass(frozen=True)
class Request:
    """One input of a batch.

    Attributes:
        example_id: which example it is; with the seed it decides what is drawn.
        prompt: what the sequence begins with, for the repetition penalty.
        max_new_tokens: a limit of its own, where it is below that of the settings; 0 or less
            leaves no room for any token.
    """

    example_id: int
    prompt: Sequence[int] = ()
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Decoded:
    """A continuation.

    Attributes:
        token_ids: the new tokens, without the end token.
        score: sum of the log probabilities of the new tokens, the end token included, under the
            model as it is, before temperature, penalties and limits; of beams divided by
            length ** length_penalty, where the end token counts too.
        finished: whether it came to its end or was stopped, rather than cut off by its limit.
    """

    token_ids: tuple[int, ...]
    score: float
    finished: bool


StopRule = Callable[[int, tuple[int, ...]], bool]


@torch.inference_mode()
def generate(
    stepper: Stepper,
    settings: DecodingSettings,
    requests: Sequence[Request],
    *,
    end_ids: frozenset[int],
    banned_ids: Sequence[int] = (),
    stop: StopRule | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[Decoded]]:
    """Continues the sequences of a batch.

    Args:
        stepper: the sequences, one of each request, with the scores of their next tokens. It is
            used up.
        settings: how to search.
        requests: what is known of each sequence.
        end_ids: tokens that end a sequence.
        banned_ids: tokens never to be chosen, such as padding.
        stop: called with (number of the request, its new tokens) after each token that does not
            end the sequence; true stops it there. The last token is part of the result.
        on_token: called with (number of the request, token) as soon as a token of the result is
            known; not for the end token.

    Returns:
        For each request ``num_return`` hypotheses, best first. A beam search returns fewer where
        fewer exist. With a repetition penalty beams are compared by their penalised scores.

    Raises:
        UsageError: ``on_token`` with beams or several hypotheses; no token is allowed.
        DivergenceError: the scores are not numbers.
    """
    if on_token and (settings.num_beams > 1 or settings.num_return > 1):
        raise UsageError(
            "Tokens can be shown as they come for a single output only: leave out --num-beams and "
            "--n-best."
        )
    if not requests:
        return []
    assert stepper.logits.shape[0] == len(requests)
    search_class = _BeamSearch if settings.num_beams > 1 else _SingleSearch
    search = search_class(stepper, settings, requests, end_ids, banned_ids, stop, on_token)
    live = search.begin()
    while live:
        live = search.step(live)
    return search.results()


@dataclass(frozen=True, slots=True)
class _Hypothesis:
    """A sequence that one row continues.

    Attributes:
        index: of its request.
        sample: which of the request's draws it is.
        token_ids: new tokens so far, the end token included.
        log_probability: their sum under the model as it is.
        ranking: their sum under the scores that the choice is made by.
    """

    index: int
    sample: int = 0
    token_ids: tuple[int, ...] = ()
    log_probability: float = 0.0
    ranking: float = 0.0


class _Search(ABC):
    """What all ways of searching share: scores, limits, and rows that leave the batch."""

    def __init__(
        self,
        stepper: Stepper,
        settings: DecodingSettings,
        requests: Sequence[Request],
        end_ids: frozenset[int],
        banned_ids: Sequence[int],
        stop: StopRule | None,
        on_token: Callable[[int, int], None] | None,
    ) -> None:
        self._stepper, self._settings, self._requests = stepper, settings, requests
        self._end_ids, self._stop, self._on_token = end_ids, stop, on_token
        most = settings.max_new_tokens
        self._limits = [
            most if request.max_new_tokens is None else min(most, max(0, request.max_new_tokens))
            for request in requests
        ]
        # Each with the number that hypotheses of one request are compared by.
        self._found: list[list[tuple[float, Decoded]]] = [[] for _ in requests]
        self._power = settings.length_penalty if settings.num_beams > 1 else 0.0
        vocab_size, device = stepper.logits.shape[1], stepper.logits.device
        self._banned_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self._banned_V[list(banned_ids)] = True
        self._banned_early_V = self._banned_V.clone()
        self._banned_early_V[list(end_ids)] = True
        self._seen_BV: Tensor | None = None
        if settings.repetition_penalty != 1:
            self._seen_BV = torch.zeros_like(stepper.logits, dtype=torch.bool)
            for row, request in enumerate(requests):
                self._seen_BV[row, list(request.prompt)] = True

    def begin(self) -> list[_Hypothesis]:
        """Returns the first rows: those that have room for a token, once for each draw."""
        copies = self._settings.num_return if self._settings.temperature > 0 else 1
        live = []
        for index, limit in enumerate(self._limits):
            if limit:
                live += [_Hypothesis(index, sample) for sample in range(copies)]
            else:
                self._found[index] = [(0.0, Decoded((), 0.0, False))] * copies
        if live:
            self._select([hypothesis.index for hypothesis in live])
        return live

    def step(self, live: list[_Hypothesis]) -> list[_Hypothesis]:
        """Chooses the next tokens and computes what follows them.

        Args:
            live: what each row holds; all have the same number of new tokens.

        Returns:
            What each row holds afterwards.
        """
        ranking_BV, model_BV = self._log_probabilities(live)
        tokens_BK = self._choose(ranking_BV, live)
        extended = [
            [
                _Hypothesis(
                    parent.index,
                    parent.sample,
                    (*parent.token_ids, token),
                    parent.log_probability + log_probability,
                    parent.ranking + ranking,
                )
                for token, log_probability, ranking in zip(*row, strict=True)
                if ranking > -math.inf
            ]
            for parent, *row in zip(
                live,
                tokens_BK.tolist(),
                model_BV.gather(1, tokens_BK).tolist(),
                ranking_BV.gather(1, tokens_BK).tolist(),
                strict=True,
            )
        ]
        kept = self._keep(extended)
        if kept:
            self._select([row for row, _ in kept])
            self._advance([hypothesis.token_ids[-1] for _, hypothesis in kept])
        return [hypothesis for _, hypothesis in kept]

    def results(self) -> list[list[Decoded]]:
        """Returns the hypotheses of each request, best first."""
        return [
            [decoded for _, decoded in sorted(found, key=lambda entry: -entry[0])][
                : self._settings.num_return
            ]
            for found in self._found
        ]

    @abstractmethod
    def _choose(self, ranking_BV: Tensor, live: list[_Hypothesis]) -> Tensor:
        """Returns (B, K) candidates for each row's next token, best first."""

    @abstractmethod
    def _keep(self, extended: list[list[_Hypothesis]]) -> list[tuple[int, _Hypothesis]]:
        """Puts aside what ends and returns what goes on, with the row it comes from."""

    def _log_probabilities(self, live: list[_Hypothesis]) -> tuple[Tensor, Tensor]:
        """Returns what the choice is made by and what the model says, both (B, V).

        The first is after the repetition penalty, and -inf where a token is not allowed.
        """
        logits_BV = self._stepper.logits
        if logits_BV.dtype != torch.float64:
            logits_BV = logits_BV.float()
        model_BV = ranking_BV = logits_BV.log_softmax(-1)
        if self._seen_BV is not None:
            penalty = self._settings.repetition_penalty
            ranking_BV = penalise_repetition(logits_BV, self._seen_BV, penalty).log_softmax(-1)
        is_early = len(live[0].token_ids) < self._settings.min_new_tokens
        banned_V = self._banned_early_V if is_early else self._banned_V
        ranking_BV = ranking_BV.masked_fill(banned_V, -torch.inf)
        for hypothesis, best in zip(live, ranking_BV.amax(-1).tolist(), strict=True):
            if not math.isfinite(best):
                self._refuse(hypothesis, best)
        return ranking_BV, model_BV

    def _refuse(self, hypothesis: _Hypothesis, best: float) -> None:
        where = (
            f"example {self._requests[hypothesis.index].example_id}, "
            f"new token {len(hypothesis.token_ids) + 1}"
        )
        if math.isnan(best):
            raise DivergenceError(
                f"The model's scores are not numbers ({where}).\n"
                "Its training may have diverged: use an earlier checkpoint."
            )
        raise UsageError(
            f"No token is left to choose ({where}): every one is banned or impossible.\n"
            "Lower --min-new-tokens, or ban fewer tokens."
        )

    def _finish(self, hypothesis: _Hypothesis) -> Decoded | None:
        """Returns the result where a hypothesis goes no further."""
        token_ids, length = hypothesis.token_ids, len(hypothesis.token_ids)
        is_ended = token_ids[-1] in self._end_ids
        is_finished = is_ended or bool(self._stop and self._stop(hypothesis.index, token_ids))
        if not is_finished and length < self._limits[hypothesis.index]:
            return None
        score = self._per_length(hypothesis.log_probability, length)
        return Decoded(token_ids[:-1] if is_ended else token_ids, score, is_finished)

    def _per_length(self, total: float, length: int) -> float:
        # A negative power of a large number is 0 where a positive one would overflow.
        return total * length**-self._power

    def _select(self, rows: list[int]) -> None:
        if rows == list(range(self._stepper.logits.shape[0])):
            return
        rows_B = torch.tensor(rows, device=self._banned_V.device)
        self._stepper.select(rows_B)
        if self._seen_BV is not None:
            self._seen_BV = self._seen_BV.index_select(0, rows_B)

    def _advance(self, tokens: list[int]) -> None:
        tokens_B = torch.tensor(tokens, device=self._banned_V.device)
        if self._seen_BV is not None:
            self._seen_BV.scatter_(1, tokens_B[:, None], True)
        self._stepper.advance(tokens_B)


class _SingleSearch(_Search):
    """Greedy decoding and sampling: one token for each row, each row for itself.

    Every draw has a generator of its own, seeded by the example and the number of the draw, so
    that it depends neither on the batch nor on when another sequence ends.
    """

    def begin(self) -> list[_Hypothesis]:
        live = super().begin()
        # Python promises that random() of a seed stays the same in all versions.
        self._generators = {
            (hypothesis.index, hypothesis.sample): random.Random(
                derive_seed(
                    "decoding",
                    self._settings.seed,
                    self._requests[hypothesis.index].example_id,
                    hypothesis.sample,
                )
            )
            for hypothesis in live
        }
        return live

    def _choose(self, ranking_BV: Tensor, live: list[_Hypothesis]) -> Tensor:
        settings = self._settings
        if settings.temperature == 0:
            return ranking_BV.argmax(-1, keepdim=True)  # of equals, the lowest id
        logits_BV = filter_logits(ranking_BV, settings.temperature, settings.top_k, settings.top_p)
        uniforms = [
            self._generators[hypothesis.index, hypothesis.sample].random() for hypothesis in live
        ]
        return draw_tokens(logits_BV, uniforms).to(ranking_BV.device)[:, None]

    def _keep(self, extended: list[list[_Hypothesis]]) -> list[tuple[int, _Hypothesis]]:
        kept = []
        for row, (hypothesis,) in enumerate(extended):
            token = hypothesis.token_ids[-1]
            if self._on_token and token not in self._end_ids:
                self._on_token(hypothesis.index, token)
            decoded = self._finish(hypothesis)
            if decoded is None:
                kept.append((row, hypothesis))
            else:
                self._found[hypothesis.index].append((decoded.score, decoded))
        return kept


class _BeamSearch(_Search):
    """Keeps the best ``num_beams`` sequences of each request, side by side.

    Each step extends every beam by its best tokens and ranks the results of one request. The best
    that go on become the new beams; those among the first ``num_beams`` that end are put aside,
    where the best ``num_beams`` stay (as in transformers with ``early_stopping="never"``). The
    first step has one beam a request, so that no two beams are ever the same.
    """

    def _choose(self, ranking_BV: Tensor, live: list[_Hypothesis]) -> Tensor:
        # Even if all that end are among a row's best, as many others as there are beams are left.
        num_beams = self._settings.num_beams
        return best_tokens(ranking_BV, num_beams + max(num_beams, len(self._end_ids)))

    def _keep(self, extended: list[list[_Hypothesis]]) -> list[tuple[int, _Hypothesis]]:
        kept = []
        rows = [(row, hypothesis) for row, group in enumerate(extended) for hypothesis in group]
        for index, group in groupby(rows, key=lambda candidate: candidate[1].index):
            # The sort is stable: of equals, those of the better beam and the better token.
            beams = self._keep_beams(sorted(group, key=lambda candidate: -candidate[1].ranking))
            if beams and self._may_improve(index, beams[0][1]):
                kept += beams
        return kept

    def _keep_beams(
        self, candidates: list[tuple[int, _Hypothesis]]
    ) -> list[tuple[int, _Hypothesis]]:
        """Returns the new beams of one request from its candidates, best first."""
        num_beams = self._settings.num_beams
        beams = []
        found = self._found[candidates[0][1].index]
        for place, (row, hypothesis) in enumerate(candidates):
            if len(beams) == num_beams:
                break
            decoded = self._finish(hypothesis)
            if decoded is None:
                beams.append((row, hypothesis))
            elif place < num_beams:
                ranking = self._per_length(hypothesis.ranking, len(hypothesis.token_ids))
                found.append((ranking, decoded))
        found.sort(key=lambda entry: -entry[0])
        del found[num_beams:]
        return beams

    def _may_improve(self, index: int, best: _Hypothesis) -> bool:
        """Whether a live beam could still be better than the worst that was put aside.

        Log probabilities only fall as a sequence grows. Divided by length ** length_penalty they
        may rise, but not above what the beam would have if it reached its limit at no cost.
        """
        found = self._found[index]
        if len(found) < self._settings.num_beams:
            return True
        return self._per_length(best.ranking, self._limits[index]) > found[-1][0]
