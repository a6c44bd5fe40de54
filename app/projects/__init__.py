"""Projects: each with its pictures, captions, draft and runs; and the picker in the header."""
