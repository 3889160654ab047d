"""Training of ControlNets: nets that let a picture guide the denoiser are what is learned. Its options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from library.core.errors import Problems
from library.core.options import option
from library.families.record import FamilyRecord
from library.training.trained_weights import OLD, TrainedWeightsOptions

RANGES = ("standard", "legacy")
_FUSED = "--fused_backward_pass does it here"
_FILES = "files are safetensors unless --save_model_as says otherwise, and are written without a second copy in memory"
_SWAP = "the blocks of this denoiser are not swapped"
FOREIGN = {
    "conditioning_range": "every program gives nets of this model pictures in one range, which is taken here too",
    "fused_optimizer_groups": _FUSED, "blockwise_fused_optimizers": _FUSED,
    "use_safetensors": _FILES, "mem_eff_save": _FILES,
    "skip_latents_validity_check": "--skip_cache_check is its name here", **dict.fromkeys(OLD, _SWAP),
}  # fmt: skip
"""options of the group that not every family's script has: name -> reason"""


@dataclass(frozen=True, kw_only=True)
class ControlNetOptions(TrainedWeightsOptions):
    """Training of a ControlNet"""

    controlnet_model_name_or_path: str | None = option(
        None, help="file or folder of a ControlNet to go on with; a new one is made of the base model when not given"
    )
    control_net_lr: float | None = option(
        None,
        help="learning rate of the layers that the base model does not have (those over the picture, the last ones);"
        " --learning_rate when not given; 0 = not trained",
    )
    conditioning_range: str = option(
        "standard", choices=RANGES,
        help="values of the conditioning images: standard = 0 to 1, as every program uses these nets; legacy = -1 to"
        " 1, for nets that were trained so by sd-scripts",
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
    return {
        **{name: reason for name, reason in FOREIGN.items() if script is None or name not in script.options},
        "skip_until_initial_step": "a run begins at --initial_step without loading what lies before it",
    }
