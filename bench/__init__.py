"""Measurements on the device: latency, accuracy, saliency metrics, each with its environment."""
