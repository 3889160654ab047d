"""Options that the training scripts of all video families have, under the names of the known scripts, and what they
stand for among the options of every script."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from library.core.errors import Problems
from library.core.options import equivalent_option, option, refused_option

_SWAP = "of swapped blocks, what is frozen only ever goes to the device, from page-locked memory"

DTYPES = {
    "fp32": "fp32", "float32": "fp32", "float": "fp32",
    "fp16": "fp16", "float16": "fp16", "half": "fp16",
    "bf16": "bf16", "bfloat16": "bf16",
    "fp8": "fp8", "fp8_e4m3": "fp8", "fp8_e4m3fn": "fp8", "float8_e4m3fn": "fp8",
}  # fmt: skip
"""names of number formats as users write them -> fp32, fp16, bf16 or fp8"""


def dtype_name(text: str) -> str | None:
    """fp32, fp16, bf16 or fp8 by any of its names; an empty text is None. ArgumentTypeError."""
    if text == "":
        return None
    name = DTYPES.get(str(text).lower().removeprefix("torch."))
    if name is None:
        raise argparse.ArgumentTypeError(f"'{text}' is no number format; use fp32, fp16, bf16 or fp8")
    return name


@dataclass(frozen=True, kw_only=True)
class VideoOptions:
    """What video models share"""

    dit: str | None = option(None, help="another name of --pretrained_model_name_or_path: file of the denoiser")
    dit_dtype: str | None = option(
        None, help="number format of the frozen denoiser: that of --mixed_precision, or fp8, which is --fp8_base",
        convert=dtype_name,
    )
    vae_dtype: str | None = option(
        None, help="number format of the VAE: fp32, fp16 or bf16; that of --mixed_precision when not given",
        convert=dtype_name,
    )
    live_encoding: bool = option(
        False,
        help="encode clips and captions in every step; without it, and without --cache_*, both are cached on the disk,"
        " and neither VAE nor text encoders are needed where the caches are complete",
    )
    guidance_scale: float = option(1.0, help="embedded guidance that models distilled for it are trained with")
    gradient_checkpointing_cpu_offload: bool = option(
        False, help="another name of --cpu_offload_checkpointing, for --gradient_checkpointing"
    )
    disable_numpy_memmap: bool = option(False, help="another name of --disable_mmap_load_safetensors")
    compile: bool = option(False, help="another name of --torch_compile")
    compile_backend: str = option("inductor", help="another name of --dynamo_backend, for --compile")
    compile_mode: str = option(
        "default", help="another name of --dynamo_mode, for --compile",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    )
    compile_dynamic: str | None = option(
        None, help="--dynamo_dynamic for --compile: true, false, or auto (found out while training)",
        choices=(None, "true", "false", "auto"), convert=str.lower,
    )
    compile_fullgraph: bool = option(False, help="another name of --dynamo_fullgraph, for --compile")
    compile_cache_size_limit: int | None = option(None, help="another name of --dynamo_cache_size_limit, for --compile")
    flash_attn: bool = option(False, help="another name of --attn_mode flash")
    flash3: bool = option(False, help="another name of --attn_mode flash3")
    sage_attn: bool = refused_option(
        False, help="attention of SageAttention",
        reason="SageAttention has no backward pass; use --sdpa or --flash_attn",
    )
    use_pinned_memory_for_block_swap: bool = equivalent_option(
        False, help="pinned memory for swapped blocks", reason=f"--use_pinned_memory_for_block_swap: {_SWAP}"
    )
    block_swap_h2d_only: bool = equivalent_option(
        False, help="never copy frozen weights back to main memory", reason=f"--block_swap_h2d_only: {_SWAP}"
    )
    img_in_txt_in_offloading: bool = option(
        False, help="keep the layers that take in pixels and text in main memory between steps"
    )

    def __post_init__(self) -> None:
        problems = Problems()
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            problems.add(f"--guidance_scale is {self.guidance_scale}; needed: 0 or more, e.g. 1.0")
        if self.vae_dtype == "fp8":
            problems.add("--vae_dtype is fp8; needed: fp32, fp16 or bf16, in which the VAE computes")
        problems.raise_if_any()


STANDS_FOR: Mapping[str, Mapping[str, object]] = {
    "dit": {"pretrained_model_name_or_path": str},
    "fp8_base": {"fp8_base_unet": True, "fp8_base": False},
    "dynamo_backend": {"torch_compile": lambda backend: backend != "no"},
    "compile": {"torch_compile": True, "dynamo_backend": "inductor"},
    "compile_backend": {"dynamo_backend": str.lower},
    "compile_mode": {"dynamo_mode": str},
    "compile_dynamic": {"dynamo_dynamic": {"true": True, "false": False, "auto": None}.get},
    "compile_fullgraph": {"dynamo_fullgraph": True},
    "compile_cache_size_limit": {"dynamo_cache_size_limit": int},
    "gradient_checkpointing_cpu_offload": {"cpu_offload_checkpointing": True},
    "disable_numpy_memmap": {"disable_mmap_load_safetensors": True},
}
"""for ModelFamily.stands_for, in the order in which they count: a later one wins"""

ATTENTION_SWITCHES: Mapping[str, str] = {
    "sdpa": "torch", "flash_attn": "flash", "xformers": "xformers", "flash3": "flash3",
}
"""for ModelFamily.attention_switches, in the order of the known scripts"""

DEFAULTS: Mapping[str, object] = {"discrete_flow_shift": 1.0, "weighting_scheme": "none", "sigma_table": "falling"}
"""for ModelFamily.defaults: those of the known scripts, where they differ from the shared ones"""


def following_defaults(values: Mapping[str, object]) -> dict[str, object]:
    """The precision of `accelerate launch`, and caches on the disk, for clips and captions each, unless something is
    said of them."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION")
    found: dict[str, object] = {"mixed_precision": launched} if launched in ("fp16", "bf16") else {}
    if values.get("live_encoding") or values.get("dataset_class"):
        return found
    kinds = ("cache_latents", "cache_text_encoder_outputs")
    return {
        **found,
        **{f"{kind}_to_disk": True for kind in kinds if kind not in values and f"{kind}_to_disk" not in values},
    }
