"""The frozen base model: opening it, turning images and captions into its inputs, calling its UNet."""
