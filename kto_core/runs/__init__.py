"""A run's folder: events, state, checkpoints, locks."""
