"""What the Export tab is made of: where a file works, copies for other tools, a look at any LoRA."""
