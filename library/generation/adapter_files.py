"""LoRA files as options of image scripts name them: reading the arguments, checking the files, which of their layers
are used."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from library.core.errors import ConfigError, Problems

OWN_MODULE = "networks.lora"


@dataclass(frozen=True)
class AdapterFile:
    """An adapter file and how strongly it works. `module`: the network module that reads it, with these `arguments`."""

    path: str
    multiplier: float = 1.0
    module: str = OWN_MODULE
    arguments: Mapping[str, Any] = field(default_factory=dict)


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
class AdapterChoice:
    """The adapters of a run. `merged`: added to the weights while these are read, not hooked."""

    files: Sequence[AdapterFile] = ()
    merged: bool = False
    layer_filter: LayerFilter = LayerFilter()


def parse_adapter_argument(text: str, option: str = "lora_weights") -> AdapterFile:
    """`path` or `path;multiplier`; ConfigError when the multiplier is no number."""
    path, separator, multiplier = text.rpartition(";")
    if not separator:
        return AdapterFile(text)
    try:
        return AdapterFile(path, float(multiplier))
    except ValueError:
        raise ConfigError(f'--{option} has "{text}"; the text after ; is the multiplier, a number') from None


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
    """A message when a file is no adapter, or one that is known to be for another family; None otherwise."""
    from library.checkpoints.kinds import check_adapter, check_slot
    from library.families.registry import record_of

    return check_slot(path, option, {"adapter"}, with_pickles=True) or check_adapter(
        path, option, record_of(family).adapters.title
    )


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
