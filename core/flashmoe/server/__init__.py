"""Serve a model over HTTP with OpenAI's chat completions API."""
