"""Compute the layers of a model, with one backend for each kind of device."""
