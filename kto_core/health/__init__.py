"""What the log of a run says of its health, in sentences with what to change."""
