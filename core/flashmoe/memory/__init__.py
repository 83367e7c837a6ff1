"""Measure memory and split a budget between dense weights, caches and expert slots."""
