"""Question answering: reading, loss, best spans, metrics and threshold, against references."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from builders import write_rows
from hasten.core.batch import PackedBatch, SequenceLayout, positions_from_lengths
from hasten.core.errors import DataError, UsageError
from hasten.data.augment import Augmentation
from hasten.data.columns import CellError
from hasten.data.corpus import Corpus, open_corpus
from hasten.data.rows import Row, open_rows
from hasten.data.spans import Answer, answers_from_json
from hasten.data.tokenizer import train_tokenizer
from hasten.data.windows import Passage, WindowForm, Windows, encode_passages
from hasten.model.search import DecodingSettings
from hasten.task.contract import (
    Certainty,
    Drawing,
    Machine,
    PredictSettings,
    TaskSettings,
    WantedColumns,
)
from hasten.task.question_answering import (
    AnswerRules,
    QuestionAnswering,
    WindowExamples,
    first_sentence,
)
from hasten.task.question_columns import read_question
from hasten.task.span_answers import BestSpans, span_log_probabilities, span_loss_sum
from hasten.task.span_metrics import answer_scores

CPU = Machine(torch.device("cpu"), 64)

# Loss


def batch_of(parts: Sequence[tuple[int, int]], targets: Sequence[tuple[int, int]]) -> PackedBatch:
    """Sequences of a class token with so many question tokens, and so many of the context."""
    lengths = [1 + question + context for question, context in parts]
    ranges = [(1 + question, 1 + question + context) for question, context in parts]
    return PackedBatch(
        token_ids=torch.zeros(sum(lengths), dtype=torch.int64),
        positions=torch.from_numpy(positions_from_lengths(lengths)),
        layout=SequenceLayout.from_lengths(lengths),
        example_ids=torch.arange(len(lengths)),
        targets=torch.tensor([(*t, *r) for t, r in zip(targets, ranges, strict=True)]),
    )


@st.composite
def scored_batches(draw: st.DrawFn) -> tuple[Tensor, PackedBatch]:
    parts = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9)), min_size=1, max_size=6))
    targets = []
    for question, context in parts:
        places = [0, *range(1 + question, 1 + question + context)]
        targets.append((draw(st.sampled_from(places)), draw(st.sampled_from(places))))
    batch = batch_of(parts, targets)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    scale = draw(st.sampled_from([0.1, 3.0, 300.0]))  # exp(300) is no float32
    scores = scale * torch.randn(batch.num_tokens, 2, dtype=torch.float64, generator=generator)
    return scores, batch


@settings(max_examples=200)
@given(scored=scored_batches(), smoothing=st.sampled_from([0.0, 0.1, 0.6]))
def test_the_packed_loss_is_the_loss_one_by_one(
    scored: tuple[Tensor, PackedBatch], smoothing: float
):
    scores, batch = scored
    assert batch.targets is not None
    packed, alone = (scores.clone().requires_grad_() for _ in range(2))
    loss = span_loss_sum(packed, batch, smoothing)
    reference = torch.zeros((), dtype=torch.float64)
    lengths = list(batch.layout.lengths)
    pieces = zip(
        torch.split(alone, lengths),
        batch.targets.tolist(),
        strict=True,
    )
    for piece, (*targets, first, end) in pieces:
        # The class token and the context, and nothing else, may be chosen.
        chosen = [0, *range(first, end)]
        for side in range(2):
            reference = reference + F.cross_entropy(
                piece[chosen, side][None],
                torch.tensor([chosen.index(targets[side])]),
                label_smoothing=smoothing,
            )
    reference = reference / 2
    assert loss.item() == pytest.approx(reference.item(), rel=1e-12, abs=1e-12)
    loss.backward()
    reference.backward()
    assert packed.grad is not None and alone.grad is not None
    torch.testing.assert_close(packed.grad, alone.grad, rtol=1e-10, atol=1e-12)
    in_float32 = span_loss_sum(scores.float(), batch, smoothing)
    assert in_float32.item() == pytest.approx(reference.item(), rel=1e-4, abs=1e-3)


@settings(max_examples=100)
@given(scored=scored_batches())
def test_probabilities_add_to_one_in_each_sequence(scored: tuple[Tensor, PackedBatch]):
    scores, batch = scored
    assert batch.targets is not None
    found = span_log_probabilities(scores, batch).exp()
    pieces = torch.split(found, list(batch.layout.lengths))
    for piece, (*_, first, end) in zip(pieces, batch.targets.tolist(), strict=True):
        assert not piece[1:first].any() and not piece[end:].any()
        assert piece.sum(0).tolist() == pytest.approx([1, 1])


# Best spans over windows


@pytest.fixture(scope="module")
def chars():
    alphabet = "abcdefghijklmnopqrstuvwxyz?.,。京 "
    return train_tokenizer([alphabet, alphabet.upper()] * 2, kind="char", vocab_size=100)


@settings(max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    overlap=st.integers(1, 8),
    max_tokens=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_the_best_span_is_that_of_trying_all_windows_in_whatever_batches(
    lengths: list[int], overlap: int, max_tokens: int, seed: int, chars: Any
):
    draw = np.random.default_rng(seed)
    form = WindowForm(14, overlap)
    texts = [Passage("".join(draw.choice(list("abc"), n)), "ab") for n in lengths]
    encoded = encode_passages(chars, texts, form)
    windows = Windows.over(encoded, np.arange(len(texts)), form, chars)
    scores = [torch.from_numpy(draw.normal(size=(n, 2))) for n in windows.lengths.tolist()]
    best = [(-math.inf, 0, 0)] * len(texts)
    no_answer = [math.inf] * len(texts)
    for window, table in enumerate(scores):
        question, begin = int(windows.questions[window]), int(windows.context_starts[window])
        table = torch.cat([table[:1], table[begin:]]).log_softmax(0).tolist()
        no_answer[question] = min(no_answer[question], sum(table[0]))
        shift = int(windows.firsts[window]) - 1
        for first in range(1, len(table)):
            for last in range(first, min(first + max_tokens, len(table))):
                found = (table[first][0] + table[last][1], first + shift, last + shift + 1)
                best[question] = max(best[question], found)
    found = BestSpans(len(texts))
    order = draw.permutation(len(windows))
    for some in np.array_split(order, draw.integers(1, len(order) + 1)):
        table = torch.cat([scores[window] for window in some.tolist()])
        found.update(table, windows.pack(some), windows, max_tokens)
    assert found.scores.tolist() == pytest.approx([score for score, _, _ in best])
    assert found.places.tolist() == [[start, end] for _, start, end in best]
    assert found.no_answer_scores.tolist() == pytest.approx(no_answer)
    assert found.differences.tolist() == pytest.approx(
        [low - score for low, (score, _, _) in zip(no_answer, best, strict=True)]
    )


# Reading

CONTEXT = "  Ada met Bob. Bob left.\n"


@pytest.mark.parametrize(
    ("cells", "answers"),
    [
        # What a SQuAD file has, and a table.
        ([[{"text": "Bob", "answer_start": 10}]], [("Bob", 10, 13)]),
        ([[{"text": "Bob", "answer_start": 15}]], [("Bob", 15, 18)]),
        ([[]], []),
        ([[{"text": "Ada", "answer_start": 2}, {"text": "Bob", "answer_start": 10}]],
         [("Ada", 2, 5), ("Bob", 10, 13)]),
        (["Bob"], [("Bob", 10, 13)]),
        (["Bob", "15"], [("Bob", 15, 18)]),
        (["Bob", 15], [("Bob", 15, 18)]),
        (["Bob", 15.0], [("Bob", 15, 18)]),
        (["Bob", ""], [("Bob", 10, 13)]),
        (["Bob", None], [("Bob", 10, 13)]),
        ([" Bob ", "9"], [("Bob", 10, 13)]),
        ([""], []),
        ([" ", "3"], []),
        ([None], []),
        # Other layouts of the same.
        ([["Ada", "Bob"]], [("Ada", 2, 5), ("Bob", 10, 13)]),
        ([{"text": ["Bob"], "answer_start": [15]}], [("Bob", 15, 18)]),
        ([{"text": [], "answer_start": []}], []),
        ([{"text": "Bob", "answer_start": 15}], [("Bob", 15, 18)]),
        ([{"text": ["Ada", "Bob"]}], [("Ada", 2, 5), ("Bob", 10, 13)]),
        # A start that is not one says nothing; a blank answer is none.
        ([[{"text": "Bob", "answer_start": -1}]], [("Bob", 10, 13)]),
        ([[{"text": "", "answer_start": 0}]], []),
        # One that is not there counts as a text, as long as another is.
        ([[{"text": "Eve", "answer_start": -1}, {"text": "Ada", "answer_start": 2}]],
         [("Eve", -1, -1), ("Ada", 2, 5)]),
    ],
)  # fmt: skip
def test_answers_are_read_with_their_places_in_the_context_as_it_stands(
    cells: list[Any], answers: list[tuple[str, int, int]]
):
    context, question, found = read_question([CONTEXT, " Who? ", *cells])
    assert (context, question) == (CONTEXT, "Who?")
    assert answers_from_json(found) == answers
    for text, start, end in answers:
        assert start == -1 or CONTEXT[start:end] == text


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        (["", "Who?", "Ada"], "the context is empty"),
        ([" ", "Who?", "Ada"], "the context is empty"),
        ([CONTEXT, " ", "Ada"], "the question is empty"),
        ([CONTEXT, None, "Ada"], "the question is empty"),
        ([CONTEXT, ["Who?"], "Ada"], "the question is a JSON list"),
        ([CONTEXT, "Who?", "Eve"], "the answer is not in its context"),
        ([CONTEXT, "Who?", ["Eve", "Mallory"]], "the answer is not in its context"),
        ([CONTEXT, "Who?", [{"answer_start": 3}]], "the answer is not a text"),
        ([CONTEXT, "Who?", "Ada", "two"], "where the answer starts is not a whole number (two)"),
        ([CONTEXT, "Who?", "Ada", "1.5"], "where the answer starts is not a whole number (1.5)"),
        ([CONTEXT, "Who?", "Ada", True], "where the answer starts is not a whole number (True)"),
        (
            [CONTEXT, "Who?", {"text": ["Ada"], "answer_start": []}],
            "the answers' texts and starts are not of the same number",
        ),
    ],
)
def test_rows_that_cannot_be_read_are_rejected(cells: list[Any], reason: str):
    with pytest.raises(CellError) as caught:
        read_question(cells)
    assert str(caught.value) == reason


SQUAD = {
    "data": [
        {
            "title": "T",
            "paragraphs": [
                {
                    "context": "Ada met Bob. Bob left.",
                    "qas": [
                        {
                            "id": "1",
                            "question": "Who left?",
                            "answers": [{"text": "Bob", "answer_start": 13}],
                        },
                        {"id": "2", "question": "Who came?", "answers": []},
                    ],
                }
            ],
        }
    ]
}


def table(path: Path, rows: list[tuple[str, ...]], header: str) -> Path:
    return write_rows(path, rows, header.split(","))


def sample_of(path: Path) -> list[Row]:
    return [row for row in open_rows(path) if isinstance(row, Row)]


def test_a_squad_file_is_recognised_and_read(tmp_path: Path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(SQUAD))
    file, sample = open_rows(path), sample_of(path)
    found = QuestionAnswering.recognise(file, sample)
    assert found is not None and found.certainty == Certainty.FORMAT
    reading, reasons = QuestionAnswering.choose_reading(file, sample, WantedColumns())
    assert reading.columns == ("context", "question", "answers") and reading.label is None
    assert len(reasons) == 3
    corpus = open_corpus([file], reading)
    assert [json.loads(answers) for _, _, answers in corpus.texts()] == [[["Bob", 13, 16]], []]


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        ("context,question,answer", ("context", "question", "answer")),
        ("id,Question,Passage,Answer_Text", ("Passage", "Question", "Answer_Text")),
        (
            "query,paragraph,answers,answer start",
            ("paragraph", "query", "answers", "answer start"),
        ),
        ("text,question,answer", None),
        ("context,question,label", None),
    ],
)
def test_columns_are_guessed_by_their_names(
    header: str, columns: tuple[str, ...] | None, tmp_path: Path
):
    roles = {"question": "Who left?", "query": "Who left?", "id": "7", "answer start": "13"}
    texts = ("context", "passage", "paragraph", "text")
    row = tuple(
        "Ada met Bob. Bob left." if name.lower() in texts else roles.get(name.lower(), "Bob")
        for name in header.split(",")
    )
    path = table(tmp_path / "t.csv", [row] * 3, header)
    file, sample = open_rows(path), sample_of(path)
    recognised = QuestionAnswering.recognise(file, sample)
    if columns is None:
        assert recognised is None
        with pytest.raises(DataError, match=r"t\.csv.*--text-column CONTEXT"):
            QuestionAnswering.choose_reading(file, sample, WantedColumns())
        return
    assert recognised is not None
    reading, _ = QuestionAnswering.choose_reading(file, sample, WantedColumns())
    assert reading.columns == columns


def test_named_columns_override_the_guess(tmp_path: Path):
    rows = [("Ada met Bob.", "x", "Who?", "Ada", "Bob")]
    path = table(tmp_path / "t.csv", rows, "body,context,ask,answer,gold")
    file, sample = open_rows(path), sample_of(path)
    wanted = WantedColumns(text=("body", "ask"), label="5")
    reading, reasons = QuestionAnswering.choose_reading(file, sample, wanted)
    assert reading.columns == ("body", "ask", "gold")
    assert all("as asked for" in reason for reason in reasons)
    assert QuestionAnswering.reading_of("answers", reading.columns, "answer").columns == (
        "body",
        "ask",
        "answer",
    )
    for wrong in (
        WantedColumns(text=("body",)),
        WantedColumns(text=("body", "nope"), label="gold"),
        WantedColumns(source="body"),
    ):
        with pytest.raises(UsageError):
            QuestionAnswering.choose_reading(file, sample, wrong)
    with pytest.raises(UsageError, match="--label-column"):
        QuestionAnswering.reading_of("answers", ("body", "ask"), None)


def test_yes_no_questions_are_not_recognised(tmp_path: Path):
    rows = [("Ada met Bob.", "Did they meet?", "true"), ("Bob left.", "Did Ada leave?", "false")]
    path = table(tmp_path / "t.csv", rows * 9, "passage,question,answer")
    assert QuestionAnswering.recognise(open_rows(path), sample_of(path)) is None


def test_answers_in_several_places_are_counted(tmp_path: Path):
    rows = [("Bob met Bob.", "Who?", "Bob"), ("Ada met Bob.", "Who?", "Ada")] * 3
    path = table(tmp_path / "t.csv", rows, "context,question,answer")
    _, reasons = QuestionAnswering.choose_reading(open_rows(path), sample_of(path), WantedColumns())
    assert any(reason.startswith("3 of the first 6 answers") for reason in reasons)
    rows = [(*row, "8" if row[0].startswith("Bob") else "0") for row in rows]
    path = table(tmp_path / "u.csv", rows, "context,question,answer,answer_start")
    _, reasons = QuestionAnswering.choose_reading(open_rows(path), sample_of(path), WantedColumns())
    assert not any("of the first" in reason for reason in reasons)


# The task

ROWS = [
    ("Ada met Bob in June. Bob left.", "Who met Bob?", "Ada"),
    ("Ada met Bob in June. Bob left.", "Who left?", "Bob"),
    ("Ada met Bob in June. Bob left.", "Who came?", ""),
    ("Eve came late, by train.", "How did Eve come?", "by train"),
    ("Eve came late, by train.", "Who saw Eve?", ""),
]


def corpus_of(folder: Path, rows: Sequence[tuple[str, ...]]) -> Corpus:
    path = table(
        folder / f"{len(list(folder.iterdir()))}.csv", list(rows), "context,question,answer"
    )
    reading = QuestionAnswering.reading_of("answers", ("context", "question", "answer"), None)
    return open_corpus([open_rows(path)], reading)


def task_of(corpus: Corpus, max_length: int = 24, stride: int = 8, **settings: Any):
    rows = np.arange(len(corpus))
    reading = QuestionAnswering.reading_of("answers", ("context", "question", "answer"), None)
    chosen = TaskSettings(max_length=max_length, stride=stride, **settings)
    (texts,) = QuestionAnswering.tokenizer_texts(corpus, rows, reading, chosen)
    tokenizer = train_tokenizer(texts, kind="char", vocab_size=200)
    return QuestionAnswering.from_data(corpus, rows, reading, (tokenizer,), chosen)


def oracle(sure: float = 9.0, *, answering: bool = True):
    """A model that knows the targets, or knows only that there is no answer."""

    def model(batch: PackedBatch) -> Tensor:
        scores = torch.zeros(batch.num_tokens, 2)
        assert batch.targets is not None
        targets = batch.targets if answering else torch.zeros_like(batch.targets)
        places = batch.layout.offsets[:-1, None].long() + targets
        scores[places[:, 0], 0] = sure
        scores[places[:, 1], 1] = sure
        return scores

    return model


def measured(task: QuestionAnswering, examples: WindowExamples, model: Any, seed: int = 0):
    meter = task.new_meter(examples)
    order = np.random.default_rng(seed).permutation(len(examples))
    for piece in np.array_split(order, 5):  # windows of a question in different batches
        batch = examples.pack(piece)
        meter.update(model(batch), batch)
    return meter


def test_the_task_follows_its_training_rows(tmp_path: Path):
    corpus = corpus_of(tmp_path, ROWS)
    task = task_of(corpus, label_smoothing=0.1)
    assert task.rules == AnswerRules("words", len("by train"), always=False, threshold=0.0)
    assert task.label_smoothing == 0.1 and task.num_classes == 24
    options = task.model_options()
    assert options["head"] == "span" and options["num_token_types"] == 4
    assert options["max_positions"] == 24
    assert task_of(corpus_of(tmp_path, ROWS[:2])).rules.always
    chinese = [("北京是首都。京", "首都是？", "北京")]
    assert task_of(corpus_of(tmp_path, chinese)).rules.language == "characters"
    again = QuestionAnswering.from_json(
        json.loads(json.dumps(task.to_json())), task.reading, task.tokenizers
    )
    assert (again.form, again.rules) == (task.form, task.rules)
    assert task.input_columns == ("context", "question")


def test_contexts_are_given_to_the_tokenizer_once(tmp_path: Path):
    corpus = corpus_of(tmp_path, ROWS)
    (texts,) = QuestionAnswering.tokenizer_texts(
        corpus,
        np.arange(len(corpus)),
        QuestionAnswering.reading_of("answers", "abc", None),
        TaskSettings(),
    )
    found = list(texts)
    assert sorted(found) == sorted({text for row in ROWS for text in row[:2]})


def test_what_has_no_place_in_the_task_is_refused(tmp_path: Path):
    corpus = corpus_of(tmp_path, ROWS)
    task = task_of(corpus)
    rows = np.arange(len(corpus))
    assert len(task.examples(corpus, rows, Drawing())) == len(task.examples(corpus, rows))
    with pytest.raises(UsageError, match=r"data\.augment has no effect on question-answering"):
        task.examples(corpus, rows, Drawing(augmentation=Augmentation(bpe_dropout=0.1)))
    with pytest.raises(UsageError, match="at least 8"):
        task_of(corpus, max_length=7)
    with pytest.raises(DataError, match="'answer'"):
        QuestionAnswering.check_corpus(corpus_of(tmp_path, [ROWS[2], ROWS[4]]))
    QuestionAnswering.check_corpus(corpus)
    always = task_of(corpus_of(tmp_path, ROWS[:2]))
    (warning,) = always.check_evaluation(corpus)
    assert "2 of 5" in warning
    assert task.check_evaluation(corpus) == []


def test_windows_are_examples_and_cut_questions_are_counted(tmp_path: Path):
    corpus = corpus_of(tmp_path, ROWS)
    task = task_of(corpus)
    rows = np.array([3, 0, 2])
    examples = task.examples(corpus, rows)
    assert len(examples) > 3 and set(examples.rows.tolist()) == {0, 2, 3}
    assert examples.weights.tolist() == [1.0] * len(examples)
    # Two of the three are longer than the 12 tokens that a question may take.
    assert examples.num_truncated == sum(len(ROWS[row][1]) > 12 for row in rows) == 1
    batch = examples.pack(np.arange(len(examples)), 2.0)
    assert batch.weight == 2.0 and list(batch.layout.lengths) == examples.lengths.tolist()


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_those_of_the_best_spans(seed: int, tmp_path: Path):
    corpus = corpus_of(tmp_path, ROWS)
    task = task_of(corpus)
    examples = task.examples(corpus, np.arange(len(corpus)))
    right = measured(task, examples, oracle(), seed)
    assert right.compute()["exact_match"] == right.compute()["f1"] == 1.0
    assert right.compute()["num_examples"] == 5
    details = right.details()
    assert details["with_answer"] == {"exact_match": 1.0, "f1": 1.0, "num_examples": 3}
    assert details["without_answer"] == {"exact_match": 1.0, "f1": 1.0, "num_examples": 2}
    losses = [
        task.loss_sum(oracle()(batch), batch).item()
        for batch in (examples.pack(np.array([i])) for i in range(len(examples)))
    ]
    assert right.compute()["loss"] == pytest.approx(sum(losses) / len(examples), rel=1e-6)
    # Never an answer: right where there is none.
    none = measured(task, examples, oracle(answering=False), seed).compute()
    assert none["exact_match"] == none["f1"] == pytest.approx(2 / 5)


def test_random_answers_are_scored_as_predictions_are(tmp_path: Path):
    corpus = corpus_of(tmp_path, ROWS * 3)
    task = task_of(corpus)
    examples = task.examples(corpus, np.arange(len(corpus)))

    def model(batch: PackedBatch) -> Tensor:
        # A function of the window alone, so that evaluation and prediction see the same.
        seeds = batch.token_ids.double() * 12.9898 + batch.positions * 78.233
        noise = (torch.sin(seeds) * 43758.5453) % 1
        scores = torch.stack([noise, (noise * 7919) % 1], 1)
        for side, letters in enumerate(("AB", "ab")):
            ids = torch.tensor([task.tokenizers[0].token_to_id(letter) for letter in letters])
            scores[:, side] += 5 * torch.isin(batch.token_ids, ids)
        return scores + 6 * (batch.positions == 0)[:, None]

    task.rules = AnswerRules("words", 5, always=False, threshold=1.0)
    found = measured(task, examples, model).compute()
    rows = [(context, question) for context, question, _ in ROWS * 3]
    predictions = task.predict(model, rows, CPU, PredictSettings())  # type: ignore[arg-type]
    scores = [
        answer_scores(prediction["answer"], [answer] if answer else [], language="words")
        for prediction, (_, _, answer) in zip(predictions, ROWS * 3, strict=True)
    ]
    assert found["f1"] == pytest.approx(np.mean([score.f1 for score in scores]))
    assert found["exact_match"] == pytest.approx(np.mean([s.exact_match for s in scores]))
    assert 0 < found["f1"] < 1
    for prediction, (context, _) in zip(predictions, rows, strict=True):
        assert 0 < prediction["score"] <= 1
        if prediction["answer"]:
            assert context[prediction["start"] : prediction["end"]] == prediction["answer"]
        else:
            assert prediction["start"] is prediction["end"] is None
    assert any(p["answer"] for p in predictions) and not all(p["answer"] for p in predictions)
    # In whatever company a question is.
    for row, prediction in zip(rows, predictions, strict=True):
        (alone,) = task.predict(model, [row], CPU, PredictSettings())  # type: ignore[arg-type]
        assert alone == prediction
    assert task.predict(model, [], CPU, PredictSettings()) == []  # type: ignore[arg-type]


def test_white_space_around_a_span_is_no_part_of_the_answer(tmp_path: Path):
    task = task_of(corpus_of(tmp_path, ROWS[:2]))
    context = "\n Ada  met Bob. "
    best = BestSpans(3)
    best.scores[:] = -0.5
    best.places[:] = [(1, 7), (0, 2), (11, 16)]
    found = [task.prediction(best, i, context) for i in range(3)]
    assert [(p["answer"], p["start"], p["end"]) for p in found] == [
        ("Ada", 2, 5),
        ("", None, None),
        ("Bob.", 11, 15),
    ]
    assert found[0]["score"] == math.exp(-0.5)


def test_the_context_stays_as_it_is_and_the_question_is_stripped(tmp_path: Path):
    task = task_of(corpus_of(tmp_path, ROWS[:2]))
    seen: list[list[int]] = []

    def model(batch: PackedBatch) -> Tensor:
        seen.append(batch.token_ids.tolist())
        return batch.positions[:, None].double().expand(-1, 2)  # the last token is the answer

    rows = [(" \n Ada ", "Who? "), (" \n Ada ", " Who?")]
    found = task.predict(model, [*rows, ("Bob left", "Who?")], CPU, PredictSettings())  # type: ignore[arg-type]
    assert found[0] == found[1] and found[0]["answer"] == ""  # it is the space after Ada
    assert (found[2]["answer"], found[2]["start"], found[2]["end"]) == ("t", 7, 8)
    assert sum(map(len, seen)) == 2 * (2 + 4 + 7) + (2 + 4 + 8)


def test_where_training_always_has_an_answer_so_have_predictions(tmp_path: Path):
    corpus = corpus_of(tmp_path, [row for row in ROWS if row[2]])
    task = task_of(corpus)
    rows = [(context, question) for context, question, _ in ROWS]
    found = task.predict(oracle(answering=False), rows, CPU, PredictSettings())  # type: ignore[arg-type]
    assert all(prediction["answer"] for prediction in found)
    (empty,) = task.predict(oracle(), [("", "Who?")], CPU, PredictSettings())  # type: ignore[arg-type]
    assert (empty["answer"], empty["start"], empty["end"]) == ("", None, None)


def test_a_question_without_answer_gets_the_probability_of_none(tmp_path: Path):
    task = task_of(corpus_of(tmp_path, ROWS))
    (found,) = task.predict(oracle(), [("Ada met Bob.", "Who?")], CPU, PredictSettings())  # type: ignore[arg-type]
    # 12 tokens of the context beside the class token, which alone has a score of 9.
    assert found["answer"] == ""
    assert found["score"] == pytest.approx((math.exp(9) / (math.exp(9) + 12)) ** 2)


def test_the_threshold_is_the_best_of_all(tmp_path: Path):
    draw = np.random.default_rng(0)
    rows = []
    for i in range(40):
        words = draw.choice(["red", "green", "blue", "black", "white"], 6)
        rows.append((" ".join(words), f"which {i}?", str(words[2]) if i % 3 else ""))
    corpus = corpus_of(tmp_path, rows)
    task = task_of(corpus, max_length=64)
    examples = task.examples(corpus, np.arange(len(corpus)))
    noise = torch.from_numpy(draw.normal(size=len(examples))).float() * 4 + 3

    def model(batch: PackedBatch) -> Tensor:
        scores = oracle(6.0)(batch)
        scores[batch.layout.offsets[:-1].long()] += noise[batch.example_ids][:, None]
        return scores

    meter = measured(task, examples, model)
    by_hand = {}
    for threshold in np.linspace(-40, 40, 321):
        rules = AnswerRules("words", task.rules.max_tokens, False, float(threshold))
        task.rules = rules
        by_hand[threshold] = measured(task, examples, model).compute()["f1"]
    task.rules = AnswerRules("words", rules.max_tokens, False, 0.0)
    before = meter.compute()["f1"]
    task.calibrate(lambda: meter)
    assert task.rules.threshold != 0.0
    after = measured(task, examples, model).compute()["f1"]
    assert after >= max(by_hand.values()) > before
    assert task.to_json()["answers"]["threshold"] == task.rules.threshold
    assert meter.details()["no_answer_threshold"] == task.rules.threshold


def test_nothing_is_measured_for_a_threshold_that_is_not_needed(tmp_path: Path):
    task = task_of(corpus_of(tmp_path, ROWS[:2]))

    def fail():
        raise AssertionError("measured in vain")

    task.calibrate(fail)
    assert task.rules.threshold == 0.0


def test_a_meter_goes_on_from_its_state(tmp_path: Path):
    corpus = corpus_of(tmp_path, ROWS)
    task = task_of(corpus)
    examples = task.examples(corpus, np.arange(len(corpus)))
    half, rest = np.array_split(np.arange(len(examples)), 2)
    first, second = task.new_meter(examples), task.new_meter(examples)
    for meter, piece in ((first, half), (second, rest)):
        if meter is second:
            meter.load(first.state())
        batch = examples.pack(piece)
        meter.update(oracle()(batch), batch)
    assert second.compute() == pytest.approx(measured(task, examples, oracle()).compute())
    quiet = task.new_meter()
    batch = examples.pack(half)
    quiet.update(oracle()(batch), batch)
    assert quiet.compute() == {} == quiet.details()
    quiet.load(quiet.state())


def test_few_answers_are_shown(tmp_path: Path):
    corpus = corpus_of(tmp_path, ROWS * 8)
    task = task_of(corpus)
    examples = task.examples(corpus, np.arange(len(corpus)))
    seen: set[int] = set()

    def model(batch: PackedBatch) -> Tensor:
        seen.update(examples.windows.questions[batch.example_ids.numpy()].tolist())
        return oracle()(batch)

    for limit, number in ((None, 3), (2, 2), (100, 3)):
        seen.clear()
        found = task.decode(model, examples, CPU, DecodingSettings(), limit)  # type: ignore[arg-type]
        assert len(found.samples) == len(seen) == number and found.metrics == {}
    assert found.samples[0] == "question: Who met Bob?\nanswer: Ada\nwanted: Ada"
    assert found.samples[2] == "question: Who saw Eve?\nanswer: (none)\nwanted: (none)"


@pytest.mark.parametrize(
    ("context", "sentence"),
    [
        ("Ada met Bob. Bob left.", "Ada met Bob."),
        ("  It was 3.5 km! Far?", "It was 3.5 km!"),
        ("北京是首都。上海不是。", "北京是首都。"),
        ("真的吗？是！", "真的吗？"),
        ("no end", "no end"),
        ("One line.\nAnother.", "One line."),
    ],
)
def test_the_first_sentence(context: str, sentence: str):
    assert first_sentence(context) == sentence


def test_the_baseline_answers_with_the_first_sentence(tmp_path: Path):
    rows = [
        ("Ada met Bob. Bob left.", "Who met?", "Ada met Bob."),
        ("Ada met Bob. Bob left.", "Who left?", "Bob"),
        ("Ada met Bob. Bob left.", "Who came?", ""),
    ]
    corpus = corpus_of(tmp_path, rows)
    task = task_of(corpus, max_length=64)
    train = task.examples(corpus, np.arange(3))
    judged = task.examples(corpus, np.array([1, 0]))
    found = task.baselines(train, judged, print)["first_sentence"]
    # Bob is one of three words.
    assert found == {"f1": pytest.approx((1 + 2 * 1 / (3 + 1)) / 2), "exact_match": 0.5}
    whole = task.baselines(train, train, print)["first_sentence"]
    assert whole["f1"] == pytest.approx((1 + 0.5 + 0) / 3)


def test_several_answers_are_all_right(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    row = {"context": "Ada met Bob.", "question": "Who?", "answers": ["Eve", "Bob", "Ada"]}
    path.write_text(json.dumps(row))
    reading = QuestionAnswering.reading_of("answers", ("context", "question", "answers"), None)
    corpus = open_corpus([open_rows(path)], reading)
    task = task_of(corpus, max_length=64)
    examples = task.examples(corpus, np.arange(1))
    # The first that is in the context is learned; each that is stated is right.
    assert examples.windows.characters(0, *examples.windows.targets[0].tolist()) == (8, 11)
    answers = next(iter(corpus.texts()))[2]
    assert answers_from_json(answers)[0] == Answer("Eve")
    for answer in ("Ada", "Bob", "Eve"):
        assert task.score(answer, answers).exact_match == 1.0
    assert task.score("Mallory", answers).exact_match == 0.0
