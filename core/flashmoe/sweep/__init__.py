"""Measure what pruning and fewer bits cost in quality."""
