"""What the engine costs: compiled without a GPU, or measured on one. Run `python -m bench --help`."""
