"""Tiny random models with a U-Net, for tests."""

from tests.tiny import KINDS, TinySd, build_tiny_sd, tiny_params

__all__ = ["KINDS", "TinySd", "build_tiny_sd", "tiny_params"]
