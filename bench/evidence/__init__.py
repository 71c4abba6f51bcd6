"""What this repository shows of its own: tables of results, published figures, cards."""
