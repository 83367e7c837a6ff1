"""Feed mutated checkpoints and requests to flashmoe: `python -m fuzz --help`, or `make fuzz`."""
