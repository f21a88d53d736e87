"""`learning_rate: auto`: several rates are tried for a few steps each, and the best of them trains."""
