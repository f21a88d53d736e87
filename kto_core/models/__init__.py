"""Where a base model is, how big it is, how it is loaded."""
