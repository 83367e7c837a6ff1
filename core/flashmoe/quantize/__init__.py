"""Write a checkpoint with fewer bits."""
