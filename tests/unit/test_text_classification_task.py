"""Loss, metrics and labels of text classification, each against a reference."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from torch import Tensor

from builders import corpus_of, write_rows
from hasten.core.batch import PackedBatch, SequenceLayout
from hasten.core.errors import DataError, UsageError
from hasten.data.augment import Augmentation
from hasten.data.corpus import Corpus, Reading
from hasten.data.rows import Row, open_rows
from hasten.data.tokenizer import train_tokenizer
from hasten.data.tokens import EncodingFormat
from hasten.task.baselines import majority_accuracy, tfidf_accuracy
from hasten.task.contract import Drawing, TaskSettings, WantedColumns
from hasten.task.label_statistics import accuracy_interval, balanced_class_weights, sort_labels
from hasten.task.text_classification import (
    UNSEEN,
    ClassificationMeter,
    LabelledExamples,
    LossSettings,
    TextClassification,
)


def batch_of(targets: list[int]) -> PackedBatch:
    n = len(targets)
    zeros = torch.zeros(n, dtype=torch.int64)
    return PackedBatch(
        token_ids=zeros,
        positions=zeros.int(),
        layout=SequenceLayout.from_lengths([1] * n),
        example_ids=zeros,
        targets=torch.tensor(targets),
    )


def reference_loss(
    scores: Tensor, targets: list[int], loss: LossSettings, weights: tuple[float, ...] | None
) -> float:
    total = 0.0
    for row, target in zip(scores.tolist(), targets, strict=True):
        if target == UNSEEN:
            continue
        k = len(row)
        top = max(row)
        log_sum = top + math.log(sum(math.exp(s - top) for s in row))
        log_p = [s - log_sum for s in row]
        w = weights or (1.0,) * k
        share = loss.label_smoothing
        value = -(1 - share) * w[target] * log_p[target]
        value -= share / k * sum(w[c] * log_p[c] for c in range(k))
        if loss.kind == "focal":
            value *= (1 - math.exp(log_p[target])) ** loss.focal_gamma
        total += value
    return total


@settings(max_examples=150)
@given(
    targets=st.lists(st.integers(-1, 3), min_size=1, max_size=10),
    kind=st.sampled_from(["cross_entropy", "focal"]),
    gamma=st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.7]),
    smoothing=st.sampled_from([0.0, 0.1, 0.5]),
    weights=st.sampled_from([None, (0.5, 1.0, 2.0, 4.0)]),
    seed=st.integers(0, 1000),
)
def test_the_loss_is_its_formula(targets, kind, gamma, smoothing, weights, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(len(targets), 4, dtype=torch.float64, generator=generator)
    loss = LossSettings(kind, gamma, smoothing)
    task = TextClassification(("a", "b", "c", "d"), loss, weights)
    found = task.loss_sum(scores, batch_of(targets)).item()
    assert found == pytest.approx(reference_loss(scores, targets, loss, weights), abs=1e-10)


@settings(max_examples=60)
@given(
    targets=st.lists(st.integers(0, 2), min_size=1, max_size=8),
    smoothing=st.sampled_from([0.0, 0.2]),
    weights=st.sampled_from([None, (0.5, 1.0, 2.0)]),
)
def test_sum_over_weight_is_torchs_mean(targets, smoothing, weights):
    scores = torch.randn(len(targets), 3, dtype=torch.float64)
    task = TextClassification(("a", "b", "c"), LossSettings(label_smoothing=smoothing), weights)
    mine = task.loss_sum(scores, batch_of(targets)) / task.unit_weights(np.array(targets)).sum()
    theirs = torch.nn.functional.cross_entropy(
        scores,
        torch.tensor(targets),
        label_smoothing=smoothing,
        weight=None if weights is None else torch.tensor(weights, dtype=torch.float64),
    )
    assert mine.item() == pytest.approx(theirs.item(), abs=1e-12)


def test_focal_with_no_focus_is_cross_entropy():
    scores, batch = torch.randn(5, 3), batch_of([0, 1, 2, -1, 1])
    focal = TextClassification(("a", "b", "c"), LossSettings("focal", 0.0))
    plain = TextClassification(("a", "b", "c"))
    torch.testing.assert_close(focal.loss_sum(scores, batch), plain.loss_sum(scores, batch))


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_certain_scores_give_finite_gradients(gamma: float, smoothing: float):
    scores = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    task = TextClassification(("a", "b"), LossSettings("focal", gamma, smoothing))
    task.loss_sum(scores, batch_of([0, 0])).backward()
    assert torch.isfinite(scores.grad).all()


def test_scores_of_low_precision_are_summed_in_float32():
    task = TextClassification(("a", "b"))
    loss = task.loss_sum(torch.zeros(3000, 2, dtype=torch.bfloat16), batch_of([0] * 3000))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(3000 * math.log(2), rel=1e-5)


def test_an_unseen_label_weighs_nothing():
    task = TextClassification(("a", "b"), None, (0.25, 4.0))
    assert task.unit_weights(np.array([0, UNSEEN, 1])).tolist() == [0.25, 0.0, 4.0]
    scores = torch.randn(2, 2, requires_grad=True)
    task.loss_sum(scores, batch_of([UNSEEN, 1])).backward()
    assert not scores.grad[0].any() and scores.grad[1].any()


@settings(max_examples=200)
@given(data=st.data(), num_classes=st.integers(2, 5), count=st.integers(1, 40))
def test_metrics_are_scikit_learns(data, num_classes: int, count: int):
    targets = data.draw(st.lists(st.integers(-1, num_classes - 1), min_size=count, max_size=count))
    guesses = data.draw(st.lists(st.integers(0, num_classes - 1), min_size=count, max_size=count))
    task = TextClassification(tuple("abcde"[:num_classes]))
    meter = task.new_meter()
    scores = torch.nn.functional.one_hot(torch.tensor(guesses), num_classes).double()
    for start in range(0, count, 7):  # in pieces, as in training
        meter.update(scores[start : start + 7], batch_of(targets[start : start + 7]))
    found = meter.compute()
    occurring = sorted(set(targets) - {UNSEEN})
    assert found["num_examples"] == count
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(targets, guesses))
    if occurring:
        expected = sk.f1_score(targets, guesses, labels=occurring, average="macro", zero_division=0)
        assert found["macro_f1"] == pytest.approx(expected)
        known = [i for i, t in enumerate(targets) if t != UNSEEN]
        loss = sk.log_loss(
            [targets[i] for i in known],
            scores.softmax(-1)[known].numpy(),
            labels=list(range(num_classes)),
        )
        assert found["loss"] == pytest.approx(loss)
    else:
        assert math.isnan(found["macro_f1"]) and math.isnan(found["loss"])
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        targets, guesses, labels=list(range(num_classes)), zero_division=0
    )
    for i, row in enumerate(meter.per_class()):
        assert row["label"] == task.labels[i] and row["num_examples"] == support[i]
        assert (row["precision"], row["recall"], row["f1"]) == pytest.approx(
            (precision[i], recall[i], f1[i])
        )


def test_an_empty_meter_is_not_a_number():
    found = ClassificationMeter(TextClassification(("a", "b"))).compute()
    assert found["num_examples"] == 0 and math.isnan(found["accuracy"])


@settings(max_examples=100)
@given(count=st.integers(1, 5000), data=st.data())
def test_the_interval_is_wilsons(count: int, data):
    from scipy.stats import binomtest

    right = data.draw(st.integers(0, count))
    expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
    low, high = accuracy_interval(right / count, count)
    assert low == pytest.approx(expected.low, abs=1e-12)
    assert high == pytest.approx(expected.high, abs=1e-12)


def test_the_interval_of_nothing_is_everything():
    assert accuracy_interval(0.0, 0) == (0.0, 1.0)


def test_labels_have_a_fixed_order():
    assert sort_labels(("10", "9", "-1")) == ("-1", "9", "10")
    assert sort_labels(("b", "a", "10", "9")) == ("10", "9", "a", "b")
    assert sort_labels(("True", "False")) == ("False", "True")
    assert sort_labels(("01", "1", "2")) == ("01", "1", "2")
    for names in (("b", "a", "c"), ("3", "20", "1")):
        assert sort_labels(names) == sort_labels(names[::-1])


def test_targets_follow_the_names_not_the_files_numbers():
    task = TextClassification(("a", "b", "c"))
    assert task.targets(("c", "a", "new"), np.array([0, 1, 2, 1])).tolist() == [2, 0, UNSEEN, 0]
    assert task.targets((), np.array([-1, -1])).tolist() == [UNSEEN, UNSEEN]
    # A row without a label among rows with one is not silently the last class.
    assert task.targets(("c", "a"), np.array([-1, 0])).tolist() == [UNSEEN, 2]


def test_balanced_weights_make_every_class_weigh_the_same():
    counts = (10, 30, 60)
    weights = balanced_class_weights(counts)
    products = [w * n for w, n in zip(weights, counts, strict=True)]
    assert products == pytest.approx([100 / 3] * 3)
    from sklearn.utils.class_weight import compute_class_weight

    y = ["a"] * 10 + ["b"] * 30 + ["c"] * 60
    assert list(weights) == pytest.approx(
        compute_class_weight("balanced", classes=np.array(["a", "b", "c"]), y=y).tolist()
    )


# From a file to examples

ROWS = [("one b", "b"), ("one a", "a"), ("held out", "z"), ("two b", "b"), ("three b", "b")]
TRAINED = np.array([0, 1, 3, 4])
SETTINGS = TaskSettings()


@pytest.fixture
def corpus(own_cache: Path, tmp_path: Path) -> Corpus:
    path = write_rows(tmp_path / "t.csv", ROWS, ("text", "label"))
    return corpus_of(open_rows(path, header=True))


def task_of(corpus: Corpus, settings: TaskSettings = SETTINGS) -> TextClassification:
    tokenizer = train_tokenizer((t for row in corpus.texts() for t in row), vocab_size=300)
    reading = TextClassification.reading_of("text", corpus.columns, corpus.label_column)
    return TextClassification.from_data(corpus, TRAINED, reading, (tokenizer,), settings)


def test_the_classes_are_the_labels_of_the_training_rows(corpus: Corpus):
    task = task_of(corpus)
    assert task.labels == ("a", "b") and task.num_classes == 2
    assert task.class_weights is None and task.loss == LossSettings()
    settings = TaskSettings(
        loss="focal", focal_gamma=1.5, label_smoothing=0.2, class_weights="balanced"
    )
    task = task_of(corpus, settings)
    assert task.class_weights == balanced_class_weights((1, 3))
    assert task.loss == LossSettings("focal", 1.5, 0.2)


def test_the_examples_are_the_rows_with_the_number_of_their_class(corpus: Corpus):
    task = task_of(corpus, TaskSettings(class_weights="balanced", max_length=77))
    examples = task.examples(corpus, np.array([3, 2, 1]))
    assert examples.targets.tolist() == [1, UNSEEN, 0]
    assert examples.weights.tolist() == pytest.approx([4 / 6, 0.0, 2.0])
    texts = [text for (text,) in corpus.texts(np.array([3, 2, 1]))]
    ids = [e.ids for e in task.tokenizers[0].encode_batch(texts)]
    assert (len(examples), examples.lengths.tolist()) == (3, [len(x) for x in ids])
    # An example is called by its number in the split, whatever its row.
    batch = examples.pack(np.array([2, 0]), weight=2.5)
    assert batch.targets is not None and batch.targets.tolist() == [0, 1]
    assert batch.token_ids.tolist() == ids[2] + ids[0]
    assert (batch.example_ids.tolist(), batch.weight) == ([2, 0], 2.5)
    assert examples.lines([0, 2]) == {corpus.name: [3, 5]}
    assert examples.in_epoch(3) is examples


def test_drawn_examples_keep_rows_classes_and_weights(corpus: Corpus):
    task = task_of(corpus, TaskSettings(class_weights="balanced"))
    plain = task.examples(corpus, TRAINED)
    drawn = task.examples(corpus, TRAINED, Drawing(3, Augmentation(word_deletion=0.5)))
    epochs = [drawn.in_epoch(epoch) for epoch in range(8)]
    assert len({tuple(e.lengths.tolist()) for e in epochs}) > 1
    for examples in (drawn, *epochs, epochs[0].in_epoch(1)):
        assert isinstance(examples, LabelledExamples) and len(examples) == 4
        for name in ("rows", "targets", "weights"):
            assert np.array_equal(getattr(examples, name), getattr(plain, name))
        batch = examples.pack(np.array([3, 1]))
        assert batch.layout.lengths == tuple(examples.lengths[[3, 1]].tolist())
    again = epochs[0].in_epoch(1).pack(np.arange(4))
    assert torch.equal(again.token_ids, epochs[1].pack(np.arange(4)).token_ids)
    # What is drawn are the rows' own words.
    words = task.tokenizers[0].decode(epochs[0].pack(np.array([0])).token_ids.tolist()).split()
    assert words and set(words) <= {"one", "b"}


@pytest.mark.parametrize("segments", ["auto", "join", "separate"])
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_the_format_follows_from_pooling_and_segments(
    segments: Any, pooling: str, own_cache: Path, tmp_path: Path
):
    rows = [(text, "more of it", label) for text, label in ROWS]
    path = write_rows(tmp_path / "t.csv", rows, ("one", "two", "label"))
    pairs = corpus_of(open_rows(path), text=("one", "two"))
    task = task_of(pairs, TaskSettings(segments=segments, pooling=pooling, max_length=9))
    expected = EncodingFormat(9, pooling == "first", segments != "join")
    assert task.form == expected
    assert task.input_columns == ("one", "two")
    options = task.model_options()
    assert options["num_token_types"] == (0 if segments == "join" else 2)
    assert (options["num_labels"], options["max_positions"], options["head"]) == (
        2,
        9,
        "classification",
    )
    assert options["vocab_size"] == task.tokenizers[0].get_vocab_size()
    saved = json.loads(json.dumps(task.to_json()))
    again = TextClassification.from_json(saved, task.reading, task.tokenizers)
    assert (again.labels, again.form, again.input_columns) == (
        task.labels,
        expected,
        ("one", "two"),
    )


def test_a_file_of_labels_never_seen_is_refused_and_some_are_told(corpus: Corpus, tmp_path: Path):
    task = task_of(corpus)
    (warning,) = task.check_evaluation(corpus)
    assert "never seen in training" in warning and "z (1 of 5 rows)" in warning
    for rows, known in ((ROWS[:2], True), ([("x", "q"), ("y", "r")], False)):
        other = corpus_of(open_rows(write_rows(tmp_path / "v.csv", rows, ("text", "label"))))
        if known:
            assert task.check_evaluation(other) == []
            continue
        with pytest.raises(DataError, match=r"v\.csv: no label .*\(q, r\) .* had a, b"):
            task.check_evaluation(other)


def choose(folder: Path, rows: list[tuple[str, str]], wanted: WantedColumns) -> Reading:
    file = open_rows(write_rows(folder / "c.csv", rows, ("words", "kind")))
    sample = [row for row in file if isinstance(row, Row)]
    assert TextClassification.recognise(file, sample) is not None
    reading, reasons = TextClassification.choose_reading(file, sample, wanted)
    assert len(reasons) == 2
    return reading


def test_columns_are_chosen_unless_they_are_named(tmp_path: Path):
    rows = [(f"some text number {i % 9}", "ab"[i % 2]) for i in range(20)]
    reading = choose(tmp_path, rows, WantedColumns())
    assert (reading.columns, reading.label) == (("words",), "kind")
    assert (reading.task, reading.is_continuous) == ("text-classification", False)
    assert reading.read_row(("  spaced out ",)) == ("spaced out",)
    swapped = choose(tmp_path, rows, WantedColumns(text=("kind",), label="words"))
    assert (swapped.columns, swapped.label) == (("kind",), "words")
    for wanted in (WantedColumns(source="words"), WantedColumns(target="words")):
        with pytest.raises(UsageError, match="no source or target"):
            choose(tmp_path, rows, wanted)


def test_a_file_without_labels_is_not_for_this_task(tmp_path: Path):
    rows = [(f"some text number {i}", f"another text of {i} words") for i in range(20)]
    file = open_rows(write_rows(tmp_path / "c.csv", rows, ("one", "two")))
    sample = [row for row in file if isinstance(row, Row)]
    assert TextClassification.recognise(file, sample) is None


def test_predictions_are_probabilities_of_named_labels():
    task = TextClassification(("no", "yes"))
    first, second = task.predictions(torch.tensor([[0.0, math.log(3)], [5.0, 5.0]]))
    assert first["label"] == "yes" and first["probability"] == pytest.approx(0.75)
    assert first["probabilities"] == pytest.approx({"no": 0.25, "yes": 0.75})
    assert second["label"] == "no"  # a tie goes to the first, as in the metrics


def test_baselines_answer_what_they_say():
    assert majority_accuracy(np.array([1, 1, 0]), np.array([1, 0, 0, 0])) == 0.25
    assert majority_accuracy(np.array([1, 1, 0]), np.array([UNSEEN, 1])) == 0.5
    texts = ["good film", "bad film", "good book", "bad book"] * 5
    accuracy, seconds = tfidf_accuracy(
        texts, np.array([1, 0, 1, 0] * 5), ["good thing", "bad thing"], np.array([1, 0])
    )
    assert accuracy == 1.0 and seconds > 0
