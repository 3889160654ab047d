"""--network_args: parsed once, strictly. An unknown key, a value of the wrong type or a bad pattern is an error."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from library.core.errors import ConfigError, Problems, did_you_mean
from library.core.learning_rates import rate
from library.core.options import LARGEST_RANK, parse_bool
from library.core.patterns import number, pattern_values, patterns
from library.families.registry import FAMILIES
from networks.kinds.block_rates import block_parsers, check_block_rates
from networks.kinds.targets import NetworkTargets, targets_of_family


@dataclass(frozen=True)
class NetworkSettings:
    """What the user asked of a network. `values` holds every parsed network argument that was given, by name."""

    rank: int = 4
    alpha: float | None = 1.0
    neuron_dropout: float | None = None
    values: Mapping[str, Any] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    @property
    def conv_rank(self) -> int:
        """Rank of convolutions larger than 1x1; 0 = they are left alone."""
        return self.rank if self.get("enable_conv") else self.get("conv_dim", 0)

    @property
    def conv_alpha(self) -> float | None:
        return self.alpha if self.get("enable_conv") else self.get("conv_alpha", 1.0)


def parse_network_args(
    pairs: Mapping[str, Any], targets: NetworkTargets, extra: Mapping[str, Callable[[Any], Any]] | None = None
) -> dict[str, Any]:
    """Texts -> values for a family. `extra` holds the arguments of one adapter type (name -> parser).

    Values that are None or already of the right type pass. Raises one ConfigError with every problem.
    """
    parsers = {**argument_parsers(targets), **(extra or {})}
    problems, values = Problems(), {}
    for name, value in pairs.items():
        if name not in parsers:
            where = families_with(name)
            hint = f"; known for {', '.join(where)}." if where else did_you_mean(name, parsers) or "."
            problems.add(
                f"--network_args {name}={value}: there is no argument '{name}' for {targets.family}{hint}"
                f" Known: {', '.join(sorted(parsers))}"
            )
            continue
        try:
            values[name] = None if value is None else parsers[name](value)
        except (ValueError, SyntaxError, argparse.ArgumentTypeError) as error:
            problems.add(f"--network_args {name}={value}: {error}")
    problems.attempt(lambda: check_block_rates(values))
    problems.raise_if_any()
    return values


def families_with(name: str) -> list[str]:
    """Families whose adapters know an argument."""
    return [family for family in FAMILIES if name in argument_parsers(targets_of_family(family))]


WEIGHT_DECOMPOSITION: dict[str, Callable[[Any], Any]] = {"dora_wd": parse_bool, "wd_on_output": parse_bool}
"""arguments of the kinds that can be combined with DoRA: norms are trained apart from directions, of a layer's output
rows or (wd_on_output=False) of its input columns"""
RANK_STABILIZED: dict[str, Callable[[Any], Any]] = {"rs_lora": parse_bool}
"""rs-LoRA (arXiv 2312.03732): scale alpha / sqrt(rank)"""


TRAINING_ONLY = (
    "ggpo_sigma",
    "ggpo_beta",
    "tlora_min_rank",
    "tlora_alpha_rank_scale",
    "block_lr_zero_threshold",
    "excludes_weight_decay",
    "verbose",
)


def shapes_nothing(name: str) -> bool:
    """Whether an argument is about training alone, dropouts and learning rates: it may change when a run goes on. Names
    of other packages' arguments tell it as well."""
    return name in TRAINING_ONLY or "dropout" in name or re.search(r"(^|_)lrs?(_|$)", name) is not None


CONV_RANKS = ("conv_dim", "conv_block_dims")
NEEDS: dict[str, tuple[str, ...]] = {
    "conv_alpha": CONV_RANKS, "conv_block_alphas": CONV_RANKS, "use_tucker": CONV_RANKS, "wd_on_output": ("dora_wd",),
}  # fmt: skip
"""arguments that do nothing on their own -> those of which one must be given too"""


def argument_parsers(targets: NetworkTargets) -> dict[str, Callable[[Any], Any]]:
    """Every argument that any adapter of this family knows."""
    parsers: dict[str, Callable[[Any], Any]] = {
        "dropout": probability,  # added by the trainer for LyCORIS, which reads no neuron_dropout
        "rank_dropout": probability,
        "module_dropout": probability,
        "conv_dim": rank,
        "conv_alpha": number,
        "loraplus_lr_ratio": positive_number,
        "loraplus_unet_lr_ratio": positive_number,
        "loraplus_text_encoder_lr_ratio": positive_number,
        "network_reg_dims": lambda text: pattern_values(text, rank),
        "network_reg_lrs": lambda text: pattern_values(text, rate),
        "exclude_patterns": patterns,
        "include_patterns": patterns,
        "excludes_weight_decay": patterns,
        "train_norm": parse_bool,
        "verbose": parse_bool,
    }
    parsers.update({rule.arg: rank for rule in targets.parts})
    parsers.update({rule.arg: selection for rule in targets.indices})
    parsers.update({arg: parse_bool for arg in targets.optional_classes})
    parsers.update({encoder.switch: parse_bool for encoder in targets.text_encoders if encoder.switch})
    if targets.choice:
        parsers[targets.choice.arg] = one_of(tuple(targets.choice.classes))
    if targets.entries:
        parsers[targets.entries.arg] = ranks(
            len(targets.entries.parts), ",".join(name for name, _ in targets.entries.parts)
        )
    if targets.blocks:
        count = targets.blocks.count
        parsers.update({"block_dims": ranks(count), "conv_block_dims": ranks(count)})
        parsers.update({"block_alphas": numbers(count), "conv_block_alphas": numbers(count)})
        parsers.update(block_parsers(targets.blocks))
    return parsers


def positive_number(value: Any) -> float:
    result = number(value)
    if not result > 0:
        raise ValueError("a number above 0 is needed")
    return result


def probability(value: Any) -> float:
    result = number(value)
    if not 0 <= result < 1:
        raise ValueError("a probability of 0 or more and below 1 is needed")
    return result


def rank(value: Any) -> int:
    try:
        result = int(str(value))
    except ValueError:
        raise ValueError("a whole number is needed (a rank; 0 leaves the layers out)") from None
    if result < 0:
        raise ValueError("a rank of 0 or more is needed")
    if result > LARGEST_RANK:
        raise ValueError(f"a rank of at most {LARGEST_RANK} is possible")
    return result


def _items(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return list(value)
    return [item.strip() for item in str(value).strip().removeprefix("[").removesuffix("]").split(",")]


def ranks(count: int, names: str = "one per block") -> Callable[[Any], list[int]]:
    def parse(value: Any) -> list[int]:
        items = _items(value)
        if len(items) != count:
            raise ValueError(f"it has {len(items)} values; needed: {count} ranks ({names})")
        return [rank(item) for item in items]

    return parse


def numbers(count: int) -> Callable[[Any], list[float]]:
    def parse(value: Any) -> list[float]:
        items = _items(value)
        if len(items) != count:
            raise ValueError(f"it has {len(items)} values; needed: {count} numbers (one per block)")
        return [number(item) for item in items]

    return parse


def one_of(choices: tuple[str, ...]) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if str(value) not in choices:
            raise ValueError(f"needed: one of {', '.join(choices)}")
        return str(value)

    return parse


def selection(value: Any) -> str:
    """`all`, `none`, empty, or items `i` and `a-b` separated by commas; checked here, resolved by selected_blocks."""
    text = str(value).strip()
    if text.lower() not in ("", "all", "none"):
        for item in text.split(","):
            match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", item)
            if not match or (match[2] is not None and int(match[2]) < int(match[1])):
                raise ValueError(
                    f"'{item.strip()}' is no block number i or range a-b (0 is the first block); or use all, none"
                )
    return text


def selected_blocks(text: str, count: int, arg: str) -> set[int]:
    """The block numbers of a selection for a model of `count` blocks; ConfigError when one is beyond the last."""
    lowered = text.strip().lower()
    if lowered == "all":
        return set(range(count))
    if lowered in ("", "none"):
        return set()
    chosen: set[int] = set()
    for item in text.split(","):
        first, _, last = item.partition("-")
        chosen.update(range(int(first), int(last or first) + 1))
    if max(chosen) >= count:
        raise ConfigError(
            f"--network_args {arg}={text}: block {max(chosen)} does not exist; this model has blocks 0-{count - 1}"
        )
    return chosen
