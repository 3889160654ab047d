"""ControlNets of FLUX.1: made from the base, read from files and written to them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoints.flux_convert import (
    control_net_rules,
    control_net_to_diffusers,
    control_net_to_original,
    convert_diffusers_sd_to_bfl,
    is_diffusers_control_net,
    rows_of,
)
from library.checkpoints.layout_rules import DenoiserLayouts
from library.checkpoints.loading import (
    CheckpointFiles,
    build_on_meta,
    build_params,
    check_state,
    count_blocks,
    open_checkpoint,
)
from library.components.control_nets import FOLDER, ControlNetInfo, ControlNets
from library.core.errors import CheckpointError
from library.flux_control_net_models import DEPTH, FluxControlNet
from library.flux_models import FluxParams
from library.flux_utils import FlowModelInfo, diffusers_config, infer_flux, model_config_metadata

_HINT = "input_hint_block."


class FluxControlNets(ControlNets):
    """Nets of double blocks alone that see a picture; those that see encoded latents are another kind."""

    kinds = frozenset({"flux_controlnet"})
    picture_range = (-1.0, 1.0)
    new_layers = ("controlnet_blocks.", "pos_embed_input.", _HINT)
    zero_layers = ("controlnet_blocks.", f"{_HINT}14.")
    new_notice = "a new ControlNet has the blocks and input layers of the base (known trainers start from random ones)"

    @staticmethod
    def empty_net(source: CheckpointFiles, params: FluxParams) -> FluxControlNet:
        """CheckpointError also for nets that read no picture."""
        state, path = FluxControlNets.net_state(source.shapes, params), source.path
        if "controlnet_blocks.0.weight" not in state or "img_in.weight" not in state:
            raise CheckpointError(f"{path} holds no ControlNet of FLUX.1 (controlnet_blocks.0 or img_in is not there)")
        if f"{_HINT}0.weight" not in state:
            raise CheckpointError(
                f"{path} is a ControlNet of FLUX.1 that reads encoded latents; needed: one that reads pictures, with"
                " input_hint_block"
            )
        if any(key.startswith(("single_blocks.", "controlnet_single_blocks.")) for key in state):
            raise CheckpointError(
                f"{path} is a ControlNet of FLUX.1 with single blocks; needed: one of double blocks alone"
            )
        own = _own_params(params, count_blocks(state, "double_blocks."), "guidance_in.in_layer.weight" in state)
        net = build_on_meta(lambda: FluxControlNet(own, state[f"{_HINT}0.weight"].shape[0]))
        check_state(net, state, path)
        return net

    @staticmethod
    def net_state(state: Mapping[str, Tensor], params: FluxParams) -> dict[str, Tensor]:
        return _original(state)

    def new_net(self, base: FlowModelInfo) -> FluxControlNet:
        params = base.params
        return FluxControlNet(_own_params(params, min(DEPTH, params.depth), params.guidance_embed))

    def base_state(
        self, base: FlowModelInfo, wanted: Mapping[str, Tensor], dtype: torch.dtype, disable_mmap: bool
    ) -> dict[str, Tensor]:
        keys = [key for key in base.keys if not any(part in key for part in ("single_blocks.", "single_transformer_"))]
        rows = ("double_blocks.", "transformer_blocks.")
        blocks = tuple(f"{row}{number}." for row in rows for number in range(DEPTH))
        keys = [key for key in keys if "_blocks." not in key or key[len(base.prefix) :].startswith(blocks)]
        cast = base.source.casting(dtype)
        tensors = base.source.tensors("cpu", disable_mmap, keys, cast=cast)
        state = {key[len(base.prefix) :]: tensor for key, tensor in tensors.items()}
        state = convert_diffusers_sd_to_bfl(state) if base.is_diffusers else state
        return {name: tensor for name, tensor in state.items() if name in wanted}

    def file_state(self, net: nn.Module) -> dict[str, Tensor]:
        return dict(net.state_dict())

    def file_metadata(self, net: FluxControlNet) -> dict[str, str]:
        return model_config_metadata(net, infer_flux)

    def diffusers_state(self, net: nn.Module) -> dict[str, Tensor]:
        return control_net_to_diffusers(net.state_dict())

    @staticmethod
    def diffusers_config(net: FluxControlNet) -> dict[str, Any]:
        params = net.params
        return {
            "_class_name": "FluxControlNetModel",
            "patch_size": 2,
            "in_channels": params.in_channels,
            "num_layers": params.depth,
            "num_single_layers": 0,
            "attention_head_dim": params.head_dim,
            "num_attention_heads": params.num_heads,
            "joint_attention_dim": params.context_in_dim,
            "pooled_projection_dim": params.vec_in_dim,
            "guidance_embeds": params.guidance_embed,
            "axes_dims_rope": list(params.axes_dim),
            "conditioning_embedding_channels": params.in_channels // 4,
        }


def inspect_control_net(path: str | os.PathLike) -> ControlNetInfo:
    """A net for a denoiser that is not at hand."""
    source = open_checkpoint(path, FOLDER)
    shapes, given = _original(source.shapes), {**diffusers_config(source.config), **source.model_config}
    params = build_params(FluxParams, infer_flux(shapes, given, source.path), given, source.path)
    net = FluxControlNets.empty_net(source, params)
    return ControlNetInfo(source, "", is_diffusers_control_net(source.shapes), net)


LAYOUTS = DenoiserLayouts(
    inspect_control_net, control_net_rules, lambda net: FluxControlNets.diffusers_config(net), part=FOLDER,
    rows_of=lambda net: rows_of(net.params.hidden_size),
)  # fmt: skip


def _original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return control_net_to_original(state) if is_diffusers_control_net(state) else dict(state)


def _own_params(params: FluxParams, depth: int, has_guidance: bool) -> FluxParams:
    return dataclasses.replace(params, depth=depth, depth_single_blocks=0, guidance_embed=has_guidance)


CONTROL_NETS = FluxControlNets()
