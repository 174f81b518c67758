"""A run: data, model and optimizer put together, the one loop, checkpoints, evaluation."""
