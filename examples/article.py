"""The article's program, working: a Transformer that learns to classify texts, in one file.

    python examples/article.py [train.csv] [test.csv] [--epochs 10]

Line for line the program that this project began from. As it was printed it could not run or
could not learn; what was wrong, and where it is put right here:

- ``MyDataset`` was never defined. It is ``hasten.TextDataset``; the test set takes the training
  set's vocabulary and labels, or the same word would have two numbers.
- The layers had no residual connections, and each was given the embeddings instead of the layer
  below: only the last one counted. ``hasten.Transformer`` chains its layers, residuals and all.
- The mask was passed on and never used, so that texts depended on the padding beside them.
  Here padding is removed at the door: (input_ids, mask) is packed and takes the path of all else.
- The position table had the shape of one sentence and was never learned. Here it is learned.
- Scores were taken at each word where there is one label a text. Here the words are averaged.
- DataLoader cannot stack texts of different lengths. ``TextDataset.collate`` pads them.
- Dropout stayed on in the test, and gradients were kept. ``model.eval()``, ``torch.no_grad()``.
- Test loss and accuracy were means over batches, in which the last, smaller one counts too much.
  Here both are counted over all examples.

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

# Training
for epoch in range(num_epochs):
    model.train()
    for batch, (input_ids, mask, labels) in enumerate(train_loader, start=1):
        optimizer.zero_grad()
        outputs = model(input_ids, mask)
        loss = criterion(outputs, labels)
        loss.backward()
        optimizer.step()
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
