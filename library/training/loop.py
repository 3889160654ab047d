"""The one training loop. It knows no family, no adapter and no option: those live in the step, the hooks and the Run."""

from __future__ import annotations

import torch

from library.dataset.batch import Batch
from library.training.run import Run, StepOutput
from library.training.step import merge_outputs


def fit(run: Run) -> None:
    """Train from where `run.progress` stands to the last step, or to the step after which a signal was heard."""
    with run.stop.listening(run.runtime):
        run.hooks.on_train_start(run)
        progress = run.progress
        while not is_over(run):
            run.hooks.on_epoch_start(run)
            outputs: list[StepOutput] = []
            for batch in run.data.batches(progress.epoch, progress.step_in_epoch):
                run.hooks.on_step_start(run, batch)
                outputs.append(micro_step(run, batch))
                if batch.request.is_last_of_group:
                    update(run)
                    progress.advance()
                    run.hooks.on_post_optimizer_step(run)
                    run.stop.agree(run.runtime)
                    run.hooks.on_step_end(run, merge_outputs(outputs))
                    outputs = []
                    run.stop.agree(run.runtime)  # samples and files take their time
                    if is_over(run):
                        break
            if progress.step_in_epoch == progress.steps_per_epoch:
                run.hooks.on_epoch_end(run)
                progress.next_epoch()
        run.stop.settle()
        run.hooks.on_train_end(run)


def is_over(run: Run) -> bool:
    return run.progress.is_finished or run.stop.agreed is not None


def micro_step(run: Run, batch: Batch) -> StepOutput:
    """Forward and backward of one micro-batch; an empty one only counts."""
    output = run.step(batch.to(run.runtime.device))
    if len(batch):
        run.runtime.backward(output.loss)
    return output


def update(run: Run) -> None:
    """Sum gradients over ranks, clip, step the optimizer and, unless fp16 skipped it, the schedule."""
    parameters = trained_parameters(run.optimizer)
    run.runtime.reduce_gradients(parameters)
    if run.max_grad_norm:
        run.runtime.clip_gradients(parameters, run.max_grad_norm)
    else:
        run.runtime.unscale_gradients()
    run.hooks.on_gradients_ready(run)
    run.optimizer.step()
    if not getattr(run.optimizer, "step_was_skipped", False):
        run.lr_scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
