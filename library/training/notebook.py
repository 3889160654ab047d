"""A training as a notebook takes it apart; `library.Training`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.core.options import Config
from library.core.plugins import search_current_folder
from library.core.registry import import_target
from library.families.registry import record_of
from library.training import parser_common

if TYPE_CHECKING:
    from library.dataset.dataset import DatasetGroup
    from library.strategy_base import StrategySet
    from library.training.accelerator_setup import Runtime
    from library.training.hooks.base import Hook
    from library.training.run import Run, StepOutput
    from library.training.trainer_base import Trainer
    from library.training.wiring.base import ModelFamily


def words_of(options: Mapping[str, Any] | Iterable[str]) -> list[str]:
    """Options as the words of a command line: {"network_dim": 4, "cache_latents": True} -> ["--network_dim=4",
    "--cache_latents=True"]. None stands for an option that is not given; a list has several values."""
    if not isinstance(options, Mapping):
        return [str(word) for word in options]
    words: list[str] = []
    for name, value in options.items():
        if isinstance(value, (list, tuple)):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


class Training:
    """One training: its options, its family, its data, a step of it, the whole of it. Each part is made when it is
    first asked for.

        training = library.Training(family="...", network_module="lora", dataset_config="data.toml", ...)
        training.dataset            # the images in their buckets, with captions and caches
        training.family             # the parts of the architecture: load_denoiser, strategies, predict, ...
        training.run                # models, adapter, optimizer and schedule, ready
        training.step()             # one optimizer step
        training.train()            # to the end; the path of the file

    Options are those of the training script, as keywords, as a dict or as the words of a command line, and are checked
    in the same way: one ConfigError with all problems. `family`, `trainable`: names, or for a trainable a path
    `package.module:Class`. `hooks`: objects that are called around the steps.
    """

    def __init__(
        self, options: Mapping[str, Any] | Iterable[str] = (), *, family: str, trainable: str = "network",
        hooks: Sequence[Hook] = (),
        **more: Any,
    ) -> None:
        search_current_folder()
        words = [*words_of(options), *words_of(more)]
        record = record_of(parser_common.chosen_variant(record_of(family).name, words))
        self.config: Config = parser_common.parse(words, record.name, trainable)
        self.family: ModelFamily = import_target(record.family)(self.config)
        self.trainable = parser_common.TRAINABLES.resolve(trainable)(self.config)
        self.hooks = list(hooks)
        self._batches: Iterator[Any] = iter(())

    @cached_property
    def runtime(self) -> Runtime:
        """The device, the number format and the seed."""
        from library.training.accelerator_setup import prepare_runtime

        return prepare_runtime(self.config)

    @cached_property
    def strategies(self) -> StrategySet:
        """How captions become tokens, tokens conditioning, and pictures latents."""
        return self.family.strategies(self.trainable.follows_text_encoders(self.family))

    @cached_property
    def dataset(self) -> DatasetGroup:
        """The images of the training in their buckets; batches are planned by `plan` and read by `load`."""
        from library.training.data_phase import find_data, group_data, side_limit_of

        found = find_data(self.config, self.family.architecture, "train", side_limit_of(self.family))
        data = group_data(self.config, found, self.family.architecture, self.runtime.seed)
        data.set_strategies(self.strategies)
        return data.train

    @cached_property
    def _trainer(self) -> Trainer:
        from library.training.trainer_base import Trainer

        return Trainer(self.config, self.family, self.trainable, self.hooks)

    @cached_property
    def run(self) -> Run:
        """Everything a step needs: files checked, caches filled, models loaded, the adapter in them, optimizer and
        schedule made."""
        return self._trainer.prepare()

    def step(self) -> StepOutput:
        """One optimizer step on the next batches of the first epoch: forward and backward of each, then the update; the
        output of the last batch. The progress of the run stays where it is: `train` begins with its own first step."""
        from library.training.loop import micro_step, update

        while True:
            batch = next(self._batches, None)
            if batch is None:  # the epoch is over: once more from its beginning
                self._batches = self.run.data.batches(epoch=1)
                continue
            output = micro_step(self.run, batch)
            if batch.request.is_last_of_group:
                update(self.run)
                return output

    def train(self) -> Path:
        """The run to its last step, with everything that happens around it; the path of the trained file."""
        from library.training.earlier_runs import final_file
        from library.training.loop import fit

        try:
            fit(self.run)
        finally:
            self.close()
        return final_file(self.config)

    def close(self) -> None:
        """Give the name of the output free for other runs; `train` does it at its end."""
        self._trainer.release()
