"""The article's program, working: a Transformer that learns to classify texts, in one file.

    python examples/article.py [train.csv] [test.csv] [--epochs 10]

Line for line the program that this project began from, which could not run as it was printed.
What was wrong with it, and how it is put right:

- The layers had no residual connections and were not chained. ``hasten.Transformer`` stacks blocks
  with residuals.
- The mask was ignored, so that a text depended on the padding beside it. Here (input_ids, mask) is
  packed at the door: no layer sees padding.
- The position table was wrong. Here each position has a learned vector.
- Accuracy was counted per batch, where the last, smaller one counts too much. Here loss and
  accuracy are counted over all examples.

What it needs besides:

- ``MyDataset`` is ``hasten.TextDataset``. The test set takes the training set's vocabulary and
  labels, or the same word would have two numbers; ``collate`` pads a batch to its longest text.
- One vector a text: the mean over its tokens.
- A warm-up of 100 batches: with Adam at the full rate from the start, the model of this size was
  still at chance after an epoch of SST-2.
- ``model.eval()`` and ``torch.no_grad()`` in the test.

``hasten train train.csv --test test.csv --preset article`` is the same run as one command.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn, optim
from torch.utils.data import DataLoader

from hasten import TextDataset, Transformer

# Hyperparameters; the model's may be made smaller on the command line.
parser = argparse.ArgumentParser(description="Train and test a Transformer on two CSV files.")
parser.add_argument("train", nargs="?", default="train.csv")
parser.add_argument("test", nargs="?", default="test.csv")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--num-layers", type=int, default=6)
parser.add_argument("--hidden-size", type=int, default=512)
parser.add_argument("--num-heads", type=int, default=8)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()
num_epochs = arguments.epochs
batch_size = 64
learning_rate = 0.001
dropout = 0.1
torch.manual_seed(arguments.seed)

# Data
train_dataset = TextDataset(arguments.train, tokenizer="word")
test_dataset = TextDataset(arguments.test, like=train_dataset)
train_loader = DataLoader(
    train_dataset, batch_size=batch_size, shuffle=True, collate_fn=train_dataset.collate
)
test_loader = DataLoader(
    test_dataset, batch_size=batch_size, shuffle=False, collate_fn=test_dataset.collate
)

# Model: the Transformer of 2017, its options named where hasten's own defaults are newer
model = Transformer(
    len(train_dataset.vocab),
    arguments.num_layers,
    arguments.hidden_size,
    arguments.num_heads,
    dropout,
    num_labels=len(train_dataset.labels),
    activation="relu",
    norm_placement="post",
    positions="learned",
)
criterion = nn.CrossEntropyLoss()
optimizer = optim.Adam(model.parameters(), lr=learning_rate)
warmup = optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=100)

# Training
for epoch in range(num_epochs):
    model.train()
    for batch, (input_ids, mask, labels) in enumerate(train_loader, start=1):
        optimizer.zero_grad()
        outputs = model(input_ids, mask)
        loss = criterion(outputs, labels)
        loss.backward()
        optimizer.step()
        warmup.step()
        if batch % 100 == 0:
            print(
                f"Epoch {epoch + 1}/{num_epochs} Batch {batch}/{len(train_loader)} "
                f"Loss {loss.item():.4f}",
                flush=True,
            )

# Test
model.eval()
test_loss = 0.0
num_correct = 0
with torch.no_grad():
    for input_ids, mask, labels in test_loader:
        outputs = model(input_ids, mask)
        test_loss += criterion(outputs, labels).item() * len(labels)
        num_correct += (outputs.argmax(dim=1) == labels).sum().item()
print(f"Test Loss {test_loss / len(test_dataset):.4f}")
print(f"Accuracy {num_correct / len(test_dataset):.4f}")
