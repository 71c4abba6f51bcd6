"""Quantization without training again (PTQ): clipping, cross-layer equalization, bias correction."""
