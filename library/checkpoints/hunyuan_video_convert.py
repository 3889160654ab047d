"""HunyuanVideo key names of the denoiser: the original layout and that of diffusers folders, both ways."""

from __future__ import annotations

from library.checkpoints.hunyuan_convert import DIFFUSERS_ROOTS, SHARED_TOP, StreamNames, embedder
from library.checkpoints.hunyuan_convert import ROOTS as SHARED_ROOTS
from library.checkpoints.layout_rules import Rule

_TIME = "time_text_embed"
NAMES = StreamNames(
    (
        *SHARED_TOP,
        *embedder("time_in.mlp", f"{_TIME}.timestep_embedder"),
        Rule("vector_in.in_layer", (f"{_TIME}.text_embedder.linear_1",)),
        Rule("vector_in.out_layer", (f"{_TIME}.text_embedder.linear_2",)),
        *embedder("guidance_in.mlp", f"{_TIME}.guidance_embedder"),
    ),
    is_diffusers=lambda keys: f"{_TIME}.text_embedder.linear_1.weight" in keys and "x_embedder.proj.weight" in keys,
)
ROOTS = ("vector_in", _TIME, *SHARED_ROOTS, *DIFFUSERS_ROOTS)
"""first words of the denoiser's names in either layout"""
