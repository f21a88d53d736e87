"""What keeps one bad thing from breaking another: bounded reads, plain text, processes of their own."""
