"""Figures of networks: what each shows is computed here, and drawn into a PNG file."""
