"""Stable Diffusion 1, 2 and SDXL between one file in the original layout and a diffusers folder.

The U-Net is passed on tensor by tensor; VAE and text encoders, a small part, are renamed in memory. What a folder has
no place for (EMA weights, schedules, marks, the unused last layer of CLIP-H, the file's metadata) goes into `REST`
beside model_index.json, from where the way back takes it, so that this gives the same tensors bit by bit.
"""

from __future__ import annotations

import copy
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
from library.checkpoints.ldm_convert import (
    attention_as_convolution,
    convert_diffusers_vae_to_ldm,
    convert_ldm_vae_to_diffusers,
)
from library.checkpoints.loading import CheckpointFiles, Source, open_checkpoint
from library.checkpoints.open_clip_convert import hf_to_open_clip, open_clip_to_hf, with_text_model
from library.checkpoints.unet_convert import diffusers_to_original, original_to_diffusers
from library.components.ldm_models import AutoEncoderParams
from library.components.ldm_utils import inspect_autoencoder
from library.components.text_encoder_utils import CLIP_G, CLIP_H, CLIP_L, ClipSlot, inspect_clip
from library.components.unet_models import UNetParams
from library.components.unet_utils import UNET_ROOTS, inspect_unet
from library.core.atomic_file import atomic_folder
from library.core.errors import CheckpointError
from library.core.registry import import_target
from library.core.text_files import read_json
from library.safetensors_utils import (
    cast_all,
    is_pickled,
    load_safetensors,
    read_header,
    save_file_atomic,
    save_pickled_atomic,
    stream_file_atomic,
)

logger = logging.getLogger("atelier")

UNET, VAE = "model.diffusion_model.", "first_stage_model."
REST = "original_rest.safetensors"
SCHEDULER, INDEX = "scheduler/scheduler_config.json", "model_index.json"
SLOTS: dict[str, tuple[tuple[ClipSlot, str], ...]] = {
    "sd1": ((CLIP_L, "cond_stage_model.transformer."),),
    "sd2": ((CLIP_H, "cond_stage_model.model."),),
    "sdxl": ((CLIP_L, "conditioner.embedders.0.transformer."), (CLIP_G, "conditioner.embedders.1.model.")),
}
AUTOENCODERS = {kind: f"library.{kind.rstrip('12')}_utils:VAE_WANTED" for kind in SLOTS}
"""what each family wants of its autoencoder"""
SAMPLE_SIZES = {"sd1": 64, "sd2": 96, "sdxl": 128}
"""of latents, at the resolution that the models are made for"""
Tensors = dict[str, Tensor]


@dataclass
class Folder:
    """A folder to be written. `kind`: one of SLOTS; `unet`: name in the folder -> key of the file; `parts`: sub-folder
    -> tensors; `configs`: file -> its content; `rest`: tensors without a place."""

    kind: str
    files: CheckpointFiles
    unet: dict[str, str]
    parts: dict[str, Tensors] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    rest: Tensors = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


# -- from a file -------------------------------------------------------------------------------------------------------


def read_single(source: str, kind: str, prediction_type: str | None) -> Folder:
    """What a file gives, the U-Net unread. CheckpointError when it is no whole model."""
    info, is_sdxl = inspect_unet(source), kind == "sdxl"
    if info.is_diffusers or info.prefix != UNET:
        raise CheckpointError(
            f"{source} holds a U-Net alone or under other names than whole files have; a whole model is needed"
        )
    files = info.source
    own = {key for key in files.shapes if key.startswith(UNET) and key[len(UNET) :].split(".")[0] in UNET_ROOTS}
    names = original_to_diffusers({key[len(UNET) :]: key for key in files.shapes if key in own})
    folder = Folder(kind, files, names, metadata={} if is_pickled(files.files[0]) else read_header(files.files[0])[1])
    vae = inspect_autoencoder(source, wanted=import_target(AUTOENCODERS[kind]))
    vae_state = _named(files, {key: key[len(VAE) :] for key in files.shapes if key.startswith(VAE)})
    folder.parts["vae"] = convert_ldm_vae_to_diffusers(vae_state)
    folder.configs["vae/config.json"] = configs.vae_config(vae.params, 8 * SAMPLE_SIZES[kind])
    used, pooled = own | {VAE + key for key in vae_state}, None
    for slot, prefix in SLOTS[kind]:
        clip = inspect_clip(source, slot)
        with_projection = slot is CLIP_G
        folder.parts[slot.subfolder], taken = _text_part(files, slot, prefix, clip.values["layers"])
        folder.configs[f"{slot.subfolder}/config.json"] = configs.text_config(clip.values, with_projection)
        used |= taken
        pooled = clip.values["projection"] if with_projection else pooled
    folder.configs["unet/config.json"] = configs.unet_config(info.params, pooled, SAMPLE_SIZES[kind])
    kind_told = prediction_type or info.prediction_type
    if kind_told is None and kind == "sd2":
        logger.warning(
            "%s does not say what it predicts; epsilon is written into the scheduler. --prediction_type v is for the "
            "768-pixel models",
            source,
        )
    folder.configs[SCHEDULER] = configs.scheduler_config(
        is_sdxl, kind_told or "epsilon", bool(info.zero_terminal_snr)
    )
    folder.configs[INDEX] = configs.model_index(is_sdxl)
    folder.rest = dict(files.stream("cpu", True, [key for key in files.shapes if key not in used]))
    return folder


def _named(files: CheckpointFiles, names: Mapping[str, str]) -> Tensors:
    return {names[key]: tensor for key, tensor in files.stream("cpu", True, names)}


def _text_part(files: CheckpointFiles, slot: ClipSlot, prefix: str, layers: int) -> tuple[Tensors, set[str]]:
    """(tensors of a text encoder under the names of transformers, keys of the file that they were made of)."""
    names = {key: with_text_model(key)[len(prefix) :] for key in files.shapes if key.startswith(prefix)}
    names = {key: name for key, name in names.items() if not _has_no_place(name, slot, layers)}
    state = _named(files, names)
    if slot is CLIP_L:
        state = {name: tensor for name, tensor in state.items() if name.startswith("text_model.")}
        return state, {key for key, name in names.items() if name in state}
    return open_clip_to_hf(state), set(names)


def _has_no_place(name: str, slot: ClipSlot, layers: int) -> bool:
    """The unused last layer, numbers that transformers does not store, and CLIP-H's projection, which SD2 does not
    use."""
    is_late = name.startswith("transformer.resblocks.") and int(name.split(".")[2]) >= layers
    return (
        is_late
        or name.endswith("position_ids")
        or name == "logit_scale"
        or (slot is CLIP_H and name == "text_projection")
    )


def hyper_parameters(
    unet: UNetParams, vae: AutoEncoderParams, texts: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What shapes do not tell, as `model_config` of one file has it. `texts`: name of the slot -> ClipInfo.values."""
    return {
        **{name: getattr(unet, name) for name in ("heads", "norm_groups", "use_linear_projection", "upcast_attention")},
        "vae": {"norm_groups": vae.norm_groups},
        **{name: {key: values[key] for key in ("heads", "act", "eos", "layers")} for name, values in texts.items()},
    }


def read_hyper_parameters(source: Source, kind: str, vae: AutoEncoderParams | None = None) -> dict[str, Any]:
    """Those of a file, a folder or the tensors of one, with another autoencoder perhaps. CheckpointError where they are
    not told."""
    texts = {slot.name: inspect_clip(source, slot).values for slot, _ in SLOTS[kind]}
    vae = vae or inspect_autoencoder(source, wanted=import_target(AUTOENCODERS[kind])).params
    return hyper_parameters(inspect_unet(source).params, vae, texts)


def untold_config(base: str, kind: str, vae: AutoEncoderParams, state: Tensors) -> dict[str, str]:
    """{"model_config": JSON} of a base folder for one file with the tensors `state`, where these do not tell it."""
    told = read_hyper_parameters(base, kind, vae)
    try:
        read = read_hyper_parameters(state, kind)
    except CheckpointError:
        read = None
    return {} if read == told else {"model_config": json.dumps(told, sort_keys=True)}


def keep_scheduler(folder: Folder, base: str) -> None:
    """The scheduler of a base folder in the place of the usual one: its class and settings, but what the model predicts
    and whether its last time is pure noise."""
    path, index = Path(base) / SCHEDULER, Path(base) / INDEX
    if not (path.is_file() and index.is_file()):
        return
    named = read_json(index, error=CheckpointError, needed=dict).get("scheduler")
    if isinstance(named, list):
        decided = {key: folder.configs[SCHEDULER][key] for key in ("prediction_type", "rescale_betas_zero_snr")}
        folder.configs[SCHEDULER] = {**read_json(path, error=CheckpointError, needed=dict), **decided}
        folder.configs[INDEX]["scheduler"] = named


def tokenizer_of(folder: str | None, cache_dir: str | None) -> Any:
    from library.components.tokenizers import load_clip_tokenizer

    return load_clip_tokenizer(folder, cache_dir, option="--tokenizer")


def write_folder(
    folder: Folder, tokenizer: Any, target: str, dtype: torch.dtype | None, variant: str | None = None,
    pickled: bool = False,
) -> None:
    """The folder appears whole or not at all. `pickled`: the weights of models in .bin files."""
    ending = f".{variant}.safetensors" if variant else ".safetensors"
    with atomic_folder(os.path.abspath(target)) as work:
        for name, content in folder.configs.items():
            (work / name).parent.mkdir(exist_ok=True)
            (work / name).write_text(f"{json.dumps(content, indent=2)}\n", encoding="utf-8")
        for name, tensors in folder.parts.items():
            stem = "diffusion_pytorch_model" if name == "vae" else "model"
            save_file_atomic(
                {key: t.contiguous() for key, t in cast_all(tensors, dtype).items()},
                work / name / f"{stem}{ending}",
                {"format": "pt"},
            )
        _write_unet(folder, work / "unet" / f"diffusion_pytorch_model{ending}", dtype)
        for slot, _ in SLOTS[folder.kind]:
            own = copy.deepcopy(tokenizer)
            own.pad_token = slot.pad or own.pad_token
            own.save_pretrained(work / slot.subfolder.replace("text_encoder", "tokenizer"))
        for path in sorted(work.glob("*/*.safetensors")) if pickled else ():
            stem = "pytorch_model" if path.parent.name.startswith("text_encoder") else path.stem
            save_pickled_atomic(load_safetensors(path, "cpu", disable_mmap=True), path.with_name(f"{stem}.bin"))
            path.unlink()
        if folder.rest or folder.metadata:
            save_file_atomic(
                {key: t.contiguous() for key, t in folder.rest.items()}, work / REST, folder.metadata or None
            )


def _write_unet(folder: Folder, path: Path, dtype: torch.dtype | None) -> None:
    names = {key: name for name, key in folder.unet.items()}
    stream_file_atomic(_infos(folder.files, names, dtype), _renamed(folder.files, names), path, {"format": "pt"})


def _infos(
    files: CheckpointFiles, names: Mapping[str, str], dtype: torch.dtype | None
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    metas = {name: files.shapes[key] for key, name in names.items()}
    return {
        name: (dtype if dtype and meta.is_floating_point() else meta.dtype, tuple(meta.shape))
        for name, meta in metas.items()
    }


def _renamed(files: CheckpointFiles, names: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    return ((names[key], tensor) for key, tensor in files.stream("cpu", True, names))


# -- to a file ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SinglePlan:
    infos: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    items: Callable[[], Iterable[tuple[str, Tensor]]]
    metadata: dict[str, str]

    def write(self, target: str) -> None:
        stream_file_atomic(self.infos, self.items(), target, self.metadata or None)


def single_plan(source: str, kind: str, dtype: torch.dtype | None) -> SinglePlan:
    """What is written for a folder. CheckpointError when a part is missing or does not fit."""
    if not os.path.isdir(source):
        raise CheckpointError(f"{source} is one file already; --to single takes a folder in the layout of diffusers")
    info = inspect_unet(source)
    inspect_autoencoder(source, wanted=import_target(AUTOENCODERS[kind]))
    originals = diffusers_to_original({key: key for key in info.source.shapes})
    unet = {key: UNET + name for name, key in originals.items()}
    small = {VAE + key: tensor for key, tensor in _vae_of(source).items()}
    for slot, prefix in SLOTS[kind]:
        inspect_clip(source, slot)
        small |= {prefix + key: tensor for key, tensor in _text_of(source, slot).items()}
    rest, metadata = Path(source) / REST, {}
    if rest.is_file():
        metadata = read_header(rest)[1]
        small |= load_safetensors(rest, "cpu")
    else:
        small = _completed(small, kind)
        if info.prediction_type == "v":
            small["v_pred"] = torch.zeros(0)
        if info.zero_terminal_snr:
            small["ztsnr"] = torch.zeros(0)
    small = cast_all(small, dtype)
    infos = {**_infos(info.source, unet, dtype), **{key: (t.dtype, tuple(t.shape)) for key, t in small.items()}}

    def items() -> Iterator[tuple[str, Tensor]]:
        yield from _renamed(info.source, unet)
        yield from small.items()

    return SinglePlan(infos, items, metadata)


def _vae_of(source: str) -> Tensors:
    files = open_checkpoint(source, "vae")
    return attention_as_convolution(convert_diffusers_vae_to_ldm(dict(files.stream("cpu", True, files.shapes))))


def _text_of(source: str, slot: ClipSlot) -> Tensors:
    files = open_checkpoint(source, slot.subfolder)
    state = {with_text_model(key): tensor for key, tensor in files.stream("cpu", True, files.shapes)}
    state = {key: tensor for key, tensor in state.items() if not key.endswith("position_ids")}
    return state if slot is CLIP_L else hf_to_open_clip(state)


def _completed(state: Tensors, kind: str) -> Tensors:
    """What readers expect and a folder does not hold: position ids, ln 100 as logit scale, a last layer that is never
    used."""
    for slot, prefix in SLOTS[kind]:
        if slot is CLIP_L:
            positions = state[f"{prefix}text_model.embeddings.position_embedding.weight"]
            state[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(len(positions))[None]
            continue
        scale = state[f"{prefix}positional_embedding"]
        state[f"{prefix}logit_scale"] = torch.tensor(4.6052, dtype=scale.dtype)
        if slot is CLIP_H:
            state.setdefault(f"{prefix}text_projection", torch.eye(scale.shape[1], dtype=scale.dtype))
            start = f"{prefix}transformer.resblocks."
            last = max(int(key[len(start) :].split(".")[0]) for key in state if key.startswith(start))
            before = f"{start}{last}."
            if last == 22:
                state |= {
                    f"{start}23.{key[len(before) :]}": tensor for key, tensor in state.items() if key.startswith(before)
                }
    return state
