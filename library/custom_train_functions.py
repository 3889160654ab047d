"""Losses and their weights by noise level, as other trainers call them; see docs/public_names.md."""

from library.compat.arguments import add_custom_train_arguments  # noqa: F401
from library.compat.losses import *  # noqa: F403
