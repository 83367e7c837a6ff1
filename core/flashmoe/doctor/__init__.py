"""Report what this installation uses, and find what is wrong with it."""
