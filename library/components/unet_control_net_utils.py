"""ControlNets of U-Nets: made from the base, read from files and written to them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from library.checkpoints.control_net_convert import (
    PREFIX,
    control_net_rules,
    control_net_to_diffusers,
    control_net_to_original,
    is_diffusers_control_net,
)
from library.checkpoints.layout_rules import DenoiserLayouts
from library.checkpoints.loading import (
    CheckpointFiles,
    build_on_meta,
    check_state,
    config_metadata,
    count_blocks,
    open_checkpoint,
    strip_prefix,
)
from library.checkpoints.unet_convert import original_to_diffusers
from library.components.control_nets import FOLDER, ControlNetInfo, ControlNets
from library.components.unet_control_net_models import UNetControlNet
from library.components.unet_models import UNetParams
from library.components.unet_utils import UNetInfo, fitting_projection, folder_config, unet_params
from library.core.errors import CheckpointError

T = TypeVar("T")
_HINT = "controlnet_cond_embedding."


class UNetControlNets(ControlNets):
    """Of Stable Diffusion 1 and 2, whose files have original names, and of SDXL, whose have those of diffusers."""

    new_layers = ("controlnet_",)
    zero_layers = ("controlnet_down_blocks.", "controlnet_mid_block.", f"{_HINT}conv_out.")

    def __init__(self, kinds: frozenset[str], *, is_original: bool) -> None:
        self.kinds, self.is_original = kinds, is_original

    @staticmethod
    def empty_net(source: CheckpointFiles, params: UNetParams) -> UNetControlNet:
        state = UNetControlNets.net_state(source.shapes, params)
        for name, what in ((f"{_HINT}conv_in", "convolutions over a picture"), ("conv_in", "way down of a U-Net")):
            if f"{name}.weight" not in state:
                raise CheckpointError(f"{source.path} holds no ControlNet of a U-Net: it has no {what}")
        wider = range(1, count_blocks(state, f"{_HINT}blocks."), 2)
        names = [f"{_HINT}conv_in.weight", *(f"{_HINT}blocks.{number}.weight" for number in wider)]
        net = build_on_meta(lambda: UNetControlNet(params, [state[name].shape[0] for name in names if name in state]))
        check_state(net, state, source.path)
        return net

    @staticmethod
    def net_state(state: Mapping[str, Tensor], params: UNetParams) -> dict[str, Tensor]:
        """Of a file that holds the U-Net too, those of the net."""
        own = {key: tensor for key, tensor in state.items() if key.startswith(PREFIX)} or state
        named = control_net_to_diffusers(own)
        return {name: fitting_projection(name, tensor, params.use_linear_projection) for name, tensor in named.items()}

    def new_net(self, base: UNetInfo) -> UNetControlNet:
        return UNetControlNet(base.params)

    def base_state(
        self, base: UNetInfo, wanted: Mapping[str, Tensor], dtype: torch.dtype, disable_mmap: bool
    ) -> dict[str, Tensor]:
        own = {key[len(base.prefix) :]: key for key in base.source.shapes if key.startswith(base.prefix)}
        places = {name: key for name, key in _diffusers(own, base.is_diffusers).items() if name in wanted}
        tensors = base.source.tensors("cpu", disable_mmap, places.values(), cast=base.source.casting(dtype))
        linear = base.params.use_linear_projection
        return {name: fitting_projection(name, tensors[key], linear) for name, key in places.items()}

    def file_state(self, net: nn.Module) -> dict[str, Tensor]:
        return control_net_to_original(net.state_dict()) if self.is_original else self.diffusers_state(net)

    def file_metadata(self, net: UNetControlNet) -> dict[str, str]:
        source = open_checkpoint(net.state_dict())
        return config_metadata(net.params, lambda: unet_params(source, source.shapes, {})[0])

    def diffusers_state(self, net: nn.Module) -> dict[str, Tensor]:
        return dict(net.state_dict())

    @staticmethod
    def diffusers_config(net: UNetControlNet) -> dict[str, Any]:
        params, names = net.params, {True: "CrossAttnDownBlock2D", False: "DownBlock2D"}
        vector = params.adm_in_channels
        return {
            "_class_name": "ControlNetModel",
            "in_channels": params.in_channels,
            "conditioning_channels": 3,
            "block_out_channels": list(params.channels),
            "layers_per_block": params.num_res_blocks,
            "down_block_types": [names[has] for has in params.attention_levels],
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "cross_attention_dim": params.context_dim,
            "transformer_layers_per_block": [depth or 1 for depth in params.transformer_depth],
            "attention_head_dim": list(params.heads),  # as in the U-Nets, the number of heads
            "use_linear_projection": params.use_linear_projection,
            "upcast_attention": params.upcast_attention,
            "norm_num_groups": params.norm_groups,
            "conditioning_embedding_out_channels": list(net.hint_channels),
            **(
                {}
                if vector is None
                else {
                    "addition_embed_type": "text_time",
                    "addition_time_embed_dim": 256,
                    "projection_class_embeddings_input_dim": vector,
                }
            ),
        }


def inspect_control_net(path: str | os.PathLike) -> ControlNetInfo:
    """A net for a model that is not at hand: what shapes do not tell is as usual, or in the file's metadata."""
    source = open_checkpoint(path, FOLDER)
    prefix = PREFIX if any(key.startswith(PREFIX) for key in source.shapes) else ""
    names = strip_prefix(source.shapes, prefix)
    given = {**folder_config(source.config), **source.model_config}
    params, _ = unet_params(source, control_net_to_diffusers(names), given)
    return ControlNetInfo(source, prefix, is_diffusers_control_net(names), UNetControlNets.empty_net(source, params))


LAYOUTS = DenoiserLayouts(
    inspect_control_net, control_net_rules, lambda net: UNetControlNets.diffusers_config(net), part=FOLDER
)


def _diffusers(state: Mapping[str, T], is_diffusers: bool) -> dict[str, T]:
    return dict(state) if is_diffusers else original_to_diffusers(state)
