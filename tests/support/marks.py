"""Marks of tests."""

import pytest


def slow(*values):
    """A parameter whose test is left to the scorecard's row `slow`; others of the same test stay in the suite."""
    return pytest.param(*values, marks=pytest.mark.slow)
