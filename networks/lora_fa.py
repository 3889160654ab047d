"""LoRA-FA (arXiv 2308.03303): LoRA whose down matrices stay as they were drawn; the up matrices alone are trained.

The input of a layer need not be kept for the backward pass, which saves memory. Files are those of LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from library.core.options import parse_bool
from networks.kinds.network_args import RANK_STABILIZED
from networks.kinds.network_base import NetworkFunctions
from networks.kinds.registry import NetworkKind
from networks.kinds.targets import NetworkTargets
from networks.lora import LoRAModule, shape_from_file

ONLY_UP = "only the up matrices are trained; give their learning rate instead"


class LoRAFAModule(LoRAModule):
    """LoRA of one layer with a fixed down matrix: a buffer, so that it has no gradient and no optimizer can hold it."""

    plus_names = ()
    decomposable = False

    def build(self, **shape: Any) -> None:
        super().build(**shape)
        weight = self.lora_down.weight.detach()
        del self.lora_down.weight
        self.lora_down.register_buffer("weight", weight)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """down normal with variance 2 / (inputs + rank), inputs counted over the kernel; up zero."""
        nn.init.zeros_(self.lora_up.weight)
        down = self.lora_down.weight
        down.normal_(std=(2 / (down[0].numel() + down.shape[0])) ** 0.5, generator=generator)

    @torch.no_grad()
    def scale_weight(self, ratio: torch.Tensor) -> None:
        self.lora_up.weight.mul_(ratio)


def arguments(targets: NetworkTargets) -> dict[str, Callable[[Any], Any]]:
    return {**RANK_STABILIZED, "use_tucker": parse_bool, "dora_wd": parse_bool, "split_qkv": parse_bool}


REFUSED: Mapping[str, str] = {
    "use_tucker": "a middle matrix would be trained beside the up matrix; use networks.lora",
    "dora_wd": "norms would be trained beside the up matrix; use networks.lora",
    "split_qkv": "use networks.lora",
    **{name: ONLY_UP for name in ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")},
}

KIND = NetworkKind("LoRA-FA", LoRAFAModule, shape_from_file, arguments=arguments, refused=REFUSED)
_FUNCTIONS = NetworkFunctions(KIND)
check_network_args = _FUNCTIONS.check_network_args
create_network = _FUNCTIONS.create_network
create_network_from_weights = _FUNCTIONS.create_network_from_weights
