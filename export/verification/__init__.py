"""Proof, before a file is written, that it computes and explains what was trained."""
