"""The Hugging Face Hub: uploads, what a base model states of itself, and what stays on this machine."""
