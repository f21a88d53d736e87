"""A row or a chat becomes the text and the token ids that the model sees."""
