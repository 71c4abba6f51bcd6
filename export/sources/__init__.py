"""What may be exported besides a checkpoint: anyone's PyTorch network, and the images that its grids come from."""
