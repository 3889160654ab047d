"""Tiny random Anima models, for tests."""

from tests.tiny import TinyAnima, build_tiny_anima

__all__ = ["TinyAnima", "build_tiny_anima"]
