"""The vision encoder of Wan 2.1 with pictures: the image side of a CLIP of ViT-H, in the layout of its own files or
that of transformers."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from library.checkpoints.layout_rules import Rule, placed, to_original, with_kinds
from library.checkpoints.loading import (
    CheckpointFiles,
    assign_state,
    build_on_meta,
    check_marks,
    check_state,
    count_blocks,
    open_checkpoint,
    size_of,
)
from library.checkpoints.scaled_weights import is_blob
from library.components.transformers_import import import_transformers_models
from library.core.errors import CheckpointError
from library.device_utils import to_device

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
HEAD_SIZE = 80
UNUSED_LAYERS = 1
"""the last layer, and the norm behind it, are not computed: states come from the one before"""
OWN_PREFIXES, PREFIXES = ("visual.", "model.visual."), ("vision_model.", "image_encoder.vision_model.")
OWN_MARK = "cls_embedding"
MARKS = ("embeddings.class_embedding", "embeddings.patch_embedding.weight", "encoder.layers.0.mlp.fc1.weight")
_TOP = (Rule("pre_layrnorm", ("pre_norm",)), Rule("post_layernorm", ("post_norm",)))
_SINGLE = (
    Rule("embeddings.class_embedding", ("cls_embedding",)),
    Rule("embeddings.position_embedding.weight", ("pos_embedding",)),
    Rule("embeddings.patch_embedding.weight", ("patch_embedding.weight",)),
)
_LAYER = (
    Rule("layer_norm1", ("norm1",)), Rule("layer_norm2", ("norm2",)), Rule("self_attn.out_proj", ("attn.proj",)),
    Rule("mlp.fc1", ("mlp.0",)), Rule("mlp.fc2", ("mlp.2",)),
)  # fmt: skip
_TOLERATED = ("position_ids", "logit_scale", "visual_projection.weight", "head")


@dataclass(frozen=True)
class VisionInfo:
    """What the headers of a file tell. `values` by the names `width, heads, layers, ff, patch, size, act, eps`: layers
    of the file, size in pixels of the side that it takes."""

    source: CheckpointFiles
    prefix: str
    is_own: bool
    values: dict[str, Any]

    @property
    def keys(self) -> list[str]:
        return [key for key in self.source.shapes if key.startswith(self.prefix)]


def _own_rules(keys: Mapping[str, object]) -> Iterator[Rule]:
    yield from with_kinds("", "", _TOP)
    yield from placed("", "", _SINGLE)
    for number in range(count_blocks(keys, "transformer.")):
        yield from with_kinds(f"encoder.layers.{number}.", f"transformer.{number}.", _LAYER)


def _to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The own layout under the names of transformers: query, key and value apart, embeddings without leading axes."""
    converted: dict[str, Tensor] = {}
    for key, tensor in to_original(state, _own_rules(state)).items():
        layer, joined, kind = key.partition(".attn.to_qkv.")
        if joined:
            place = layer.replace("transformer.", "encoder.layers.")
            for name, part in zip("qkv", tensor.chunk(3)):
                converted[f"{place}.self_attn.{name}_proj.{kind}"] = part
        else:
            converted[key] = tensor
    converted["embeddings.class_embedding"] = converted["embeddings.class_embedding"].flatten()
    positions = converted["embeddings.position_embedding.weight"]
    return {**converted, "embeddings.position_embedding.weight": positions.reshape(positions.shape[-2:])}


def inspect_vision(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> VisionInfo:
    """Recognise the encoder from headers alone; `config` overrides values. CheckpointError when there is none."""
    source = open_checkpoint(path, "image_encoder")
    is_own = any(key.endswith(OWN_MARK) for key in source.shapes)
    known = OWN_PREFIXES if is_own else PREFIXES
    prefix = next((one for one in known if any(key.startswith(one) for key in source.shapes)), "")
    named = {key: tensor for key, tensor in source.shapes.items() if key.startswith(prefix) and not is_blob(key)}
    stripped = {key[len(prefix) :]: tensor for key, tensor in named.items()}
    shapes = _to_transformers(stripped) if is_own else stripped
    check_marks(shapes, MARKS, source.path, "CLIP vision encoder")

    def size(key: str, dim: int) -> int:
        return size_of(shapes, key, dim, source.path, "CLIPVisionModel")

    width, patch = size(MARKS[1], 0), size(MARKS[1], 2)
    side = math.isqrt(size("embeddings.position_embedding.weight", 0) - 1)
    values = {
        "width": width, "heads": max(width // HEAD_SIZE, 1), "layers": count_blocks(shapes, "encoder.layers."),
        "ff": size(MARKS[2], 0), "patch": patch, "size": side * patch, "act": "gelu", "eps": 1e-5,
    }  # fmt: skip
    folder = {"heads": source.config["num_attention_heads"]} if "num_attention_heads" in source.config else {}
    values = {**values, **folder, **source.config_of("clip_vision"), **(config or {})}
    if width % values["heads"] or values["layers"] <= UNUSED_LAYERS:
        raise CheckpointError(
            f"{source.path}: heads is {values['heads']}, which must divide the width {width}, and there are"
            f" {values['layers']} layers, of which the last is not used"
        )
    return VisionInfo(source, prefix, is_own, values)


def load_vision(
    path: str | os.PathLike,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None,
) -> CLIPVisionModel:
    """Load the layers that are used, of a file (either layout, pickled too) or a folder. CheckpointError when it does
    not fit."""
    import_transformers_models()
    from transformers import CLIPVisionConfig, CLIPVisionModel

    info = inspect_vision(path, config)
    values = info.values
    layers = values["layers"] - UNUSED_LAYERS
    model_config = CLIPVisionConfig(
        hidden_size=values["width"], intermediate_size=values["ff"], num_hidden_layers=layers,
        num_attention_heads=values["heads"], image_size=values["size"], patch_size=values["patch"],
        hidden_act=values["act"], layer_norm_eps=values["eps"],
    )  # fmt: skip
    tensors = info.source.tensors(device, disable_mmap, info.keys, cast=info.source.casting(dtype))
    state = {key[len(info.prefix) :]: tensor for key, tensor in tensors.items()}
    state = _to_transformers(state) if info.is_own else state
    state = {key: tensor for key, tensor in state.items() if not key.startswith(f"encoder.layers.{layers}.")}
    model = build_on_meta(lambda: CLIPVisionModel(model_config))
    inner = "vision_model." if any(key.startswith("vision_model.") for key in model.state_dict()) else ""
    state = {inner + key: tensor for key, tensor in state.items()}
    check_state(model, state, info.source.path, lambda key: key.endswith(_TOLERATED))
    assign_state(model, state)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:  # position ids, which no file holds
                places = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
                module.register_buffer(name, places, persistent=False)
    return model


def vision_states(model: CLIPVisionModel, pictures: Tensor) -> Tensor:
    """States [B, 257, D] of pictures [B, 3, H, W] in -1..1: stretched to the size of the encoder, without a crop."""
    parameter = next(model.parameters())
    side = model.config.image_size
    resized = F.interpolate(pictures.float(), size=(side, side), mode="bicubic", align_corners=False)
    mean, std = (to_device(torch.tensor(values), resized.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    normed = ((resized * 0.5 + 0.5) - mean) / std
    return model(pixel_values=normed.to(parameter.device, parameter.dtype)).last_hidden_state
