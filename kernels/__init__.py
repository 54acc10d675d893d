"""Operators with more than one implementation: a folder each, with a plain reference beside the fast ones."""

from .backend import NAMES, BackendStatus, backends, use_backend

__all__ = ["NAMES", "BackendStatus", "backends", "use_backend"]
