"""Metadata of trained files: the ss_* and modelspec.* keys that other programs read. All values are texts."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from library.checkpoints.hashes import BackgroundHashes
from library.core.options import Config
from library.dataset.items import SOURCES
from library.sai_model_spec import OPTIONAL, ModelSpec, build_model_spec, local_date

MINIMUM = (
    "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args",
)  # fmt: skip
"""the only ss_ keys with --no_metadata"""

FROM_OPTIONS = {
    "ss_output_name": "output_name", "ss_training_comment": "training_comment",
    "ss_learning_rate": "learning_rate", "ss_unet_lr": "unet_lr", "ss_text_encoder_lr": "text_encoder_lr",
    "ss_lr_scheduler": "lr_scheduler", "ss_lr_warmup_steps": "lr_warmup_steps", "ss_lr_decay_steps": "lr_decay_steps",
    "ss_lr_scheduler_num_cycles": "lr_scheduler_num_cycles", "ss_max_grad_norm": "max_grad_norm",
    "ss_gradient_checkpointing": "gradient_checkpointing",
    "ss_gradient_accumulation_steps": "gradient_accumulation_steps",
    "ss_mixed_precision": "mixed_precision", "ss_full_fp16": "full_fp16", "ss_full_bf16": "full_bf16",
    "ss_fp8_base": "fp8_base", "ss_fp8_base_unet": "fp8_base_unet", "ss_lowram": "lowram",
    "ss_v2": "v2", "ss_v_parameterization": "v_parameterization", "ss_clip_skip": "clip_skip",
    "ss_max_token_length": "max_token_length",
    "ss_noise_offset": "noise_offset", "ss_noise_offset_random_strength": "noise_offset_random_strength",
    "ss_adaptive_noise_scale": "adaptive_noise_scale", "ss_multires_noise_iterations": "multires_noise_iterations",
    "ss_multires_noise_discount": "multires_noise_discount", "ss_ip_noise_gamma": "ip_noise_gamma",
    "ss_ip_noise_gamma_random_strength": "ip_noise_gamma_random_strength", "ss_zero_terminal_snr": "zero_terminal_snr",
    "ss_min_snr_gamma": "min_snr_gamma", "ss_debiased_estimation": "debiased_estimation_loss",
    "ss_scale_v_pred_loss_like_noise_pred": "scale_v_pred_loss_like_noise_pred",
    "ss_v_pred_like_loss": "v_pred_like_loss",
    "ss_prior_loss_weight": "prior_loss_weight", "ss_masked_loss": "masked_loss", "ss_loss_type": "loss_type",
    "ss_huber_schedule": "huber_schedule", "ss_huber_scale": "huber_scale", "ss_huber_c": "huber_c",
    "ss_min_timestep": "min_timestep", "ss_max_timestep": "max_timestep",
    "ss_caption_dropout_rate": "caption_dropout_rate",
    "ss_caption_dropout_every_n_epochs": "caption_dropout_every_n_epochs",
    "ss_caption_tag_dropout_rate": "caption_tag_dropout_rate", "ss_face_crop_aug_range": "face_crop_aug_range",
    "ss_resize_interpolation": "resize_interpolation",
    "ss_validation_seed": "validation_seed", "ss_validation_split": "validation_split",
    "ss_max_validation_steps": "max_validation_steps", "ss_validate_every_n_epochs": "validate_every_n_epochs",
    "ss_validate_every_n_steps": "validate_every_n_steps",
}  # fmt: skip
"""key -> option whose value is written as it is"""

LEGACY_DATASET = {
    "ss_bucket_no_upscale": "bucket_no_upscale", "ss_color_aug": "color_aug", "ss_flip_aug": "flip_aug",
    "ss_random_crop": "random_crop", "ss_shuffle_caption": "shuffle_caption", "ss_keep_tokens": "keep_tokens",
}  # fmt: skip
"""further keys of a run whose data come from --train_data_dir"""


@dataclass(frozen=True, kw_only=True)
class MetadataInputs:
    """Everything that metadata are made of, as plain data.

    `datasets` is DatasetGroup.metadata() and `tag_frequency` DatasetGroup.tag_frequency of the training images;
    `family`, `modelspec` and `trainable` come from the objects' methods of these names; `optimizer` is
    OptimizerBuild.metadata_text; `extra` is what hooks add. `kind` is Trainable.spec_kind.
    """

    config: Config
    session_id: int
    started_at: float
    seed: int
    datasets: Sequence[Mapping[str, Any]]
    tag_frequency: Mapping[str, Mapping[str, int]]
    num_train_images: int
    num_validation_images: int
    num_reg_images: int
    num_batches_per_epoch: int
    num_epochs: int
    max_train_steps: int
    num_processes: int
    optimizer: str
    family: Mapping[str, Any]
    modelspec: Mapping[str, str | None]
    trainable: Mapping[str, Any]
    kind: str = "lora"
    has_clips: bool = False
    """of a family of videos, whose readers call samples items"""
    extra: Mapping[str, Any] = field(default_factory=dict)


def build_metadata(inputs: MetadataInputs) -> dict[str, str]:
    """Metadata of every file of a run; at_save completes them for one file."""
    options = inputs.config.values()
    values: dict[str, Any] = {key: options[name] for key, name in FROM_OPTIONS.items() if name in options}
    rates = options.get("text_encoder_lr")
    if isinstance(rates, (list, tuple)):  # one rate for all is written as a number, as known readers expect
        values["ss_text_encoder_lr"] = rates[0] if len(rates) == 1 else list(rates) or None
    values["ss_cache_latents"] = bool(options.get("cache_latents") or options.get("cache_latents_to_disk"))
    values.update(_counts(inputs))
    values.update(_model_name(options))
    values.update(_dataset_keys(inputs, options))
    values.update(inputs.family)
    values.update(inputs.trainable)
    values.update(inputs.extra)
    texts = {key: value if isinstance(value, str) else str(value) for key, value in values.items()}
    if options.get("no_metadata"):
        texts = {key: texts[key] for key in MINIMUM if key in texts}
    return {**texts, **_model_spec(inputs, options)}


def at_save(
    metadata: Mapping[str, str], *, steps: int, epoch: int, finished_at: float, hashes: BaseModelHashes | None = None
) -> dict[str, str]:
    """Metadata of the file that is written now. `epoch` counts finished epochs; `hashes` are waited for."""
    texts = dict(metadata)
    if "ss_session_id" in texts:  # absent with --no_metadata
        texts.update(
            {"ss_steps": str(steps), "ss_epoch": str(epoch), "ss_training_finished_at": time_text(finished_at)}
        )
        if hashes is not None:
            texts.update(hashes.metadata())
    texts["modelspec.date"] = local_date(finished_at)
    return texts


class BaseModelHashes:
    """Hashes of the base model (and of --vae), taken in the background from the start of a run."""

    def __init__(self, config: Config, memory: Path | None = None) -> None:
        options = config.values()
        paths = {"sd_model": options.get("pretrained_model_name_or_path"), "vae": options.get("vae")}
        self._paths = {name: path for name, path in paths.items() if path and os.path.exists(path)}
        self._hashes = BackgroundHashes(memory)
        if not options.get("no_metadata"):
            for path in self._paths.values():
                self._hashes.start(path)

    def metadata(self) -> dict[str, str]:
        """ss_*_hash and ss_new_*_hash; only for local files. Waits until they are there."""
        texts: dict[str, str] = {}
        for name, path in self._paths.items():
            texts[f"ss_{name}_hash"], texts[f"ss_new_{name}_hash"] = self._hashes.result(path)
        return texts

    def close(self) -> None:
        self._hashes.close()


def time_text(timestamp: float) -> str:
    """Seconds since 1970, always of the same length: sshs_legacy_hash depends on the length of the header."""
    return f"{timestamp:.6f}"


def _counts(inputs: MetadataInputs) -> dict[str, Any]:
    of_clips = {"ss_num_train_items": inputs.num_train_images} if inputs.has_clips else {}
    return {
        **of_clips,
        "ss_session_id": f"{inputs.session_id:010d}",
        "ss_training_started_at": time_text(inputs.started_at),
        "ss_seed": inputs.seed,
        "ss_num_train_images": inputs.num_train_images,
        "ss_num_validation_images": inputs.num_validation_images,
        "ss_num_reg_images": inputs.num_reg_images,
        "ss_num_batches_per_epoch": inputs.num_batches_per_epoch,
        "ss_num_epochs": inputs.num_epochs,
        "ss_max_train_steps": inputs.max_train_steps,
        "ss_optimizer": inputs.optimizer,
        "ss_sd_scripts_commit_hash": commit_hash() or "(unknown)",
    }


def _model_name(options: Mapping[str, Any]) -> dict[str, str]:
    """Base names of local files, hub names as they are."""
    names = {"ss_sd_model_name": options.get("pretrained_model_name_or_path"), "ss_vae_name": options.get("vae")}
    return {
        key: os.path.basename(os.path.normpath(name)) if os.path.exists(name) else str(name) for key,
        name in names.items() if name
    }


def _dataset_keys(inputs: MetadataInputs, options: Mapping[str, Any]) -> dict[str, Any]:
    subsets = [subset for dataset in inputs.datasets for subset in dataset["subsets"]]
    keys: dict[str, Any] = {
        "ss_tag_frequency": json.dumps(inputs.tag_frequency),
        "ss_dataset_dirs": json.dumps(_folders(subset for subset in subsets if not subset.get("is_reg"))),
    }
    if options.get("dataset_config"):
        return {**keys, "ss_datasets": json.dumps(list(inputs.datasets))}
    first = inputs.datasets[0]
    per_device = first["batch_size_per_device"]
    accumulation = options.get("gradient_accumulation_steps", 1)
    return {
        **keys,
        **{key: options[name] for key, name in LEGACY_DATASET.items() if name in options},
        "ss_reg_dataset_dirs": json.dumps(_folders(subset for subset in subsets if subset.get("is_reg"))),
        "ss_batch_size_per_device": per_device,
        "ss_total_batch_size": per_device * inputs.num_processes * accumulation,
        "ss_resolution": str(tuple(first["resolution"])),
        "ss_enable_bucket": first["enable_bucket"],
        "ss_min_bucket_reso": first["min_bucket_reso"],
        "ss_max_bucket_reso": first["max_bucket_reso"],
        "ss_bucket_info": json.dumps(first["bucket_info"]),
    }


def _folders(subsets: Any) -> dict[str, dict[str, int]]:
    """Folder or list of files -> repeats and images; a name that comes again gets a number."""
    folders: dict[str, dict[str, int]] = {}
    for subset in subsets:
        base = name = next((subset[key] for key in SOURCES if subset.get(key)), "")
        number = 2
        while name in folders:
            name, number = f"{base} ({number})", number + 1
        folders[name] = {"n_repeats": subset["num_repeats"], "img_count": subset["img_count"]}
    return folders


def _model_spec(inputs: MetadataInputs, options: Mapping[str, Any]) -> dict[str, str]:
    low, high = options.get("min_timestep"), options.get("max_timestep")
    sizes = [tuple(dataset["resolution"]) for dataset in inputs.datasets]
    commit = commit_hash()
    return build_model_spec(ModelSpec(
        architecture=options.get("metadata_arch") or inputs.modelspec["architecture"] or "",
        implementation=inputs.modelspec["implementation"] or "",
        implementation_version=f"atelier/{commit or 'unknown'}",
        kind=inputs.kind,
        title=options.get("metadata_title") or options.get("output_name"),
        resolution_wh=options.get("metadata_reso")
        or max(sizes, key=lambda size: size[0] * size[1], default=(1024, 1024)),
        timestamp=inputs.started_at,
        prediction_type=inputs.modelspec.get("prediction_type"),
        timestep_range=None if low is None and high is None else (low or 0, 1000 if high is None else high),
        encoder_layer=options.get("clip_skip"),
        optional={key: options.get(f"metadata_{key}") for key in OPTIONAL},
    ))


@cache
def commit_hash() -> str | None:
    """The commit of this program, or None outside a git checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
