"""What a run would do, before it starts."""
