"""Options of the scripts that train something else than an adapter: what is refused, read, switched on, by the recorded
faults of known scripts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from library.core.errors import ConfigError
from library.dataset import CachingOptions
from library.families.registry import FAMILIES
from library.training import cli, parser_common, trainer_base
from tests.golden_dir import BEHAVIOUR_DIR, MissingFile, behaviour
from tests.runs.families import FamilyWork, Tinies, without
from tests.runs.test_whole_models import argv

FILE = "train_options.json"
SCRIPTS = {
    script.name: (family, trainable)
    for family, record in FAMILIES.items() if record.variant_of is None for trainable, script in record.scripts.items()
}
"""name of a script -> what it trains"""
TINY = {"sd": "sd1"}
"""family -> its tiny set, where that has another name"""
BY_ITSELF = re.compile(r"--\w+(?:, --\w+)*")
"""entries that name options and nothing else"""
WORKS_HERE = re.compile(r"\(ours: ")
"""refused there because the known tool cannot do it"""
WORKS_TOO = {
    ("--weighted_captions", "--cache_text_encoder_outputs"): "cached outputs are the weighted ones",
    ("--unsloth_offload_checkpointing", "--cpu_offload_checkpointing"): "two names of the same",
}
"""what else is refused there and works here"""
SERVES_HERE = {
    "fp8_base": "the denoiser that does not learn", "fused_optimizer_groups": "means the same as --fused_backward_pass",
    "mem_eff_attn": "every family computes attention in the way that is chosen", "xformers": "likewise",
    "sdpa": "likewise",
}
"""options that do nothing there, and something here"""
REFUSED_VALUE = {"save_model_as": "diffusers"}
"""options of which one value works in every script, and another is to be refused"""
TOLD_AT_RUN_TIME = {
    "textual_inversion": {"--token_string", "--weights"},
    "textual_inversion_xti": {"--token_string", "--weights"},
}
"""trainable -> options whose values need files of their own; tests of these trainables have them"""
COMBINED = {
    "--fused_backward_pass with --fused_optimizer_groups": ("--fused_backward_pass", "--fused_optimizer_groups=2"),
    "--fused_backward_pass with --blockwise_fused_optimizers": (
        "--fused_backward_pass", "--blockwise_fused_optimizers",
    ),
    "--block_lr with --learning_rate 0": ("--learning_rate=0", f"--block_lr={','.join(['1e-4'] * 23)}"),
    "--learning_rate_te1 or te2 without --train_text_encoder": ("--learning_rate_te1=1e-4",),
    "--learning_rate_te1/2/3 without --train_text_encoder": ("--learning_rate_te3=1e-4",),
    "--alpha_mask without masked_loss or an SNR option": ("--alpha_mask",),
    "--skip_cache_check for text encoder outputs": ("--skip_cache_check", "--cache_text_encoder_outputs_to_disk"),
    "--model_type chroma": (),  # a family of its own, with the same script
    "--learning_rate 0 with part rates": ("--learning_rate=0", "--mlp_lr=1e-4"),
    "--loss_type huber with the default schedule": ("--loss_type=huber",),
    "--loss_type huber --huber_schedule exponential": ("--loss_type=huber", "--huber_schedule=exponential"),
    "--stop_text_encoder_training N reached": ("--stop_text_encoder_training=1",),
    "no --attn_mode": (),
    "prior loss weights of a data set file": ("--prior_loss_weight=0.5",),
    "prior_loss_weight and sample weights": ("--prior_loss_weight=0.5",),
    "--loss_type huber, smooth_l1": ("--loss_type=huber",),
    "--multires_noise_iterations with --noise_offset": ("--multires_noise_iterations=6", "--noise_offset=0.1"),
}
"""entries in words -> a command that does what they tell"""
ELSEWHERE = {
    "--use_object_template with --use_style_template", "--init_word with more tokens than num_vectors_per_token",
    "captions without the token", "any",
}  # fmt: skip
"""about words that are learned: tests/runs/test_textual_inversion.py"""


def cases(kind: str) -> list[Any]:
    if not (BEHAVIOUR_DIR / FILE).exists():
        return [pytest.param("", MissingFile(BEHAVIOUR_DIR / FILE), id="missing")]
    return [
        pytest.param(script, case, id=f"{script}-{' '.join(case['options']) if kind != 'silent' else case['options']}")
        for script, entries in behaviour(FILE)["scripts"].items()
        for case in (entries[kind] if kind != "silent" else entries["ignored"] + entries["fails_in_peer"])
    ]


class Started(Exception):
    """All checks have passed."""


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Tinies:
    return Tinies(tmp_path_factory)


def command(script: str, work: FamilyWork) -> list[str]:
    """That trains in three steps; ControlNets with the pictures themselves as control pictures."""
    trainable = SCRIPTS[script][1]
    found = argv(work, trainable, "out")
    if "control_net" not in script:
        return found
    dataset = work.dataset(subset_keys=f"conditioning_data_dir = '{work.images}'", name="controlled.toml")
    return [*without(found, "dataset_config"), f"--dataset_config={dataset}"]


def told(script: str, words: list[str], tinies: Tinies, folder: Path, leave_out: tuple[str, ...] = ()) -> str:
    """What a start complains of; "" when all checks pass. No model is loaded."""
    family, trainable = SCRIPTS[script]
    work = tinies.work(TINY.get(family, family), folder)
    names = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
    given = without(command(script, work), *names, *leave_out)

    def stop(config: Any) -> Any:
        raise Started

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_base, "prepare_runtime", stop)
        try:
            cli.run(family, trainable, [*given, *words])
        except Started:
            return ""
        except ConfigError as error:
            return str(error)
        except SystemExit as error:  # by the parser: unknown here
            return f"the parser ended with {error.code}: {' '.join(words)}"
    raise AssertionError("nothing was trained, and nothing was told")


@pytest.mark.parametrize("script, case", cases("refused"))
def test_refused(script: str, case: dict[str, Any], tinies: Tinies, tmp_path: Path) -> None:
    """At start, with the option named; what only the known tool cannot do starts."""
    words = case["options"]
    assert script in SCRIPTS, f"there is no {script}.py"
    family, trainable = SCRIPTS[script]
    if {word.partition("=")[0] for word in words} & TOLD_AT_RUN_TIME.get(trainable, set()):
        pytest.skip("in the tests of new words: it needs files")
    if not words:  # without T5, of which the known trainer's own inference does without, its states are zeros
        message = told(script, [], tinies, tmp_path, ("clip_l", "clip_g"))
        assert "--clip_l is not given" in message and "--clip_g is not given" in message
        return
    message = told(script, words, tinies, tmp_path)
    what, names = parser_common.script(family, trainable), [word[2:] for word in words if word.startswith("--")]
    if tuple(words) in WORKS_TOO:
        assert message == ""
    elif WORKS_HERE.search(case["reason"]):
        assert message == "" or (trainable not in ("full", "dreambooth") and names[0] in message)
    elif all(what.status(name) == "ignored" for name in names):
        assert message == ""  # means nothing for the family: listed on the start page
    else:
        assert any(name in message for name in names), message


@pytest.mark.parametrize("script, case", cases("silent"))
def test_nothing_is_silently_without_effect(script: str, case: dict[str, Any], tinies: Tinies, tmp_path: Path) -> None:
    """What is to be honoured works; what is to be refused is refused, or listed with its reason, as all scripts do with
    options that mean nothing for their family."""
    text, right = case["options"], case["right"]
    assert script in SCRIPTS, f"there is no {script}.py"
    if text in ELSEWHERE:
        pytest.skip("in the tests of new words")
    if not BY_ITSELF.fullmatch(text):
        message = told(script, list(COMBINED[text]), tinies, tmp_path)
        assert bool(message) == (right == "refuse"), message
        return
    what = parser_common.script(*SCRIPTS[script])
    for name in re.findall(r"--(\w+)", text):
        if name not in what.owners:
            assert "refuse" in right, name  # told by the parser
            continue
        status = what.status(name)
        works = status in ("works", "equivalent")
        assert status == "works" or what.reason(name), f"--{name} is {status}, and nobody is told why"
        if name in REFUSED_VALUE:
            message = told(script, [f"--{name}={REFUSED_VALUE[name]}"], tinies, tmp_path)
            assert message or SCRIPTS[script][1] not in ("full", "dreambooth")
        elif not works:
            assert "refuse" in right, f"--{name} is {status}; wanted: {right}"
        elif status == "works" and "honour" not in right:
            assert name in SERVES_HERE, f"--{name} works; wanted: {right}"


@pytest.mark.parametrize("script, case", cases("implied"))
def test_implied(script: str, case: dict[str, Any], tinies: Tinies, tmp_path: Path) -> None:
    family, trainable = SCRIPTS[script]
    work = tinies.work(TINY.get(family, family), tmp_path)
    config = parser_common.parse([*command(script, work), *case["options"]], family, trainable)
    by_cache = {"cache_latents": "caches_latents", "cache_text_encoder_outputs": "caches_text"}
    if case["sets"] in by_cache:
        assert getattr(config[CachingOptions], by_cache[case["sets"]])
    else:
        assert config.value(case["sets"]) is True
