"""Fine-tuning from the command line: `python -m training`. It uses the engine; the engine does not know of it."""
