"""Feedback that other programs export becomes plain records, one small importer for each program."""
