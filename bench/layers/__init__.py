"""One layer at a time: codes, noise, time, and what an engine made of it."""
