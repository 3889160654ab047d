"""SD3 and SD3.5 checkpoints: what a file holds, loading its parts, saving the denoiser."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.checkpoints.ldm_convert import convert_diffusers_vae_to_ldm, is_diffusers_autoencoder
from library.checkpoints.loading import (
    CheckpointFiles,
    Source,
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
from library.checkpoints.sd3_convert import convert_diffusers_to_sd3, convert_sd3_to_diffusers, is_diffusers_denoiser
from library.checkpoints.weight_forms import is_stored
from library.components import text_encoder_utils
from library.components.ldm_models import AutoEncoder
from library.components.ldm_utils import (
    AE_PREFIXES,
    AE_ROOTS,
    AutoEncoderInfo,
    Wanted,
    inspect_autoencoder,
    load_autoencoder,
)
from library.components.text_encoder_utils import (
    CLIP_G,
    CLIP_L,
    clip_g_state,
    clip_l_state,
    inspect_clip,
    inspect_t5xxl,
    load_clip,
    t5_state,
)
from library.core.errors import CheckpointError
from library.core.lazy_names import homes, lazy_names
from library.families.sd3 import FAMILY
from library.safetensors_utils import cast_all, save_file_atomic
from library.sd3_models import MMDiT, SD3Params, get_2d_sincos_pos_embed

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

__all__ = [
    "convert_diffusers_to_sd3", "convert_sd3_to_diffusers", "inspect_sd3", "inspect_vae_sd3", "load_clip_g",
    "load_clip_l", "load_sd3", "load_t5xxl", "load_vae_sd3", "save_sd3",
]  # fmt: skip

logger = logging.getLogger(__name__)
__getattr__, __dir__ = lazy_names(
    __name__,
    homes(
        "library.compat.sd3_names", "ModelSamplingDiscreteFlow", "analyze_checkpoint_state", "analyze_state_dict_state",
        "load_mmdit", "load_vae",
    ),
)

VAE_WANTED = Wanted(
    "SD3",
    "the one of an SD3 file or its vae folder",
    quant_conv=False,
    scaling={"scaling_factor": 1.5305, "shift_factor": 0.0609},
)
FILE_PREFIX = "model.diffusion_model."
DENOISER_PREFIXES = (FILE_PREFIX, "diffusion_model.", "model.", "net.", "module.", "transformer.")
DENOISER_ROOTS = (
    "x_embedder", "t_embedder", "y_embedder", "context_embedder", "pos_embed", "joint_blocks", "final_layer",
    "time_text_embed", "transformer_blocks", "norm_out", "proj_out",
)  # fmt: skip
BLOCKS = ("joint_blocks.", "transformer_blocks.")
ENCODER_SLOTS = ("clip_l", "clip_g", "t5xxl")
"""text encoders in the order of the family"""


@dataclass(frozen=True)
class Sd3Info:
    """What the headers of a denoiser checkpoint tell."""

    source: CheckpointFiles
    prefix: str
    is_diffusers: bool
    params: SD3Params

    @property
    def keys(self) -> list[str]:
        """Those of the denoiser, as the file has them."""
        named = [key for key in self.source.shapes if key.startswith(self.prefix)]
        return [key for key in named if key[len(self.prefix) :].split(".")[0] in DENOISER_ROOTS]

    @property
    def version(self) -> str:
        """As metadata call it: medium, 5-medium or 5-large."""
        if self.params.qk_norm is None:
            return "medium"
        return "5-medium" if self.params.x_block_self_attn_layers else "5-large"

    @property
    def title(self) -> str:
        """Its name for people: SD3 medium, SD3.5 medium or SD3.5 large."""
        return f"SD3.{self.version.replace('-', ' ')}" if self.version != "medium" else "SD3 medium"


def inspect_sd3(path: Source, config: Mapping[str, Any] | None = None) -> Sd3Info:
    """Recognise an SD3 denoiser from headers alone; `config` overrides hyper-parameters by the names of SD3Params.

    `path` may be tensors in memory, here and in the loaders below. CheckpointError when the file is damaged or no SD3
    denoiser.
    """
    source = open_checkpoint(path, "transformer")
    prefix = find_prefix(source.shapes, DENOISER_PREFIXES, DENOISER_ROOTS, source.path, "denoiser")
    stripped = _denoiser_part(source.shapes, prefix)
    is_diffusers = is_diffusers_denoiser(stripped)
    shapes = convert_diffusers_to_sd3(stripped) if is_diffusers else stripped
    marks = ("joint_blocks.0.x_block.attn.qkv.weight", "x_embedder.proj.weight")
    check_marks(shapes, marks, source.path, "SD3 denoiser")
    given = {**_diffusers_config(source.config), **source.model_config, **(config or {})}
    params = build_params(SD3Params, _inferred(shapes, source.path), given, source.path)
    return Sd3Info(source, prefix, is_diffusers, params)


def _denoiser_part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in strip_prefix(state, prefix).items() if key.split(".")[0] in DENOISER_ROOTS}


def _diffusers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Names of a diffusers config.json that SD3Params knows under other ones."""
    return {"num_heads": config["num_attention_heads"]} if "num_attention_heads" in config else {}


def _inferred(shapes: Mapping[str, Tensor], path: str) -> dict[str, Any]:
    """Hyper-parameters from shapes. Heads have 64 channels where no norm over them tells it."""

    def size(key: str, dim: int) -> int:
        return size_of(shapes, key, dim, path, "MMDiT")

    hidden, patch = size("x_embedder.proj.weight", 0), size("x_embedder.proj.weight", 2)
    depth = count_blocks(shapes, "joint_blocks.")
    norm = "joint_blocks.0.x_block.attn.ln_q.weight"
    heads = (
        {"num_heads": hidden // size(norm, 0)}
        if norm in shapes
        else {"num_heads": hidden // 64}
        if hidden % 64 == 0
        else {}
    )
    second = tuple(number for number in range(depth) if f"joint_blocks.{number}.x_block.attn2.qkv.weight" in shapes)
    table = round(size("pos_embed", 1) ** 0.5) if "pos_embed" in shapes else 384 if second else 192
    return {
        **heads,
        "depth": depth,
        "hidden_size": hidden,
        "patch_size": patch,
        "in_channels": size("x_embedder.proj.weight", 1),
        "out_channels": size("final_layer.linear.weight", 0) // patch**2,
        "mlp_ratio": size("joint_blocks.0.x_block.mlp.fc1.weight", 0) / hidden,
        "qk_norm": "rms" if norm in shapes else None,
        "x_block_self_attn_layers": second,
        "pos_embed_max_size": table,
        "adm_in_channels": size("y_embedder.mlp.0.weight", 1),
        "context_in": size("context_embedder.weight", 1),
        "time_embed_dim": size("t_embedder.mlp.0.weight", 1),
    }


def load_sd3(
    path: Source,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None,
    transform: Transform | None = None,
    form: str | None = None,
) -> MMDiT:
    """Load an SD3 denoiser: alone or in a file with the other parts, in either layout, or a diffusers folder.

    `dtype` float8_e4m3fn keeps the weights of linear layers in 8 bits and the rest in bfloat16; None keeps the file's
    own types; `form`, one of weight_forms.FORMS, stores those of the blocks in fewer bits; the position table is
    float32 in any case. `transform` may change the tensors as they are read.
    CheckpointError when the file does not fit.
    """
    info = inspect_sd3(path, config)
    logger.info(
        "loading %s from %s (%s layout, %d joint blocks of width %d)", info.title, info.source.path,
        "diffusers" if info.is_diffusers else "original", info.params.depth, info.params.hidden_size,
    )  # fmt: skip
    cast = info.source.storing(
        dtype, info.keys, form, lambda key: is_stored(form, key[len(info.prefix) :], BLOCKS),
        stays_float32=lambda key: key.endswith("pos_embed"),
    )  # fmt: skip
    state = strip_prefix(info.source.tensors(device, disable_mmap, info.keys, transform, cast), info.prefix)
    if info.is_diffusers:
        state = convert_diffusers_to_sd3(state)
    if "pos_embed" not in state:  # some exports leave it out, as it is not learned
        state["pos_embed"] = _new_table(info.params).to(device)
    model = build_on_meta(lambda: MMDiT(info.params))
    check_state(model, state, info.source.path)
    assign_state(model, state)
    return model


def _new_table(params: SD3Params) -> Tensor:
    return get_2d_sincos_pos_embed(params.hidden_size, params.pos_embed_max_size)[None]


def denoiser_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The denoiser's entries of a checkpoint's state under the names of the module tree."""
    part = part_of(state, DENOISER_PREFIXES, DENOISER_ROOTS)
    return convert_diffusers_to_sd3(part) if is_diffusers_denoiser(part) else part


def save_sd3(
    model: MMDiT, path: str | os.PathLike, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a denoiser in the original layout. Hyper-parameters that its shapes do not tell go into `model_config`."""
    state = cast_all({FILE_PREFIX + key: tensor for key, tensor in model.state_dict().items()}, dtype)
    save_file_atomic(state, path, {**(metadata or {}), **model_config_metadata(model)})


def model_config_metadata(model: MMDiT) -> dict[str, str]:
    """{"model_config": JSON} for a model whose hyper-parameters do not follow from its shapes, else nothing."""
    return config_metadata(model.params, lambda: build_params(SD3Params, _inferred(model.state_dict(), ""), {}, ""))


# -- the other parts ---------------------------------------------------------------------------------------------------


def inspect_vae_sd3(path: Source, config: Mapping[str, Any] | None = None) -> AutoEncoderInfo:
    return inspect_autoencoder(path, config, wanted=VAE_WANTED)


def load_vae_sd3(
    path: Source,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None,
) -> AutoEncoder:
    """The autoencoder of SD3, alone, in a file with the other parts, or a diffusers folder."""
    return load_autoencoder(inspect_vae_sd3(path, config), dtype, device, disable_mmap)


def load_clip_l(
    clip_l_path: str | os.PathLike | None,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    transform: Transform | None = None,
) -> CLIPTextModelWithProjection:
    """CLIP-L with its projection; a file without one gets the identity. `state_dict` stands in the place of a file."""
    source = clip_l_path if state_dict is None else state_dict
    return load_clip(source, CLIP_L, dtype, device, disable_mmap, transform=transform)


def load_clip_g(
    clip_g_path: str | os.PathLike | None,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    transform: Transform | None = None,
) -> CLIPTextModelWithProjection:
    """CLIP bigG with its projection. `state_dict` stands in the place of a file."""
    source = clip_g_path if state_dict is None else state_dict
    return load_clip(source, CLIP_G, dtype, device, disable_mmap, transform=transform)


def load_t5xxl(
    t5xxl_path: str | os.PathLike | None,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    transform: Transform | None = None,
) -> T5EncoderModel:
    """The encoder of T5-XXL. `state_dict` stands in the place of a file."""
    return text_encoder_utils.load_t5xxl(t5xxl_path, dtype, device, disable_mmap, state_dict, transform=transform)


ENCODER_LOADERS = {"clip_l": load_clip_l, "clip_g": load_clip_g, "t5xxl": load_t5xxl}


def inspect_encoder(slot: str, path: str | os.PathLike) -> dict[str, Any]:
    """Hyper-parameters of the text encoder `slot` in a file or folder, from headers. CheckpointError when it is not
    there."""
    if slot == "t5xxl":
        return inspect_t5xxl(path)
    return inspect_clip(path, CLIP_L if slot == "clip_l" else CLIP_G).values


SUBFOLDERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3", "vae": "vae"}
"""where a diffusers folder has the other parts"""
FILE_PREFIXES = {**{slot: f"text_encoders.{slot}.transformer." for slot in ENCODER_SLOTS}, "vae": AE_PREFIXES[0]}
"""what stands before the names of the other parts in a file that holds them too"""
_TITLES = {"clip_l": "CLIP-L text encoder", "clip_g": "CLIP-G text encoder", "vae": "autoencoder"}


def parts_in(path: str | os.PathLike) -> tuple[str, ...]:
    """What a model, one file or a diffusers folder, holds beside the denoiser: clip_l, clip_g, t5xxl, vae."""
    if os.path.isdir(path):
        return tuple(part for part, folder in SUBFOLDERS.items() if os.path.isdir(os.path.join(path, folder)))
    prefixes = {**{slot: (f"text_encoders.{slot}.",) for slot in ENCODER_SLOTS}, "vae": AE_PREFIXES}
    keys = open_checkpoint(path).shapes
    return tuple(part for part, known in prefixes.items() if any(key.startswith(known) for key in keys))


def part_paths(base: str | os.PathLike, given: Mapping[str, str | None]) -> dict[str, str]:
    """Where each part (a key of `given`) lies: the file that is given for it, else the model's own; without those that
    are nowhere."""
    base, own = os.fspath(base), parts_in(base)

    def own_place(part: str) -> str:
        return os.path.join(base, SUBFOLDERS[part]) if os.path.isdir(base) else base

    return {part: path or own_place(part) for part, path in given.items() if path or part in own}


def embedding_widths(base: str | os.PathLike, given: Mapping[str, str | None]) -> dict[str, int | None]:
    """Widths of the vectors that the text encoders take, by the names of files of textual inversions; None for T5 that
    is left out. `given`: as for `part_paths`."""
    paths = part_paths(base, given)
    names = {"clip_l": "width", "clip_g": "width", "t5xxl": "d_model"}
    return {
        slot: inspect_encoder(slot, paths[slot])[names[slot]] if slot in paths else None for slot in ENCODER_SLOTS
    }


def file_problems(
    slot: str, base: str | None, given: Mapping[str, str | None], *, for_pictures: bool = False
) -> list[str]:
    """What is missing, something else, or does not fit together, from headers. `slot`: the option that names the model;
    `given`: what the options of the parts (clip_l, clip_g, t5xxl, vae, or some of them) name."""
    from library.checkpoints.kinds import check_slot

    wrong = check_slot(base, slot, set(FAMILY.kinds), for_pictures=for_pictures)
    found = [problem for part, path in given.items() if path and (problem := _slot_problem(part, path, for_pictures))]
    if wrong is None:
        own = parts_in(base)
        found += [
            f"--{part} is not given, and {base} holds no {_TITLES[part]}; needed: a file of it"
            for part, path in given.items()
            if not path and part not in own and part in _TITLES
        ]
    if wrong or found:
        return [*([wrong] if wrong else []), *found]
    try:
        return size_problems(base, given)
    except CheckpointError as error:
        return [str(error)]


def _slot_problem(part: str, path: str, for_pictures: bool) -> str | None:
    from library.checkpoints.kinds import check_slot, describe_checkpoint

    kinds, inside = {"vae": "vae_flux", "t5xxl": "t5"}, FAMILY.autoencoders
    kind = kinds.get(part, part)
    problem = check_slot(path, part, {kind}, for_pictures=for_pictures, inside={inside.get(kind, kind)})
    if problem and part == "clip_g" and describe_checkpoint(path).kind == "clip_l":
        # files of no released width are told apart by the sizes of both
        return None if inspect_encoder("clip_g", path)["width"] != 768 else problem
    return problem


def size_problems(base: str, given: Mapping[str, str | None]) -> list[str]:
    """Sizes of the parts against each other, from headers. CheckpointError when one is no such part."""
    params, paths = inspect_sd3(base).params, part_paths(base, given)

    def named(part: str) -> str:
        return f"--{part} is {given[part]}" if given[part] else f"the {_TITLES.get(part, 'T5')} in {base}"

    problems = []
    if "clip_l" in paths and "clip_g" in paths:
        first, second = (inspect_encoder(slot, paths[slot])["width"] for slot in ("clip_l", "clip_g"))
        if first > second:
            problems.append(f"{named('clip_l')}: its width is {first}, that of CLIP-G {second}; are they exchanged?")
        elif first + second != params.adm_in_channels:
            problems.append(
                f"{named('clip_l')}, {named('clip_g')}: their widths are {first} and {second}, the denoiser {base}"
                f" takes {params.adm_in_channels} together; use the files that belong together"
            )
    if "t5xxl" in paths:
        width = inspect_encoder("t5xxl", paths["t5xxl"])["d_model"]
        if width != params.context_in:
            problems.append(
                f"{named('t5xxl')}: its width is {width}, the denoiser {base} takes {params.context_in}; use T5-XXL"
            )
    if "vae" in paths:
        channels = inspect_vae_sd3(paths["vae"]).params.z_channels
        if channels != params.in_channels:
            problems.append(
                f"{named('vae')}: it has {channels} latent channels, the denoiser {base} takes {params.in_channels}"
            )
    return problems


def save_whole_sd3(
    model: MMDiT,
    path: str | os.PathLike,
    beside: Mapping[str, str],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    learned: Mapping[str, nn.Module] | None = None,
) -> None:
    """Write a denoiser and other parts as one file in the original layout. `beside`: part -> the file or folder that
    holds it; its tensors are those of the base, in the type of the file or in `dtype`, but for parts that have
    `learned`."""
    state = {FILE_PREFIX + key: tensor for key, tensor in model.state_dict().items()}
    config = json.loads(model_config_metadata(model).get("model_config", "{}"))
    for part, source in beside.items():
        tensors, own = _part_of_file(part, source)
        if learned and part in learned:
            tensors = {**tensors, **_encoder_state(part, learned[part])}
        state |= {FILE_PREFIXES[part] + key: tensor for key, tensor in tensors.items()}
        config[part] = own  # also where it is empty, so that what the denoiser says is not taken for the part's
    told = {"model_config": json.dumps(config, sort_keys=True)} if any(config.values()) else {}
    cast = {key: tensor.contiguous() for key, tensor in cast_all(state, dtype).items()}
    save_file_atomic(cast, path, {**(metadata or {}), **told})


def save_encoder(
    model: nn.Module, slot: str, base: str | os.PathLike, path: str | os.PathLike, dtype: torch.dtype | None = None
) -> None:
    """Write a text encoder as a file of its own, under the names of transformers. `base`: where it was read, which
    tells what shapes do not."""
    source = open_checkpoint(base)
    own = source.config_of(slot)
    told = {"model_config": json.dumps(own, sort_keys=True)} if own else {}
    state = {**_encoder_state(slot, model), **_tokenizer_blob(slot, source)}
    save_file_atomic(cast_all(state, dtype), path, {"format": "pt", **told})


def _encoder_state(slot: str, model: nn.Module) -> dict[str, Tensor]:
    """Of a model of transformers, with what its file had beside the layers in use; tied tensors once."""
    state = {**getattr(model, "unused_tensors", {}), **model.state_dict()}
    state.pop("encoder.embed_tokens.weight", None)  # of T5 the same parameter as `shared`
    return {key: tensor.contiguous() for key, tensor in _ENCODER_STATES[slot](state).items()}


def _part_of_file(part: str, path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a part under the names of its single file, and what its shapes do not tell."""
    source = open_checkpoint(path)
    state = source.tensors("cpu", False, source.shapes, cast=source.casting(None))
    own = source.config_of(part)
    if part == "vae":
        tensors = part_of(state, AE_PREFIXES, AE_ROOTS)
        return (convert_diffusers_vae_to_ldm(tensors) if is_diffusers_autoencoder(tensors) else tensors), own
    return {**_ENCODER_STATES[part](state), **_tokenizer_blob(part, source)}, own


def _tokenizer_blob(slot: str, source: CheckpointFiles) -> dict[str, Tensor]:
    """The tokenizer that a file of T5 may carry, by the name that it has in a file of its own."""
    names = [key for key in source.shapes if key.split(".")[-1] == "spiece_model"] if slot == "t5xxl" else []
    return {"spiece_model": tensor for _, tensor in source.stream("cpu", False, names[:1])}


_ENCODER_STATES = {"clip_l": clip_l_state, "clip_g": clip_g_state, "t5xxl": t5_state}
"""slot -> its entries in the state of a checkpoint, under the names of transformers"""
