"""Degradations, data sets, objectives and the trainer."""
