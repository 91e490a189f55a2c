"""Blocked FP8 for JAX."""

__version__ = "0.1.0"
