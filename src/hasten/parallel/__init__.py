"""Several processes for one run, on PyTorch Distributed."""
