"""SD3 and SD3.5 between one file in the original layout and a diffusers folder.

Denoiser and T5 are passed on tensor by tensor; the autoencoder and both CLIPs, a small part, are renamed in memory.
What a folder has no place for (tokenizers inside the file, scales of logits, the file's metadata) goes into `REST`
beside model_index.json, from where the way back takes it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.checkpoints import ldm_folder as configs
from library.checkpoints.layout_rules import Rule, from_original
from library.checkpoints.ldm_convert import (
    attention_as_convolution,
    convert_diffusers_vae_to_ldm,
    convert_ldm_vae_to_diffusers,
)
from library.checkpoints.loading import CheckpointFiles, open_checkpoint, strip_prefix
from library.checkpoints.sd3_convert import convert_diffusers_to_sd3, convert_sd3_to_diffusers, denoiser_rules
from library.components.ldm_folder_files import REST
from library.components.tokenizers import load_clip_tokenizer, load_t5_tokenizer
from library.core.atomic_file import atomic_folder
from library.core.errors import CheckpointError, ConfigError
from library.safetensors_utils import cast_all, load_safetensors, read_header, save_file_atomic, stream_file_atomic
from library.sd3_models import SD3Params
from library.sd3_utils import (
    DENOISER_ROOTS,
    ENCODER_SLOTS,
    FILE_PREFIX,
    FILE_PREFIXES,
    SUBFOLDERS,
    inspect_encoder,
    inspect_sd3,
    inspect_vae_sd3,
    parts_in,
)
from library.strategy_sd3 import CLIP_G_PAD
from tools.model_tools.denoiser_folder import Infos, SinglePlan, infos_of, joined

logger = logging.getLogger("atelier")

TOKENIZERS = {"clip_l": "tokenizer", "clip_g": "tokenizer_2", "t5xxl": "tokenizer_3"}
CLASSES = {
    "transformer": ["diffusers", "SD3Transformer2DModel"], "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "T5TokenizerFast"],
}  # fmt: skip
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
Items = Callable[[], Iterable[tuple[str, Tensor]]]
_WITHOUT_PLACE = ("position_ids", "logit_scale", "spiece_model")


def _infos(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> Infos:
    """Types and shapes of tensors that are cast to `dtype` (None: as they are)."""
    return {
        key: (dtype if dtype and tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
        for key, tensor in state.items()
    }


# -- from a folder -----------------------------------------------------------------------------------------------------


def single_plan(source: str, dtype: torch.dtype | None) -> SinglePlan:
    """Of a pipeline folder with the parts that it has, of its `transformer`, or of any one of the shards.
    CheckpointError when a part does not fit."""
    info = inspect_sd3(source)
    if not info.is_diffusers:
        raise CheckpointError(f"{source} is SD3 in the original layout already; nothing is to be rewritten")
    shapes = strip_prefix(info.source.shapes, info.prefix)
    rules = [rule for rule in denoiser_rules(info.params.depth) if any(part in shapes for part in rule.parts)]
    lacking = [part for rule in rules for part in rule.parts if part not in shapes]
    if lacking:
        raise CheckpointError(f"{source} lacks {len(lacking)} tensors, the first is {lacking[0]}; are all parts there?")
    denoiser = convert_diffusers_to_sd3(shapes)
    rest = Path(source) / REST
    small, metadata = (load_safetensors(rest, "cpu"), read_header(rest)[1]) if rest.is_file() else ({}, {})
    streams: list[tuple[CheckpointFiles, dict[str, str]]] = []
    for part in parts_in(source) if os.path.isdir(source) else ():
        files = open_checkpoint(source, SUBFOLDERS[part])
        if part == "vae":
            state = convert_diffusers_vae_to_ldm(dict(files.stream("cpu", True, files.shapes)))
            small |= {FILE_PREFIXES[part] + key: tensor for key, tensor in attention_as_convolution(state).items()}
        else:
            inspect_encoder(part, os.path.join(source, SUBFOLDERS[part]))
            names = {key: FILE_PREFIXES[part] + key for key in files.shapes if not key.endswith(_WITHOUT_PLACE)}
            streams.append((files, names))
    small = cast_all(small, dtype)
    infos = _infos({FILE_PREFIX + key: tensor for key, tensor in denoiser.items()}, dtype) | infos_of(small)
    for files, names in streams:
        infos |= _infos({name: files.shapes[key] for key, name in names.items()}, dtype)

    def items() -> Iterator[tuple[str, Tensor]]:
        own = [info.prefix + name for name in shapes]
        parts = ((key[len(info.prefix) :], tensor) for key, tensor in info.source.stream("cpu", True, own))
        yield from ((FILE_PREFIX + name, tensor) for name, tensor in joined(parts, rules))
        yield from small.items()
        for files, names in streams:
            yield from ((names[key], tensor) for key, tensor in files.stream("cpu", True, names))

    return SinglePlan(infos, items, metadata)


# -- to a folder -------------------------------------------------------------------------------------------------------


@dataclass
class FolderPlan:
    """What is written: `parts`: sub-folder -> (infos, tensors); `configs`: file -> its content; `rest`: tensors without
    a place; `tokenizers`: sub-folder -> tokenizer."""

    parts: dict[str, tuple[Infos, Items]] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    rest: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    tokenizers: dict[str, Any] = field(default_factory=dict)

    def write(self, target: str, variant: str | None) -> None:
        """The folder appears whole or not at all."""
        ending = f".{variant}.safetensors" if variant else ".safetensors"
        with atomic_folder(os.path.abspath(target)) as work:
            for name, content in self.configs.items():
                (work / name).parent.mkdir(exist_ok=True)
                (work / name).write_text(f"{json.dumps(content, indent=2)}\n", encoding="utf-8")
            for name, (infos, items) in self.parts.items():
                stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
                stream_file_atomic(infos, items(), work / name / f"{stem}{ending}", {"format": "pt"})
            for name, tokenizer in self.tokenizers.items():
                tokenizer.save_pretrained(work / name)
            if self.rest or self.metadata:
                save_file_atomic(self.rest, work / REST, self.metadata or None)


def folder_plan(
    source: str, dtype: torch.dtype | None, tokenizer: str | None = None, tokenizer_cache_dir: str | None = None
) -> FolderPlan:
    """Of a file, with the parts that it holds. CheckpointError when it is no SD3 file in the original layout."""
    if os.path.isdir(source):
        raise CheckpointError(f"{source} is a folder; --to diffusers takes one file in the original layout")
    info = inspect_sd3(source)
    if info.is_diffusers:
        raise CheckpointError(f"{source} has the names of diffusers already; --to diffusers takes the original layout")
    files, plan, own = info.source, FolderPlan(metadata=read_header(info.source.files[0])[1]), parts_in(source)
    denoiser = [key for key in files.shapes if _root_of(key, info.prefix) in DENOISER_ROOTS]
    used = set(denoiser)
    plan.parts["transformer"] = _denoiser(files, denoiser, info.prefix, info.params, dtype)
    plan.configs["transformer/config.json"] = transformer_config(info.params)
    for part in own:
        prefix = _prefix_in_file(part, files.shapes)
        names = {key: key[len(prefix) :] for key in files.shapes if key.startswith(prefix)}
        names = {key: name for key, name in names.items() if not key.endswith(_WITHOUT_PLACE)}
        used |= set(names)
        plan.parts[SUBFOLDERS[part]] = _part(part, files, names, dtype)
        plan.configs[f"{SUBFOLDERS[part]}/config.json"] = _config_of(part, source)
    plan.rest = {key: t.contiguous() for key, t in files.stream("cpu", True, set(files.shapes) - used)}
    plan.tokenizers = _tokenizers(own, source, tokenizer, tokenizer_cache_dir)
    plan.configs["scheduler/scheduler_config.json"] = SCHEDULER
    there = {*plan.parts, *plan.tokenizers, "scheduler"}
    index = {name: known if name in there else [None, None] for name, known in CLASSES.items()}
    plan.configs["model_index.json"] = {"_class_name": "StableDiffusion3Pipeline", **index}
    return plan


def _root_of(key: str, prefix: str) -> str:
    return key[len(prefix) :].split(".")[0] if key.startswith(prefix) else ""


def _prefix_in_file(part: str, keys: Iterable[str]) -> str:
    known = ("first_stage_model.", "vae.") if part == "vae" else (FILE_PREFIXES[part], f"text_encoders.{part}.")
    return next(prefix for prefix in known if any(key.startswith(prefix) for key in keys))


def _denoiser(
    files: CheckpointFiles, keys: list[str], prefix: str, params: SD3Params, dtype: torch.dtype | None
) -> tuple[Infos, Items]:
    """One original tensor in memory at a time, with all that is made of it."""
    infos = _infos(convert_sd3_to_diffusers({key[len(prefix) :]: files.shapes[key] for key in keys}), dtype)
    rules: Mapping[str, Rule] = {rule.original: rule for rule in denoiser_rules(params.depth)}

    def items() -> Iterator[tuple[str, Tensor]]:
        for key, tensor in files.stream("cpu", True, keys):
            name = key[len(prefix) :]
            for part, piece in from_original({name: tensor}, [rules[name]]).items():
                yield part, piece.contiguous()

    return infos, items


def _part(
    part: str, files: CheckpointFiles, names: Mapping[str, str], dtype: torch.dtype | None
) -> tuple[Infos, Items]:
    if part == "t5xxl":  # the largest part, under the same names in both layouts
        infos = _infos({name: files.shapes[key] for key, name in names.items()}, dtype)
        return infos, lambda: ((names[key], tensor) for key, tensor in files.stream("cpu", True, names))
    state = {names[key]: tensor for key, tensor in files.stream("cpu", True, names)}
    if part == "vae":
        state = convert_ldm_vae_to_diffusers(state)
    elif "text_projection.weight" not in state:  # what a file without one means
        norm = state["text_model.final_layer_norm.weight"]
        state["text_projection.weight"] = torch.eye(len(norm), dtype=norm.dtype)
    state = {key: tensor.contiguous() for key, tensor in cast_all(state, dtype).items()}
    return infos_of(state), state.items


def _config_of(part: str, source: str) -> dict[str, Any]:
    if part == "vae":
        params = inspect_vae_sd3(source).params
        own = {"shift_factor": params.shift_factor, "use_quant_conv": False, "use_post_quant_conv": False}
        return {**configs.vae_config(params, 1024), **own}
    values = inspect_encoder(part, source)
    return t5_config(values) if part == "t5xxl" else configs.text_config(values, has_projection=True)


def _tokenizers(own: Iterable[str], source: str, folder: str | None, cache_dir: str | None) -> dict[str, Any]:
    """Sub-folder -> tokenizer of the text encoders that the file holds; that of T5 is left out where none is found."""
    made = {}
    for slot in (slot for slot in ENCODER_SLOTS if slot in own):
        try:
            if slot == "t5xxl":
                made[TOKENIZERS[slot]] = load_t5_tokenizer(None, cache_dir, source, max_length=256)
            else:
                pad = CLIP_G_PAD if slot == "clip_g" else None
                made[TOKENIZERS[slot]] = load_clip_tokenizer(folder, cache_dir, pad_token=pad, option="--tokenizer")
        except ConfigError as error:
            if slot != "t5xxl":
                raise
            logger.warning("%s is not written, put it there yourself: %s", TOKENIZERS[slot], error)
    return made


def transformer_config(params: SD3Params) -> dict[str, Any]:
    """config.json of SD3Transformer2DModel."""
    return {
        "_class_name": "SD3Transformer2DModel", "sample_size": 128, "patch_size": params.patch_size,
        "in_channels": params.in_channels, "out_channels": params.out_channels, "num_layers": params.depth,
        "attention_head_dim": params.head_dim, "num_attention_heads": params.num_heads,
        "joint_attention_dim": params.context_in, "caption_projection_dim": params.hidden_size,
        "pooled_projection_dim": params.adm_in_channels, "pos_embed_max_size": params.pos_embed_max_size,
        "dual_attention_layers": list(params.x_block_self_attn_layers),
        "qk_norm": "rms_norm" if params.qk_norm == "rms" else None,
    }  # fmt: skip


def t5_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of T5EncoderModel, from inspect_t5xxl."""
    return {
        "architectures": ["T5EncoderModel"], "model_type": "t5", "vocab_size": values["vocab_size"],
        "d_model": values["d_model"], "d_kv": values["d_kv"], "d_ff": values["d_ff"], "num_layers": values["num_layers"],
        "num_heads": values["num_heads"], "relative_attention_num_buckets": values["buckets"],
        "relative_attention_max_distance": values["max_distance"], "layer_norm_epsilon": values["eps"],
        "feed_forward_proj": "gated-gelu", "dropout_rate": 0.1, "is_encoder_decoder": True, "pad_token_id": 0,
        "eos_token_id": 1, "decoder_start_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
