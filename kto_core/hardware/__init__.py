"""GPUs, who uses them, and what happens when memory runs out."""
