"""Merge, GGUF, upload."""
