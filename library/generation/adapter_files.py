"""LoRA files as options of image scripts name them: reading the arguments, checking the files, which of their layers
are used."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from library.core.errors import ConfigError, Problems
from library.core.options import option

OWN_MODULE = "networks.lora"
LYCORIS_MODULE = "lycoris.kohya"


@dataclass(frozen=True)
class LayerFilter:
    """Which layers of the files are used: with `include` those that one of its patterns finds, without those that one
    of `exclude` finds. Patterns are searched in the layer's name in the file and in its dotted path."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def problems(self) -> list[str]:
        found = []
        for option, patterns in (("include_patterns", self.include), ("exclude_patterns", self.exclude)):
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    found.append(f"--{option} has '{pattern}', which is no regular expression: {error}")
        return found

    def accepts(self, names: Sequence[str]) -> bool:
        def hit(patterns: Sequence[str]) -> bool:
            return any(re.search(pattern, name) for pattern in patterns for name in names)

        return (not self.include or hit(self.include)) and not hit(self.exclude)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter file, how strongly it works, and which of its layers do. `module`: the network module that reads it,
    with these `arguments`."""

    path: str
    multiplier: float = 1.0
    module: str = OWN_MODULE
    arguments: Mapping[str, Any] = field(default_factory=dict)
    layer_filter: LayerFilter = LayerFilter()


@dataclass(frozen=True)
class AdapterChoice:
    """The adapters of a run. `merged`: added to the weights while these are read, not hooked."""

    files: Sequence[AdapterFile] = ()
    merged: bool = False


def parse_adapter_argument(text: str, option: str = "lora_weights") -> AdapterFile:
    """`path` or `path;multiplier`; ConfigError when the multiplier is no finite number."""
    path, separator, multiplier = text.rpartition(";")
    if not separator:
        return AdapterFile(text)
    try:
        strength = float(multiplier)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise ConfigError(f'--{option} has "{text}"; the text after ; is the multiplier, a number')
    return AdapterFile(path, strength)


def adapter_problems(texts: Sequence[str] | None, family: str, option: str = "lora_weights") -> list[str]:
    """What is wrong with arguments of the form `path;multiplier` and with the files that they name, from headers.
    `family`: of the model."""
    problems = Problems()
    for text in texts or ():
        adapter = problems.attempt(lambda: parse_adapter_argument(text, option))
        if adapter is not None:
            problem = file_problem(adapter.path, option, family)
            if problem:
                problems.add(problem)
    return problems.messages


def file_problem(path: str, option: str, family: str) -> str | None:
    """A message when a file is no adapter, or one that is known to be for another family whose adapters do not fit;
    None otherwise."""
    from library.checkpoints.kinds import check_adapter, check_slot
    from library.families.registry import record_of
    from networks.kinds.targets import targets_of_family

    problem = check_slot(path, option, {"adapter"}, with_pickles=True)
    if problem:
        return problem
    readable = (family, *targets_of_family(family).reads)
    found = [check_adapter(path, option, record_of(name).adapters.title) for name in readable]
    return found[0] if all(found) else None


def multiplier_problems(multipliers: Sequence[float] | None, num_adapters: int, *, merged: bool) -> list[str]:
    """What is wrong with the multipliers of one prompt line."""
    if multipliers is None:
        return []
    if not num_adapters:
        return ["--m gives multipliers, and there are no adapters"]
    if merged:
        return ["--m needs adapters that are hooked; these are merged into the weights (--merge_lora_weights)"]
    if len(multipliers) > num_adapters:
        return [f"--m gives {len(multipliers)} multipliers for {num_adapters} adapters"]
    return []


# -- options -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ListedAdapterOptions:
    """LoRAs"""

    lora_weight: list[str] | None = option(None, nargs="*", help="adapter files")
    lora_multiplier: list[float] | None = option(
        None, nargs="*", help="strength of each of the --lora_weight, or one for all; 1 when not given"
    )
    include_patterns: list[str] | None = option(
        None, nargs="*", help="use only the layers that one of these regular expressions finds"
    )
    exclude_patterns: list[str] | None = option(
        None, nargs="*", help="leave out the layers that one of these regular expressions finds"
    )
    lycoris: bool = option(False, help="read the adapter files with the package lycoris-lora")
    merge_lora_weights: bool = option(False, help="add the adapters to the weights instead of hooking them")
    merged_by_default: ClassVar[bool] = False
    """whether adapters are merged unless something else is asked for"""

    def __post_init__(self) -> None:
        problems = self.pattern_problems()
        files, multipliers = len(self.lora_weight or ()), len(self.lora_multiplier or ())
        if multipliers > 1 and multipliers != files or multipliers and not files:
            problems.append(
                f"--lora_multiplier has {multipliers} values for {files} --lora_weight; give one for each file,"
                " or one for all"
            )
        if (self.include_patterns or self.exclude_patterns) and not files:
            problems.append(
                "--include_patterns and --exclude_patterns choose layers of --lora_weight, which is not given"
            )
        if self.lycoris and self.merge_lora_weights and not self.merged_by_default:
            problems.append(
                "--merge_lora_weights: the package lycoris-lora merges without multipliers; leave out it or --lycoris"
            )
        if problems:
            raise ConfigError(problems)

    def pattern_problems(self) -> list[str]:
        return LayerFilter(tuple(self.include_patterns or ()), tuple(self.exclude_patterns or ())).problems()

    def filter_of(self, number: int) -> LayerFilter:
        """Which layers of the file with this number are used."""
        return LayerFilter(tuple(self.include_patterns or ()), tuple(self.exclude_patterns or ()))

    @property
    def num_adapters(self) -> int:
        return len(self.lora_weight or ())

    @property
    def adapters(self) -> AdapterChoice:
        return AdapterChoice(self.files, self.merge_lora_weights and not self.lycoris)

    @property
    def files(self) -> list[AdapterFile]:
        paths, multipliers = self.lora_weight or [], self.lora_multiplier or [1.0]
        strengths = multipliers * len(paths) if len(multipliers) == 1 else multipliers
        return [
            AdapterFile(p, m, LYCORIS_MODULE if self.lycoris else OWN_MODULE, layer_filter=self.filter_of(number))
            for number, (p, m) in enumerate(zip(paths, strengths, strict=True))
        ]


@dataclass(frozen=True, kw_only=True)
class MergedModelOptions:
    """A model with adapters in it"""

    save_merged_model: str | None = option(
        None, help="write the denoiser with the --lora_weight in it to this file and stop; nothing else is made"
    )

    def problems(self, adapters: ListedAdapterOptions, *, is_fp8: bool) -> list[str]:
        """What --save_merged_model cannot do; none without it."""
        from library.core.atomic_file import unwritable

        if self.save_merged_model is None:
            return []
        target, found = Path(self.save_merged_model), []
        if not adapters.lora_weight:
            found.append("--save_merged_model writes the denoiser with --lora_weight in it, which is not given")
        if adapters.lycoris:
            found.append(
                "--save_merged_model: the package lycoris-lora merges without multipliers; leave out --lycoris"
            )
        if is_fp8:
            found.append("--save_merged_model writes whole weights; leave out --fp8 and --fp8_scaled")
        if target.suffix != ".safetensors":
            found.append(f"--save_merged_model is {target}; needed: a name that ends in .safetensors")
        elif reason := unwritable(target.parent):
            found.append(f"--save_merged_model is {target}; it cannot be written there ({reason})")
        elif target.exists():
            found.append(f"--save_merged_model is {target}, which exists; give another name, or remove it")
        return found


@dataclass(frozen=True, kw_only=True)
class EmbeddingOptions:
    """Words"""

    textual_inversion_embeddings: list[str] | None = option(
        None, nargs="*",
        help="files of textual inversions; the name of a file without its ending is the word for prompts. Words that a "
        "LoRA file holds are known under their own names"
    )
