"""Errors that a user can cause. Each message says what was wrong, where, and what to do about it."""

from __future__ import annotations


class MendError(Exception):
    """Base of every error whose text is meant for the person at the graph or the command line."""


class CheckpointError(MendError):
    """A model file cannot be used: damaged, hostile, not a model, or for another network."""


class ConfigError(MendError):
    """A network cannot be built from the given hyper-parameters."""


class InputError(MendError):
    """An image, mask or option does not fit; the text names the input."""


class MissingDependency(MendError):
    """An optional package is needed for what was asked; the text says which and how to install it."""


class WorkflowError(MendError):
    """A workflow file is malformed or asks for something that does not exist."""


class OutOfMemoryError(MendError):
    """Even the smallest tile does not fit into memory."""


class Cancelled(MendError):
    """The user cancelled the run."""
