"""What is done to an exported graph, in place: one pass a module."""
