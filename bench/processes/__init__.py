"""Whole processes, measured from outside: their start, their memory, and what is left of them when killed."""
