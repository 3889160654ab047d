"""Names that scripts, notebooks and plug-ins import from here, handed on from where the work is done.

Importing this module costs nothing: a name is looked up when it is asked for. A name whose job does not exist in this project
is not here.
"""

from __future__ import annotations

from typing import Any

from library.core.registry import import_target

_CALLS = "library.training.namespace_calls"
HOMES: dict[str, str] = {
    "DatasetGroup": "library.dataset.dataset:DatasetGroup",
    "model_hash": "library.checkpoints.hashes:model_hash",
    "calculate_sha256": "library.checkpoints.hashes:calculate_sha256",
    "precalculate_safetensors_hashes": "library.checkpoints.hashes:precalculate_safetensors_hashes",
    **{
        name: f"{_CALLS}:{name}"
        for name in (
            "load_prompts", "line_to_prompt_dict", "prepare_dtype", "get_optimizer", "get_optimizer_train_eval_fn",
            "is_schedulefree_optimizer", "get_scheduler_fix", "get_epoch_ckpt_name", "get_step_ckpt_name", "get_last_ckpt_name",
            "get_remove_epoch_no", "get_remove_step_no", "load_metadata_from_safetensors", "get_sanitized_config_or_none",
            "read_config_from_file", "add_sd_models_arguments", "add_optimizer_arguments", "add_training_arguments",
            "add_dataset_arguments",
        )
    },
}  # fmt: skip
"""name -> module:attribute"""

__all__ = list(HOMES)


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"library.train_util has no {name}")
    return import_target(HOMES[name])


def __dir__() -> list[str]:
    return sorted([*globals(), *HOMES])
