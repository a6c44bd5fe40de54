"""The window: a reader of folders that starts fast and never imports torch."""
