"""Generate the answers of one loaded model."""
