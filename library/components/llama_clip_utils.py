"""Files of models of clips whose captions LLaMA and CLIP-L read: the encoders, and whether they fit the denoiser."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch

from library.components.hunyuan_vae_utils import inspect_hunyuan_vae
from library.components.llm_encoder_utils import inspect_llama, load_llama
from library.components.stored_parts import stored_model
from library.components.text_encoder_utils import inspect_clip_l, load_clip_l
from library.core.errors import Problems


def load_encoders(
    text_encoder1: str | os.PathLike,
    text_encoder2: str | os.PathLike,
    dtype: torch.dtype,
    device: torch.device | str,
    disable_mmap: bool = False,
    *,
    form: str | None = None,
) -> list[torch.nn.Module]:
    """[LLaMA, CLIP-L]. On a CPU they compute in bfloat16 instead of float16; `form`, one of weight_forms.FORMS, stores
    the matrices of the first. CheckpointError when a file does not fit."""
    if torch.device(device).type == "cpu" and dtype == torch.float16:
        dtype = torch.bfloat16
    llama = stored_model(lambda place: load_llama(text_encoder1, dtype, place, disable_mmap), form, device)
    return [llama, load_clip_l(text_encoder2, dtype, device, disable_mmap)]


WIDTH = "its width"
Size = tuple[str, "str | None", str, Callable[[], int], "int | None"]
"""(option, file, what is compared in words, what reads it, what the denoiser takes; None = not known)"""


def encoder_sizes(
    text_encoder1: str | None, text_encoder2: str | None, vae: str | None, *, text: int | None, pooled: int | None,
    channels: int | None,
) -> list[Size]:
    """Sizes of the encoders and of the autoencoder beside those that the denoiser takes."""
    return [
        ("text_encoder1", text_encoder1, WIDTH, lambda: inspect_llama(text_encoder1)["hidden_size"], text),
        ("text_encoder2", text_encoder2, WIDTH, lambda: inspect_clip_l(text_encoder2)["width"], pooled),
        (
            "vae", vae, "its number of latent channels", lambda: inspect_hunyuan_vae(vae).params.latent_channels,
            channels,
        ),
    ]  # fmt: skip


def add_size_problems(problems: Problems, sizes: Iterable[Size], model: str) -> None:
    """What is wrong with each file, and sizes that the denoiser `model` does not take, from headers. Files that are
    None are not looked at."""
    for option, path, what, read, needed in sizes:
        size = problems.attempt(read) if path is not None else None
        if needed is not None and size not in (None, needed):
            problems.add(
                f"--{option} is {path}: {what} is {size}, the denoiser {model} takes {needed}; use the files that"
                " belong together"
            )
