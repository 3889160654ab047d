"""Hooks: what happens now and then around the training step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, ClassVar, TypeVar

if TYPE_CHECKING:
    import torch

    from library.core.options import Config
    from library.dataset.batch import Batch
    from library.training.objective import NoisyLatents
    from library.training.protocols import Logs, LossBody, ParamGroup, Plain, StateValue, StepBody
    from library.training.run import DiTOutput, Run, StepOutput
    from library.training.step import TrainStep
    from library.training.trainables.base import Trainable
    from library.training.wiring.base import ModelFamily

logger = logging.getLogger(__name__)
H = TypeVar("H", bound="Hook")


class Hook:
    """Every method is empty; a hook fills those it needs. All ranks call all methods, in the order of `Run.hooks`;
    those of `--hook`, of a trainable and of the trainer get the same calls.

    Two methods replace instead of add, and at most one hook may define each: `process_batch` (the body of TrainStep)
    and `compute_loss` (from DiTOutput to the loss). Their default is None.
    """

    options: ClassVar[type | None] = None
    """dataclass of its own options (library.core.options). A class that `--hook` names is made with an object of it,
    which it then has as `opts`, or with nothing when it has none"""
    state_key: str = ""
    """names its part of a state; its class's name when empty"""
    told_as: ClassVar[str] = ""
    """the option that switches it on, for messages; its class's name when empty"""
    without_untouched: ClassVar[str] = ""
    """why there is no prediction of the untouched model to keep (`diff_output_preservation`); empty where there is"""
    companions: ClassVar[tuple[str, ...]] = ()
    """endings of the files that it writes beside each model file: `-ema` for `<name>-ema.safetensors`. See
    `save_companion`"""
    reads_saved_files: ClassVar[bool] = True
    """whether its `on_post_save`, if it has one, needs the file, and its `save_companion` what that wrote: the run then
    waits until it is written"""
    draws_own_times: ClassVar[bool] = True
    """whether a `process_batch`, if it has one, gives `loss_of` predictions at other noise levels than the run's law has,
    or of something else"""
    process_batch: StepBody | None = None
    compute_loss: LossBody | None = None

    def __init__(self, options: object = None) -> None:
        self.opts = options

    def check(self, config: Config, family: ModelFamily, trainable: Trainable) -> None:
        """Before models are loaded; raises ConfigError when the run cannot be what this hook needs."""

    def on_transformer_loaded(self, denoiser: torch.nn.Module) -> None:
        """Right after loading, before freezing and before adapters are attached."""

    def modules(self) -> dict[str, torch.nn.Module]:
        """Name -> module of its own, made in `on_transformer_loaded` at the latest. The run moves them to its device,
        keeps them in its states and in evaluation mode where the others are; what has a gradient is summed over
        processes, clipped and trained like the rest (see `extra_trainable_params`)."""
        return {}

    def extra_trainable_params(self) -> list[ParamGroup]:
        """Further optimizer groups ({"params", "name"} and, unless it is --learning_rate, "lr"): one for each of
        `modules`."""
        found = []
        for name, module in self.modules().items():
            parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
            found += [{"params": parameters, "name": name}] if parameters else []
        return found

    def on_train_start(self, run: Run) -> None: ...

    def on_epoch_start(self, run: Run) -> None: ...

    def on_step_start(self, run: Run, batch: Batch) -> None:
        """Before each micro-batch."""

    def on_prediction(self, step: TrainStep, output: DiTOutput, sample: NoisyLatents, batch: Batch) -> None:
        """After each forward of training, before the loss is made of it; `output` is to be looked at, not changed."""

    def on_gradients_ready(self, run: Run) -> None:
        """After gradients are summed over ranks, before the optimizer step; clipping is done before this."""

    def on_post_optimizer_step(self, run: Run) -> None: ...

    def on_step_end(self, run: Run, output: StepOutput) -> None:
        """After each optimizer step; `run.progress.global_step` counts it already."""

    def weights_for_eval(self, run: Run) -> AbstractContextManager[object]:
        """Inside, the trained weights are those that this hook wants samples and validation to be made with."""
        return nullcontext()

    def on_before_sample_images(self, run: Run) -> None: ...

    def on_after_sample_images(self, run: Run) -> None: ...

    def save_companion(
        self, run: Run, ending: str, path: str, dtype: torch.dtype | None, metadata: dict[str, str]
    ) -> None:
        """Write the file of one of `companions`; main process only, right after the model file. It is removed with that
        file."""
        raise NotImplementedError(f"{type(self).__name__} names the companion {ending} and does not write it")

    def on_post_save(self, run: Run, path: str, metadata: dict[str, str]) -> None:
        """Main process only, after a model file (not a state folder) was written; see `reads_saved_files`."""

    def on_files_written(self, run: Run, what: str, files: Sequence[str], step: int) -> None:
        """Main process only, when files stand: `what` is "model" (with the files beside it), "state" (one folder) or
        "samples", `step` the optimizer steps done when they were due. A model or a state is written while training goes
        on, and then the thread that writes calls."""

    def on_epoch_end(self, run: Run) -> None: ...

    def on_train_end(self, run: Run) -> None:
        """After the last step, or the one after which a signal was heard."""

    def close(self, run: Run, error: BaseException | None) -> None:
        """The last call of all: after on_train_end, or when something raised `error`, wherever it was."""

    def extra_metadata(self, run: Run) -> dict[str, Plain]:
        return {}

    def extra_step_logs(self, run: Run) -> Logs:
        return {}

    def planned_files(self, run: Run) -> list[str]:
        """Files that this hook will write, for the start page: names below the output folder, several of a kind as one
        line."""
        return []

    def written_files(self) -> list[str]:
        """Files and folders that it has written and not removed again, for the last lines of the log."""
        return []

    def state_dict(self) -> dict[str, StateValue]:
        """What this hook needs to go on after a resume, beside its modules; tensors, numbers, texts, lists and dicts
        only."""
        return {}

    def load_state_dict(self, state: dict[str, StateValue]) -> None: ...


IN_EACH_STEP = ("on_step_start", "on_gradients_ready", "on_post_optimizer_step", "on_step_end", "extra_step_logs")
"""methods that are called so often that those which a hook has not filled are passed over"""


def is_empty(hook: Hook, name: str) -> bool:
    """Whether a hook has left this method as it is here."""
    return getattr(getattr(hook, name), "__func__", None) is getattr(Hook, name)


class HookList:
    """Calls every hook in order: `hooks.on_step_end(run, output)`."""

    def __init__(self, hooks: list[Hook]) -> None:
        self.hooks = list(hooks)

    def __iter__(self):
        return iter(self.hooks)

    def __getattr__(self, name: str):
        if not hasattr(Hook, name):
            raise AttributeError(name)
        called = [hook for hook in self.hooks if not (name in IN_EACH_STEP and is_empty(hook, name))]

        def call_all(*args: object) -> list[object]:
            return [getattr(hook, name)(*args) for hook in called]

        self.__dict__[name] = call_all  # who fills a method is looked up once
        return call_all

    def close(self, run: Run, error: BaseException | None) -> None:
        """Every hook is closed, also after one that cannot be. What went wrong first is what the caller sees."""
        first: Exception | None = None
        for hook in self.hooks:
            try:
                hook.close(run, error)
            except Exception as problem:
                if error is not None or first is not None:
                    logger.error("%s could not be closed: %s", type(hook).__name__, problem)
                first = first or problem
        if error is None and first is not None:
            raise first

    def by_key(self) -> dict[str, Hook]:
        """Hooks by the name that their states have; a name that comes again gets the number of its place: `Losses
        2`."""
        found: dict[str, Hook] = {}
        for hook in self.hooks:
            name = key = hook.state_key or type(hook).__name__
            number = 2
            while key in found:
                key, number = f"{name} {number}", number + 1
            found[key] = hook
        return found

    def all_modules(self) -> dict[str, torch.nn.Module]:
        """The modules of all hooks as `<key>.<name>`."""
        return {
            f"{key}.{name}": module for key, hook in self.by_key().items() for name, module in hook.modules().items()
        }

    def find(self, hook_class: type[H]) -> H | None:
        return next((hook for hook in self.hooks if isinstance(hook, hook_class)), None)
