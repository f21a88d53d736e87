"""A run's settings."""
