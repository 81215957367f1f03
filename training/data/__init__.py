"""Training data: reading files, checking rows, tokenising them, and their order."""
