"""Tokens to hidden states to outputs: plain modules that know nothing of training."""
