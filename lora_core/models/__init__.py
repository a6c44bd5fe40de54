"""The frozen base model: opening it, turning pictures and captions into its inputs, calling its UNet."""
