"""Training: the loop, optimisers, checkpoints, processes."""
