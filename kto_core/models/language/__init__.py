"""The language model inside a model: where it is, what of it LoRA adapts."""
