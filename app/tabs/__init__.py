"""One module a tab, each with `TITLE` and `build()`."""
