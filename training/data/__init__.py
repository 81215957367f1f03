"""Rows of training data: where they come from, what is read of them, and in which order."""
