"""What is learned: a task turns rows into examples, outputs into a loss, metrics, predictions."""
