"""Talk to a model, and measure it."""
