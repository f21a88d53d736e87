"""The Runs tab: all runs in a table, and the chosen ones beside each other."""
