"""From a float network to one on integer grids: quantizers, tracing, and what they ask of a graph."""
