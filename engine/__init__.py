"""Devices, memory, tiling, and the built-in workflow runner."""
