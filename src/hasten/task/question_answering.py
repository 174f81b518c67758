"""Extractive question answering: an answer is a span of the question's context, or none.

    context, question -> windows of tokens -> scores (N, 2) of each token to begin and to end it
                      -> best span over all windows -> code points of the context

A context longer than the model is read in overlapping windows. Where training has questions
without answer, predictions may be empty: a threshold chosen on the validation rows decides.

Shapes: N tokens, Q questions, W windows.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from hasten.core.batch import PackedBatch
from hasten.core.errors import DataError, UsageError
from hasten.data.corpus import Corpus, Reading
from hasten.data.examples import Examples
from hasten.data.order import cut_micro_batches
from hasten.data.rows import Row, RowFile
from hasten.data.spans import answers_from_json, answers_to_json
from hasten.data.template import Framing, template_from_json
from hasten.data.windows import Passage, WindowForm, Windows, encode_passages, open_passages
from hasten.model.search import DecodingSettings
from hasten.model.transformer import Transformer
from hasten.task.contract import (
    DecodedSample,
    Drawing,
    Machine,
    Meter,
    PredictSettings,
    Recognised,
    Say,
    Task,
    TaskSettings,
    WantedColumns,
)
from hasten.task.generating import spread
from hasten.task.question_columns import (
    choose_question_columns,
    read_question,
    recognise_questions,
)
from hasten.task.span_answers import BestSpans, span_loss_sum
from hasten.task.span_metrics import (
    AnswerScore,
    Language,
    answer_scores,
    best_threshold,
    choose_language,
)

_MIN_LENGTH = 8
_SHOWN = 3
_LANGUAGE_ROWS = 1000
_FOUND = ("scores", "places", "no_answer_scores")
_NO_ANSWERS = answers_to_json([])
# A full stop within a number or an abbreviation has no space after it.
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")


class WindowExamples(Examples):
    """The windows of some questions; each is an example of its own.

    Args:
        corpus: the rows they come from.
        questions: (Q,) rows of the split.
        windows: over the contexts of these rows.
    """

    def __init__(self, corpus: Corpus, questions: np.ndarray, windows: Windows) -> None:
        self.corpus, self.questions, self.windows = corpus, questions, windows
        self.rows, self.lengths = windows.rows, windows.lengths
        self.weights = np.ones(len(windows))
        self.num_truncated = int(windows.passages.is_cut[questions].sum())

    def pack(self, examples: np.ndarray, weight: float = 1.0) -> PackedBatch:
        """Packs windows; targets are first and last token of the answer (S, 2)."""
        return self.windows.pack(examples, weight)


@dataclass(frozen=True)
class AnswerRules:
    """How answers are taken from scores and compared, as the training rows have them.

    Attributes:
        language: how answers are compared.
        max_tokens: the longest answer.
        always: whether every question has an answer.
        threshold: a question has none if "no answer" scores higher than the best span by more.
    """

    language: Language = "words"
    max_tokens: int = 30
    always: bool = True
    threshold: float = 0.0


class QuestionAnswering(Task):
    """Finds the answer of a question in its context.

    Args:
        reading: which columns are read, and how.
        tokenizers: the one tokenizer.
        form: how windows are cut.
        rules: how answers are taken and compared.
        label_smoothing: share of each target that is spread over the tokens of its window.
    """

    name = "question-answering"
    architecture = "encoder"
    head = "span"
    higher_is_better = {"loss": False, "exact_match": True, "f1": True}  # noqa: RUF012
    default_metric = "f1"
    uses = frozenset({"label_smoothing", "max_length", "stride"})
    prediction_columns = ("answer", "score", "start")
    takes_label = True
    split_han = True

    def __init__(
        self,
        reading: Reading,
        tokenizers: tuple[Tokenizer, ...],
        *,
        form: WindowForm | None = None,
        rules: AnswerRules | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        self.reading, self.tokenizers = reading, tokenizers
        self.label_smoothing = label_smoothing
        self.form, self.rules = form or WindowForm(), rules or AnswerRules()

    @classmethod
    def recognise(cls, file: RowFile, sample: Sequence[Row]) -> Recognised | None:
        """Takes SQuAD files, and files with columns of contexts, questions and their answers."""
        return recognise_questions(file, sample)

    @classmethod
    def choose_reading(
        cls, file: RowFile, sample: Sequence[Row], wanted: WantedColumns
    ) -> tuple[Reading, tuple[str, ...]]:
        """Chooses the columns by their names."""
        columns, reasons = choose_question_columns(file, sample, wanted)
        return cls.reading_of("answers", columns, None), reasons

    @classmethod
    def reading_of(cls, form: str, columns: Sequence[str], label: str | None) -> Reading:
        """Reads context, question, answers and, where there is a fourth column, their starts.

        A ``label`` is another column of answers.
        """
        columns = tuple(columns) if label is None else (*columns[:2], label)
        if len(columns) < 3:
            raise UsageError("name the column of answers too (--label-column).")
        return Reading(cls.name, form, columns, None, read_question, group_texts=1)

    @classmethod
    def check_corpus(cls, corpus: Corpus) -> None:
        """Refuses rows of which none has an answer."""
        if not any(answers != _NO_ANSWERS for _, _, answers in corpus.texts()):
            raise DataError(
                f"{corpus.name}: no question has an answer in column '{corpus.columns[2]}'; name "
                "another with --label-column."
            )

    @classmethod
    def tokenizer_texts(
        cls, corpus: Corpus, rows: np.ndarray, reading: Reading, settings: TaskSettings
    ) -> list[Iterator[str]]:
        """Returns the questions, and the contexts once for all questions in a row."""

        def texts() -> Iterator[str]:
            for context, some in itertools.groupby(corpus.texts(rows), lambda row: row[0]):
                yield context
                yield from (question for _, question, _ in some)

        return [texts()]

    @classmethod
    def from_data(
        cls,
        corpus: Corpus,
        rows: np.ndarray,
        reading: Reading,
        tokenizers: tuple[Tokenizer, ...],
        settings: TaskSettings,
    ) -> QuestionAnswering:
        """Builds the task; the longest answer of the training bounds those that are given.

        Raises:
            UsageError: windows are too short to hold a question and some of its context.
        """
        if settings.max_length < _MIN_LENGTH:
            raise UsageError(
                f"tokenizer.max_length must be at least {_MIN_LENGTH} for {cls.name}, not "
                f"{settings.max_length}."
            )
        template = None if settings.framing is None else settings.framing.read
        if template is not None and not template.first:
            raise UsageError(
                f"{cls.name} needs a token that sequences begin with, which stands for no answer; "
                "this tokenizer puts none."
            )
        form = WindowForm(settings.max_length, settings.stride, template is None, template)
        task = cls(reading, tokenizers, form=form, label_smoothing=settings.label_smoothing)
        spans = open_passages(corpus, tokenizers[0], task.form).answers[rows]
        some = (context for context, _, _ in corpus.texts(rows[:_LANGUAGE_ROWS]))
        task.rules = AnswerRules(
            language=choose_language(some),
            max_tokens=int((spans[:, 1] - spans[:, 0]).max()) + 1,
            always=all(answers != _NO_ANSWERS for _, _, answers in corpus.texts(rows)),
        )
        return task

    def check_evaluation(self, corpus: Corpus) -> list[str]:
        """Warns of questions without answer where training had none."""
        if not self.rules.always:
            return []
        without = sum(answers == _NO_ANSWERS for _, _, answers in corpus.texts())
        if not without:
            return []
        return [
            f"{corpus.name}: questions without an answer, of which training had none, count as "
            f"errors: {without:,} of {len(corpus):,}"
        ]

    def examples(
        self, corpus: Corpus, rows: np.ndarray, drawing: Drawing | None = None
    ) -> WindowExamples:
        """Returns the windows of some rows.

        Raises:
            UsageError: texts are to be augmented; answers would lose their places.
        """
        if drawing is not None and not drawing.augmentation.is_off:
            raise UsageError(f"data.augment has no effect on {self.name}; set it to none.")
        passages = open_passages(corpus, self.tokenizers[0], self.form)
        return WindowExamples(
            corpus, rows, Windows.over(passages, rows, self.form, self.tokenizers[0])
        )

    def model_options(self) -> dict[str, Any]:
        """Returns vocabulary, positions and segments."""
        return {
            "vocab_size": self.tokenizers[0].get_vocab_size(),
            "max_positions": self.form.max_length,
            "num_token_types": self.form.num_token_types,
            "head": self.head,
        }

    @property
    def num_classes(self) -> int:
        """The tokens of a window, among which a start and an end are chosen."""
        return self.form.max_length

    def loss_sum(self, outputs: Tensor, batch: PackedBatch) -> Tensor:
        """Returns the summed loss of windows; see ``span_loss_sum``."""
        return span_loss_sum(outputs, batch, self.label_smoothing)

    def new_meter(self, examples: Examples | None = None) -> SpanMeter:
        """Returns an empty meter; without examples, one that counts nothing."""
        assert examples is None or isinstance(examples, WindowExamples)
        return SpanMeter(self, examples)

    def calibrate(self, measured: Callable[[], Meter]) -> None:
        """Chooses the threshold of highest F1, where questions may have no answer."""
        if self.rules.always:
            return
        meter = measured()
        assert isinstance(meter, SpanMeter)
        self.rules = dataclasses.replace(self.rules, threshold=meter.best_threshold())

    def decode(
        self,
        model: Transformer,
        examples: Examples,
        machine: Machine,
        settings: DecodingSettings,
        limit: int | None = None,
    ) -> DecodedSample:
        """Shows a few answers beside those that were wanted; metrics are the meter's."""
        assert isinstance(examples, WindowExamples)
        windows, questions = examples.windows, examples.questions
        shown = spread(len(questions), _SHOWN if limit is None else min(limit, _SHOWN))
        numbers = np.flatnonzero(np.isin(windows.questions, shown))
        best = self._best_spans(model, windows, numbers, machine)
        samples = []
        texts = examples.corpus.texts(questions[shown])
        for i, (context, question, stated) in zip(shown.tolist(), texts, strict=True):
            found = self.prediction(best, i, context)["answer"]
            wanted = " / ".join(dict.fromkeys(answer.text for answer in answers_from_json(stated)))
            samples.append(
                f"question: {question}\nanswer: {found or '(none)'}\nwanted: {wanted or '(none)'}"
            )
        return DecodedSample(samples=tuple(samples))

    def baselines(self, train: Examples, judged: Examples, say: Say) -> dict[str, Any]:
        """Returns the metrics of always answering with the first sentence of the context."""
        assert isinstance(judged, WindowExamples)
        scores = [
            self.score(first_sentence(context), answers)
            for context, _, answers in judged.corpus.texts(judged.questions)
        ]
        return {
            "first_sentence": {
                "f1": float(np.mean([score.f1 for score in scores])),
                "exact_match": float(np.mean([score.exact_match for score in scores])),
            }
        }

    @property
    def framing(self) -> Framing:
        """What stands around and between question and context."""
        template = self.form.template_for(self.tokenizers[0])
        return Framing(template, template)

    @property
    def input_columns(self) -> tuple[str, ...]:
        """The columns of contexts and questions."""
        return self.reading.columns[:2]

    def predict(
        self,
        model: Transformer,
        rows: Sequence[tuple[str, ...]],
        machine: Machine,
        settings: PredictSettings,
    ) -> list[dict[str, Any]]:
        """Answers questions.

        Args:
            model: in evaluation mode.
            rows: context and question of each.
            machine: where to compute.
            settings: without effect.

        Returns:
            ``{"answer", "score", "start", "end"}`` of each: ``start`` and ``end`` are code points
            [start, end) in the context; without an answer, ``answer`` is "" and they are None.
            ``score``, 0 to 1, is the probability of the answer's start times that of its end in
            its window; without an answer, that of "no answer" in the window least sure of it.
        """
        passages = encode_passages(
            self.tokenizers[0],
            [Passage(context, question.strip()) for context, question in rows],
            self.form,
        )
        windows = Windows.over(passages, np.arange(len(rows)), self.form, self.tokenizers[0])
        best = self._best_spans(model, windows, np.arange(len(windows)), machine)
        return [self.prediction(best, i, context) for i, (context, _) in enumerate(rows)]

    def prediction(self, best: BestSpans, question: int, context: str) -> dict[str, Any]:
        """Returns the prediction for a question, of the form that ``predict`` returns."""
        answer, start, end = self.span(best, question, context)
        if not self.rules.always and best.differences[question] > self.rules.threshold:
            answer = ""
        score = best.scores[question] if answer else best.no_answer_scores[question]
        return {
            "answer": answer,
            "score": math.exp(score),
            "start": start if answer else None,
            "end": end if answer else None,
        }

    def span(self, best: BestSpans, question: int, context: str) -> tuple[str, int, int]:
        """Returns the best span without white space around it, and its code points."""
        start, end = best.places[question].tolist()
        text = context[start:end]
        bare = text.strip()
        start += len(text) - len(text.lstrip())
        return bare, start, start + len(bare)

    def score(self, prediction: str, answers: str) -> AnswerScore:
        """Compares an answer with those that a row of a corpus states."""
        wanted = [answer.text for answer in answers_from_json(answers)]
        return answer_scores(prediction, wanted, language=self.rules.language)

    def to_json(self) -> dict[str, Any]:
        """Returns how windows are cut, and how answers are taken and compared."""
        return {"windows": asdict(self.form), "answers": asdict(self.rules)}

    @classmethod
    def from_json(
        cls, values: Mapping[str, Any], reading: Reading, tokenizers: tuple[Tokenizer, ...]
    ) -> QuestionAnswering:
        """Builds the task of a saved run."""
        cut = values["windows"]
        form = WindowForm(**{**cut, "template": template_from_json(cut.get("template"))})
        rules = AnswerRules(**values["answers"])
        return cls(reading, tokenizers, form=form, rules=rules)

    def _best_spans(
        self, model: Transformer, windows: Windows, numbers: np.ndarray, machine: Machine
    ) -> BestSpans:
        """Runs the model over some windows, like lengths together."""
        best = BestSpans(int(windows.questions.max(initial=-1)) + 1)
        if not len(numbers):
            return best
        for piece in cut_micro_batches(numbers, windows.lengths, machine.batch_tokens):
            batch = windows.pack(piece).to(machine.device)
            outputs = model(batch)
            assert isinstance(outputs, Tensor)
            best.update(outputs, batch, windows, self.rules.max_tokens)
        return best


class SpanMeter(Meter):
    """Loss and best spans of one pass: a few numbers a question.

    Args:
        task: what is measured.
        examples: all windows of some questions, which may come in any order; None in training,
            where nothing is counted because the step's own loss says as much.
    """

    def __init__(self, task: QuestionAnswering, examples: WindowExamples | None) -> None:
        self._task, self._examples = task, examples
        self._best = BestSpans(0 if examples is None else len(examples.questions))
        self._loss = 0.0
        self._windows = 0

    def update(self, outputs: Tensor, batch: PackedBatch) -> None:
        """Counts one batch."""
        if self._examples is None:
            return
        self._loss += span_loss_sum(outputs, batch).item()
        self._windows += batch.num_sequences
        windows = self._examples.windows
        self._best.update(outputs, batch, windows, self._task.rules.max_tokens)

    def compute(self) -> dict[str, float]:
        """Returns loss (of windows), exact_match and f1 (of questions), and num_examples."""
        if self._examples is None:
            return {}
        scores, _ = self._scores()
        return {
            "loss": self._loss / self._windows if self._windows else math.nan,
            **_means(scores),
            "num_examples": len(scores),
        }

    def details(self) -> dict[str, Any]:
        """Returns the same for questions with and without an answer, where there are both."""
        if self._examples is None or self._task.rules.always:
            return {}
        scores, has_answer = self._scores()
        parts = {"with_answer": scores[has_answer], "without_answer": scores[~has_answer]}
        found: dict[str, Any] = {
            name: {**_means(part), "num_examples": len(part)}
            for name, part in parts.items()
            if len(part)
        }
        return {**found, "no_answer_threshold": self._task.rules.threshold}

    def best_threshold(self) -> float:
        """Returns the score difference above which "no answer" is best given."""
        scores, no_answer = [], []
        for i, (context, _, answers) in enumerate(self._texts()):
            span, _, _ = self._task.span(self._best, i, context)
            scores.append(self._task.score(span, answers).f1)
            no_answer.append(answers == _NO_ANSWERS)
        return best_threshold(self._best.differences, scores, no_answer)

    def state(self) -> dict[str, Tensor]:
        """Returns the counts as tensors."""
        sums = torch.tensor([self._loss, self._windows], dtype=torch.float64)
        if self._examples is None:
            return {"sums": sums}
        found = {name: getattr(self._best, name) for name in _FOUND}
        return {"sums": sums, **{name: torch.from_numpy(a.copy()) for name, a in found.items()}}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from ``state``."""
        self._loss, windows = state["sums"].tolist()
        self._windows = int(windows)
        for name in state.keys() - {"sums"}:
            getattr(self._best, name)[:] = state[name].numpy()

    def merged(self, states: Sequence[Mapping[str, Tensor]]) -> Self:
        """Takes for each question the best span that any process found."""
        self.load({**states[0], "sums": torch.stack([state["sums"] for state in states]).sum(0)})
        for state in states[1:] if self._examples is not None else ():
            self._best.merge(*(state[name].numpy() for name in _FOUND))
        return self

    def _texts(self) -> Iterator[tuple[str, ...]]:
        assert self._examples is not None
        return self._examples.corpus.texts(self._examples.questions)

    def _scores(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns (Q, 2) exact match and F1, and (Q,) whether the question has an answer."""
        task, rows, has_answer = self._task, [], []
        for i, (context, _, answers) in enumerate(self._texts()):
            found = task.score(task.prediction(self._best, i, context)["answer"], answers)
            rows.append((found.exact_match, found.f1))
            has_answer.append(answers != _NO_ANSWERS)
        return np.array(rows).reshape(-1, 2), np.array(has_answer, dtype=bool)


def first_sentence(context: str) -> str:
    """Returns a text up to the end of its first sentence."""
    return _SENTENCE_END.split(context.strip(), maxsplit=1)[0]


def _means(scores: np.ndarray) -> dict[str, float]:
    exact_match, f1 = scores.mean(0).tolist() if len(scores) else (math.nan, math.nan)
    return {"exact_match": exact_match, "f1": f1}
