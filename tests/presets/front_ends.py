"""Configurations as graphical front ends write them, from panels on which choices were made.

Two ways of writing are in use: one drops whatever is false, 0 or empty and writes keys of its own beside those of the
script (`epoch`, `noise_offset_type`, ...); the other writes every field as it stands, with stale keys. Both share one
shape among all families, write numbers as texts here and there, a prompt file whether there are prompts or not, and one
rate for every text encoder that a model may have.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import toml

PANEL: dict[str, Any] = {
    "adaptive_noise_scale": 0, "async_upload": False, "bucket_no_upscale": True, "bucket_reso_steps": 64,
    "cache_latents": True,
    "cache_latents_to_disk": False, "caption_dropout_every_n_epochs": 0, "caption_dropout_rate": 0,
    "caption_extension": ".txt",
    "clip_skip": 1, "color_aug": False, "dataset_config": "", "debiased_estimation_loss": False, "dynamo_backend": "no",
    "dim_from_weights": False, "enable_bucket": True, "epoch": 1, "flip_aug": False, "fp8_base": False,
    "full_bf16": False,
    "full_fp16": False, "gradient_accumulation_steps": 1, "gradient_checkpointing": False, "huber_c": 0.1,
    "huber_scale": 1,
    "huber_schedule": "snr", "huggingface_path_in_repo": "", "huggingface_repo_id": "", "huggingface_repo_type": "",
    "huggingface_repo_visibility": "", "huggingface_token": "", "ip_noise_gamma": 0,
    "ip_noise_gamma_random_strength": False,
    "keep_tokens": 0, "learning_rate": 1e-4, "log_config": False, "log_tracker_name": "", "log_tracker_config": "",
    "log_with": "",
    "logging_dir": "", "loss_type": "l2", "lr_scheduler": "cosine", "lr_scheduler_args": [],
    "lr_scheduler_num_cycles": 1,
    "lr_scheduler_power": 1, "lr_scheduler_type": "", "lr_warmup_steps": 0, "masked_loss": False,
    "max_bucket_reso": 128,
    "max_data_loader_n_workers": 0, "max_grad_norm": 1, "max_timestep": 1000, "max_token_length": 75,
    "max_train_epochs": 0,
    "max_train_steps": 2, "mem_eff_attn": False, "metadata_author": "", "metadata_title": "", "min_bucket_reso": 64,
    "min_snr_gamma": 0,
    "min_timestep": 0, "mixed_precision": "no", "multires_noise_discount": 0.3, "multires_noise_iterations": 0,
    "network_alpha": 2,
    "network_args": [], "network_dim": 4, "network_dropout": 0, "network_module": "networks.lora",
    "network_train_text_encoder_only": False,
    "network_train_unet_only": False, "network_weights": "", "no_half_vae": True, "noise_offset": 0,
    "noise_offset_random_strength": False,
    "noise_offset_type": "Original", "optimizer_args": [], "optimizer_type": "AdamW",
    "persistent_data_loader_workers": False,
    "prior_loss_weight": 1, "random_crop": False, "reg_data_dir": "", "resolution": "64,64", "resume": "",
    "resume_from_huggingface": "",
    "sample_every_n_epochs": 0, "sample_every_n_steps": 0, "sample_sampler": "euler_a", "save_every_n_epochs": 1,
    "save_every_n_steps": 0, "save_last_n_epochs": 0, "save_last_n_epochs_state": 0, "save_last_n_steps": 0,
    "save_last_n_steps_state": 0,
    "save_model_as": "safetensors", "save_precision": "fp16", "save_state": False, "save_state_on_train_end": False,
    "save_state_to_huggingface": False, "scale_v_pred_loss_like_noise_pred": False, "scale_weight_norms": 0, "seed": 5,
    "shuffle_caption": False, "skip_cache_check": False, "stop_text_encoder_training": 0,
    "text_encoder_lr": [1e-5, 1e-5],
    "train_batch_size": 1, "training_comment": "", "unet_lr": 1e-4, "v2": False, "v_parameterization": False,
    "v_pred_like_loss": 0,
    "vae": "", "vae_batch_size": 0, "wandb_api_key": "", "wandb_run_name": "", "weighted_captions": False,
    "xformers": True,
    "zero_terminal_snr": False,
}  # fmt: skip
"""field -> what it shows at first, with sizes for pictures of 64 pixels"""

STALE: dict[str, Any] = {
    "lr_restart_cycles": 1, "save_n_epoch_ratio": 0, "noise_offset_type": "Multires", "train_inpainting": False,
    "mem_eff_save": False,
    "show_timesteps": "", "single_blocks_to_swap": 0, "double_blocks_to_swap": 0, "compile": False,
    "compile_mode": "default", "gemma2": "",
    "clip_g": "", "min_snr_gamma": 5, "blocks_to_swap": 0, "timestep_sampling": "sigma", "fused_backward_pass": True,
    "model_train_type": "lora",
    "lowram": False, "max_train_epochs": 0, "ddp_timeout": 0,
}  # fmt: skip
"""keys that stay in files of a front end whatever is trained"""

_LYCORIS = [
    "preset=full",
    "conv_dim=2",
    "conv_alpha=1",
    "rank_dropout=0",
    "module_dropout=0",
    "use_tucker=False",
    "use_scalar=False",
]
CHOICES: dict[str, list[dict[str, Any]]] = {
    "optimizer": [
        {}, {"optimizer_type": "AdamW8bit"}, {"optimizer_type": "Lion"}, {"optimizer_type": "pytorch_optimizer.CAME"},
        {"optimizer_type": "Adafactor", "optimizer_args": ["scale_parameter=False", "relative_step=False", "warmup_init=False"]},
        {"optimizer_type": "Adafactor", "optimizer_args": ["relative_step=True"], "lr_scheduler": "adafactor"},
        {"optimizer_type": "Prodigy", "learning_rate": 1, "unet_lr": 1, "text_encoder_lr": [1, 1],
         "optimizer_args": ["decouple=True", "weight_decay=0.01", "d_coef=2", "use_bias_correction=True", "safeguard_warmup=False"]},
        {"optimizer_type": "DAdaptAdam", "learning_rate": 1, "unet_lr": 1, "text_encoder_lr": [1, 1], "optimizer_args": ["decouple=True"]},
        {"optimizer_type": "prodigyplus.ProdigyPlusScheduleFree", "learning_rate": 1, "unet_lr": 1, "lr_scheduler": "constant"},
        {"optimizer_type": "RAdamScheduleFree", "lr_scheduler": "constant"},
    ],
    "schedule": [
        {}, {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3},
        {"lr_scheduler": "polynomial", "lr_scheduler_power": 2},
        {"lr_scheduler": "constant", "lr_warmup_steps": 0},
        {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 0.1},
        {"lr_scheduler": "linear", "lr_warmup_steps": 1},
    ],
    "noise": [
        {}, {"noise_offset": 0.05, "adaptive_noise_scale": 0.005},
        {"noise_offset_type": "Multires", "multires_noise_iterations": 6},
        {"noise_offset": 0.1, "noise_offset_random_strength": True}, {"ip_noise_gamma": 0.1},
    ],
    "weights": [{}, {"min_snr_gamma": 5}, {"debiased_estimation_loss": True}, {"min_snr_gamma": 1, "zero_terminal_snr": True}],
    "loss": [{}, {"loss_type": "huber"}, {"loss_type": "smooth_l1", "huber_schedule": "exponential"}, {"scale_weight_norms": 1}],
    "text": [{}, {"clip_skip": 2}, {"clip_skip": 2, "max_token_length": 225}, {"max_token_length": 150, "shuffle_caption": True, "keep_tokens": 1}],
    "precision": [
        {}, {"mixed_precision": "bf16", "save_precision": "bf16"}, {"mixed_precision": "bf16", "full_bf16": True},
        {"mixed_precision": "bf16", "fp8_base": True},
    ],
    "network": [
        {}, {"network_args": ["conv_dim=2", "conv_alpha=1"]},
        {"network_module": "networks.dylora", "network_args": ["unit=2"]},
        {"network_module": "lycoris.kohya", "network_args": [*_LYCORIS, "algo=loha"]},
        {"network_module": "lycoris.kohya", "network_args": [*_LYCORIS, "algo=lokr", "factor=-1", "decompose_both=False", "dora_wd=False"]},
    ],
    "parts": [{}, {"network_train_unet_only": True, "cache_text_encoder_outputs": True}, {"text_encoder_lr": [5e-5, 0]}],
    "samples": [{}, {"sample_every_n_epochs": 1}, {"sample_every_n_steps": 999999, "sample_every_n_epochs": 999999}],
    "saving": [{}, {"save_state": True, "save_last_n_epochs": 1}, {"max_train_epochs": 1}, {"save_every_n_epochs": 0, "save_every_n_steps": 1}],
    "memory": [{}, {"xformers": False, "sdpa": True, "gradient_checkpointing": True}, {"cache_latents_to_disk": True, "vae_batch_size": 2},
               {"cache_latents": False, "flip_aug": True, "caption_dropout_rate": 0.1}],
}  # fmt: skip
"""what is chosen together -> the choices"""

FLUX_FIELDS: dict[str, Any] = {
    "timestep_sampling": "sigmoid", "model_prediction_type": "raw", "guidance_scale": 1, "discrete_flow_shift": 3.1582,
    "split_mode": False,
    "apply_t5_attn_mask": True, "t5xxl_max_token_length": 512, "network_module": "networks.lora_flux",
    "weighting_scheme": "logit_normal",
    "cache_text_encoder_outputs_to_disk": False,
}  # fmt: skip


def panels(family: str, count: int) -> list[dict[str, Any]]:
    """Panels of a family: every choice occurs, in ever other company."""
    orders = {}
    for group, choices in CHOICES.items():
        order = [choices[i % len(choices)] for i in range(count)]
        random.Random(f"{family} {group}").shuffle(order)
        orders[group] = order
    return [_panel(family, {group: order[i] for group, order in orders.items()}) for i in range(count)]


def _panel(family: str, chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The groups in the order of CHOICES but for the schedule, which the optimizer's choice may bring along."""
    fields = {**PANEL, **(FLUX_FIELDS if family == "flux" else {})}
    for group in ("schedule", *(name for name in CHOICES if name != "schedule")):
        fields.update(chosen[group])
    if fields["lr_scheduler"] == "adafactor":
        fields["lr_warmup_steps"] = 0
    if fields["optimizer_type"] in ("Prodigy", "DAdaptAdam"):  # which refuse different rates in their first step
        fields["text_encoder_lr"] = [fields["unet_lr"]] * 2
    if fields.get("cache_text_encoder_outputs"):  # with which every script refuses captions that change
        fields.update(shuffle_caption=False, caption_dropout_rate=0)
    if fields["network_module"] == "lycoris.kohya" and fields["fp8_base"]:  # which no script can train on 8-bit weights
        fields.update(network_module="networks.loha", network_args=["conv_dim=2", "conv_alpha=1"])
    if family == "sd":  # its panel has no such field
        fields.pop("cache_text_encoder_outputs", None)
    if family == "flux" and fields["network_module"] in ("networks.lora", "networks.dylora"):
        fields["network_module"] = "networks.lora_flux"
        fields["network_args"] = ["train_blocks=all", "split_qkv=False"]
    return fields


def _common(fields: Mapping[str, Any], prompts: Path) -> dict[str, Any]:
    prompts.write_text("", encoding="utf-8")
    return {**fields, "sample_prompts": str(prompts), "epoch": fields["max_train_epochs"] or 1}


def dropping(fields: Mapping[str, Any], prompts: Path) -> str:
    """A file of the front end that leaves out what is false, 0 or empty, but not empty lists."""
    values = _common(fields, prompts)
    if values["noise_offset_type"] == "Original":
        values["multires_noise_iterations"] = values["multires_noise_discount"] = None
    return toml.dumps({key: value for key, value in sorted(values.items()) if value not in ("", False, None)})


def as_it_stands(fields: Mapping[str, Any], prompts: Path) -> str:
    """A file of a front end that writes every field, numbers as texts, arguments in one text, and stale keys."""
    values = {**STALE, **_common(fields, prompts)}
    for name in (
        "learning_rate",
        "unet_lr",
        "network_dim",
        "network_alpha",
        "max_train_steps",
        "seed",
        "lr_warmup_steps",
        "save_every_n_epochs",
    ):
        values[name] = str(values[name])
    for name in ("optimizer_args", "network_args"):
        values[name] = " ".join(values[name])
    return toml.dumps(values)
