"""Options of packing, samples of several sizes in one step, and what does not go with it. Without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.core.errors import Problems
from library.core.options import Ignored, option, without_effect
from library.dataset import DatasetOptions
from library.dataset.packing import STRATEGIES, Packing
from library.training.adapters import NetworkOptions
from library.training.computing_options import MemoryOptions

if TYPE_CHECKING:
    from library.core.options import Config
    from library.training.hooks.base import Hook
    from library.training.trainables.base import Trainable
    from library.training.wiring.base import ModelFamily

PACKS = ("network", "full")
"""what can be learned from packs"""
OF_SAMPLES = "is drawn for every sample, and the layers see the tokens of all samples of a pack as one row"


@dataclass(frozen=True, kw_only=True)
class NavitOptions:
    """Packing: samples of several sizes in one step."""

    navit_packing: bool = option(
        False, help="NaViT: samples of several sizes go through the denoiser together, as many as a budget of tokens"
        " holds; for transformer families",
    )  # fmt: skip
    navit_token_budget: int = option(
        16384, least=1, help="tokens of pictures or clips in one pack, at most; a picture of 1024x1024 has 4096 in most"
        " families",
    )  # fmt: skip
    navit_max_images_per_pack: int = option(0, least=0, help="samples of one pack, at most; 0 = any number")
    navit_pack_strategy: str = option(
        "next_fit", choices=STRATEGIES, help="next_fit: samples in shuffled order, a new pack where the next does not"
        " fit; ffd: the largest first, each into the first pack that has room",
    )  # fmt: skip
    navit_pack_ffd_window: int = option(256, least=0, help="samples that ffd sorts at a time; 0 = the whole epoch")
    navit_drop_last: bool = option(False, help="leave out the emptiest pack of every epoch of a dataset")

    @property
    def packing(self) -> Packing | None:
        """How packs are filled; None without packing."""
        if not self.navit_packing:
            return None
        return Packing(
            self.navit_token_budget, self.navit_max_images_per_pack, self.navit_pack_strategy,
            self.navit_pack_ffd_window, self.navit_drop_last,
        )  # fmt: skip


def packing_of(config: Config) -> Packing | None:
    return config[NavitOptions].packing if NavitOptions in config else None


def idle_beside_packs(config: Config) -> list[Ignored]:
    """Settings without effect in a run that packs."""
    packing = packing_of(config)
    if packing is None:
        return []
    size = [name for name in ("train_batch_size",) if name in config.explicit]
    window = [name for name in ("navit_pack_ffd_window",) if name in config.explicit and packing.strategy != "ffd"]
    return [
        *without_effect(size, "has no effect with --navit_packing, where --navit_token_budget fills a step"),
        *without_effect(window, "has no effect without --navit_pack_strategy ffd"),
    ]


def check_packing(config: Config, family: ModelFamily, trainable: Trainable, hooks: Iterable[Hook]) -> None:
    """ConfigError for what cannot be done with packs."""
    if packing_of(config) is None:
        return
    problems = Problems()
    for message in _problems(config, family, trainable):
        problems.add(message)
    for hook in hooks:
        if hook.process_batch is not None:
            name = hook.told_as or type(hook).__name__
            problems.add(
                f"--navit_packing is set and {name} replaces the body of the step, whose batches have one size; take"
                " one of them out"
            )
    problems.raise_if_any()


def _problems(config: Config, family: ModelFamily, trainable: Trainable) -> Iterator[str]:
    if not family.packs:
        yield (
            f"--navit_packing is set, and the denoiser of {family.record.title} takes batches of one size; leave it"
            " out: buckets make such batches"
        )
    if trainable.name not in PACKS:
        yield "--navit_packing is set, and packs are for adapters and whole models; leave it out"
    if config[MemoryOptions].compiles:
        yield (
            "--navit_packing and --torch_compile are set: every pack has lengths of its own, for which blocks would be"
            " compiled again and again; leave one of them out"
        )
    if config[DatasetOptions].dataset_class is not None:
        yield "--navit_packing is set, and --dataset_class makes batches of its own; leave one of them out"
    if NetworkOptions in config:
        yield from _network_problems(config[NetworkOptions])


def _network_problems(options: NetworkOptions) -> Iterator[str]:
    """Dropouts and ranks of each sample."""
    if options.network_dropout:
        yield f"--network_dropout is {options.network_dropout}, which {OF_SAMPLES}: leave it or --navit_packing out"
    given = dict(pair.partition("=")[::2] for pair in options.network_args or ())
    for name, value in given.items():
        if "dropout" in name and name != "module_dropout" and value not in ("0", "0.0", "None", ""):
            yield f"--network_args {name}={value}: it {OF_SAMPLES}: leave it or --navit_packing out"
    if "tlora" in (options.network_module or "") or given.get("algo", "").lower() == "tlora":
        yield (
            "--navit_packing is set, and T-LoRA trains ranks by the noise level of every sample, where layers see the"
            " tokens of all samples of a pack as one row; use another adapter or leave --navit_packing out"
        )
