"""The blind vote: two models answer the same prompts, somebody says which answer is better and does not know whose."""
