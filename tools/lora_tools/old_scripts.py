"""Scripts under the names that they have elsewhere: their options translated for the tools that replace them."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

logger = logging.getLogger("atelier")


@dataclass(frozen=True)
class OldScript:
    """`tool`: name of the module in tools; `renamed`: old option -> words in its place (its value, if it has one,
    follows the last); `dropped`: old option -> number of values that are passed over; `added`: words that are always
    there; `told`: what differs from the old script."""

    tool: str
    renamed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    added: tuple[str, ...] = ("--overwrite",)
    told: str = ""


EXACT_SUM = "adapters are merged exactly, side by side, where the old script mixed their matrices"
NO_CLAMP = "numbers are not clamped unless --clamp_quantile is given"
EXACT_RANK = "a rule keeps exactly the values it asks for, where the old script kept one or two more"

SCRIPTS: dict[str, OldScript] = {
    "resize_lora": OldScript("resize_lora", told=EXACT_RANK),
    "extract_lora_from_models": OldScript(
        "extract_lora", {"--v2": ("--family", "sd2"), "--sdxl": ("--family", "sdxl")},
        {"--load_precision": 1, "--load_original_model_to": 1, "--load_tuned_model_to": 1}, told=NO_CLAMP,
    ),
    "flux_extract_lora": OldScript("extract_lora", dropped={"--mem_eff_safe_open": 0}, added=("--overwrite", "--family", "flux"), told=NO_CLAMP),
    "extract_lora_from_dylora": OldScript(
        "resize_lora", {"--unit": ("--split_unit",)},
        told="alpha is that of the training, alpha * sqrt(rank / full rank)"
    ),
    "check_lora_weights": OldScript("check_lora", added=("--weights",)),
    "merge_lora": OldScript("merge_lora", {"--v2": ("--family", "sd2")}, told=EXACT_SUM),
    "merge_lora_old": OldScript("merge_lora", {"--v2": ("--family", "sd2")}, told=EXACT_SUM),
    "sdxl_merge_lora": OldScript("merge_lora", added=("--overwrite", "--family", "sdxl"), told=EXACT_SUM),
    "flux_merge_lora": OldScript(
        "merge_lora", {"--working_device": ("--device",)}, {"--diffusers": 0, "--loading_device": 1},
        added=("--overwrite", "--family", "flux"), told=EXACT_SUM,
    ),
    "svd_merge_lora": OldScript("merge_lora", added=("--overwrite", "--mode", "svd"), told="numbers are not clamped"),
}  # fmt: skip
"""old script of the folder networks -> what replaces it"""


def translated(name: str, argv: Sequence[str]) -> list[str]:
    """The words for the tool in the place of those for the old script."""
    script, result, skip = SCRIPTS[name], [], 0
    for word in argv:
        if skip and not word.startswith("--"):
            skip -= 1
            continue
        skip = 0
        option, equals, value = word.partition("=")
        if option in script.dropped:
            skip = 0 if equals else script.dropped[option]
        elif option in script.renamed:
            result += [*script.renamed[option], *([value] if equals else [])]
        else:
            result.append(word)
    return [*result, *script.added]


def run(name: str, argv: Sequence[str] | None) -> int:
    """Run the tool that replaces an old script of the folder networks; its exit code."""
    script = SCRIPTS[name]
    words = list(sys.argv[1:] if argv is None else argv)
    if not {"-h", "--help"} & set(words):
        logger.warning(
            "networks/%s.py is now tools/%s.py%s", name, script.tool, f"; {script.told}" if script.told else ""
        )
    return importlib.import_module(f"tools.{script.tool}").main(translated(name, words))
