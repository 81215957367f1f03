"""Adapters on disk, in PEFT's files."""
