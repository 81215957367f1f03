"""The base model, its adapter and its optimizer, from flags."""
