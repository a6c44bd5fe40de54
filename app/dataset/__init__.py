"""What the Dataset tab is made of: bringing pictures in, the grid, captions, checks."""
