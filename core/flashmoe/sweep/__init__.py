"""Measure what pruning the router and fewer bits cost in quality: `flashmoe sweep`."""
