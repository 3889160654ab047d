"""Anima checkpoints: what a file holds, loading and saving it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from library.anima_models import AdapterParams, Anima, AnimaParams
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
    open_checkpoint,
    part_of,
    strip_prefix,
)
from library.checkpoints.weight_forms import FP8_STORAGE
from library.components.llm_encoder_utils import inspect_qwen3
from library.components.wan_vae_utils import inspect_wan_vae
from library.core.errors import CheckpointError
from library.core.lazy_names import homes, lazy_names
from library.safetensors_utils import cast_all, save_file_atomic

__all__ = [
    "inspect_anima", "inspect_llm_adapter", "load_anima", "save_anima",
]  # fmt: skip

logger = logging.getLogger(__name__)
__getattr__, __dir__ = lazy_names(__name__, homes(
    "library.compat.anima_names", "load_anima_model", "load_qwen3_text_encoder", "load_qwen3_tokenizer",
    "load_t5_tokenizer",
    "save_anima_model",
))

FILE_PREFIX = "net."
ADAPTER = "llm_adapter."
DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.net.", "model.", "net.", "module.")
DENOISER_ROOTS = (
    "x_embedder", "t_embedder", "t_embedding_norm", "blocks", "final_layer", "llm_adapter", "pos_embedder",
    "extra_pos_embedder", "affline_norm",
)  # fmt: skip
KEPT_WIDE = ("_embedder", "norm", "adaln", "final_layer", ".embed.")
"""parts of layer names that are never stored in fewer bits"""
_ROPE_BUFFERS = ("pos_embedder.seq", "pos_embedder.dim_spatial_range", "pos_embedder.dim_temporal_range")
_RATIO_WITH_CONDITION = (1.0, 3.0, 3.0)
"""rotary ratios of the models with one input channel more"""


@dataclass(frozen=True)
class AnimaInfo:
    """What the headers of a denoiser file tell. `dtypes`: types of the stored weights."""

    source: CheckpointFiles
    prefix: str
    params: AnimaParams
    dtypes: frozenset[torch.dtype]


def inspect_anima(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> AnimaInfo:
    """Recognise an Anima denoiser from headers alone; `config` overrides hyper-parameters by the names of AnimaParams.

    CheckpointError when the file is damaged or no Anima denoiser.
    """
    source = open_checkpoint(path, "transformer")
    prefix = find_prefix(source.shapes, DENOISER_PREFIXES, DENOISER_ROOTS, source.path, "denoiser")
    shapes = strip_prefix(source.shapes, prefix)
    marks = ("blocks.0.adaln_modulation_self_attn.1.weight", "x_embedder.proj.1.weight")
    check_marks(shapes, marks, source.path, "Anima denoiser")
    given = {**source.model_config, **(config or {})}
    params = build_params(AnimaParams, *_inferred_and_given(shapes, given, source.path), source.path)
    dtypes = frozenset(tensor.dtype for key, tensor in shapes.items() if key.endswith(".weight"))
    return AnimaInfo(source, prefix, params, dtypes)


def _inferred_and_given(
    shapes: Mapping[str, Tensor], given: Mapping[str, Any], path: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two mappings of `build_params`; an adapter that is given is completed by what its shapes tell."""
    try:
        inferred = _infer_denoiser(shapes, given)
        adapter = _infer_adapter(shapes) if f"{ADAPTER}out_proj.weight" in shapes else None
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            f"{path} does not fit Anima: {error.args[0]} is missing or has too few dimensions"
        ) from error
    if adapter is None:
        return {**inferred, "adapter": None}, {key: value for key, value in given.items() if key != "adapter"}
    merged = build_params(AdapterParams, adapter, given.get("adapter") or {}, path)
    return inferred, {**given, "adapter": merged}


def _infer_denoiser(shapes: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    volume = given.get("patch_temporal", 1) * given.get("patch_spatial", 2) ** 2
    dim, width = shapes["x_embedder.proj.1.weight"].shape
    in_channels = width // volume - 1
    inferred = {
        "in_channels": in_channels,
        "out_channels": shapes["final_layer.linear.weight"].shape[0] // volume,
        "model_channels": dim,
        "num_blocks": count_blocks(shapes, "blocks."),
        "num_heads": dim // shapes["blocks.0.self_attn.q_norm.weight"].shape[0],
        "mlp_ratio": shapes["blocks.0.mlp.layer1.weight"].shape[0] / dim,
        "context_dim": shapes["blocks.0.cross_attn.k_proj.weight"].shape[1],
        "adaln_lora_dim": shapes["blocks.0.adaln_modulation_self_attn.1.weight"].shape[0],
    }
    return {**inferred, "rope_extrapolation_thw": _RATIO_WITH_CONDITION} if in_channels == 17 else inferred


def _infer_adapter(shapes: Mapping[str, Tensor]) -> dict[str, Any]:
    vocab, target_dim = shapes[f"{ADAPTER}embed.weight"].shape
    first = f"{ADAPTER}blocks.0."
    model_dim, source_dim = shapes[f"{first}cross_attn.k_proj.weight"].shape
    return {
        "source_dim": source_dim,
        "target_dim": target_dim,
        "model_dim": model_dim,
        "num_layers": count_blocks(shapes, f"{ADAPTER}blocks."),
        "num_heads": model_dim // shapes[f"{first}self_attn.q_norm.weight"].shape[0],
        "vocab": vocab,
        "mlp_hidden": shapes[f"{first}mlp.0.weight"].shape[0],
    }


def load_anima(
    path: str | os.PathLike,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None,
    *,
    llm_adapter_path: str | os.PathLike | None = None,
    transform: Transform | None = None,
    form: str | None = None,
) -> Anima:
    """Load an Anima denoiser; its sizes come from the file. `llm_adapter_path` gives the adapter's weights instead.

    `dtype` float8_e4m3fn keeps the weights of the blocks' linear layers in 8 bits and the rest in bfloat16; None keeps
    the file's own types; `form`, one of weight_forms.FORMS, stores them in another. CheckpointError when a file does
    not fit.
    """
    info = inspect_anima(path, config)
    wide = torch.bfloat16 if dtype is None or dtype == FP8_STORAGE else dtype
    keys = [
        key
        for key in info.source.shapes
        if key.startswith(info.prefix) and key[len(info.prefix) :].split(".")[0] in DENOISER_ROOTS
    ]

    cast = info.source.storing(
        dtype, keys, form, lambda key: takes_scale(key[len(info.prefix) :].removesuffix(".weight"))
    )
    state = strip_prefix(info.source.tensors(device, disable_mmap, keys, transform, cast), info.prefix)
    params = info.params
    if llm_adapter_path:
        state, params = _with_adapter(state, params, llm_adapter_path, wide, device)
    logger.info(
        "loading Anima from %s (%d blocks of width %d, %s LLM adapter)",
        path, params.num_blocks, params.model_channels, "with its" if params.adapter else "without an",
    )  # fmt: skip
    model = build_on_meta(lambda: Anima(params))
    check_state(model, state, os.fspath(path), lambda key: key in _ROPE_BUFFERS)
    assign_state(model, {key: tensor for key, tensor in state.items() if key not in _ROPE_BUFFERS})
    return model


def denoiser_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The denoiser's entries of a checkpoint's state under the names of the module tree."""
    return part_of(state, DENOISER_PREFIXES, DENOISER_ROOTS)


def takes_scale(path: str) -> bool:
    """Whether the layer of this path is stored in fewer bits: the matrices of the blocks."""
    return path.startswith("blocks.") and not any(part in path for part in KEPT_WIDE)


def inspect_llm_adapter(path: str | os.PathLike) -> tuple[CheckpointFiles, str, AdapterParams]:
    """An adapter from headers: a whole denoiser file, or the adapter's keys alone. (files, prefix of its keys, sizes).

    CheckpointError when the file holds none, or a part of one.
    """
    source = open_checkpoint(path)
    marker = next(
        (key for key in source.shapes if key.endswith("out_proj.weight") and ".blocks." not in f".{key}"), None
    )
    if marker is None:
        check_marks(source.shapes, (f"{ADAPTER}out_proj.weight",), source.path, "LLM adapter")
    prefix = marker.removesuffix("out_proj.weight")
    shapes = {ADAPTER + key: tensor for key, tensor in strip_prefix(source.shapes, prefix).items()}
    try:
        params = build_params(
            AdapterParams, _infer_adapter(shapes), source.model_config.get("adapter") or {}, source.path
        )
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"{source.path} is no whole LLM adapter: {error.args[0]} is missing") from error
    return source, prefix, params


def adapter_file_problem(path: str | os.PathLike | None) -> str | None:
    """A message when the file of --llm_adapter_path holds no LLM adapter, or a part of one; None without a file."""
    if not path:
        return None
    try:
        inspect_llm_adapter(path)
    except CheckpointError as error:
        return f"--llm_adapter_path: {error}"
    return None


def adapter_problem(adapter: AdapterParams, params: AnimaParams, path: str | os.PathLike) -> str | None:
    """Why this adapter cannot serve this denoiser, or None."""
    if adapter.target_dim == params.context_dim:
        return None
    return (
        f"{os.fspath(path)}: the LLM adapter gives {adapter.target_dim} values, the denoiser takes {params.context_dim}"
    )


def fitting_problems(
    params: AnimaParams, adapter: AdapterParams | None, *, qwen3: tuple[str, str], vae: tuple[str, str] | None,
    model: str, adapter_path: str
) -> list[str]:
    """Sizes of text encoder, autoencoder and LLM adapter against the denoiser's, from headers. `qwen3` and `vae` are
    (option, path), no vae = not checked; `adapter_path` is the file of the adapter. CheckpointError when a file is no
    such part."""
    width = inspect_qwen3(qwen3[1])["hidden_size"]
    channels = inspect_wan_vae(vae[1]).params.z_dim if vae else params.in_channels
    needed = params.context_dim if adapter is None else adapter.source_dim
    problems = []
    if width != needed:
        problems.append(f"--{qwen3[0]} is {qwen3[1]}: its width is {width}, the model {adapter_path} takes {needed}")
    if channels != params.in_channels:
        problems.append(
            f"--{vae[0]} is {vae[1]}: it has {channels} latent channels, the model {model} takes {params.in_channels}"
        )
    if adapter is not None:
        problem = adapter_problem(adapter, params, adapter_path)
        problems += [problem] if problem else []
    return problems


def _with_adapter(
    state: dict[str, Tensor], params: AnimaParams, path: str | os.PathLike, wide: torch.dtype,
    device: torch.device | str
) -> tuple[dict[str, Tensor], AnimaParams]:
    """State and parameters with the adapter of another file."""
    source, prefix, adapter = inspect_llm_adapter(path)
    problem = adapter_problem(adapter, params, path)
    if problem:
        raise CheckpointError(problem)
    keys = [key for key in source.shapes if key.startswith(prefix)]
    tensors = source.tensors(device, False, keys, cast=source.casting(wide))
    ours = {ADAPTER + key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    kept = {key: tensor for key, tensor in state.items() if not key.startswith(ADAPTER)}
    return {**kept, **ours}, replace(params, adapter=adapter)


def save_anima(
    model: Anima, path: str | os.PathLike, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a denoiser under its original names, `net.` included. Each tensor goes to the CPU before it is cast."""
    state = cast_all({FILE_PREFIX + key: tensor.detach().cpu() for key, tensor in model.state_dict().items()}, dtype)
    save_file_atomic(state, path, {"format": "pt", **(metadata or {}), **model_config_metadata(model)})


def model_config_metadata(model: Anima) -> dict[str, str]:
    """{"model_config": JSON} for a model whose hyper-parameters do not follow from its shapes, else nothing."""
    return config_metadata(
        model.params, lambda: build_params(AnimaParams, *_inferred_and_given(model.state_dict(), {}, ""), "")
    )
