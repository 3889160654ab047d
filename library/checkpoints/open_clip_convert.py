"""Key names of CLIP text encoders: the layout of open_clip and the one of transformers, both ways, and an old
oddity."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

OPEN_CLIP_ROOTS = ("positional_embedding", "token_embedding", "transformer", "ln_final")
"""what tells where the encoder stands in a file; `logit_scale` may stand elsewhere, above the encoder"""
_WITHOUT_ROOT = re.compile(
    r"(cond_stage_model\.transformer\.|text_encoder\.|^)(embeddings\.(?:token|position)_embedding|encoder\.layers|final_layer_norm)\."
)
_TOP = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
_TOP_BACK = {other: original for original, other in _TOP.items()}
_LAYER_BACK = {other: original for original, other in _LAYER.items()}


def with_text_model(key: str) -> str:
    """The level `text_model.` put into keys that lack it: Stable Diffusion 1 files of old tools, and folders that
    transformers 5 wrote."""
    return _WITHOUT_ROOT.sub(r"\1text_model.\2.", key, count=1)


def is_open_clip_text(keys: Iterable[str]) -> bool:
    return "transformer.resblocks.0.attn.in_proj_weight" in keys


def open_clip_to_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of transformers. `text_projection` is stored for pooled @ P there and for a linear layer
    here, hence transposed; the joint projection of q, k and v is taken apart."""
    converted: dict[str, Tensor] = {}
    for key, tensor in state.items():
        match = re.match(r"transformer\.resblocks\.(\d+)\.(.+)\.?(weight|bias)$", key)
        if key == "text_projection":
            converted["text_projection.weight"] = tensor.t().contiguous()
        elif match and match[2] == "attn.in_proj_":
            for name, part in zip("qkv", tensor.chunk(3)):
                converted[f"text_model.encoder.layers.{match[1]}.self_attn.{name}_proj.{match[3]}"] = part.clone()
        elif match:
            name = match[2].removesuffix(".")
            converted[f"text_model.encoder.layers.{match[1]}.{_LAYER.get(name, name)}.{match[3]}"] = tensor
        else:
            converted[_TOP.get(key, key)] = tensor
    return converted


def hf_to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `open_clip_to_hf`. Position ids, which open_clip has not, are left out."""
    converted: dict[str, Tensor] = {}
    for key, tensor in state.items():
        match = re.match(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$", key)
        if key.endswith("position_ids"):
            continue
        if key == "text_projection.weight":
            converted["text_projection"] = tensor.t().contiguous()
        elif match and match[2].startswith("self_attn.") and match[2] != "self_attn.out_proj":
            if match[2] == "self_attn.q_proj":
                names = (key.replace("q_proj", f"{name}_proj") for name in "qkv")
                converted[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}"] = torch.cat(
                    [state[name] for name in names]
                )
        elif match:
            converted[f"transformer.resblocks.{match[1]}.{_LAYER_BACK[match[2]]}.{match[3]}"] = tensor
        else:
            converted[_TOP_BACK.get(key, key)] = tensor
    return converted
