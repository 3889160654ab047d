"""Denoisers of all transformer families with enough blocks to swap some of them, and inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from library.components.block_ring import BlockOffloader
from library.framepack_models import HunyuanVideoTransformer3DModelPacked
from library.hunyuan_video_models import HYVideoDiffusionTransformer
from library.wan_models import WanModel
from tests.library import test_framepack_utils, test_hunyuan_video_utils, test_wan_utils
from tests.networks.tiny_denoisers import tiny_denoiser
from tests.tiny import random_state

DEPTHS = {
    "flux": {"depth": 5, "depth_single_blocks": 6}, "chroma": {"depth": 4, "depth_single_blocks": 4},
    "sd3": {"depth": 5, "x_block_self_attn_layers": (0, 1)}, "anima": {"num_blocks": 6}, "lumina": {"n_layers": 5},
    "hunyuan_image": {"depth": 4, "depth_single": 4}, "wan": {"num_layers": 6},
    "hunyuan_video": {"depth": 3, "depth_single": 4}, "framepack": {"num_layers": 3, "num_single_layers": 4},
}  # fmt: skip
"""family -> the fields of its sizes that count blocks"""
MOST = {
    "flux": 4, "chroma": 2, "sd3": 3, "anima": 4, "lumina": 3, "hunyuan_image": 2, "wan": 5, "hunyuan_video": 2,
    "framepack": 2,
}  # fmt: skip
"""family -> how many of these can be swapped"""


def _wan_inputs() -> dict[str, Any]:
    draws = torch.Generator().manual_seed(5)
    return {
        "x": torch.randn(2, 4, 3, 4, 6, generator=draws), "t": torch.tensor([130.5, 900.0]),
        "context": torch.randn(2, 5, 20, generator=draws),
    }  # fmt: skip


CLIPS: dict[str, tuple[Callable[[Any], nn.Module], Any, Callable[[], dict[str, Any]]]] = {
    "wan": (WanModel, test_wan_utils.SMALL, _wan_inputs),
    "hunyuan_video": (HYVideoDiffusionTransformer, test_hunyuan_video_utils.PARAMS, test_hunyuan_video_utils.inputs),
    "framepack": (HunyuanVideoTransformer3DModelPacked, test_framepack_utils.PARAMS, test_framepack_utils.inputs),
}


class Denoiser:
    """A frozen denoiser with inputs."""

    def __init__(self, family: str) -> None:
        self.family = family
        if family in CLIPS:
            build, params, inputs = CLIPS[family]
            self.inputs: tuple[tuple, dict[str, Any]] = ((), inputs())
        else:
            tiny, inputs = tiny_denoiser(family)
            build, params, self.inputs = type(tiny), tiny.params, (inputs, {})
        self.model = build(replace(params, **DEPTHS[family]))
        self.model.load_state_dict(random_state(self.model, torch.Generator().manual_seed(0)))
        self.model.requires_grad_(False).train()

    def __call__(self) -> Tensor:
        positional, named = self.inputs
        return self.model(*positional, **named)

    @property
    def offloaders(self) -> list[BlockOffloader]:
        return [one for one in self.model.offloaders if one is not None]
