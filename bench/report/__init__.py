"""`python -m bench.report`: one HTML file with what was trained, exported and measured."""
