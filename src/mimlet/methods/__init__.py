"""What can be trained: the contract, the settings of every method, pre-training methods."""
