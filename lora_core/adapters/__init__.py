"""The trainable part: which layers are adapted, how, and the one in-memory form that all file formats
translate."""
