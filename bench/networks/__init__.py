"""Networks to measure, whatever runs them."""
