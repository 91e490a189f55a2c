"""Texts that come with the package; README.md says what they are."""

from importlib import resources


def alice() -> str:
    """The opening chapters of *Alice's Adventures in Wonderland*."""
    return resources.files(__name__).joinpath("alice.txt").read_text(encoding="utf-8")
