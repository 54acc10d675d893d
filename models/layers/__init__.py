"""Layers that at least two networks use, under their textbook names."""
