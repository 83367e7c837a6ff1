"""mlx-lm's models with experts that stay on disk."""
