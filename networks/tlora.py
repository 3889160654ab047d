"""T-LoRA (arXiv 2507.05964): LoRA whose rank in training depends on how noisy a sample is.

Noisy samples teach the composition, and a full rank learns a single picture's by heart there; so they get few ranks:
active = floor((1 - t)^power * (rank - least)) + least for t from 0 (data) to 1 (noise), and the first `active` ranks
are used. Every sample has a mask of its own. Images are made, files written and merged with the whole rank; files are
those of LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from library.core.errors import ConfigError
from library.core.options import parse_bool
from networks.kinds.network_args import RANK_STABILIZED, NetworkSettings, positive_number
from networks.kinds.network_base import AdditionalNetwork, NetworkFunctions
from networks.kinds.registry import NetworkKind
from networks.kinds.targets import NetworkTargets
from networks.lora import LoRAModule, shape_from_file
from networks.lora import shape_from_settings as lora_shape


def rank_masks(times: torch.Tensor, rank: int, least: int, power: float) -> torch.Tensor:
    """Which ranks are used [B, rank] (1 or 0, float32) at `times` [B], 0 = data, 1 = noise. Formula: see above."""
    least = min(least, rank)
    active = ((1 - times.float().clamp(0, 1)) ** power * (rank - least)).floor() + least  # [B]
    return (torch.arange(rank, device=times.device) < active.unsqueeze(1)).float()


class TLoRAModule(LoRAModule):
    """LoRA of one layer with ranks by the time of each sample."""

    decomposable = False

    def build(self, *, least_rank: int = 1, power: float = 1.0, **shape: Any) -> None:
        self.least_rank, self.power = least_rank, power
        super().build(**shape)

    @property
    def _drops_values(self) -> bool:
        return True

    def _dropped(self, hidden: torch.Tensor, part: int) -> torch.Tensor:
        hidden = super()._dropped(hidden, part)
        times = self.step_state.times
        if not self.training or times is None:
            return hidden
        masks = rank_masks(times.to(hidden.device), self.lora_dim, self.least_rank, self.power)
        masks = masks.repeat_interleave(self.rows_of_samples(hidden.shape[0], len(times)), dim=0)  # [rows, rank]
        shape = (self.lora_dim, *[1] * (hidden.ndim - 2)) if self.is_conv else (*[1] * (hidden.ndim - 2), self.lora_dim)
        return hidden * masks.view(-1, *shape).to(hidden.dtype)


def least_rank(value: Any) -> int:
    number = int(str(value)) if str(value).strip().isdigit() else 0
    if number < 1:
        raise ValueError("a rank of 1 or more is needed: the ranks that pure noise trains")
    return number


def _times_of(settings: NetworkSettings) -> dict[str, Any]:
    return {"least_rank": settings.get("tlora_min_rank", 1), "power": settings.get("tlora_alpha_rank_scale", 1.0)}


def shape_from_settings(settings: NetworkSettings, layer: Any, split: Any) -> dict[str, Any]:
    return {**lora_shape(settings, layer, split), **_times_of(settings)}


def arguments(targets: NetworkTargets) -> dict[str, Callable[[Any], Any]]:
    parsers = {
        "tlora_min_rank": least_rank, "tlora_alpha_rank_scale": positive_number, "tlora_use_ortho": parse_bool,
        "use_tucker": parse_bool, "dora_wd": parse_bool, **RANK_STABILIZED,
    }  # fmt: skip
    return {**parsers, "split_qkv": parse_bool} if targets.splits else parsers


REFUSED: Mapping[str, str] = {
    "dora_wd": "norms of the changed weight are the same for all samples, and ranks differ between them",
    "tlora_use_ortho": "rotated singular vectors of the layer, which it would train instead of two matrices, cannot be read back from a"
    " file of LoRA, so that a run that goes on from its file would lose a part of what was learned; leave it out",
}


def prepare(network: AdditionalNetwork) -> None:
    """Networks made from a file learn their arguments here. ConfigError when no layer has ranks to leave out."""
    settings = _times_of(network.settings)
    own = [module for module in network.loras if isinstance(module, TLoRAModule)]
    for module in own:
        module.least_rank, module.power = settings["least_rank"], settings["power"]
    if own and settings["least_rank"] > 1 and all(module.lora_dim <= settings["least_rank"] for module in own):
        raise ConfigError(
            f"--network_args tlora_min_rank is {settings['least_rank']}; the layers have rank "
            f"{max(module.lora_dim for module in own)}"
            " at most, so that no rank would depend on time. Lower it, or raise --network_dim"
        )


KIND = NetworkKind(
    "T-LoRA", TLoRAModule, shape_from_file, shape_from_settings, arguments, refused=REFUSED, prepare=prepare
)
_FUNCTIONS = NetworkFunctions(KIND)
check_network_args = _FUNCTIONS.check_network_args
create_network = _FUNCTIONS.create_network
create_network_from_weights = _FUNCTIONS.create_network_from_weights
