"""Whole models: adapting them, and merging the adapters."""
