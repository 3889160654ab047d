"""Checkpoints of the latent diffusion autoencoder, alone or inside a larger file: what they hold, and loading them.

Which autoencoder a family needs, with which scale and shift, is the family's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.checkpoints.ldm_convert import (
    attention_as_convolution,
    convert_diffusers_vae_to_ldm,
    is_diffusers_autoencoder,
)
from library.checkpoints.loading import (
    CheckpointFiles,
    Source,
    assign_state,
    build_on_meta,
    build_params,
    check_marks,
    check_state,
    count_blocks,
    find_prefix,
    open_checkpoint,
    strip_prefix,
)
from library.checkpoints.scaled_weights import is_blob
from library.components.ldm_models import AutoEncoder, AutoEncoderParams
from library.core.errors import CheckpointError
from library.safetensors_utils import cast_floats

AE_PREFIXES = ("first_stage_model.", "vae.")
AE_ROOTS = ("encoder", "decoder", "quant_conv", "post_quant_conv")
MARKS = ("encoder.down.0.block.0.norm1.weight", "decoder.conv_in.weight")


@dataclass(frozen=True)
class DiffusersNames:
    """How diffusers names the tensors of a kind of autoencoder: `holds`: whether these are such names; `to_original`:
    its tensors under the original ones."""

    holds: Callable[[Mapping[str, object]], bool]
    to_original: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


LDM_NAMES = DiffusersNames(is_diffusers_autoencoder, convert_diffusers_vae_to_ldm)


@dataclass(frozen=True)
class Wanted:
    """The autoencoder that a family needs: by `quant_conv` known from others, with its scale and shift; `owner` and
    `usual_name` are for messages, `names` those of diffusers, `marks` tensors that no other kind has, `model_class` is
    what it becomes."""

    owner: str
    usual_name: str
    quant_conv: bool
    scaling: Mapping[str, float]
    names: DiffusersNames = LDM_NAMES
    marks: tuple[str, ...] = ()
    model_class: type[AutoEncoder] = AutoEncoder


@dataclass(frozen=True)
class AutoEncoderInfo:
    """What the headers of an autoencoder checkpoint tell."""

    source: CheckpointFiles
    prefix: str
    is_diffusers: bool
    params: AutoEncoderParams
    wanted: Wanted

    @property
    def keys(self) -> list[str]:
        """Those of the autoencoder, as the file has them."""
        named = [key for key in self.source.shapes if key.startswith(self.prefix)]
        return [key for key in named if key[len(self.prefix) :].split(".")[0] in AE_ROOTS]


def inspect_autoencoder(
    path: Source, config: Mapping[str, Any] | None = None, *, wanted: Wanted
) -> AutoEncoderInfo:
    """Recognise an autoencoder from headers alone; `config` overrides by the names of AutoEncoderParams.
    CheckpointError when the file is damaged or not of the wanted kind."""
    source = open_checkpoint(path, "vae")
    prefix = find_prefix(source.shapes, AE_PREFIXES, AE_ROOTS, source.path, "autoencoder")
    stripped = strip_prefix(source.shapes, prefix)
    is_diffusers = wanted.names.holds(stripped)
    shapes = wanted.names.to_original(stripped) if is_diffusers else stripped
    check_marks(shapes, (*MARKS, *wanted.marks), source.path, f"{wanted.owner} autoencoder")
    if ("quant_conv.weight" in shapes) != wanted.quant_conv:
        channels = shapes["decoder.conv_in.weight"].shape[1]
        kind = "FLUX.1 or SD3 (no quant_conv" if wanted.quant_conv else "SD1, SD2 or SDXL (quant_conv"
        raise CheckpointError(
            f"{source.path} is the autoencoder of {kind}, {channels} latent channels); {wanted.owner} needs its own, "
            f"{wanted.usual_name}"
        )
    names = {"norm_num_groups": "norm_groups", "scaling_factor": "scaling_factor", "shift_factor": "shift_factor"}
    from_folder = {
        ours: source.config[theirs] for theirs, ours in names.items() if source.config.get(theirs) is not None
    }
    given = {**wanted.scaling, **from_folder, **source.config_of("vae"), **(config or {})}
    params = build_params(AutoEncoderParams, infer_autoencoder(shapes, given, source.path), given, source.path)
    info = AutoEncoderInfo(source, prefix, is_diffusers, params, wanted)
    _checked_model(info, _original(info, {key: source.shapes[key] for key in info.keys}))
    return info


def _original(info: AutoEncoderInfo, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of its file under the names and in the shapes of the module tree."""
    own = {key: tensor for key, tensor in strip_prefix(state, info.prefix).items() if not is_blob(key)}
    return attention_as_convolution(info.wanted.names.to_original(own) if info.is_diffusers else own)


def _checked_model(info: AutoEncoderInfo, state: Mapping[str, Tensor]) -> AutoEncoder:
    """The module without weights; CheckpointError unless `state` fits."""
    model = build_on_meta(lambda: info.wanted.model_class(info.params))
    check_state(model, state, info.source.path)
    return model


def infer_autoencoder(shapes: Mapping[str, Tensor], given: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Hyper-parameters from shapes in the original layout."""
    try:
        ch = shapes["encoder.conv_in.weight"].shape[0]
        levels = count_blocks(shapes, "encoder.down.")
        widths = [shapes[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
        inferred = {
            "in_channels": shapes["encoder.conv_in.weight"].shape[1],
            "out_ch": shapes["decoder.conv_out.weight"].shape[0],
            "z_channels": shapes["decoder.conv_in.weight"].shape[1],
        }
    except KeyError as error:
        raise CheckpointError(f"{path} does not fit AutoEncoder: {error.args[0]} is missing") from error
    if any(width % ch for width in widths):
        raise CheckpointError(f"{path}: the level widths {widths} are no multiples of the first one, {ch}")
    return {
        **inferred,
        "ch": ch,
        "ch_mult": tuple(width // ch for width in widths),
        "num_res_blocks": count_blocks(shapes, "encoder.down.0.block."),
        "quant_conv": "quant_conv.weight" in shapes,
    }


def load_autoencoder(
    info: AutoEncoderInfo, dtype: torch.dtype | None, device: torch.device | str, disable_mmap: bool = False
) -> AutoEncoder:
    """The weights of an inspected autoencoder, as a module of the wanted class."""
    state = _original(info, info.source.tensors(device, disable_mmap, info.keys))
    model = _checked_model(info, state)
    assign_state(model, {key: cast_floats(tensor, dtype, key).contiguous() for key, tensor in state.items()})
    return model
