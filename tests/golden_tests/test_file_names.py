"""Names, removal and resuming against the reference file file_names.json."""

from __future__ import annotations

import pytest

from library.core.errors import ConfigError
from library.core.options import option_fields
from library.training import checkpoint
from library.training.checkpoint import CheckpointNames, SaveRules
from library.training.option_groups import ResumeOptions, SavingOptions
from tests.golden_dir import behaviour_cases

FILE = "file_names.json"


def saving_options(options) -> SavingOptions:
    return SavingOptions(**{key: value for key, value in options.items() if key in option_fields(SavingOptions)})


def events_of(case):
    """Plays the run: (label, written names, removed names) of every occasion, and what is left in the folder."""
    total, per_epoch = case["options"]["max_train_steps"], case["options"]["steps_per_epoch"]
    rules = SaveRules(saving_options(case["options"]), -(-total // per_epoch))
    assert rules.num_epochs == case["epochs"]
    savings = []
    for step in range(1, total + 1):
        savings.append((f"step {step}", rules.after_step(step)))
        if step % per_epoch == 0 or step == total:
            epoch = -(-step // per_epoch)
            savings.append((f"epoch {epoch}", rules.after_epoch(epoch)))
    savings.append(("end", rules.at_end(total)))
    folder, events = set(), []
    for label, saving in savings:
        if saving is None:
            continue
        written = {saving.file} | ({saving.state + "/"} if saving.state else set())
        folder |= written
        removed = folder & (set(saving.remove) | {name + "/" for name in saving.remove_states})
        folder -= removed
        events.append({"at": label, "write": sorted(written), "remove": sorted(removed)})
    return events, sorted(folder)


@pytest.mark.parametrize("case", behaviour_cases(FILE))
def test_names_of_a_run(case):
    events, left = events_of(case)
    assert events == [
        {**event, "write": sorted(event["write"]), "remove": sorted(event["remove"])} for event in case["events"]
    ]
    assert left == sorted(case["left"])


@pytest.mark.parametrize("case", behaviour_cases(FILE, "resume"))
def test_resume(case):
    steps_per_epoch = checkpoint.steps_of_epoch(case["batches_per_epoch"], case["gradient_accumulation_steps"])

    def point():
        return checkpoint.resume_point(
            ResumeOptions(**case["options"]), case["train_state"], steps_per_epoch=steps_per_epoch,
            accumulation=case["gradient_accumulation_steps"], max_train_steps=case["max_train_steps"],
        )

    if "error" in case:
        with pytest.raises(ConfigError) as error:
            point()
        assert any(name in str(error.value) for name in ("max_train_steps", *case["options"]))
        return
    expected = case["expected"]
    found = {
        **vars(point()),
        "steps_per_epoch": steps_per_epoch,
        "num_epochs": -(-case["max_train_steps"] // steps_per_epoch),
    }
    names = CheckpointNames("lora")
    found["next_step_file"] = names.file(names.step(found["global_step"] + 1))
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("case", behaviour_cases(FILE, "train_state"))
def test_train_state(case):
    step = int(case["when"].removeprefix("after step "))
    assert checkpoint.train_state(step, case["steps_per_epoch"]) == case["train_state"]


@pytest.mark.parametrize("case", behaviour_cases(FILE, "errors"))
def test_errors(case):
    with pytest.raises(ConfigError) as error:
        SavingOptions(**case["options"])
    assert any(name in str(error.value) for name in case["options"])
