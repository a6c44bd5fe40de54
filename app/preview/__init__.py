"""What the Preview tab is made of: the form, pictures, strip and grid, and what was drawn before."""
