"""One packed forward for every supported architecture, LoRA in it, and the oracle over transformers + peft."""
