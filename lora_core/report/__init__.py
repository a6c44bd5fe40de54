"""A run as one page that can be passed on: a single HTML file without scripts that asks for nothing."""
