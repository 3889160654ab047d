"""HunyuanImage 2.1 checkpoints: what a file holds, loading and saving it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.checkpoints import hunyuan_image_convert
from library.checkpoints.layout_rules import DenoiserLayouts, Rule, to_original
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
    is_blob,
    open_checkpoint,
    part_of,
    size_of,
    strip_prefix,
)
from library.components.ldm_models import AutoEncoderParams
from library.components.ldm_utils import (
    AutoEncoderInfo,
    DiffusersNames,
    Wanted,
    inspect_autoencoder,
    load_autoencoder,
)
from library.components.llm_encoder_utils import inspect_qwen25_vl, load_qwen25_vl
from library.components.text_encoder_utils import inspect_t5xxl, load_t5xxl
from library.core.errors import Problems
from library.core.lazy_names import homes, lazy_names
from library.custom_offloading_utils import stream_swap_problem
from library.fp8_optimization_utils import (
    FP8_STORAGE,
    scaled_fp8,
    shrink_linears_to_fp8,
    store_linears_in_fp8,
    use_scales,
)
from library.hunyuan_image_models import HYImageDiffusionTransformer, HYImageParams
from library.hunyuan_image_vae import LATENT_SCALING_FACTOR, SAMPLE_SIZE, TILES, HunyuanVAE2D
from library.safetensors_utils import cast_all, save_file_atomic

logger = logging.getLogger(__name__)
__getattr__, __dir__ = lazy_names(__name__, homes(
    "library.compat.hunyuan_image_names", "MODEL_VERSION_2_1", "get_timesteps_sigmas", "step",
))

VAE_WANTED = Wanted(
    "HunyuanImage 2.1", "hunyuan_image_2.1_vae_fp16.safetensors", quant_conv=False,
    scaling={"scaling_factor": LATENT_SCALING_FACTOR, "shift_factor": 0.0},
    names=DiffusersNames(
        hunyuan_image_convert.is_diffusers_autoencoder, hunyuan_image_convert.autoencoder_to_original
    ),
    marks=("decoder.up.0.upsample.conv.weight",), model_class=HunyuanVAE2D,
)  # fmt: skip
DENOISER_PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "model.model.",
    "model.",
    "net.",
    "module.",
    "transformer.",
)
DENOISER_ROOTS = (
    "byt5_in", "img_in", "txt_in", "time_in", "time_r_in", "guidance_in", "double_blocks", "single_blocks",
    "final_layer", "vision_in", *hunyuan_image_convert.ROOTS,
)  # fmt: skip


@dataclass(frozen=True)
class HYImageInfo:
    """What the headers of a denoiser checkpoint tell. `rules`: by which its names become the original ones, none where
    they are; `dtypes`: types of the stored weights."""

    source: CheckpointFiles
    prefix: str
    is_diffusers: bool
    rules: tuple[Rule, ...]
    params: HYImageParams
    dtypes: frozenset[torch.dtype]

    @property
    def keys(self) -> list[str]:
        """Those of the denoiser, as the file has them."""
        named = [key for key in self.source.shapes if key.startswith(self.prefix)]
        return [key for key in named if key[len(self.prefix) :].split(".")[0] in DENOISER_ROOTS]


def inspect_hunyuan_image(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> HYImageInfo:
    """Recognise a HunyuanImage 2.1 denoiser from headers alone; `config` overrides hyper-parameters by the names of
    HYImageParams.

    CheckpointError when the file is damaged or no such denoiser.
    """
    source = open_checkpoint(path, "transformer")
    prefix = find_prefix(source.shapes, DENOISER_PREFIXES, DENOISER_ROOTS, source.path, "denoiser")
    stripped = strip_prefix(source.shapes, prefix)
    own = {key: tensor for key, tensor in stripped.items() if key.split(".")[0] in DENOISER_ROOTS and not is_blob(key)}
    rules = hunyuan_image_convert.rules_of_names(own)
    shapes = to_original(own, rules)
    marks = ("byt5_in.fc1.weight", "double_blocks.0.img_attn_qkv.weight")
    check_marks(shapes or stripped, marks, source.path, "HunyuanImage 2.1 denoiser")
    given = {**_diffusers_config(source.config), **source.model_config, **(config or {})}
    params = build_params(HYImageParams, _infer(shapes, given, source.path), given, source.path)
    check_state(build_on_meta(lambda: HYImageDiffusionTransformer(params)), shapes, source.path)
    dtypes = frozenset(tensor.dtype for key, tensor in shapes.items() if key.endswith(".weight"))
    is_diffusers = hunyuan_image_convert.is_diffusers_denoiser(stripped)
    return HYImageInfo(source, prefix, is_diffusers, tuple(rules), params, dtypes)


def _diffusers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json of diffusers says that shapes do not."""
    names = {"rope_axes_dim": "rope_dim_list", "rope_theta": "rope_theta"}
    return {ours: config[theirs] for theirs, ours in names.items() if theirs in config}


def _infer(shapes: Mapping[str, Tensor], given: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Hyper-parameters from shapes; head size h gives the rotary axes (h/2, h/2)."""

    def size(key: str, dim: int) -> int:
        return size_of(shapes, key, dim, path, "HYImageDiffusionTransformer")

    hidden, head_dim = size("img_in.proj.weight", 0), size("double_blocks.0.img_attn_q_norm.weight", 0)
    inferred: dict[str, Any] = {
        "in_channels": size("img_in.proj.weight", 1),
        "hidden_size": hidden,
        "num_heads": hidden // head_dim,
        "depth": count_blocks(shapes, "double_blocks."),
        "depth_single": count_blocks(shapes, "single_blocks."),
        "refiner_depth": count_blocks(shapes, "txt_in.individual_token_refiner.blocks."),
        "mlp_ratio": size("double_blocks.0.img_mlp.fc1.weight", 0) / hidden,
        "text_dim": size("txt_in.input_embedder.weight", 1),
        "byt5_dim": size("byt5_in.fc1.weight", 1),
        "byt5_mid": size("byt5_in.fc1.weight", 0),
        "time_embed_dim": size("time_in.mlp.0.weight", 1),
        "guidance_embed": any(key.startswith("guidance_in.") for key in shapes),
        "mean_flow": any(key.startswith("time_r_in.") for key in shapes),
    }
    if "rope_dim_list" not in given:
        inferred["rope_dim_list"] = (head_dim // 2, head_dim // 2)
    return inferred


def load_hunyuan_image(
    path: str | os.PathLike,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None,
    *,
    fp8_scaled: bool = False,
    transform: Transform | None = None,
) -> HYImageDiffusionTransformer:
    """Load a denoiser in any layout; its sizes come from the file.

    `fp8_scaled` keeps the large matrices of the blocks in 8 bits, each row with a scale of its own; `dtype`
    float8_e4m3fn the weights of all linear layers, without scales, and the rest in bfloat16; None keeps the file's own
    types. `transform` may change the tensors as they are read. CheckpointError when the file does not fit.
    """
    info = inspect_hunyuan_image(path, config)
    params = info.params
    logger.info(
        "loading HunyuanImage 2.1%s from %s (%d double and %d single blocks)",
        " (distilled)" if params.guidance_embed or params.mean_flow else "", path, params.depth, params.depth_single,
    )  # fmt: skip
    store = info.source.storing(torch.bfloat16 if fp8_scaled and dtype == FP8_STORAGE else dtype, info.keys)
    rule_of = {part: rule for rule in info.rules for part in rule.parts}
    scales: dict[str, Tensor] = {}

    def cast(key: str, tensor: Tensor) -> Tensor:
        name = key[len(info.prefix) :]
        ours = rule_of[name].original if name in rule_of else name
        if fp8_scaled and takes_scale(ours.removesuffix(".weight")) and ours.endswith(".weight"):
            weight, scales[name] = scaled_fp8(tensor)
            return weight
        return store(key, tensor)

    state = strip_prefix(info.source.tensors(device, disable_mmap, info.keys, transform, cast), info.prefix)
    state, scales = to_original(state, info.rules), to_original(scales, info.rules)
    model = build_on_meta(lambda: HYImageDiffusionTransformer(params))
    check_state(model, state, os.fspath(path))
    assign_state(model, state)
    store_linears_in_fp8(model)
    for name, scale in scales.items():
        use_scales(model.get_submodule(name.removesuffix(".weight")), scale)
    return model


def load_encoders(
    text_encoder: str | os.PathLike,
    byt5: str | os.PathLike,
    dtype: torch.dtype,
    device: torch.device | str,
    disable_mmap: bool = False,
    *,
    fp8_vl: bool = False,
) -> list[torch.nn.Module]:
    """[Qwen2.5-VL, ByT5]. On a CPU they compute in bfloat16 instead of float16; `fp8_vl` keeps the matrices of the
    first in 8 bits. CheckpointError when a file does not fit."""
    if torch.device(device).type == "cpu" and dtype == torch.float16:
        dtype = torch.bfloat16
    vlm = load_qwen25_vl(text_encoder, dtype, device, disable_mmap)
    if fp8_vl:
        shrink_linears_to_fp8(vlm)
    return [vlm, load_t5xxl(byt5, dtype, device, disable_mmap)]


def takes_scale(path: str) -> bool:
    """Whether the layer of this path is stored in scaled 8 bits: the matrices of the double and single blocks."""
    return path.startswith(("double_blocks.", "single_blocks.")) and not path.endswith("_norm")


def denoiser_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The denoiser's entries of a checkpoint's state under the names of the module tree."""
    return hunyuan_image_convert.to_original(part_of(state, DENOISER_PREFIXES, DENOISER_ROOTS))


def fitting_problems(
    denoiser: Callable[[], HYImageParams],
    *,
    text_encoder: tuple[str, str],
    byt5: tuple[str, str],
    vae: tuple[str, str] | None,
    model: str,
    blocks_to_swap: int,
) -> list[str]:
    """What is wrong with each file, sizes of text encoders and autoencoder against the denoiser's, and a block swap
    that its depth does not allow, from headers. Each part is (option, path), no vae = not checked; `denoiser` reads
    the header of `model`."""
    problems = Problems()
    params = problems.attempt(denoiser)
    sizes = [
        (*text_encoder, "its width", lambda: inspect_qwen25_vl(text_encoder[1])["hidden_size"], "text_dim"),
        (*byt5, "its width", lambda: inspect_t5xxl(byt5[1])["d_model"], "byt5_dim"),
    ]
    if vae is not None:
        sizes.append(
            (*vae, "its number of latent channels", lambda: inspect_vae(vae[1]).params.z_channels, "in_channels")
        )
    for option, path, what, read, needed in sizes:
        size = problems.attempt(read)
        if params is not None and size not in (None, getattr(params, needed)):
            problems.add(
                f"--{option} is {path}: {what} is {size}, the denoiser {model} takes {getattr(params, needed)};"
                " use the files that belong together"
            )
    swap = params and stream_swap_problem(blocks_to_swap, params.depth, params.depth_single)
    return [*problems.messages, swap] if swap else problems.messages


def save_hunyuan_image(
    model: HYImageDiffusionTransformer,
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a denoiser in the original layout. Hyper-parameters that its shapes do not tell go into `model_config`."""
    state = cast_all({key: tensor.detach().cpu() for key, tensor in model.state_dict().items()}, dtype)
    save_file_atomic(state, path, {"format": "pt", **(metadata or {}), **model_config_metadata(model)})


def model_config_metadata(model: HYImageDiffusionTransformer) -> dict[str, str]:
    """{"model_config": JSON} for a model whose hyper-parameters do not follow from its shapes, else nothing."""
    return config_metadata(
        model.params, lambda: build_params(HYImageParams, _infer(model.state_dict(), {}, ""), {}, "")
    )


def _config_of_diffusers(params: HYImageParams) -> dict[str, Any]:
    """config.json of diffusers' HunyuanImageTransformer2DModel."""
    return {
        "_class_name": "HunyuanImageTransformer2DModel",
        "in_channels": params.in_channels, "out_channels": params.in_channels, "patch_size": [1, 1],
        "num_attention_heads": params.num_heads, "attention_head_dim": params.hidden_size // params.num_heads,
        "num_layers": params.depth, "num_single_layers": params.depth_single,
        "num_refiner_layers": params.refiner_depth, "mlp_ratio": params.mlp_ratio, "qk_norm": "rms_norm",
        "guidance_embeds": params.guidance_embed, "use_meanflow": params.mean_flow,
        "text_embed_dim": params.text_dim, "text_embed_2_dim": params.byt5_dim,
        "rope_theta": params.rope_theta, "rope_axes_dim": list(params.rope_dim_list),
    }  # fmt: skip


LAYOUTS = DenoiserLayouts(
    inspect_hunyuan_image, hunyuan_image_convert.denoiser_rules, _config_of_diffusers,
    rows_of=lambda params: hunyuan_image_convert.rows_of(params.hidden_size),
    further=hunyuan_image_convert.comfy_rules,
)  # fmt: skip


def inspect_vae(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> AutoEncoderInfo:
    """Recognise the 32x autoencoder, in either layout, from headers alone; `config` overrides by the names of
    AutoEncoderParams. CheckpointError when it is another one."""
    return inspect_autoencoder(path, config, wanted=VAE_WANTED)


def load_vae(
    vae_path: str | os.PathLike,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None,
    *,
    chunk_size: int | None = None,
    tiling: bool = False,
) -> HunyuanVAE2D:
    """Load the autoencoder; `chunk_size`: rows that its convolutions compute at once; `tiling`: larger pictures are
    computed in tiles. CheckpointError when the file does not fit."""
    vae = load_autoencoder(inspect_vae(vae_path, config), dtype, device, disable_mmap)
    vae.set_chunk_rows(chunk_size)
    vae.tiles = TILES if tiling else None
    return vae


def _config_of_vae(params: AutoEncoderParams) -> dict[str, Any]:
    """config.json of diffusers' AutoencoderKLHunyuanImage, whose norms have 32 groups in any case."""
    groups = {} if params.norm_groups == 32 else {"norm_num_groups": params.norm_groups}
    return {
        "_class_name": "AutoencoderKLHunyuanImage",
        "in_channels": params.in_channels, "out_channels": params.out_ch, "latent_channels": params.z_channels,
        "block_out_channels": list(params.widths), "layers_per_block": params.num_res_blocks,
        "spatial_compression_ratio": params.spatial_stride, "sample_size": SAMPLE_SIZE,
        "scaling_factor": params.scaling_factor, **groups,
    }  # fmt: skip


VAE_LAYOUTS = DenoiserLayouts(
    inspect_vae, hunyuan_image_convert.autoencoder_rules, _config_of_vae, part="vae",
)  # fmt: skip
