"""Correctness before any number: a contestant that computes something else is not timed."""
