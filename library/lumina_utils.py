"""Lumina-Image 2.0 checkpoints: what a file holds, loading and saving the denoiser; its other parts are shared with
other families."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.checkpoints import lumina_convert
from library.checkpoints.kinds import check_slot, describe_checkpoint
from library.checkpoints.layout_rules import DenoiserLayouts
from library.checkpoints.loading import (
    CheckpointFiles,
    Transform,
    assign_state,
    build_on_meta,
    build_params,
    check_marks,
    check_state,
    config_metadata,
    count_blocks,
    find_prefix,
    open_checkpoint,
    part_of,
    strip_prefix,
)
from library.checkpoints.weight_forms import is_stored
from library.components.gemma_encoder_utils import inspect_gemma2
from library.components.ldm_models import AutoEncoder
from library.components.ldm_utils import AutoEncoderInfo, Wanted, inspect_autoencoder, load_autoencoder
from library.core.errors import CheckpointError
from library.lumina_models import LuminaParams, NextDiT
from library.safetensors_utils import cast_all, save_file_atomic

logger = logging.getLogger(__name__)

AE_WANTED = Wanted("Lumina-Image 2.0", "ae.safetensors", quant_conv=False, scaling={})
DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "module.", "transformer.")
DENOISER_ROOTS = (
    "x_embedder", "t_embedder", "cap_embedder", "noise_refiner", "context_refiner", "layers", "norm_final",
    "final_layer", "time_caption_embed", "norm_out",
)  # fmt: skip
BLOCKS = ("layers.", "noise_refiner.", "context_refiner.")
MARK = "noise_refiner.0.attention.qkv.weight"
UNUSED = lumina_convert.UNUSED


@dataclass(frozen=True)
class LuminaInfo:
    """What the headers of a denoiser file tell."""

    source: CheckpointFiles
    prefix: str
    is_diffusers: bool
    params: LuminaParams

    @property
    def keys(self) -> list[str]:
        """Those of the denoiser, as the file has them."""
        named = [key for key in self.source.shapes if key.startswith(self.prefix)]
        return [key for key in named if key[len(self.prefix) :].split(".")[0] in DENOISER_ROOTS]


def inspect_lumina(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> LuminaInfo:
    """Recognise a denoiser from headers alone; `config` overrides hyper-parameters by the names of LuminaParams.

    CheckpointError when the file is damaged or no denoiser of Lumina-Image 2.0.
    """
    source = open_checkpoint(path, "transformer")
    prefix = find_prefix(source.shapes, DENOISER_PREFIXES, DENOISER_ROOTS, source.path, "denoiser")
    stripped = strip_prefix(source.shapes, prefix)
    is_diffusers = lumina_convert.is_diffusers_denoiser(stripped)
    shapes = lumina_convert.to_original(stripped) if is_diffusers else stripped
    check_marks(shapes, (MARK, "cap_embedder.1.weight"), source.path, "Lumina-Image 2.0 denoiser")
    given = {**_diffusers_config(source.config), **source.model_config, **(config or {})}
    params = build_params(LuminaParams, _infer(shapes, given, source.path), given, source.path)
    return LuminaInfo(source, prefix, is_diffusers, params)


def _diffusers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a diffusers config.json says under other names."""
    names = {"axes_dim_rope": "axes_dims", "axes_lens": "axes_lens", "norm_eps": "norm_eps", "patch_size": "patch_size"}
    return {ours: config[theirs] for theirs, ours in names.items() if theirs in config}


def _infer(shapes: Mapping[str, Tensor], given: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Hyper-parameters from shapes; a head size h gives three rotary axes of h/3."""
    try:
        dim, token_width = shapes["x_embedder.weight"].shape
        first = "noise_refiner.0."
        head_dim = shapes[f"{first}attention.q_norm.weight"].shape[0]
        time_dim, time_embed_dim = shapes["t_embedder.mlp.0.weight"].shape
        inferred: dict[str, Any] = {
            "in_channels": token_width // given.get("patch_size", 2) ** 2,
            "dim": dim,
            "n_layers": count_blocks(shapes, "layers."),
            "n_refiner_layers": count_blocks(shapes, "noise_refiner."),
            "n_heads": dim // head_dim,
            "n_kv_heads": (shapes[f"{first}attention.qkv.weight"].shape[0] - dim) // (2 * head_dim),
            "ffn_hidden": shapes[f"{first}feed_forward.w1.weight"].shape[0],
            "cap_feat_dim": shapes["cap_embedder.1.weight"].shape[1],
            "time_dim": time_dim,
            "time_embed_dim": time_embed_dim,
        }
    except (KeyError, ValueError) as error:
        what = f"{error.args[0]} is missing or has another rank"
        raise CheckpointError(f"{path} does not fit Lumina-Image 2.0: {what}") from error
    if "axes_dims" not in given:
        if head_dim % 6:
            raise CheckpointError(
                f"{path}: the head size is {head_dim}, no multiple of 6, so the rotary axes are not known;"
                " give axes_dims as an argument or under model_config in the file's metadata"
            )
        inferred["axes_dims"] = (head_dim // 3,) * 3
    return inferred


def load_lumina(
    path: str | os.PathLike,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None,
    transform: Transform | None = None,
    form: str | None = None,
) -> NextDiT:
    """Load a denoiser: a file alone or with text encoder and autoencoder inside, in either layout, one of a split set,
    or a folder.

    `dtype` float8_e4m3fn keeps the weights of linear layers in 8 bits and the rest in bfloat16; None keeps the file's
    own types; `form`, one of weight_forms.FORMS, stores those of the layers in fewer bits. `config` overrides
    hyper-parameters; `transform` may change the tensors as they are read. CheckpointError when the file does not
    fit.
    """
    info = inspect_lumina(path, config)
    logger.info(
        "loading Lumina-Image 2.0 from %s (%s layout, %d layers of width %d)",
        path, "diffusers" if info.is_diffusers else "original", info.params.n_layers, info.params.dim,
    )  # fmt: skip
    cast = info.source.storing(dtype, info.keys, form, lambda key: is_stored(form, key[len(info.prefix) :], BLOCKS))
    tensors = info.source.tensors(device, disable_mmap, info.keys, transform, cast)
    state = strip_prefix(tensors, info.prefix)
    if info.is_diffusers:
        state = lumina_convert.to_original(state)
    for name, like in LAYOUTS.unused.items():  # diffusers leaves it out
        if like in state:  # otherwise check_state tells that it is missing
            state.setdefault(name, torch.ones_like(state[like]))
    model = build_on_meta(lambda: NextDiT(info.params))
    check_state(model, state, os.fspath(path))
    assign_state(model, state)
    return model


def denoiser_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The denoiser's entries of a checkpoint's state under the names of the module tree; nothing when it is not
    there."""
    part = part_of(state, DENOISER_PREFIXES, DENOISER_ROOTS)
    part = lumina_convert.to_original(part) if lumina_convert.is_diffusers_denoiser(part) else part
    return part if MARK in part else {}  # a language model has names that begin with the same words


def save_lumina(
    model: NextDiT, path: str | os.PathLike, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a denoiser in the original layout. Hyper-parameters that its shapes do not tell go into `model_config`."""
    save_file_atomic(cast_all(model.state_dict(), dtype), path, {**(metadata or {}), **model_config_metadata(model)})


def model_config_metadata(model: NextDiT) -> dict[str, str]:
    """{"model_config": JSON} for a model whose hyper-parameters do not follow from its shapes, else nothing."""
    return config_metadata(model.params, lambda: build_params(LuminaParams, _infer(model.state_dict(), {}, ""), {}, ""))


def _config_of_diffusers(params: LuminaParams) -> dict[str, Any]:
    """config.json of diffusers' Lumina2Transformer2DModel; there the feed-forward width follows from two numbers."""
    usual = params.ffn_hidden == 256 * -(-4 * params.dim // 256)
    return {
        "_class_name": "Lumina2Transformer2DModel",
        "patch_size": params.patch_size, "in_channels": params.in_channels, "hidden_size": params.dim,
        "num_layers": params.n_layers, "num_refiner_layers": params.n_refiner_layers,
        "num_attention_heads": params.n_heads, "num_kv_heads": params.n_kv_heads,
        "multiple_of": 256 if usual else 1,
        "ffn_dim_multiplier": None if usual else (params.ffn_hidden + 0.5) / (4 * params.dim),  # rounded down there
        "norm_eps": params.norm_eps, "axes_dim_rope": list(params.axes_dims), "axes_lens": list(params.axes_lens),
        "cap_feat_dim": params.cap_feat_dim,
    }  # fmt: skip


LAYOUTS = DenoiserLayouts(
    inspect_lumina, lumina_convert.denoiser_rules, _config_of_diffusers,
    rows_of=lambda params: lumina_convert.rows_of(params.dim), unused={UNUSED: "noise_refiner.0.ffn_norm1.weight"},
)  # fmt: skip


def inspect_ae(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> AutoEncoderInfo:
    """Recognise the 16-channel autoencoder from headers alone; `config` overrides by the names of AutoEncoderParams."""
    return inspect_autoencoder(path, config, wanted=AE_WANTED)


def load_ae(
    path: str | os.PathLike, dtype: torch.dtype | None, device: torch.device | str, disable_mmap: bool = False
) -> AutoEncoder:
    """Load the autoencoder, which is that of FLUX.1: a file alone or inside a larger one, in either layout, or a
    folder."""
    return load_autoencoder(inspect_ae(path), dtype, device, disable_mmap)


def part_problem(
    path: str | None, slot: str, kind: str, model: str | None, *, for_pictures: bool = False
) -> str | None:
    """A message when the file of `--{slot}` is missing or something else; None when it fits. Not given, the part may be
    in the file or the pipeline folder of the model."""
    if not path and model and check_slot(model, slot, {kind}) is None and describe_checkpoint(model).kind != kind:
        return None
    return check_slot(path, slot, {kind}, for_pictures=for_pictures)


def fitting_problems(
    params: LuminaParams, model: str, *, gemma2: tuple[str, str], ae: tuple[str, str], tokens: int
) -> list[str]:
    """Sizes of text encoder, autoencoder and captions against the denoiser's, from headers. `gemma2` and `ae` are
    (option, path). CheckpointError when a file is no such part."""
    sizes = (
        (*gemma2, "its width", inspect_gemma2(gemma2[1])["hidden_size"], params.cap_feat_dim),
        (*ae, "its number of latent channels", inspect_ae(ae[1]).params.z_channels, params.in_channels),
    )
    problems = [
        f"--{slot} is {path}: {what} is {size}, the denoiser {model} takes {needed}; use the files that belong together"
        for slot, path, what, size, needed in sizes
        if size != needed
    ]
    if tokens > params.max_text_tokens:
        problems.append(
            f"--gemma2_max_token_length is {tokens}; the denoiser {model} has positions for {params.max_text_tokens} "
            "tokens"
            " of text"
        )
    return problems
