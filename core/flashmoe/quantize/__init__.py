"""Write checkpoints with fewer bits per weight."""
