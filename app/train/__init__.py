"""What the Train tab is made of: the form, what is said before Start, the run, the queue, earlier runs."""
