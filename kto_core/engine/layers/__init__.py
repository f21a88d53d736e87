"""What a packed pass puts in place of the model's own layers."""
