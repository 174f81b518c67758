"""What every task promises, kept by text generation in each of its forms."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from other_processes import assert_resumes_exactly, predict_in_new_process

import hasten
from builders import TINY, Recorder, write_rows
from hasten.core.errors import UsageError
from hasten.data.corpus import Corpus, open_corpus
from hasten.data.packing import IGNORED
from hasten.data.rows import open_rows
from hasten.data.tokenizer import train_tokenizer
from hasten.model.heads import TokenOutputs
from hasten.task.contract import TaskSettings, WantedColumns
from hasten.task.text_generation import TextExamples, TextGeneration
from hasten.training.label import label_file
from hasten.training.sources import sample_rows

PAIRS = [
    ("a heron by the water", "ein Reiher am Wasser"),
    ("the old saw is sharp", "die alte Säge ist scharf"),
    ("one ripe plum", "eine reife Pflaume"),
    ("two crows and an owl", "zwei Krähen und eine Eule"),
    ("a hammer near a drill", "ein Hammer bei einem Bohrer"),
    ("figs and a melon", "Feigen und eine Melone"),
    ("an eagle", "ein Adler"),
    ("file and vice", "Feile und Schraubstock"),
]
# 8 windows of 16 characters and one to begin with. None occurs twice, so that each says what
# follows it, wherever a window begins.
ALPHABET = (string.ascii_letters + string.digits + "äöüßéñøå€→中文字漢👍🏽" + "".join(
    chr(code) for code in range(0x400, 0x435)
))[:129]  # fmt: skip
OWN = {key: value for key, value in TINY.items() if key != "model.pooling"}
OVERFIT: dict[str, Any] = {
    **OWN,
    "data.augment": "none",
    "data.validation_fraction": 0.0,
    "model.dropout": 0.0,
    "model.zero_init_residual": False,
    "model.initializer_std": 0.1,
    "train.epochs": 50,
    "train.tokens_per_step": 110,
    "train.learning_rate": 1e-2,
    "train.ema_decay": 0.0,
    "optim.weight_decay": 0.0,
    "eval.patience": 0,
}
ASKED = ("pair", "question", "instruction", "messages")
FORMS = ("text", "documents", *ASKED)
Texts = str | tuple[str, ...]


def chat(*said: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]


def instructions(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """An instruction and its input for each pair, every other one without input."""
    prompts = [prompt for prompt, _ in pairs]
    return [(f"{p[0]}?", p) if i % 2 else (p, "") for i, p in enumerate(prompts)]


def write_form(folder: Path, form: str, pairs: Sequence[tuple[str, str]]) -> Path:
    """Writes pairs as one of the forms of text."""
    if form == "documents":
        rows = [(f"{prompt}: {response}",) for prompt, response in pairs]
        return write_rows(folder / "documents.csv", rows, ("text",))
    if form == "pair":
        return write_rows(folder / "pair.csv", pairs, ("prompt", "response"))
    if form == "question":
        rows = [(prompt, f"{prompt[0]}?", response) for prompt, response in pairs]
        return write_rows(folder / "question.csv", rows, ("context", "question", "answer"))
    if form == "instruction":
        rows = [
            (*row, response) for row, (_, response) in zip(instructions(pairs), pairs, strict=True)
        ]
        return write_rows(folder / "instruction.csv", rows, ("instruction", "input", "output"))
    if form == "messages":
        path = folder / "messages.jsonl"
        lines = [json.dumps({"messages": chat(*pair)}) + "\n" for pair in pairs]
        path.write_text("".join(lines), encoding="utf-8")
        return path
    path = folder / "text.txt"
    path.write_text(
        "".join(f"{prompt},\n  {response}.\n" for prompt, response in pairs), encoding="utf-8"
    )
    return path


def learn_by_heart(folder: Path, form: str, **settings: Any) -> hasten.Run:
    if form == "text":
        path = folder / "text.txt"
        path.write_text(ALPHABET, encoding="utf-8")
        settings |= {"tokenizer.kind": "char", "tokenizer.max_length": 16}
        settings["train.tokens_per_step"] = 48
    else:
        path = write_form(folder, form, PAIRS)
    if form == "documents":  # of which every token has to be learned
        settings["train.tokens_per_step"] = 60
    run = hasten.train(path, test=path, output=folder / "run", settings={**OVERFIT, **settings})
    assert run.task.reading.form == form
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, hasten.Run]:
    """A run of each form that has learned eight examples by heart."""
    return {form: learn_by_heart(tmp_path_factory.mktemp(form), form) for form in FORMS}


def prompts_of(form: str) -> list[Texts]:
    if form == "text":
        return [ALPHABET[0], ALPHABET[5:12], ALPHABET[:40]]
    if form == "question":
        return [(prompt, f"{prompt[0]}?") for prompt, _ in PAIRS]
    if form == "instruction":
        return list[Texts](instructions(PAIRS))
    return [f"{prompt}:" if form == "documents" else prompt for prompt, _ in PAIRS]


def expected_of(form: str) -> list[str]:
    if form == "text":
        return [ALPHABET[1:81], ALPHABET[12:92], ALPHABET[40:120]]
    return [f" {response}" if form == "documents" else response for _, response in PAIRS]


def predict(run: hasten.Run, texts: Sequence[Texts], **options: Any) -> list[str]:
    if run.task.reading.form == "text":  # which has no end
        options.setdefault("max_new_tokens", 80)
    return [found["generated"] for found in run.predict(texts, **options)]


# Learned


@pytest.mark.parametrize("form", FORMS)
def test_eight_examples_are_learned_by_heart(form: str, runs: dict[str, hasten.Run]):
    run = runs[form]
    test, training = run.result["test"], run.result["training"]
    least = 0.0
    if form == "documents":
        # Which of eight texts begins cannot be known: -ln(1/8) each, at best, is spread over the
        # predicted tokens. No model is better on them.
        least = 8 * math.log(8) / test["num_tokens"]
    assert least <= test["loss"] < least + 0.02 and test["num_examples"] == 8
    assert test["perplexity"] == pytest.approx(math.exp(test["loss"]))
    assert training["padding_fraction"] == 0.0 and training["epochs"] == 50
    assert predict(run, prompts_of(form)) == expected_of(form)


@pytest.mark.parametrize(
    "settings",
    [
        {
            "model.positions": "learned",
            "model.norm_placement": "post",
            "model.norm": "layernorm",
            "model.bias": True,
            "model.tie_embeddings": False,
            "train.learning_rate": 5e-3,
            "train.tokens_per_step": 70,
            "tokenizer.kind": "byte",
        },
        {
            "model.num_kv_heads": 1,
            "model.qk_norm": True,
            "model.logit_softcap": 30.0,
            "model.activation": "swiglu",
            "model.sliding_window": 24,
            "tokenizer.kind": "char",
        },
    ],
)
def test_every_kind_of_model_learns_eight_examples(settings: dict[str, Any], tmp_path: Path):
    run = learn_by_heart(tmp_path, "pair", **settings)
    assert predict(run, prompts_of("pair")) == expected_of("pair")


@pytest.mark.parametrize("form", ASKED)
def test_scores_agree_with_the_evaluation(form: str, runs: dict[str, hasten.Run]):
    """Responses are found token by token, and are what the evaluation reads in one go."""
    run = runs[form]
    found = run.predict(prompts_of(form))
    tokenizer = run.task.tokenizers[0]
    num_learned = sum(len(tokenizer.encode(response).ids) + 1 for _, response in PAIRS)
    total = sum(prediction["score"] for prediction in found)
    assert -total / num_learned == pytest.approx(run.result["test"]["loss"], rel=1e-3, abs=1e-6)
    suffix = "jsonl" if form == "messages" else "csv"
    again = run.evaluate(run.folder.parent / f"{form}.{suffix}")
    for name in ("loss", "perplexity", "num_examples", "num_tokens"):
        assert again[name] == pytest.approx(run.result["test"][name], rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_predictions_do_not_depend_on_their_company(form: str, runs: dict[str, hasten.Run]):
    run, prompts = runs[form], prompts_of(form)
    alone = [predict(run, [prompt])[0] for prompt in prompts]
    assert alone == predict(run, prompts) == predict(run, prompts[::-1])[::-1]
    assert run.predict([]) == []


@pytest.mark.parametrize("form", FORMS)
def test_odd_prompts_are_continued_too(form: str, runs: dict[str, hasten.Run]):
    odd = ["", " ", "\n", "\u0000", "q\u0301", "[CLS] [PAD] [SEP]", "👩‍👩‍👧", "x" * 100]
    texts = [(text, text) for text in odd] if form in ("question", "instruction") else odd
    for found in runs[form].predict(texts, max_new_tokens=5):
        assert isinstance(found["generated"], str) and math.isfinite(found["score"])
        assert not any(name in found["generated"] for name in ("[CLS]", "[PAD]", "[UNK]"))


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_run_predicts_the_same_in_a_new_process(form: str, runs: dict[str, hasten.Run]):
    run, prompts = runs[form], prompts_of(form)
    options = ["--max-new-tokens", "80"] if form == "text" else []
    texts = [text for row in prompts for text in ([row] if isinstance(row, str) else row)]
    found = predict_in_new_process(run.folder, *texts, *options)
    more = {"max_new_tokens": 80} if options else {}
    assert found == run.predict(prompts, **more)
    assert [prediction["generated"] for prediction in found] == expected_of(form)


def test_drawn_outputs_repeat_themselves_in_a_new_process(runs: dict[str, hasten.Run]):
    run, texts = runs["documents"], ["a", "the", "a"]
    options = {"temperature": 2.0, "num_return": 2, "seed": 5, "max_new_tokens": 12}
    found = predict_in_new_process(
        run.folder,
        *texts,
        *("--temperature", "2", "--n-best", "2", "--seed", "5", "--max-new-tokens", "12"),
    )
    assert found == run.predict(texts, **options)
    assert found[0] != found[2]  # the same prompt, but another number
    assert found != run.predict(texts, **{**options, "seed": 6})


# Stopped and resumed

NOISY: dict[str, Any] = {
    **OWN,
    "model.dropout": 0.2,
    "model.attention_dropout": 0.1,
    "model.token_dropout": 0.1,
    "model.stochastic_depth": 0.1,
    "train.label_smoothing": 0.1,
    "train.ema_decay": 0.9,
    "train.epochs": 3,
    "train.tokens_per_step": 100,
    "train.micro_batch_tokens": 60,
    "train.learning_rate": 3e-3,
    "data.validation_fraction": 0.2,
    "eval.patience": 0,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_stopped_run_resumes_exactly(form: str, tmp_path: Path):
    pairs = [(f"{prompt} {i}", f"{response} {i}") for i in range(3) for prompt, response in PAIRS]
    settings = {**NOISY, "data.train": (str(write_form(tmp_path, form, pairs)),)}
    if form != "messages":
        settings["data.augment"] = "bpe_dropout=0.2,word_swap=0.1,char_noise=0.02"
    if form == "text":
        settings["tokenizer.max_length"] = 24  # windows are cut at other places each epoch
    assert_resumes_exactly(tmp_path, settings)


# What is learned, and how it is counted


def task_and_examples(
    path: Path, *, kind: str = "char", max_length: int = 60
) -> tuple[TextGeneration, TextExamples]:
    """The task and the examples of a file, as a run makes them."""
    file = open_rows(path)
    reading, _ = TextGeneration.choose_reading(file, sample_rows(file), WantedColumns())
    corpus = open_corpus([file], reading)
    rows, settings = np.arange(len(corpus)), TaskSettings(max_length=max_length)
    (texts,) = TextGeneration.tokenizer_texts(corpus, rows, reading, settings)
    tokenizer = train_tokenizer(texts, kind=kind, vocab_size=400, exact=True)
    task = TextGeneration.from_data(corpus, rows, reading, (tokenizer,), settings)
    return task, task.examples(corpus, rows)


def random_outputs(num_tokens: int, vocab_size: int) -> TokenOutputs:
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (
        torch.randn(n, 8, generator=generator, dtype=torch.float64)
        for n in (num_tokens, vocab_size)
    )
    return TokenOutputs(hidden.requires_grad_(), weight, 0.0)


def test_only_responses_are_learned_of_pairs(tmp_path: Path):
    path = write_rows(tmp_path / "p.csv", [("ab", "xyz"), ("a", "y")], ("prompt", "response"))
    task, examples = task_and_examples(path)
    # A response and the token that ends it: 3 + 1 and 1 + 1.
    assert examples.weights.tolist() == [4.0, 2.0]
    assert examples.lengths.tolist() == [7, 4]  # [CLS] a b [SEP] x y z, each with a successor
    batch = examples.pack(np.array([1, 0]))
    tokenizer = task.tokenizers[0]
    names = [tokenizer.id_to_token(i) for i in batch.token_ids.tolist()]
    assert names == ["[CLS]", "a", "[SEP]", "y", "[CLS]", "a", "b", "[SEP]", "x", "y", "z"]
    assert batch.targets is not None
    targets = [None if i == IGNORED else tokenizer.id_to_token(i) for i in batch.targets.tolist()]
    assert targets == [None, None, "y", "[SEP]", None, None, None, "x", "y", "z", "[SEP]"]


def test_only_the_assistants_texts_are_learned_of_chats(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    said = [{"role": "system", "content": "q"}, *chat("ab", "xyz", "a", "y")]
    path.write_text(
        json.dumps({"messages": said}) + "\n" + json.dumps({"messages": chat("b", "x")})
    )
    task, examples = task_and_examples(path, max_length=200)
    assert examples.weights.tolist() == [(3 + 1) + (1 + 1), 1 + 1]
    batch = examples.pack(np.arange(2))
    assert batch.targets is not None
    tokenizer = task.tokenizers[0]
    learned = [tokenizer.id_to_token(i) for i in batch.targets.tolist() if i != IGNORED]
    assert learned == ["x", "y", "z", "[SEP]", "y", "[SEP]", "x", "[SEP]"]


@pytest.mark.parametrize("form", ASKED)
def test_what_is_asked_is_no_part_of_the_loss(form: str, tmp_path: Path):
    """Other prompts of the same length have the same loss under the same scores."""
    losses, gradients, weights = [], [], []
    for number, mapping in enumerate(({}, {"a": "r", "e": "o", "h": "t", "p": "d"})):
        table = str.maketrans(mapping)
        pairs = [(prompt.translate(table), response) for prompt, response in PAIRS]
        (folder := tmp_path / str(number)).mkdir()
        path = write_form(folder, form, pairs)
        task, examples = task_and_examples(path, kind="byte", max_length=120)
        batch = examples.pack(np.arange(8), weight=float(examples.weights.sum()))
        outputs = random_outputs(batch.num_tokens, task.num_classes)
        loss = task.loss_sum(outputs, batch)
        loss.backward()
        losses.append(loss.item())
        gradients.append(outputs.hidden_ND.grad)
        weights.append(examples.weights)
        assert batch.targets is not None and outputs.hidden_ND.grad is not None
        is_felt = outputs.hidden_ND.grad.abs().sum(1) > 0
        assert torch.equal(is_felt, batch.targets != IGNORED)
        # By hand: a byte a token, and the end of each response.
        by_hand = [len(response.encode()) + 1 for _, response in PAIRS]
        assert examples.weights.tolist() == by_hand and is_felt.sum() == sum(by_hand)
    assert losses[0] == losses[1] and torch.equal(gradients[0], gradients[1])


def test_what_is_cut_of_a_pair_is_not_counted(tmp_path: Path):
    rows = [("ab", "x" * 90), ("a" * 90, "xy"), ("a" * 90, "x" * 90), ("ab", "xy")]
    path = write_rows(tmp_path / "p.csv", rows, ("prompt", "response"))
    _, examples = task_and_examples(path, max_length=20)
    # 21 tokens, of which 3 are special: the longer text is cut, and the end of a response stays.
    assert examples.lengths.tolist() == [20, 20, 20, 6]
    assert examples.weights.tolist() == [16 + 1, 2 + 1, 9 + 1, 2 + 1]
    assert examples.num_truncated == 3


# Bits per byte


def bits_by_hand(run: hasten.Run, ids: Sequence[int], num_given: int = 1) -> float:
    """Minus log2 of the probability of each token but the first few, all read at once."""
    with torch.inference_mode():
        outputs = run.saved.model(torch.tensor([ids[:-1]]))
        assert isinstance(outputs, TokenOutputs)
        probabilities = outputs.scores().double().softmax(-1)
    return -sum(
        math.log2(probabilities[place - 1, ids[place]].item())
        for place in range(num_given, len(ids))
    )


def test_bits_per_byte_of_a_continuous_text_by_hand(runs: dict[str, hasten.Run], tmp_path: Path):
    run, path = runs["text"], tmp_path / "other.txt"
    text = "abcä€x中éabd👍🏽yzä" + ALPHABET[30:60] + "zyxw"
    path.write_text(text, encoding="utf-8")
    ids = [run.task.tokenizers[0].token_to_id(character) for character in text]
    assert None not in ids
    # Windows of 16 predicted tokens; each begins with the last of the one before.
    windows = [ids[i : i + 17] for i in range(0, len(ids) - 1, 16)]
    found = run.evaluate(path)
    bits = sum(bits_by_hand(run, window) for window in windows)
    assert found["num_tokens"] == len(text) - 1
    assert found["bits_per_byte"] == pytest.approx(bits / len(text.encode()), rel=1e-5)
    assert found["loss"] == pytest.approx(bits * math.log(2) / (len(text) - 1), rel=1e-5)


@pytest.mark.parametrize("form", ["documents", *ASKED])
def test_bits_per_byte_of_texts_by_hand(form: str, runs: dict[str, hasten.Run], tmp_path: Path):
    run = runs[form]
    pairs = [("ein Ei", "an ägg"), ("two", "zwei €"), ("a saw, a saw", "eine Säge")]
    path = write_form(tmp_path, form, pairs)
    tokenizer = run.task.tokenizers[0]
    begin, end = (tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text).ids

    bits = num_bytes = 0.0
    for (prompt, response), (instruction, given) in zip(pairs, instructions(pairs), strict=True):
        if form == "documents":
            asked, answer = [begin], f"{prompt}: {response}"
        elif form != "messages":
            joined = f"{instruction}\n\n{given}" if given else instruction
            asked = {"question": f"{prompt[0]}?\n{prompt}", "instruction": joined}.get(form, prompt)
            asked, answer = [begin, *encode(asked), end], response
        else:
            parts = [encode(part) for part in ("user", prompt, "assistant")]
            asked, answer = [begin, *(i for part in parts for i in (*part, end))], response
        bits += bits_by_hand(run, [*asked, *encode(answer), end], len(asked))
        num_bytes += len(answer.encode())
    assert run.evaluate(path)["bits_per_byte"] == pytest.approx(bits / num_bytes, rel=1e-5)


# Data of odd shapes


@pytest.mark.parametrize("text", ["ab", "a line\n", "one block of text\n" * 30])
def test_a_text_of_one_block_has_no_validation(text: str, tmp_path: Path):
    path, observer = tmp_path / "t.txt", Recorder()
    path.write_text(text)
    settings = {**OWN, "train.epochs": 1}
    run = hasten.train(path, output=tmp_path / "run", settings=settings, observer=observer)
    assert "validation" not in run.result and run.result["judged_on"] == "train"
    assert observer.evaluations == []


def test_several_files_are_several_texts(tmp_path: Path):
    """No window goes from one file into the next, and rows not used part a text."""
    paths = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for path in paths:
        path.write_text(path.stem * 3000)
    file_one, file_two = (open_rows(path) for path in paths)
    reading, _ = TextGeneration.choose_reading(file_one, sample_rows(file_one), WantedColumns())
    corpus = open_corpus([file_one, file_two], reading)
    assert len(corpus) == 2
    tokenizer = train_tokenizer(["onetwo"], kind="char", vocab_size=20, exact=True)
    settings = TaskSettings(max_length=700)
    task = TextGeneration.from_data(corpus, np.arange(2), reading, (tokenizer,), settings)
    examples = task.examples(corpus, np.arange(2))
    # 9,000 characters each, of which all but the first are predicted.
    assert examples.lengths.tolist() == ([700] * 12 + [599]) * 2
    assert examples.rows.tolist() == [0] * 13 + [1] * 13
    assert examples.lines([0, 25]) == {str(path): [1] for path in paths}
    for epoch in range(4):
        lengths = examples.in_epoch(epoch).lengths
        assert lengths.sum() == 2 * 8999 and lengths.max() == 700
    firsts = {int(examples.in_epoch(epoch).lengths[0]) for epoch in range(1, 6)}
    assert len(firsts) > 1  # cut at other places


def test_rows_of_a_text_that_are_no_neighbours_are_several_texts(tmp_path: Path):
    path = tmp_path / "t.txt"
    lines = [f"{i:04} " + "x" * 4090 + "\n" for i in range(5)]
    path.write_text("".join(lines))
    _, examples = task_and_examples(path, max_length=1000)
    corpus: Corpus = examples.corpus
    assert len(corpus) == 5
    size = len(lines[0])
    parted = examples.task.examples(corpus, np.array([0, 1, 3, 4]))
    assert parted.lengths.sum() == 2 * (2 * size - 1)
    assert {int(row) for row in parted.rows} == {0, 1, 3, 4}
    together = examples.task.examples(corpus, np.array([0, 1, 2, 3, 4]))
    assert together.lengths.sum() == 5 * size - 1


def test_chats_cannot_be_augmented(tmp_path: Path):
    path = write_form(tmp_path, "messages", PAIRS * 2)
    settings = {**OWN, "data.augment": "word_swap"}
    with pytest.raises(UsageError, match=r"data\.augment has no effect on chat messages"):
        hasten.train(path, output=tmp_path / "run", settings=settings)
    assert not (tmp_path / "run").exists()


# Files to predict


def labelled(run: hasten.Run, rows: list[dict[str, Any]], **options: Any) -> tuple[Any, list[str]]:
    """Writes rows, predicts them, and returns what became of them and what was warned of."""
    path, output, warnings = run.folder.parent / "in.jsonl", run.folder.parent / "out.jsonl", []
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = run.settings(**options)
    label_file(run, path, output, settings=settings, warn=warnings.append)
    return [json.loads(line) for line in output.read_text("utf-8").splitlines()], warnings


@pytest.mark.parametrize("form", ASKED)
def test_the_rows_of_the_training_are_answered_in_a_file(form: str, runs: dict[str, hasten.Run]):
    """The columns of a file are joined to the same prompts as in training."""
    run = runs[form]
    file = open_rows(run.folder.parent / f"{form}.{'jsonl' if form == 'messages' else 'csv'}")
    rows = [dict(zip(file.columns, row.cells, strict=True)) for row in sample_rows(file)]
    found, warnings = labelled(run, rows)
    assert [row.pop("generated") for row in found] == expected_of(form) and not warnings
    assert [row for row in found if row.pop("score")] == rows


def test_a_file_to_predict_may_lack_the_column_of_inputs(runs: dict[str, hasten.Run]):
    run = runs["instruction"]
    both = zip(instructions(PAIRS), expected_of("instruction"), strict=True)
    asked = [(row, text) for row, text in both if not row[1]]
    for rows in (
        [{"instruction": row[0]} for row, _ in asked],
        [{"id": 1, "instruction": row[0]} for row, _ in asked],
        [{"instruction": row[0], "input": None} for row, _ in asked],
    ):
        found, _ = labelled(run, rows)
        assert [row["generated"] for row in found] == [text for _, text in asked]
    assert predict(run, [row[0] for row, _ in asked]) == [text for _, text in asked]
    (found,) = predict_in_new_process(run.folder, asked[0][0][0])
    assert found["generated"] == asked[0][1]
    with pytest.raises(UsageError, match=r"takes 2 texts .* \(instruction, input\)"):
        run.predict([("a", "b", "c")])


SAID = {"role": "user", "content": "an eagle "}
ANSWER = {"role": "assistant", "content": "ein Adler"}
SYSTEM = {"role": "system", "content": "one owl"}
# chat -> what comes before the assistant's turn
CHATS: dict[str, tuple[list[Any], list[str]]] = {
    "user last": ([SAID], ["user", "an eagle"]),
    "assistant last": ([SAID, ANSWER], ["user", "an eagle"]),
    "an empty answer": ([SAID, {**ANSWER, "content": ""}], ["user", "an eagle"]),
    "a system prompt": ([SYSTEM, SAID], ["system", "one owl", "user", "an eagle"]),
    "several turns": (
        [SAID, ANSWER, SYSTEM, ANSWER],
        ["user", "an eagle", "assistant", "ein Adler", "system", "one owl"],
    ),
    "as ShareGPT": ([{"from": "human", "value": "figs"}], ["user", "figs"]),
}


def test_chats_are_answered_where_the_assistant_has_the_word(runs: dict[str, hasten.Run]):
    """The score of the first token is what the model gives it after the chat, token by token."""
    run = runs["messages"]
    rows = [{"id": name, "messages": chat} for name, (chat, _) in CHATS.items()]
    found, warnings = labelled(run, rows, max_new_tokens=1)
    assert [{"id": row["id"], "messages": row["messages"]} for row in found] == rows
    assert not warnings
    tokenizer = run.task.tokenizers[0]
    begin, end = (tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))
    for row, (chat, turns) in zip(found, CHATS.values(), strict=True):
        ids = [begin]
        for part in (*turns, "assistant"):
            ids += [*tokenizer.encode(part).ids, end]
        with torch.inference_mode():
            outputs = run.saved.model(torch.tensor([ids]))
            assert isinstance(outputs, TokenOutputs)
            scores = outputs.scores().double().log_softmax(-1)[-1]
        assert row["score"] == pytest.approx(scores.max().item(), abs=2e-6)
        (said,) = run.predict([json.dumps(chat)], max_new_tokens=1)
        assert said["generated"] == row["generated"]


def test_a_text_is_what_the_user_says(runs: dict[str, hasten.Run]):
    (asked, answer), run = PAIRS[6], runs["messages"]
    for text in (asked, f" {asked}\n", json.dumps([{"role": "user", "content": asked}])):
        assert predict(run, [text]) == [answer]
    for text in ("[]", '["user", "an eagle"]', "7", "null", '{"role": "user"}'):
        assert isinstance(predict(run, [text], max_new_tokens=2)[0], str)
    with pytest.raises(UsageError, match="a message lacks a role or a content"):
        run.predict(['[{"role": "user"}]'])


def test_chats_that_cannot_be_answered_are_kept_and_named(runs: dict[str, hasten.Run]):
    reasons = {
        "there is no message before the assistant's": [ANSWER],
        "the messages are not a list of at least one": [],
        "a message is not a JSON object": ["an eagle"],
        "a message lacks a role or a content": [{"role": "user"}],
        "the content of a message of the user is empty": [{**SAID, "content": " "}],
        "the text is empty": None,
    }
    rows = [{"messages": chat} for chat in [[SAID], *reasons.values()]]
    assert len(reasons) == 6
    found, warnings = labelled(runs["messages"], rows, max_new_tokens=2)
    assert [row["messages"] for row in found] == [row["messages"] for row in rows]
    assert [row["generated"] is None for row in found] == [False] + [True] * 6
    expected = [f"line {n}: {reason}; no output" for n, reason in enumerate(reasons, start=2)]
    assert [warning.partition(", ")[2] for warning in warnings] == expected[:5]


@pytest.mark.parametrize("form", ASKED)
def test_prompts_longer_than_the_model_stop_neither_training_nor_a_file(form: str, tmp_path: Path):
    pairs = [(f"{prompt} " * 5 + str(i), response) for i, (prompt, response) in enumerate(PAIRS)]
    path, observer = write_form(tmp_path, form, pairs), Recorder()
    settings = {**OWN, "tokenizer.kind": "char", "tokenizer.max_length": 40, "train.epochs": 1}
    run = hasten.train(
        path, test=path, output=tmp_path / "run", settings=settings, observer=observer
    )
    assert run.result["test"]["samples"]
    file = open_rows(path)
    rows = [dict(zip(file.columns, row.cells, strict=True)) for row in sample_rows(file)]
    found, warnings = labelled(run, rows, max_new_tokens=1)
    assert [row["generated"] for row in found] == [None] * 8
    assert "line " in warnings[0] and "longer than the model's 40 positions" in warnings[0]
