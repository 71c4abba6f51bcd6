"""Rules of differentiation: one family of operators a module."""
