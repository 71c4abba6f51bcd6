"""Stage one: quantization-aware and saliency-guided training, from images to a checkpoint."""
