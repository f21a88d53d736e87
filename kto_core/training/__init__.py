"""Start, queue, train."""
