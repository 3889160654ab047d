"""Losses beside the usual one that teach a denoiser by what it knows already: the options of each, and the hooks that
these switch on. Without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.core.errors import AtelierError
from library.core.registry import import_target
from library.training.alignment.options import LeapOptions, SelfFlowOptions, SraOptions

if TYPE_CHECKING:
    from library.core.options import Config
    from library.training.hooks.base import Hook
    from library.training.wiring.base import ModelFamily

__all__ = ["LeapOptions", "SelfFlowOptions", "SraOptions", "alignment_hooks", "depth_of"]

HOOKS = {
    "self_flow": (SelfFlowOptions, "library.training.alignment.self_flow:SelfFlow"),
    "sra_enabled": (SraOptions, "library.training.alignment.sra:Sra"),
    "leap_enabled": (LeapOptions, "library.training.alignment.leap:Leap"),
}
"""switch -> its group of options, and the hook"""


def depth_of(family: ModelFamily) -> int | None:
    """The blocks of a family's denoiser, from its file; None where that cannot be read, which the family tells."""
    try:
        return family.num_blocks
    except (AtelierError, OSError, TypeError):
        return None


def alignment_hooks(config: Config) -> list[Hook]:
    """Those that the options switch on."""
    return [
        import_target(path)()
        for switch, (group, path) in HOOKS.items()
        if group in config and getattr(config[group], switch)
    ]
