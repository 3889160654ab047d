"""Hooks replace parts of the step without touching the loop; families hand side outputs to them."""

from __future__ import annotations

import dataclasses

import pytest

from library.core.errors import ConfigError, TrainingError
from library.training.hooks.base import Hook
from library.training.loop import fit
from library.training.run import StepOutput
from library.training.wiring.flux import FluxFamily
from tests.runs.conftest import Work, read_parts


class SideOutput(FluxFamily):
    """A family that returns more than a prediction."""

    def predict(self, models, sample, conditioning, batch, **inputs):
        output = super().predict(models, sample, conditioning, batch, **inputs)
        return dataclasses.replace(output, extra={"features": output.pred.mean(dim=(2, 3))})


class FeatureLoss(Hook):
    """Adds a term on the side output, and tells the log."""

    def compute_loss(self, step, output, sample, batch):
        per_sample, logs = type(step).compute_loss(step, output, sample, batch)
        features = output.extra["features"].square().mean(dim=1)  # [B]
        return per_sample + features, {**logs, "loss/features": features.detach().mean()}


def test_a_hook_replaces_the_loss_and_sees_side_outputs(work: Work) -> None:
    logs: list[dict] = []

    class Noting(Hook):
        def on_step_end(self, run, output: StepOutput) -> None:
            logs.append(output.logs)

    work.trainer("out", "--max_train_steps=2", hooks=[FeatureLoss(), Noting()], family=SideOutput).run()
    assert len(logs) == 2 and all("loss/features" in entry for entry in logs)
    plain = work.train("plain", "--max_train_steps=2")
    assert read_parts(plain)[1] != read_parts(work.folder / "out" / "lora.safetensors")[1]


def test_a_hook_replaces_the_whole_body(work: Work) -> None:
    class Constant(Hook):
        def process_batch(self, step, batch, times):
            parameters = [p for module in step.trainable.modules().values() for p in module.parameters()]
            loss = sum(p.square().sum() for p in parameters)
            return StepOutput(loss / batch.request.group_size, loss.detach(), len(batch))

    run = work.trainer(
        "out", "--max_train_steps=5", "--optimizer_type=SGD", "--learning_rate=0.1", hooks=[Constant()]
    ).prepare()
    network = run.trainable.modules()["network"]
    before = sum(p.square().sum().item() for p in network.parameters())
    fit(run)
    assert sum(p.square().sum().item() for p in network.parameters()) < before


@pytest.mark.parametrize(
    "name, found, told",
    [
        ("compute_loss", lambda *a: None, r"compute_loss of a hook gave a NoneType; needed: \(losses, values"),
        ("compute_loss", lambda self, step, output, *a: output.pred.mean(), r"gave a tensor \[\]; needed: \(losses"),
        ("compute_loss", lambda self, step, output, *a: (output.pred.mean(), {}), r"losses of the shape \[\]; needed"),
        ("process_batch", lambda *a: None, "process_batch of a hook gave a NoneType; needed: a StepOutput"),
    ],
)
def test_what_a_replacement_gives_is_looked_at(work: Work, name: str, found, told: str) -> None:
    """A mean in the place of one loss for each sample would be divided by the number of samples once more."""
    hook = type("Own", (Hook,), {name: found})()
    with pytest.raises(TrainingError, match=told):
        work.trainer("out", "--max_train_steps=1", hooks=[hook]).run()


@pytest.mark.parametrize("name", ["compute_loss", "process_batch"])
def test_two_hooks_that_replace_the_same_part_are_refused(work: Work, name: str) -> None:
    first, second = (type(f"Hook{i}", (Hook,), {name: lambda self, *a: None})() for i in (1, 2))
    with pytest.raises(ConfigError, match=f"Hook1, Hook2 all replace {name}"):
        work.trainer("out", hooks=[first, second]).prepare()


def test_hooks_are_called_in_the_order_that_the_documentation_gives(work: Work) -> None:
    calls: list[str] = []
    names = [
        "on_transformer_loaded", "on_train_start", "on_epoch_start", "on_step_start", "on_gradients_ready",
        "on_post_optimizer_step", "on_step_end", "on_post_save", "on_epoch_end", "on_train_end",
    ]  # fmt: skip
    noting = type(
        "Noting", (Hook,), {name: (lambda name: lambda self, *a: calls.append(name))(name) for name in names}
    )()
    work.trainer(
        "out", "--max_train_epochs=1", "--gradient_accumulation_steps=3", "--save_every_n_steps=2", hooks=[noting]
    ).run()
    step = ["on_step_start"] * 3 + ["on_gradients_ready", "on_post_optimizer_step", "on_step_end"]
    short = ["on_step_start"] * 2 + ["on_gradients_ready", "on_post_optimizer_step", "on_step_end"]
    expected = [
        "on_transformer_loaded", "on_train_start", "on_epoch_start", *step, *short, "on_post_save", "on_epoch_end",
        "on_train_end", "on_post_save",
    ]  # fmt: skip
    assert sorted(calls) == sorted(expected)
    assert [c for c in calls if c != "on_step_start"][:3] == expected[:3]
    assert calls[-1] == "on_post_save" and calls.index("on_gradients_ready") < calls.index(
        "on_post_optimizer_step"
    ) < calls.index("on_step_end")
