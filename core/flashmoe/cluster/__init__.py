"""Spread experts over several machines (experimental)."""
