"""CLIP and T5-XXL text encoders: sizes from shapes, loaded into the classes of transformers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.checkpoints.loading import (
    CheckpointFiles,
    Source,
    Transform,
    assign_state,
    build_on_meta,
    check_marks,
    check_state,
    count_blocks,
    find_prefix,
    open_checkpoint,
    part_of,
    strip_prefix,
)
from library.checkpoints.open_clip_convert import OPEN_CLIP_ROOTS, is_open_clip_text, open_clip_to_hf, with_text_model
from library.checkpoints.weight_forms import whole
from library.components.transformers_import import import_transformers_models
from library.core.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5EncoderModel

CLIP_PREFIXES = (
    "text_encoders.clip_l.transformer.", "text_encoders.clip_l.", "cond_stage_model.transformer.",
    "conditioner.embedders.0.transformer.", "clip_l.transformer.", "clip_l.", "text_encoder.",
)  # fmt: skip
T5_PREFIXES = (
    "text_encoders.t5xxl.transformer.", "text_encoders.t5xxl.", "text_encoders.byt5_small.transformer.",
    "text_encoders.byt5_small.", "t5xxl.transformer.", "t5xxl.", "text_encoder_3.", "text_encoder_2.",
)  # fmt: skip
T5_ROOTS = ("encoder", "shared")
_CLIP_TOLERATED = ("position_ids", "logit_scale", "visual_projection.weight")
_HEAD_SIZE = 64


@dataclass(frozen=True)
class ClipSlot:
    """Where a CLIP text encoder lies and what its shapes do not tell. `layers`: how many are used when the file has
    more; `has_open_clip`: files of this encoder may be in the layout of open_clip; `subfolder`: its place in a
    folder; `pad`: the token that fills its captions up, where that is not the one that ends them."""

    name: str
    title: str
    subfolder: str
    prefixes: tuple[str, ...]
    act: str
    layers: int | None = None
    has_open_clip: bool = False
    pad: str | None = None


CLIP_L = ClipSlot("clip_l", "CLIP text encoder", "text_encoder", CLIP_PREFIXES, "quick_gelu")
CLIP_H = ClipSlot(
    "clip_h", "CLIP-H text encoder", "text_encoder", ("cond_stage_model.model.", "text_encoder."), "gelu", layers=23,
    has_open_clip=True, pad="!",
)
CLIP_G = ClipSlot(
    "clip_g", "CLIP-G text encoder", "text_encoder_2",
    (
        "conditioner.embedders.1.model.", "text_encoders.clip_g.transformer.", "text_encoders.clip_g.",
        "clip_g.transformer.", "clip_g.", "text_encoder_2.",
    ),
    "gelu", has_open_clip=True, pad="!",
)  # fmt: skip


@dataclass(frozen=True)
class ClipInfo:
    """What the headers of a CLIP checkpoint tell; `values` by the names `width, heads, layers, vocab, act, eos,
    max_len, ff, projection`."""

    source: CheckpointFiles
    prefix: str
    is_open_clip: bool
    values: dict[str, Any]


def inspect_clip_l(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Hyper-parameters of a CLIP-L file by the names of `ClipInfo.values`, from headers."""
    return inspect_clip(path, CLIP_L, config).values


def inspect_clip(path: Source, slot: ClipSlot, config: Mapping[str, Any] | None = None) -> ClipInfo:
    """Recognise a CLIP text encoder from headers alone; `config` overrides values. CheckpointError when there is
    none."""
    source = replace(open_checkpoint(path, slot.subfolder), part=slot.subfolder)
    names = {key: with_text_model(key) for key in source.shapes}
    roots = ("text_model", "text_projection", *(OPEN_CLIP_ROOTS if slot.has_open_clip else ()))
    prefix = find_prefix(names.values(), slot.prefixes, roots, source.path, slot.title)
    shapes = strip_prefix({names[key]: tensor for key, tensor in source.shapes.items()}, prefix)
    is_open_clip = slot.has_open_clip and is_open_clip_text(shapes)
    shapes = open_clip_to_hf(shapes) if is_open_clip else shapes
    tokens, first = "text_model.embeddings.token_embedding.weight", "text_model.encoder.layers.0.mlp.fc1.weight"
    positions = "text_model.embeddings.position_embedding.weight"
    check_marks(shapes, (tokens, positions, first), source.path, slot.title)
    vocab, width = shapes[tokens].shape
    layers = count_blocks(shapes, "text_model.encoder.layers.")
    inferred = {
        "width": width,
        "layers": min(layers, slot.layers or layers),
        "vocab": vocab,
        "ff": shapes[first].shape[0],
        "max_len": shapes[positions].shape[0],
        "act": slot.act,
        "eos": vocab - 1,
        "projection": shapes["text_projection.weight"].shape[0] if "text_projection.weight" in shapes else None,
    }
    values = {
        **inferred, **_folder_clip_config(source.config), **source.config_of(slot.name), **(config or {}),
    }  # fmt: skip
    return ClipInfo(source, prefix, is_open_clip, _with_heads(values, source.path))


def _with_heads(values: dict[str, Any], path: str) -> dict[str, Any]:
    width = values["width"]
    if "heads" not in values:
        if width % _HEAD_SIZE:
            raise CheckpointError(
                f"{path}: the width {width} is no multiple of {_HEAD_SIZE}, so the number of heads is not known;"
                " give heads as an argument or under model_config in the file's metadata"
            )
        values["heads"] = width // _HEAD_SIZE
    if width % values["heads"]:
        raise CheckpointError(f"{path}: heads is {values['heads']}; it must divide the width {width}")
    return values


def _folder_clip_config(config: Mapping[str, Any]) -> dict[str, Any]:
    names = {"num_attention_heads": "heads", "hidden_act": "act"}
    values = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    if config.get("eos_token_id") not in (None, 2):  # 2 is a placeholder in old folders, not the id
        values["eos"] = config["eos_token_id"]
    return values


def load_clip_l(
    ckpt_path: str | os.PathLike | None,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    transform: Transform | None = None,
) -> CLIPTextModelWithProjection:
    """Load CLIP-L from a file (any known prefix) or a transformers folder, or from the tensors of one, `state_dict`,
    instead. `config` overrides the names of `inspect_clip_l`.

    A file without `text_projection.weight` gets the identity, for families that do not use it. CheckpointError when the
    file does not fit.
    """
    source = ckpt_path if state_dict is None else state_dict
    return load_clip(source, CLIP_L, dtype, device, disable_mmap, config, transform)


def load_clip(
    path: Source,
    slot: ClipSlot,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None,
    transform: Transform | None = None,
) -> CLIPTextModelWithProjection:
    """Load a CLIP text encoder from a file (any known prefix and layout) or a folder.

    What the file holds beside the layers in use (further layers, logit_scale) stays in `model.unused_tensors` under the
    names of transformers, so that it can be written back. CheckpointError when the file does not fit.
    """
    import_transformers_models()
    from transformers import CLIPTextModelWithProjection

    info = inspect_clip(path, slot, config)
    values = info.values
    names = {key: with_text_model(key) for key in info.source.shapes}
    keys = [key for key, name in names.items() if name.startswith(info.prefix)]
    tensors = info.source.tensors(device, disable_mmap, keys, transform, info.source.casting(dtype))
    state = strip_prefix({names[key]: tensor for key, tensor in tensors.items()}, info.prefix)
    state = open_clip_to_hf(state) if info.is_open_clip else state
    state = {
        key: tensor
        for key, tensor in state.items()
        if key.startswith(("text_model.", "text_projection.", "logit_scale"))
    }
    if "text_projection.weight" not in state:
        kind = state["text_model.final_layer_norm.weight"].dtype
        state["text_projection.weight"] = torch.eye(values["width"], dtype=kind, device=device)
    unused = {
        key: state.pop(key) for key in list(state) if _layer_number(key) >= values["layers"] or key == "logit_scale"
    }
    model = build_on_meta(lambda: CLIPTextModelWithProjection(_clip_config(values)))
    check_state(model, state, info.source.path, lambda key: key.endswith(_CLIP_TOLERATED))
    assign_state(model, state)
    _rebuild_buffers(model, device)
    model.unused_tensors = {key: whole(tensor).cpu() for key, tensor in unused.items()}
    return model


def clip_state(state: Mapping[str, Tensor], slot: ClipSlot) -> dict[str, Tensor]:
    """The entries of a CLIP text encoder in a checkpoint's state under the names of transformers; {} when it is not
    there."""
    roots = ("text_model", "text_projection", *(OPEN_CLIP_ROOTS if slot.has_open_clip else ()))
    part = part_of({with_text_model(key): tensor for key, tensor in state.items()}, slot.prefixes, roots)
    return open_clip_to_hf(part) if slot.has_open_clip and is_open_clip_text(part) else part


def clip_l_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return clip_state(state, CLIP_L)


def clip_g_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return clip_state(state, CLIP_G)


def sd_clip_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The one text encoder of Stable Diffusion 1 (CLIP-L) or 2 (CLIP-H)."""
    return clip_state(state, CLIP_H if any(key.startswith(CLIP_H.prefixes[0]) for key in state) else CLIP_L)


def t5_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a T5 encoder in a checkpoint's state under the names of transformers; {} when it is not there."""
    return part_of(state, T5_PREFIXES, T5_ROOTS)


def _layer_number(key: str) -> int:
    """Number of the encoder layer that a key belongs to, -1 for the rest."""
    start = "text_model.encoder.layers."
    return int(key[len(start) :].split(".")[0]) if key.startswith(start) else -1


def _clip_config(values: Mapping[str, Any]) -> CLIPTextConfig:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=values["vocab"],
        hidden_size=values["width"],
        intermediate_size=values["ff"],
        projection_dim=values["projection"] or values["width"],
        num_hidden_layers=values["layers"],
        num_attention_heads=values["heads"],
        max_position_embeddings=values["max_len"],
        hidden_act=values["act"],
        bos_token_id=max(values["eos"] - 1, 0),
        eos_token_id=values["eos"],
        pad_token_id=values["eos"],
    )


def _rebuild_buffers(model: torch.nn.Module, device: torch.device | str) -> None:
    """Buffers that no file holds were built without data; position ids are the only ones of CLIP."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                if name != "position_ids":
                    raise AssertionError(f"buffer {name} of {type(module).__name__} has no data")
                module.register_buffer(
                    name, torch.arange(buffer.shape[-1], device=device).expand(buffer.shape), persistent=False
                )


def attended(model: Any, ids: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor | None:
    """The mask to hand to an encoder of transformers for ids [B, L] and their mask [B, L] (1 = token; None hides
    nothing).

    From [B, L] it makes [B, 1, L, L] after a look at the values, for which the host would wait: so on a device it gets
    that at once. On the CPU the mask stays as it is: one that hides nothing takes a quicker way there.
    """
    if ids.device.type == "cpu" or model.config._attn_implementation != "sdpa":
        return mask
    return ready_mask(ids, mask, causal=causal)


def ready_mask(ids: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    """Which places each place of ids [B, L] attends to, as booleans [B, 1, L, L]."""
    length = ids.shape[1]
    seen = (torch.ones_like(ids) if mask is None else mask).bool()[:, None, None, :].expand(-1, 1, length, -1)
    return seen & torch.ones(length, length, dtype=torch.bool, device=ids.device).tril() if causal else seen


def pool_at_first_eos(states: Tensor, ids: Tensor, eos_id: int) -> Tensor:
    """The state [B, D] of `states` [B, L, D] at the first end token of each row of `ids` [B, L]; a row without one
    (which tokenizers do not make) is pooled at its first place."""
    first = (ids == eos_id).int().argmax(dim=-1).to(states.device)
    return states[torch.arange(len(states), device=states.device), first]


def inspect_t5xxl(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Hyper-parameters of a T5 encoder file by the names `d_model, d_kv, d_ff, num_layers, num_heads, vocab_size,
    buckets, max_distance, eps`, from headers."""
    return _open_t5(path, config)[2]


def _open_t5(path: Source, config: Mapping[str, Any] | None) -> tuple[Any, str, dict[str, Any]]:
    # in a pipeline folder T5 is the last of two or three text encoders
    third = not isinstance(path, Mapping) and os.path.isdir(os.path.join(path, "text_encoder_3"))
    source = open_checkpoint(path, "text_encoder_3" if third else "text_encoder_2")
    prefix = find_prefix(source.shapes, T5_PREFIXES, T5_ROOTS, source.path, "T5 encoder")
    shapes = strip_prefix(source.shapes, prefix)
    attention = "encoder.block.0.layer.0.SelfAttention."
    feed_forward = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    embeddings = ("shared.weight", "encoder.embed_tokens.weight")
    needed = (attention + "q.weight", attention + "relative_attention_bias.weight", feed_forward)
    check_marks(shapes, (embeddings, *needed), source.path, "T5 v1.1 encoder")
    embedding = next(key for key in embeddings if key in shapes)
    if "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in shapes:
        raise CheckpointError(
            f"{source.path} is an umT5 encoder (a position bias in every block); T5 v1.1 XXL is needed"
        )
    buckets, heads = shapes[attention + "relative_attention_bias.weight"].shape
    inferred = {
        "d_model": shapes[embedding].shape[1],
        "vocab_size": shapes[embedding].shape[0],
        "num_heads": heads,
        "d_kv": shapes[attention + "q.weight"].shape[0] // heads,
        "d_ff": shapes[feed_forward].shape[0],
        "num_layers": count_blocks(shapes, "encoder.block."),
        "buckets": buckets,
        "max_distance": 128,
        "eps": 1e-6,
    }
    folder = {ours: source.config[theirs] for theirs, ours in _T5_FOLDER_NAMES.items() if theirs in source.config}
    return source, prefix, {**inferred, **folder, **source.config_of("t5xxl"), **(config or {})}


_T5_FOLDER_NAMES = {"relative_attention_max_distance": "max_distance", "layer_norm_epsilon": "eps"}


def load_t5xxl(
    ckpt_path: str | os.PathLike | None,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    transform: Transform | None = None,
) -> T5EncoderModel:
    """Load the encoder of T5 v1.1 XXL from a file (any known prefix) or a transformers folder, or from the tensors of
    one, `state_dict`, instead; dropout is off.

    8-bit files are widened. `config` overrides the names of `inspect_t5xxl`. CheckpointError when the file does not
    fit.
    """
    import_transformers_models()
    from transformers import T5Config, T5EncoderModel

    source, prefix, values = _open_t5(ckpt_path if state_dict is None else state_dict, config)
    model_config = T5Config(
        vocab_size=values["vocab_size"],
        d_model=values["d_model"],
        d_kv=values["d_kv"],
        d_ff=values["d_ff"],
        num_layers=values["num_layers"],
        num_heads=values["num_heads"],
        relative_attention_num_buckets=values["buckets"],
        relative_attention_max_distance=values["max_distance"],
        layer_norm_epsilon=values["eps"],
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    keys = [key for key in source.shapes if key.startswith(prefix)]
    state = strip_prefix(source.tensors(device, disable_mmap, keys, transform, source.casting(dtype)), prefix)
    state = {key: tensor for key, tensor in state.items() if key.startswith(("encoder.", "shared."))}
    embedding = state.pop("encoder.embed_tokens.weight", None)
    state.setdefault("shared.weight", embedding)
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    model = build_on_meta(lambda: T5EncoderModel(model_config))
    check_state(model, state, source.path)
    assign_state(model, state)
    model.encoder.embed_tokens.weight = model.shared.weight  # one parameter under two names
    _rebuild_buffers(model, device)
    return model
