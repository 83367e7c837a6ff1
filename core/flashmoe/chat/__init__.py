"""Turn messages into prompt tokens, and tokens into text, reasoning and tool calls."""
