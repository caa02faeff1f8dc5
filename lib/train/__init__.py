"""Training: the model family, its augmentation, the one training loop, and the search."""
