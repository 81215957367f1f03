"""Result rows: recorded, read, compared and laid out as tables."""
