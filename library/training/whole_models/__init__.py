"""Training of whole models: its options, and which of them the script of a family has."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.core.errors import Problems
from library.core.options import Config, equivalent_option, option, option_fields
from library.families.record import FamilyRecord
from library.families.registry import FAMILIES
from library.training.trained_weights import OF_EVERY_SCRIPT, OLD, TrainedWeightsOptions

if TYPE_CHECKING:
    from library.training.wiring.base import ModelFamily

TEXT_RATES = ("learning_rate_te", "learning_rate_te1", "learning_rate_te2", "learning_rate_te3")
"""learning rates of text encoders: of the only one, or of each"""
_SWAP = "an old option that no script reads any more; see --blocks_to_swap"
_FEWER_BITS = "trained weights are not held in 8 or 4 bits, in which nothing can be learned; --full_bf16 halves them"
OF_ADAPTERS = {"skip_until_initial_step": "a run that resumes goes on at its step and reads no image before it"}
"""shared options that only scripts of adapters have"""


@dataclass(frozen=True, kw_only=True)
class WholeModelOptions(TrainedWeightsOptions):
    """Training of whole models"""

    train_text_encoder: bool = option(False, help="the text encoders learn too")
    learning_rate_te: float | None = option(
        None, help="learning rate of the text encoder; --learning_rate when not given; 0 = not trained"
    )
    learning_rate_te1: float | None = option(
        None, help="learning rate of the first text encoder; --learning_rate when not given; 0 = not trained"
    )
    learning_rate_te2: float | None = option(
        None, help="learning rate of the second text encoder; --learning_rate when not given; 0 = not trained"
    )
    learning_rate_te3: float | None = option(
        None, help="learning rate of the third text encoder; --learning_rate when not given; 0 = not trained"
    )
    train_t5xxl: bool = option(False, help="T5 learns too, where --train_text_encoder lets text encoders learn")
    use_t5xxl_cache_only: bool = option(
        False, help="cache what T5 says, as --cache_text_encoder_outputs does, while both CLIPs learn"
    )
    num_last_block_to_freeze: int | None = option(
        None, help="number of blocks, counted from the last, that stay as they are"
    )
    stop_text_encoder_training: int | None = option(
        None, help="optimizer step after which text encoders stay as they are; -1 = they do not learn at all"
    )
    no_token_padding: bool = option(False, help="captions without padding up to their length in tokens")
    block_lr: str | None = option(
        None, metavar="RATES",
        help="learning rates of the blocks of the U-Net, 23 numbers with commas: 0 embeddings of time and size, 1-9 input"
        " blocks, 10-12 middle, 13-21 output blocks, 22 output; 0 = not trained",
    )
    trainable_modules: list[str] | None = option(
        None, nargs="+", metavar="TEXT",
        help="parts of paths of the denoiser's parameters: those that have one of them learn, the others stay; . = all",
    )
    diffusers_xformers: bool = equivalent_option(
        False, help="attention of xformers in the text encoder",
        reason="--diffusers_xformers: attention is computed by torch (scaled_dot_product_attention)",
    )

    def __post_init__(self) -> None:
        problems = Problems()
        problems.attempt(super().__post_init__)
        for name in TEXT_RATES:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                problems.add(f"--{name} is {value}; needed: 0 (not trained) or more")
        if self.stop_text_encoder_training is not None and self.stop_text_encoder_training < -1:
            problems.add(
                f"--stop_text_encoder_training is {self.stop_text_encoder_training}; needed: a number of steps, or -1"
            )
        if self.num_last_block_to_freeze is not None and self.num_last_block_to_freeze < 0:
            problems.add(f"--num_last_block_to_freeze is {self.num_last_block_to_freeze}; needed: 0 or more blocks")
        problems.raise_if_any()


def following_defaults(family: type[ModelFamily], given: Mapping[str, Any]) -> dict[str, str]:
    """A base that is a folder of diffusers is saved as one, where the family has that layout and nothing else is asked
    for."""
    base = given.get("pretrained_model_name_or_path")
    is_pipeline = bool(base) and os.path.isfile(os.path.join(str(base), "model_index.json"))
    asks = given.get("save_model_as") is not None
    return {"save_model_as": "diffusers_safetensors"} if family.writes_folders and is_pipeline and not asks else {}


def side_endings(config: Config) -> list[str]:
    """What stands behind the name of the model in those of files that a run with these options may write beside it."""
    if WholeModelOptions not in config or not config[WholeModelOptions].train_text_encoder:
        return []
    scripts = [script for record in FAMILIES.values() for script in record.scripts.values()]
    return list(dict.fromkeys(ending for script in scripts for ending in script.text_files.values()))


def refused_options(record: FamilyRecord, trainable: str) -> Mapping[str, str]:
    """Options of a script without which the result would be another: name -> reason."""
    return {
        **dict.fromkeys(("fp8_base", "fp8_base_unet", "fp8_scaled", "fp8_fast", "quantize_base"), _FEWER_BITS),
        "mixed_precision_transformer": "weights that learn are of one type, that of the forward pass or float32",
        "no_token_padding": "captions are padded to their length in tokens, as the text encoder was trained",
    }


def ignored_options(record: FamilyRecord, trainable: str) -> Mapping[str, str]:
    """Options that the family's script of this trainable takes and that mean nothing: name -> reason."""
    script = record.scripts.get(trainable)
    return {name: _SWAP for name in OLD if script is not None and name in script.options}


def foreign_options(record: FamilyRecord, trainable: str) -> Mapping[str, str]:
    """Options, most of them of the group, that the family's script of this trainable does not have: name -> reason."""
    script = record.scripts.get(trainable)
    own = {*(script.options if script else ()), *OF_EVERY_SCRIPT}
    others = [name for name in option_fields(WholeModelOptions) if name not in own]
    named = ", ".join(f"--{name}" for name in option_fields(WholeModelOptions) if name in own)
    where = script.name if script else f"training of whole {record.title} models"
    return {
        **dict.fromkeys(others, f"an option of other scripts for whole models; {where} has {named}"),
        **OF_ADAPTERS,
        **(script.foreign if script else {}),
    }
