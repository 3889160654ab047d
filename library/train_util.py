"""Names that scripts, notebooks and plug-ins import from here, handed on from where they are made.

Importing this module costs nothing: a name is looked up when it is asked for. docs/public_names.md lists them.
"""

from library.core.lazy_names import homes, lazy_names

_HOMES = {
    **homes(
        "library.compat.arguments", "add_dataset_arguments", "add_dit_training_arguments", "add_masked_loss_arguments",
        "add_optimizer_arguments", "add_sd_models_arguments", "add_sd_saving_arguments", "add_training_arguments",
        "enable_high_vram",
        "get_sanitized_config_or_none", "prepare_dataset_args", "read_config_from_file",
        "verify_command_line_training_args",
        "verify_training_args",
    ),
    **homes(
        "library.compat.accelerator", "patch_accelerator_for_fp16_training", "prepare_accelerator", "prepare_dtype",
    ),
    **homes(
        "library.compat.optimizing", "LossRecorder", "append_lr_to_logs", "append_lr_to_logs_with_names",
        "get_optimizer",
        "get_optimizer_train_eval_fn", "get_scheduler_fix", "is_schedulefree_optimizer",
    ),
    **homes(
        "library.compat.losses", "conditional_loss", "get_huber_threshold_if_needed",
        "get_noise_noisy_latents_and_timesteps",
    ),
    **homes(
        "library.compat.files", "build_minimum_network_metadata", "get_epoch_ckpt_name", "get_git_revision_hash",
        "get_last_ckpt_name",
        "get_remove_epoch_no", "get_remove_step_no", "get_step_ckpt_name", "load_metadata_from_safetensors",
        "resume_from_local_or_hf_if_specified", "save_and_remove_state_on_epoch_end", "save_and_remove_state_stepwise",
        "save_state_on_train_end",
    ),
    **homes("library.compat.buckets", "BucketManager", "ImageInfo", "glob_images_pathlib", "split_train_val"),
    **homes(
        "library.compat.datasets", "BaseDataset", "ControlNetDataset", "ControlNetSubset", "DatasetGroup",
        "DreamBoothDataset", "DreamBoothSubset",
        "FineTuningDataset",
        "FineTuningSubset", "MinimalDataset", "collator_class", "debug_dataset", "load_arbitrary_dataset",
    ),
    **homes("library.compat.sd_names", "load_target_model", "replace_unet_modules"),
    **homes("library.compat.modelspec", "get_sai_model_spec", "get_sai_model_spec_dataclass"),
    "sample_images": "library.compat.samples:sample_images_sd",
    **homes("library.compat.samples", "line_to_prompt_dict", "load_prompts"),
    **homes("library.checkpoints.hashes", "calculate_sha256", "model_hash", "precalculate_safetensors_hashes"),
}  # fmt: skip
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
__all__ = list(_HOMES)
