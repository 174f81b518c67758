"""The programs in examples/ run as a person would run them."""

from __future__ import annotations

import csv
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NUM_TRAIN, NUM_TEST = 6500, 120
NUM_EPOCHS = 2
TIMEOUT_SECONDS = 300
WORDS = {
    "sea": ["harbour", "sail", "tide", "anchor", "wave"],
    "mountain": ["summit", "ridge", "glacier", "rope", "valley"],
}
FILLER = ["the", "a", "of", "near", "old", "and", "long", "day", "we", "saw"]


def write(path, num_rows, seed):
    """Texts of which one or two words tell the label, among words that do not."""
    rng = random.Random(seed)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(num_rows):
            label = rng.choice(sorted(WORDS))
            words = rng.choices(FILLER, k=rng.randint(2, 6))
            words += rng.sample(WORDS[label], k=rng.randint(1, 2))
            rng.shuffle(words)
            writer.writerow([" ".join(words), label])


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("article")
    write(folder / "train.csv", NUM_TRAIN, seed=1)
    write(folder / "test.csv", NUM_TEST, seed=2)
    sizes = ["--num-layers", "2", "--hidden-size", "16", "--num-heads", "2"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "article.py"), "--epochs", str(NUM_EPOCHS), *sizes],
        cwd=folder,  # it reads train.csv and test.csv where it is run
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_the_article_reports_every_hundred_batches(printed):
    num_batches = -(-NUM_TRAIN // 64)
    lines = [
        re.fullmatch(r"Epoch (\d+)/(\d+) Batch (\d+)/(\d+) Loss (\d+\.\d{4})", line)
        for line in printed[:-2]
    ]
    assert all(lines)
    assert [tuple(map(int, line.groups()[:4])) for line in lines if line] == [
        (epoch, NUM_EPOCHS, 100, num_batches) for epoch in range(1, NUM_EPOCHS + 1)
    ]


def test_the_article_learns(printed):
    loss = re.fullmatch(r"Test Loss (\d+\.\d{4})", printed[-2])
    accuracy = re.fullmatch(r"Accuracy (\d\.\d{4})", printed[-1])
    assert loss and accuracy
    assert float(accuracy.group(1)) > 0.95  # chance is about 0.5
    assert float(loss.group(1)) < 0.3  # chance is 0.69


def test_the_article_counts_over_all_examples(printed):
    accuracy = float(printed[-1].split()[1])
    assert round(accuracy * NUM_TEST) / NUM_TEST == pytest.approx(accuracy, abs=5e-5)


def test_the_article_says_what_is_wrong_with_a_file(tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "article.py"), "absent.csv"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode != 0
    assert "absent.csv: there is no such file" in done.stderr
