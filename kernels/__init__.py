"""Operators with more than one implementation: a folder each, with a plain reference beside the fast ones."""
