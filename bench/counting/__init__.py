"""Bytes, FLOPs, launches and compiled kernels, counted without running."""
