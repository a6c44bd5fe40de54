"""LoRA Easel's engine. Empty on purpose: importing a module without torch never imports torch."""
