"""What dense tasks are made of: maps of patch tokens, pyramids, heads, and the loop that trains them."""
