"""Saliency: the methods, the map of an image, its picture, and how much two maps agree."""
