"""A model for Ollama: its chat template in Go's template language, and a Modelfile with all that belongs to it."""
