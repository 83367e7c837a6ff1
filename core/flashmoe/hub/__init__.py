"""Model names, and downloads from the Hugging Face hub."""
