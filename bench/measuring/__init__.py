"""Time and memory of a call, and the shapes that are measured."""
