"""A record, as people write it, becomes a row."""
