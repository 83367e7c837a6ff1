"""Predict whether and how fast a model will run, before it is downloaded."""
