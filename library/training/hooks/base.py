"""Hooks: what happens now and then around the training step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from library.training.run import Run, StepOutput


class Hook:
    """Every method is empty; a hook fills those it needs. All ranks call all methods, in the order of `Run.hooks`.

    Two methods replace instead of add, and at most one hook may define each: `process_batch` (the body of TrainStep) and
    `compute_loss` (from DiTOutput to the loss). Their default is None.
    """

    state_key: str = ""
    """names its part of a state; its class's name when empty"""
    process_batch = None
    """(step: TrainStep, batch, times) -> StepOutput"""
    compute_loss = None
    """(step: TrainStep, output: DiTOutput, sample: NoisyLatents, batch) -> (per-sample loss [B], logs)"""

    def on_transformer_loaded(self, denoiser: torch.nn.Module) -> None:
        """Right after loading, before freezing and before adapters are attached."""

    def extra_trainable_params(self) -> list[dict[str, Any]]:
        """Further optimizer groups ({"params", "lr", "name"})."""
        return []

    def on_train_start(self, run: Run) -> None: ...

    def on_epoch_start(self, run: Run) -> None: ...

    def on_step_start(self, run: Run, batch: Any) -> None:
        """Before each micro-batch."""

    def on_gradients_ready(self, run: Run) -> None:
        """After gradients are summed over ranks, before the optimizer step; clipping is done before this."""

    def on_post_optimizer_step(self, run: Run) -> None: ...

    def on_step_end(self, run: Run, output: StepOutput) -> None:
        """After each optimizer step; `run.progress.global_step` counts it already."""

    def on_before_sample_images(self, run: Run) -> None: ...

    def on_after_sample_images(self, run: Run) -> None: ...

    def on_post_save(self, run: Run, path: str, metadata: dict[str, str]) -> None:
        """Main process only, after a model file (not a state folder) was written."""

    def on_epoch_end(self, run: Run) -> None: ...

    def on_train_end(self, run: Run) -> None: ...

    def extra_metadata(self, run: Run) -> dict[str, Any]:
        return {}

    def extra_step_logs(self, run: Run) -> dict[str, float]:
        return {}

    def planned_files(self, run: Run) -> list[str]:
        """Files that this hook will write, for the start page: names below the output folder, several of a kind as one line."""
        return []

    def written_files(self) -> list[str]:
        """Files and folders that it has written and not removed again, for the last lines of the log."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """What this hook needs to go on after a resume; tensors, numbers, texts, lists and dicts only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class HookList:
    """Calls every hook in order: `hooks.on_step_end(run, output)`."""

    def __init__(self, hooks: list[Hook]) -> None:
        self.hooks = list(hooks)

    def __iter__(self):
        return iter(self.hooks)

    def __getattr__(self, name: str):
        if not hasattr(Hook, name):
            raise AttributeError(name)

        def call_all(*args: Any) -> list[Any]:
            return [getattr(hook, name)(*args) for hook in self.hooks]

        return call_all

    def by_key(self) -> dict[str, Hook]:
        """Hooks by the name that their states have; a name that comes again gets the number of its place: `Losses 2`."""
        found: dict[str, Hook] = {}
        for hook in self.hooks:
            name = key = hook.state_key or type(hook).__name__
            number = 2
            while key in found:
                key, number = f"{name} {number}", number + 1
            found[key] = hook
        return found

    def find(self, hook_class: type) -> Any | None:
        return next((hook for hook in self.hooks if isinstance(hook, hook_class)), None)
