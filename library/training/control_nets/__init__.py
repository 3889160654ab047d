"""Training of ControlNets: nets that let a picture guide the denoiser are what is learned. Its options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from library.core.errors import Problems
from library.core.options import option, option_fields
from library.families.record import FamilyRecord
from library.training.whole_models import OF_EVERY_SCRIPT, OLD, WholeModelOptions

RANGES = ("standard", "legacy")
OWN = ("controlnet_model_name_or_path", "control_net_lr")
"""options of the group that every script of a ControlNet has"""


@dataclass(frozen=True, kw_only=True)
class ControlNetOptions(WholeModelOptions):
    """Training of a ControlNet"""

    controlnet_model_name_or_path: str | None = option(
        None, help="file or folder of a ControlNet to go on with; a new one is made of the base model when not given"
    )
    control_net_lr: float | None = option(
        None,
        help="learning rate of the layers that the base model does not have (those over the picture, and the last ones);"
        " 1e-4 for SDXL, else --learning_rate when not given; 0 = not trained",
    )
    conditioning_range: str = option(
        "standard", choices=RANGES,
        help="values of the conditioning images: standard = 0 to 1, as every program uses these nets; legacy = -1 to 1, for"
        " nets that were trained so by sd-scripts",
    )

    def __post_init__(self) -> None:
        problems = Problems()
        problems.attempt(super().__post_init__)
        rate = self.control_net_lr
        if rate is not None and not (math.isfinite(rate) and rate >= 0):
            problems.add(f"--control_net_lr is {rate}; needed: 0 (not trained) or more")
        problems.raise_if_any()


def ignored_options(record: FamilyRecord, trainable: str) -> Mapping[str, str]:
    """Options that the family's script takes and that mean nothing: name -> reason."""
    script = record.scripts.get(trainable)
    reason = "an old option that its script no longer reads; see --blocks_to_swap"
    return {name: reason for name in OLD if script is not None and name in script.options}


def foreign_options(record: FamilyRecord, trainable: str) -> Mapping[str, str]:
    """Options of the group that the family's script does not have: name -> reason."""
    script = record.scripts.get(trainable)
    own = {*(script.options if script else ()), *OF_EVERY_SCRIPT, *OWN}
    others = [name for name in option_fields(ControlNetOptions) if name not in own]
    return {
        **dict.fromkeys(others, "what learns here is a ControlNet of this base model"),
        "skip_until_initial_step": "a run begins at --initial_step without loading what lies before it",
    }
