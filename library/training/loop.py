"""The one training loop. It knows no family, no adapter and no option: those live in the step, the updater, the hooks
and the Run."""

from __future__ import annotations

from library.dataset.batch import Batch
from library.training.run import Run, StepOutput
from library.training.step import merge_outputs


def fit(run: Run) -> None:
    """Train from where `run.progress` stands to the last step, or to the step after which a signal was heard. Whatever
    is raised on the way, the updater is ended and every hook closed."""
    error: BaseException | None = None
    try:
        with run.stop.listening(run.runtime):
            _train(run)
    except BaseException as raised:
        error = raised
        raise
    finally:
        try:
            run.updater.end(run)
        finally:
            run.hooks.close(run, error)
            error = None  # it holds this frame, which holds it


def _train(run: Run) -> None:
    run.updater.begin(run)
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
        run.updater.backward(run, output.loss)
    return output


def update(run: Run) -> None:
    """The end of an optimizer step: the gradients of its micro-batches change the weights."""
    run.updater.update(run)
