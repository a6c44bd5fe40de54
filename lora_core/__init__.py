"""LoRA Easel's engine. Empty on purpose, so that importing `lora_core.spec` never imports torch."""
