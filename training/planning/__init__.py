"""A training step counted on tensors without values: every allocation, and nothing computed."""
