"""Experiments: do the training methods do what their papers say, at a small scale? A script each, a table each in docs/experiments."""
