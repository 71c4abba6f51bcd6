"""TensorRT: plans, their sidecars, and the CUDA runtime beneath them."""
