"""TextDataset: what it reads, how it numbers, and what it refuses."""

from __future__ import annotations

import gzip
import json
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

import hasten
from hasten import HastenError, TextDataset
from hasten.core.errors import DataError, UsageError
from hasten.data.rows import open_rows
from hasten.data.tokenizer import train_tokenizer

TRAIN = [
    ("the film is a delight", "positive"),
    ("a dull and lifeless film", "negative"),
    ("a delight from start to end", "positive"),
    ("lifeless , dull and far too long a film", "negative"),
    ("warm and funny", "positive"),
    ("tired", "negative"),
]


def write(path, rows, header=("text", "label")):
    lines = [",".join(f'"{cell}"' for cell in row) for row in [header, *rows] if row]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def train_file(tmp_path):
    return write(tmp_path / "train.csv", TRAIN)


@pytest.fixture
def train(train_file):
    return TextDataset(train_file, tokenizer="word")


def test_it_is_a_public_name():
    assert hasten.TextDataset is TextDataset


def test_every_row_is_an_example_in_the_order_of_the_file(train):
    assert len(train) == len(TRAIN)
    assert train.labels == ("negative", "positive")
    words = {number: token for token, number in train.vocab.items()}
    for (text, label), (token_ids, number) in zip(TRAIN, train, strict=True):
        assert token_ids.dtype == torch.int64
        assert isinstance(number, int)
        assert train.labels[number] == label
        # A word seen once is unknown; the others come back as they were.
        pairs = zip(text.split(), (words[i] for i in token_ids.tolist()), strict=True)
        assert all(found in (word, "[UNK]") for word, found in pairs)
    assert "delight" in train.vocab


def test_vocab_maps_each_token_to_its_id(train):
    assert len(train.vocab) == train.tokenizer.get_vocab_size()
    assert list(train.vocab.values()) == list(range(len(train.vocab)))


def test_indices_count_from_both_ends(train):
    last, label = train[len(train) - 1]
    assert torch.equal(train[-1][0], last)
    assert train[-1][1] == label
    with pytest.raises(IndexError):
        train[len(train)]
    with pytest.raises(IndexError):
        train[-len(train) - 1]


def test_examples_do_not_share_memory_with_the_dataset(train):
    before = train[0][0].clone()
    train[0][0].zero_()
    assert torch.equal(train[0][0], before)


def test_collate_pads_on_the_right_and_masks_the_padding(train):
    examples = [train[5], train[3], train[0]]
    input_ids, mask, labels = train.collate(examples)
    longest = max(len(token_ids) for token_ids, _ in examples)
    assert input_ids.shape == mask.shape == (3, longest)
    assert (input_ids.dtype, mask.dtype, labels.dtype) == (torch.int64, torch.bool, torch.int64)
    assert labels.tolist() == [label for _, label in examples]
    assert (input_ids[~mask] == train.vocab["[PAD]"]).all()
    for row, real, (token_ids, _) in zip(input_ids, mask, examples, strict=True):
        assert torch.equal(row[real], token_ids)
        assert torch.equal(real, torch.arange(longest) < len(token_ids))


def test_the_model_takes_its_batches(train):
    model = hasten.Transformer(len(train.vocab), 1, 8, 2, 0.0).eval()
    loader = DataLoader(train, batch_size=4, collate_fn=train.collate)
    padded = torch.cat([model(input_ids, mask) for input_ids, mask, _ in loader])
    single = torch.cat([model(token_ids[None]) for token_ids, _ in train])
    torch.testing.assert_close(padded, single, atol=1e-5, rtol=0)


def test_a_loader_visits_every_example_once_with_workers_too(train):
    for num_workers in (0, 2):
        loader = DataLoader(
            train, batch_size=4, shuffle=True, num_workers=num_workers, collate_fn=train.collate
        )
        seen = [
            tuple(row[real].tolist())
            for input_ids, mask, _ in loader
            for row, real in zip(input_ids, mask, strict=True)
        ]
        assert sorted(seen) == sorted(tuple(token_ids.tolist()) for token_ids, _ in train)


def test_it_travels_to_a_worker_that_is_started_afresh(train):
    twin = pickle.loads(pickle.dumps(train))
    assert len(twin) == len(train)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(train, twin, strict=True))
    assert twin.vocab == train.vocab


def test_like_takes_tokenizer_labels_columns_and_limit(tmp_path, train_file):
    train = TextDataset(train_file, max_length=3)
    # Another order of columns and of labels, one label only, words that training never saw.
    rows = [("positive", "a delight", "x"), ("positive", "wholly unseen words", "y")]
    path = write(tmp_path / "test.csv", rows, ("label", "text", "extra"))
    test = TextDataset(path, like=train)
    assert test.vocab == train.vocab
    assert test.labels == train.labels
    assert [label for _, label in test] == [1, 1]
    assert test.text_columns == ("text",)
    assert max(len(token_ids) for token_ids, _ in test) == test.max_length == 3
    assert torch.equal(test[0][0], torch.tensor(train.tokenizer.encode("a delight").ids[:3]))


def test_an_unlike_test_set_would_number_words_differently(tmp_path, train):
    path = write(tmp_path / "test.csv", TRAIN[::-1][:4] + [("film", "positive")] * 3)
    assert TextDataset(path, tokenizer="word").vocab != train.vocab
    assert TextDataset(path, like=train).vocab == train.vocab


def test_whole_numbers_are_sorted_by_value(tmp_path):
    rows = [(f"text number {i}", str(i % 12)) for i in range(48)]
    dataset = TextDataset(write(tmp_path / "train.csv", rows))
    assert dataset.labels == tuple(map(str, range(12)))


def test_cut_texts_are_counted(tmp_path, train_file):
    dataset = TextDataset(train_file, tokenizer="word", max_length=4)
    assert dataset.num_truncated == sum(len(text.split()) > 4 for text, _ in TRAIN) == 4
    assert TextDataset(train_file, tokenizer="word").num_truncated == 0


def test_a_tokenizer_file_is_used_as_it_is(tmp_path, train_file):
    tokenizer = train_tokenizer(["another text altogether"] * 3, kind="bpe", vocab_size=300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    dataset = TextDataset(train_file, tokenizer=tmp_path / "tokenizer.json")
    assert dataset.vocab == tokenizer.get_vocab()


def test_vocab_size_bounds_the_vocabulary(train_file):
    assert len(TextDataset(train_file, tokenizer="word", vocab_size=8).vocab) == 8


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "word", "char", "byte"])
def test_every_kind_of_tokenizer_works(train_file, kind):
    dataset = TextDataset(train_file, tokenizer=kind)
    assert all(0 <= int(token_ids.max()) < len(dataset.vocab) for token_ids, _ in dataset)


def test_json_lines_gzip_and_several_text_columns(tmp_path):
    path = tmp_path / "train.jsonl.gz"
    rows = [{"title": t[:6], "body": t, "label": label} for t, label in TRAIN]
    rows.append({"title": "", "body": "warm and funny", "label": "positive"})
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    dataset = TextDataset(path, text_columns=["title", "body"], label_column="label")
    assert len(dataset) == len(rows)
    assert dataset.text_columns == ("title", "body")
    encoded = [dataset.tokenizer.encode(TRAIN[1][0][:6]), dataset.tokenizer.encode(TRAIN[1][0])]
    assert dataset[1][0].tolist() == encoded[0].ids + encoded[1].ids


def test_json_and_parquet_are_read_like_a_table(tmp_path, train_file):
    import pyarrow
    import pyarrow.parquet

    wanted = TextDataset(train_file)
    rows = [{"text": text, "label": label} for text, label in TRAIN]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    for name in ("train.json", "train.parquet"):
        found = TextDataset(tmp_path / name)
        assert (found.vocab, found.labels) == (wanted.vocab, wanted.labels)
        for ours, theirs in zip(found, wanted, strict=True):
            assert torch.equal(ours[0], theirs[0]) and ours[1] == theirs[1]


@pytest.mark.parametrize("name", ["novel.txt", "chats.jsonl"])
def test_a_file_without_labels_is_refused(tmp_path, name):
    text = '{"messages": [{"role": "user", "content": "Hi"}]}\n' if name[0] == "c" else "A night.\n"
    (tmp_path / name).write_text(text * 3)
    with pytest.raises(DataError, match=rf"{name}: no column looks like"):
        TextDataset(tmp_path / name)


def test_a_file_opened_by_hand_is_read_as_it_was_opened(tmp_path):
    path = tmp_path / "train.csv"
    text = "text,label\n" + "".join(f"{t.replace(',', '')} é,{label}\n" for t, label in TRAIN)
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(HastenError):
        TextDataset(path)
    dataset = TextDataset(open_rows(path, encoding="latin-1"))
    assert len(dataset) == len(TRAIN)


def test_rows_that_cannot_be_used_are_kept_with_line_and_reason(tmp_path):
    path = write(tmp_path / "train.csv", [*TRAIN, *TRAIN, ("no label here", ""), *TRAIN])
    with pytest.warns(UserWarning, match=r"1 of 19 rows cannot be used.*line 14") as caught:
        dataset = TextDataset(path)
    assert caught[0].filename == __file__
    assert len(dataset) == 18
    assert [(entry.line, entry.reason) for entry in dataset.rejected] == [
        (14, "the label is empty")
    ]


def test_half_of_a_surrogate_pair_is_rejected(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [{"text": text, "label": label} for text, label in TRAIN * 3]
    rows.insert(2, {"text": "half \ud800", "label": "positive"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.warns(UserWarning, match="line 3"):
        assert len(TextDataset(path)) == len(rows) - 1


def fails(error, *arguments, **options):
    with pytest.raises(error) as caught:
        TextDataset(*arguments, **options)
    assert isinstance(caught.value, HastenError)
    message = str(caught.value)
    assert message.count("\n") <= 1
    return message


def test_a_missing_file_is_named(tmp_path):
    assert "absent.csv" in fails(DataError, tmp_path / "absent.csv")


def test_too_many_bad_rows_are_an_error_that_names_the_first(tmp_path):
    path = write(tmp_path / "train.csv", [*TRAIN, ("no label", "")])
    message = fails(DataError, path)
    assert str(path) in message
    assert "1 of 7 rows" in message
    assert "line 8" in message


def test_an_unclosed_quote_is_named_with_its_line(tmp_path):
    path = write(tmp_path / "train.csv", TRAIN)
    with path.open("a") as file:
        file.write('"never closed,positive\nmore,negative\n')
    message = fails(DataError, path)
    assert f"{path}, line 8" in message


def test_a_label_that_training_never_saw_is_named_with_its_line(tmp_path, train, train_file):
    path = write(tmp_path / "test.csv", [*TRAIN[:2], ("so so", "neutral")])
    message = fails(DataError, path, like=train)
    assert f"{path}, line 4: the label 'neutral' does not occur in {train_file}" in message


def test_one_class_only_is_refused(tmp_path):
    path = write(tmp_path / "train.csv", [(text, "same") for text, _ in TRAIN])
    message = fails(DataError, path, text_columns=["text"], label_column="label")
    assert str(path) in message
    assert "at least two classes" in message


def test_a_test_file_without_the_columns_names_file_and_column(tmp_path, train):
    path = write(tmp_path / "test.csv", TRAIN, ("text", "lable"))
    message = fails(UsageError, path, like=train)
    assert str(path) in message
    assert "Did you mean 'lable'?" in message


def test_an_unknown_column_names_the_file(train_file):
    assert str(train_file) in fails(UsageError, train_file, label_column="sentiment")


def test_an_unknown_tokenizer_names_the_nearest(train_file):
    assert "Did you mean 'wordpiece'?" in fails(UsageError, train_file, tokenizer="wordpeice")
    assert "absent.json" in fails(UsageError, train_file, tokenizer="absent.json")


def test_options_beside_like_are_refused(train, train_file):
    assert "like=" in fails(UsageError, train_file, like=train, tokenizer="bpe")
    assert "max_length" in fails(UsageError, train_file, max_length=0)


def test_a_test_file_without_usable_rows_is_refused(tmp_path, train):
    path = write(tmp_path / "test.csv", [("", "positive"), ("", "negative")])
    assert str(path) in fails(DataError, path, like=train)
