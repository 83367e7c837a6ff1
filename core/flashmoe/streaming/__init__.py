"""Read experts from the SSD into slots and compute an expert block from them."""
