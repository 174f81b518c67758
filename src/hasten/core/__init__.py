"""What every other package rests on: the batch, errors, files, seeds."""
