"""From files to rows, from rows to token ids."""
