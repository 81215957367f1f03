"""Modules: the DoRA layer, what it keeps for inference, what it would run, and which layers it cannot take."""
