"""Images and captions on disk. Pillow, numpy and tokenizers; no torch, so that the window can use it."""
