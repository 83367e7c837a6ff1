"""Constrained decoding for tool calls and structured output, with llguidance."""
