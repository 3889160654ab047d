"""Stable Diffusion 1 and 2 as other trainers call it; see docs/public_names.md."""

from library.compat.sd_names import *  # noqa: F403
