"""Predict whether a model runs on a machine, and how fast."""
