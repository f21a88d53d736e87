"""GGUF files: written, read, checked in llama.cpp."""
