"""The trainable part: layer, flat parameters, targets, injection, and the one in-memory adapter."""
