"""The smallest training loop that is complete, and the demo that it runs."""
