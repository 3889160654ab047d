"""Files of denoisers with double and single stream blocks, which the families of Hunyuan share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from library.checkpoints.denoisers import DenoiserKind, SizeOf
from library.checkpoints.hunyuan_convert import StreamNames
from library.checkpoints.loading import count_blocks
from library.components.hunyuan_stream_models import StreamDenoiser, StreamParams

DENOISER_PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "model.model.",
    "model.",
    "net.",
    "module.",
    "transformer.",
)


def stream_kind(
    title: str,
    model: type[StreamDenoiser],
    params: type[StreamParams],
    names: StreamNames,
    roots: tuple[str, ...],
    *,
    mark: str,
    sizes: Callable[[SizeOf, Mapping[str, Tensor]], dict[str, Any]],
    axes: Callable[[int], tuple[int, ...]],
) -> DenoiserKind:
    """The files of a family's denoiser. `mark`: a tensor that no relative has; `sizes`: (sizes, names -> shapes) -> the
    hyper-parameters that it alone has; `axes`: size of a head -> its rotary axes, where nothing else tells."""

    def infer(size: SizeOf, shapes: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
        hidden, head_dim = size("img_in.proj.weight", 0), size("double_blocks.0.img_attn_q_norm.weight", 0)
        found: dict[str, Any] = {} if "rope_dim_list" in given else {"rope_dim_list": axes(head_dim)}
        return {
            **found,
            "in_channels": size("img_in.proj.weight", 1),
            "hidden_size": hidden,
            "num_heads": hidden // head_dim,
            "depth": count_blocks(shapes, "double_blocks."),
            "depth_single": count_blocks(shapes, "single_blocks."),
            "refiner_depth": count_blocks(shapes, "txt_in.individual_token_refiner.blocks."),
            "mlp_ratio": size("double_blocks.0.img_mlp.fc1.weight", 0) / hidden,
            "text_dim": size("txt_in.input_embedder.weight", 1),
            "time_embed_dim": size("time_in.mlp.0.weight", 1),
            "guidance_embed": any(key.startswith("guidance_in.") for key in shapes),
            **sizes(size, shapes),
        }

    return DenoiserKind(
        title=title, model=model, params=params, prefixes=DENOISER_PREFIXES, roots=roots,
        marks=(mark, "double_blocks.0.img_attn_qkv.weight"), infer=infer, takes_scale=takes_scale,
        is_diffusers=names.is_diffusers, rules=names.rules_of_names,
        of_config={"rope_axes_dim": "rope_dim_list", "rope_theta": "rope_theta"},
    )  # fmt: skip


def takes_scale(path: str) -> bool:
    """Whether the layer of this path is stored in scaled 8 bits: the matrices of the double and single blocks."""
    return path.startswith(("double_blocks.", "single_blocks.")) and not path.endswith("_norm")
