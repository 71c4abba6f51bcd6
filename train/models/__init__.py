"""Architectures: ours, torchvision's, and the user's."""
