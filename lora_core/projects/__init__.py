"""Projects: a dataset with its draft of settings, edits and runs. No torch."""
