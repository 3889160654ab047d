"""FLUX.1 checkpoints: what a file holds, loading and saving it; packing of latents and position ids."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from library.checkpoints.flux_convert import (
    APPROXIMATOR,
    convert_bfl_sd_to_diffusers,
    convert_diffusers_sd_to_bfl,
    is_diffusers_denoiser,
)
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
    size_of,
    strip_prefix,
)
from library.checkpoints.weight_forms import is_stored
from library.components.ldm_utils import AE_PREFIXES, AutoEncoderInfo, Wanted, inspect_autoencoder, load_autoencoder
from library.components.text_encoder_utils import inspect_clip_l, inspect_t5xxl, load_clip_l, load_t5xxl
from library.core.errors import CheckpointError
from library.core.lazy_names import homes, lazy_names
from library.flux_models import AutoEncoder, Flux, FluxParams, StreamParams, StreamTransformer
from library.safetensors_utils import cast_all, save_file_atomic

__all__ = [
    "analyze_checkpoint_state", "convert_bfl_sd_to_diffusers", "convert_diffusers_sd_to_bfl", "get_t5xxl_actual_dtype",
    "inspect_ae", "inspect_flow_model", "load_ae", "load_clip_l", "load_flux", "load_t5xxl", "pack_latents",
    "prepare_img_ids", "save_flow_model", "unpack_latents",
]  # fmt: skip

logger = logging.getLogger(__name__)
__getattr__, __dir__ = lazy_names(__name__, homes("library.compat.flux_names", "load_controlnet", "load_flow_model"))

AE_WANTED = Wanted("FLUX.1", "ae.safetensors", quant_conv=False, scaling={})
DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "net.", "module.", "transformer.")
DENOISER_ROOTS = (
    "img_in", "txt_in", "time_in", "vector_in", "guidance_in", "double_blocks", "single_blocks", "final_layer",
    "distilled_guidance_layer", "x_embedder", "context_embedder", "time_text_embed", "transformer_blocks",
    "single_transformer_blocks", "proj_out", "norm_out",
)  # fmt: skip
BLOCKS = ("double_blocks.", "single_blocks.", "transformer_blocks.", "single_transformer_blocks.")
_OTHER_PARTS = ("text_encoders.", "text_encoder.", "cond_stage_model.", "conditioner.", "model_ema.", *AE_PREFIXES)


@dataclass(frozen=True)
class StreamKind:
    """One kind of denoiser that is made of double and single stream blocks.

    `refuse`: raises CheckpointError for (shapes in original names, path) of another kind; `infer`: (shapes, what is
    given, path) -> hyper-parameters by the names of `params`.
    """

    title: str
    model: type[StreamTransformer]
    params: type[StreamParams]
    refuse: Callable[[Mapping[str, Tensor], str], None]
    infer: Callable[[Mapping[str, Tensor], Mapping[str, Any], str], dict[str, Any]]


@dataclass(frozen=True)
class StreamModelInfo:
    """What the headers of a denoiser checkpoint tell. `dtypes`: types of the stored weights."""

    source: CheckpointFiles
    prefix: str
    is_diffusers: bool
    params: Any
    dtypes: frozenset[torch.dtype]

    @property
    def keys(self) -> list[str]:
        """Names of the denoiser's tensors in the file."""
        others = () if self.prefix else _OTHER_PARTS
        return [key for key in self.source.shapes if key.startswith(self.prefix) and not key.startswith(others)]


@dataclass(frozen=True)
class FlowModelInfo(StreamModelInfo):
    """The same of FLUX.1."""

    params: FluxParams

    @property
    def is_schnell(self) -> bool:
        return not self.params.guidance_embed


def inspect_stream_model(
    path: str | os.PathLike, config: Mapping[str, Any] | None, kind: StreamKind
) -> StreamModelInfo:
    """Recognise a denoiser of this kind from headers alone; `config` overrides hyper-parameters. CheckpointError when
    it is none."""
    source = open_checkpoint(path, "transformer")
    prefix = find_prefix(source.shapes, DENOISER_PREFIXES, DENOISER_ROOTS, source.path, "denoiser")
    stripped = strip_prefix(source.shapes, prefix)
    is_diffusers = is_diffusers_denoiser(stripped)
    shapes = convert_diffusers_sd_to_bfl(stripped) if is_diffusers else stripped
    kind.refuse(shapes, source.path)
    given = {**diffusers_config(source.config), **source.model_config, **(config or {})}
    params = build_params(kind.params, kind.infer(shapes, given, source.path), given, source.path)
    dtypes = frozenset(tensor.dtype for key, tensor in stripped.items() if key.endswith(".weight"))
    return StreamModelInfo(source, prefix, is_diffusers, params, dtypes)


def inspect_flow_model(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> FlowModelInfo:
    """Recognise a FLUX.1 denoiser from headers alone; `config` overrides hyper-parameters by the names of FluxParams.

    CheckpointError when the file is damaged, no FLUX.1 denoiser, or one of the variants that are not trained here.
    """
    return FlowModelInfo(**vars(inspect_stream_model(path, config, FLUX)))


def refuse_other_kinds(shapes: Mapping[str, Tensor], path: str) -> None:
    """CheckpointError for a file that is no FLUX.1 denoiser, and no variant of one with the same blocks."""
    if any(key.startswith(APPROXIMATOR) for key in shapes):
        raise CheckpointError(
            f"{path} is a Chroma model; add --model_type chroma, or give a FLUX.1 dev or schnell file"
        )
    refuse_unknown_streams(shapes, path, "FLUX.1")


def _refuse_other_models(shapes: Mapping[str, Tensor], path: str) -> None:
    refuse_other_kinds(shapes, path)
    if "final_layer.linear.weight" in shapes:
        width, out_width = shapes["img_in.weight"].shape[1], shapes["final_layer.linear.weight"].shape[0]
        if width != out_width:
            variant = {6: "the Fill variant", 2: "the Depth or Canny variant"}.get(
                width // out_width, "a control variant"
            )
            raise CheckpointError(
                f"{path} is {variant} of FLUX.1 (img_in takes {width} values, {out_width} come out); plain FLUX.1 dev "
                "or schnell is needed"
            )


def refuse_unknown_streams(shapes: Mapping[str, Tensor], path: str, title: str) -> None:
    """CheckpointError for a file without the blocks of a denoiser of these kinds."""
    check_marks(
        shapes, ("double_blocks.0.img_attn.norm.query_norm.scale", "img_in.weight"), path, f"{title} denoiser"
    )


def diffusers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Names of a diffusers config.json that the hyper-parameters have under other ones."""
    names = {"axes_dims_rope": "axes_dim", "num_attention_heads": "num_heads"}
    return {ours: config[theirs] for theirs, ours in names.items() if theirs in config}


def infer_streams(shapes: Mapping[str, Tensor], given: Mapping[str, Any], path: str, title: str) -> dict[str, Any]:
    """StreamParams from shapes; head size h gives the rotary axes (h/8, 7h/16, 7h/16)."""

    def size(key: str, dim: int) -> int:
        return size_of(shapes, key, dim, path, title)

    hidden = size("img_in.weight", 0)
    head_dim = size("double_blocks.0.img_attn.norm.query_norm.scale", 0)
    inferred: dict[str, Any] = {
        "in_channels": size("img_in.weight", 1),
        "context_in_dim": size("txt_in.weight", 1),
        "hidden_size": hidden,
        "mlp_ratio": size("double_blocks.0.img_mlp.0.weight", 0) / hidden,
        "num_heads": hidden // head_dim,
        "depth": count_blocks(shapes, "double_blocks."),
        "depth_single_blocks": count_blocks(shapes, "single_blocks."),
        "qkv_bias": "double_blocks.0.img_attn.qkv.bias" in shapes,
    }
    if "axes_dim" not in given:
        if head_dim % 32:
            raise CheckpointError(
                f"{path}: the head size is {head_dim}, no multiple of 32, so the rotary axes are not known;"
                " give axes_dim as an argument or under model_config in the file's metadata"
            )
        inferred["axes_dim"] = (head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16)
    return inferred


def infer_flux(shapes: Mapping[str, Tensor], given: Mapping[str, Any], path: str) -> dict[str, Any]:
    """FluxParams from shapes in original names."""
    return {
        **infer_streams(shapes, given, path, "Flux"),
        "vec_in_dim": size_of(shapes, "vector_in.in_layer.weight", 1, path, "Flux"),
        "guidance_embed": any(key.startswith("guidance_in.") for key in shapes),
        "time_embed_dim": size_of(shapes, "time_in.in_layer.weight", 1, path, "Flux"),
    }


FLUX = StreamKind("FLUX.1", Flux, FluxParams, _refuse_other_models, infer_flux)


class CheckpointState(NamedTuple):
    """The answer of `analyze_checkpoint_state`, in the order in which other code unpacks it."""

    is_diffusers: bool
    is_schnell: bool
    num_blocks: tuple[int, int]
    paths: list[str]


def analyze_checkpoint_state(ckpt_path: str | os.PathLike) -> CheckpointState:
    """Layout, kind, (double, single) block counts and files of a denoiser checkpoint, read from headers."""
    info = inspect_flow_model(ckpt_path)
    blocks = (info.params.depth, info.params.depth_single_blocks)
    return CheckpointState(info.is_diffusers, info.is_schnell, blocks, list(info.source.files))


def load_flux(
    path: str | os.PathLike,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None,
    transform: Transform | None = None,
    form: str | None = None,
) -> Flux:
    """Load a FLUX.1 denoiser: single file in either layout, one of a split set, or a diffusers folder.

    `dtype` float8_e4m3fn keeps the weights of linear layers in 8 bits and the rest in bfloat16; None keeps the file's
    own types; `form`, one of weight_forms.FORMS, stores those of the blocks in fewer bits. `config` overrides
    hyper-parameters; `transform` may change the tensors as they are read. `model.params.guidance_embed`
    tells dev from schnell. CheckpointError when the file does not fit.
    """
    info = inspect_flow_model(path, config)
    kind = "schnell" if info.is_schnell else "dev"
    return load_stream_model(info, FLUX, f"FLUX.1 {kind}", path, dtype, device, disable_mmap, transform, form)


def load_stream_model(
    info: StreamModelInfo, kind: StreamKind, title: str, path: str | os.PathLike, dtype: torch.dtype | None,
    device: torch.device | str, disable_mmap: bool, transform: Transform | None, form: str | None = None,
) -> Any:
    """The denoiser of a file that was recognised; types as `load_flux` tells."""
    logger.info(
        "loading %s from %s (%s layout, %d double and %d single blocks)",
        title, path, "diffusers" if info.is_diffusers else "original", info.params.depth,
        info.params.depth_single_blocks,
    )  # fmt: skip
    cast = info.source.storing(dtype, info.keys, form, lambda key: is_stored(form, key[len(info.prefix) :], BLOCKS))
    state = strip_prefix(info.source.tensors(device, disable_mmap, info.keys, transform, cast), info.prefix)
    if info.is_diffusers:
        state = convert_diffusers_sd_to_bfl(state)
    model = build_on_meta(lambda: kind.model(info.params))
    check_state(model, state, os.fspath(path))
    assign_state(model, state)
    return model


def denoiser_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The denoiser's entries of a checkpoint's state under the names of the module tree."""
    part = part_of(state, DENOISER_PREFIXES, DENOISER_ROOTS)
    return convert_diffusers_sd_to_bfl(part) if is_diffusers_denoiser(part) else part


def save_flow_model(
    model: Flux, path: str | os.PathLike, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a denoiser in the original layout. Hyper-parameters that its shapes do not tell go into `model_config`."""
    save_stream_model(model, FLUX, path, dtype, metadata)


def save_stream_model(
    model: StreamTransformer, kind: StreamKind, path: str | os.PathLike, dtype: torch.dtype | None,
    metadata: Mapping[str, str] | None
) -> None:
    state = cast_all(model.state_dict(), dtype)
    save_file_atomic(state, path, {**(metadata or {}), **model_config_metadata(model, kind.infer)})


def model_config_metadata(model: StreamTransformer, infer: Callable[..., dict[str, Any]]) -> dict[str, str]:
    """{"model_config": JSON} for a model whose hyper-parameters do not follow from its shapes, else nothing."""
    return config_metadata(
        model.params, lambda: build_params(type(model.params), infer(model.state_dict(), {}, ""), {}, "")
    )


def embedding_widths(clip_l: str | os.PathLike, t5xxl: str | os.PathLike) -> dict[str, int | None]:
    """Widths of the vectors that the text encoders take, by the names of files of textual inversions."""
    return {"clip_l": inspect_clip_l(clip_l)["width"], "t5xxl": inspect_t5xxl(t5xxl)["d_model"]}


def inspect_ae(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> AutoEncoderInfo:
    """Recognise a 16-channel autoencoder from headers alone; `config` overrides by the names of AutoEncoderParams."""
    return inspect_autoencoder(path, config, wanted=AE_WANTED)


def load_ae(
    ckpt_path: str | os.PathLike,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None,
) -> AutoEncoder:
    """Load the autoencoder of FLUX.1: a file in the original or the diffusers layout, alone or inside a larger file, or
    a diffusers folder. CheckpointError when the file does not fit."""
    return load_autoencoder(inspect_ae(ckpt_path, config), dtype, device, disable_mmap)


def get_t5xxl_actual_dtype(t5xxl: torch.nn.Module) -> torch.dtype:
    """The type in which the T5 encoder computes: that of its projections (embeddings and norms may be wider)."""
    return t5xxl.encoder.block[0].layer[0].SelfAttention.q.weight.dtype


def prepare_img_ids(batch_size: int, packed_latent_height: int, packed_latent_width: int) -> Tensor:
    """Position ids (0, row, column) of packed tokens, [B, height * width, 3] float32."""
    rows, columns = torch.meshgrid(
        torch.arange(packed_latent_height, dtype=torch.float32), torch.arange(packed_latent_width, dtype=torch.float32),
        indexing="ij"
    )
    ids = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1)
    return ids.flatten(0, 1).expand(batch_size, -1, -1).clone()


def pack_latents(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, (H/2)(W/2), 4C]; inside a token the order is channel, row, column."""
    return rearrange(x, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=2, pw=2)


def unpack_latents(x: Tensor, packed_latent_height: int, packed_latent_width: int) -> Tensor:
    """[B, height * width, 4C] -> [B, C, 2 * height, 2 * width]; the inverse of `pack_latents`."""
    return rearrange(
        x, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=packed_latent_height, w=packed_latent_width, ph=2, pw=2
    )
