"""Layers that PyTorch computes slowly on the CPU, and their derivatives."""
