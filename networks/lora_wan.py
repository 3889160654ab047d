"""Wan 2.1 and 2.2: the layers that adapters train, all of them in the blocks: self-attention, cross-attention (with its
image branch where there is one) and feed-forward. The text encoder is never trained.

musubi-tuner, ComfyUI and diffusion-pipe name the layers after this module tree, diffusers after its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.core.lazy_names import homes, lazy_names
from networks.kinds.targets import NetworkTargets
from networks.lora import check_network_args, create_network, create_network_from_weights

if TYPE_CHECKING:
    from networks.files.file_names import LayerNames

__all__ = ["TARGETS", "check_network_args", "create_network", "create_network_from_weights", "file_layers"]

__getattr__, __dir__ = lazy_names(__name__, homes("networks.lora", "LoRAModule"))

ATTENTIONS = (("self_attn", "attn1"), ("cross_attn", "attn2"))
LEAVES = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"), ("norm_q", "norm_q"), ("norm_k", "norm_k"))
IMAGE_LEAVES = (("k_img", "add_k_proj"), ("v_img", "add_v_proj"), ("norm_k_img", "norm_added_k"))
"""of the cross-attention with pictures"""
REST = (("ffn.0", "ffn.net.0.proj"), ("ffn.2", "ffn.net.2"), ("norm3", "norm2"))


def file_layers() -> tuple[LayerNames, ...]:
    """The layers under their names in files of other programs."""
    from networks.files.file_names import LayerNames

    pairs = [(f"{own}.{leaf}", f"{theirs}.{name}") for own, theirs in ATTENTIONS for leaf, name in LEAVES]
    pairs += [(f"cross_attn.{leaf}", f"attn2.{name}") for leaf, name in IMAGE_LEAVES]
    return tuple(LayerNames(f"blocks.{{i}}.{own}", (f"blocks.{{i}}.{theirs}",)) for own, theirs in (*pairs, *REST))


TARGETS = NetworkTargets(
    family="wan",
    file_state="library.wan_utils:denoiser_state",
    classes=("WanAttentionBlock",),
    attention_paths=r"blocks\.\d+\.(self|cross)_attn\..*",
    default_excludes=(r".*(patch_embedding|text_embedding|time_embedding|time_projection|norm|head).*",),
    regex_on_path=True,
)
