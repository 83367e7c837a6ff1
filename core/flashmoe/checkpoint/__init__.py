"""Read MLX checkpoints: config.json, safetensors headers and the byte range of each expert."""
