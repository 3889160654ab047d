"""A run that is killed or interrupted leaves whole files, and what it resumes to is what it would have been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.runs.conftest import Stopped, Work, draw_pictures, fingerprint, stop_after
from tests.waiting import PATIENCE, wait_until

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("held_script.py")
SAVING = ["--save_every_n_steps=1", "--save_state"]
LONG = "--max_train_steps=10"
BRIEF = "--t5xxl_max_token_length=32"
"""most of the time of such a small model goes into padding"""


def start_held(work: Work, out: str, step: int, *more: str, dataset: Path) -> subprocess.Popen[str]:
    """A run that stands before a step, with all files of the steps before, in a process group of its own as a terminal
    gives it.

    It goes on when there is a file `go` in the folder of the test.
    """
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *work.argv(out, LONG, BRIEF, *SAVING, *more, dataset=dataset)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HOLD_AT": str(step), "HOLD_FOLDER": str(work.folder)}, cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    wait_until((work.folder / "held").exists, process)
    return process


def assert_only_whole_files(folder: Path) -> None:
    """No rest of a file that was being written; every weight file can be read."""
    assert not [path for path in folder.rglob("*") if "tmp" in path.name]
    for path in folder.rglob("*.safetensors"):
        load_file(path)


def test_killed_and_resumed_with_another_number_of_workers(work: Work) -> None:
    """What stands on the disk when a run dies is whole and goes on."""
    data, out = work.dataset(subset_keys="flip_aug = true\nshuffle_caption = true"), work.folder / "parts"
    process = start_held(work, "parts", 7, "--max_data_loader_n_workers=2", dataset=data)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    for path in out.glob("*.safetensors"):
        load_file(path)
    newest = max(out.glob("lora-step*-state"))
    # that of step 7 may have been on its way
    assert newest.name in ("lora-step00000006-state", "lora-step00000007-state")
    resumed = work.train("parts", LONG, BRIEF, f"--resume={newest}", dataset=data)
    assert fingerprint(resumed) == fingerprint(work.train("whole", LONG, BRIEF, dataset=data))


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_to_all_processes_of_a_run(work: Work, number: int, code: int) -> None:
    """Ctrl-C and many job systems reach the loader workers too, which the run still needs for the step that it
    finishes."""
    data = work.dataset()
    process = start_held(work, "out", 3, "--max_data_loader_n_workers=2", "--no-save_state", dataset=data)
    os.killpg(process.pid, number)
    (work.folder / "go").touch()
    told = process.communicate(timeout=PATIENCE)[1]
    state = work.folder / "out" / "lora-step00000004-state"
    assert process.returncode == code, told
    assert "interrupted after step 4 of 10" in told and f"--resume {state}" in told and "Traceback" not in told
    assert_only_whole_files(work.folder)
    assert [path.name for path in state.parent.glob("*-state")] == [state.name]


def several_datasets(work: Work) -> Path:
    """Two resolutions and batch sizes, repeats, regularisation images."""
    other, reg = draw_pictures(work.folder / "other", 7), draw_pictures(work.folder / "reg", 4)
    return work.dataset(
        subset_keys=f"shuffle_caption = true\n[[datasets.subsets]]\nimage_dir = '{reg}'\nis_reg = true\nclass_tokens = 'cat'\n"
        "[[datasets]]\nresolution = [96, 64]\nbatch_size = 3\nenable_bucket = false\nnetwork_multiplier = 0.5\n"
        f"[[datasets.subsets]]\nimage_dir = '{other}'\nflip_aug = true\nnum_repeats = 2"
    )


def changed_pixels(work: Work) -> Path:
    """Every draw about pixels, without caches."""
    return work.dataset(subset_keys="color_aug = true\nrandom_crop = true\nflip_aug = true")


def changed_captions(work: Work) -> Path:
    """Settings that depend on the epoch and on the share of the run that is done."""
    return work.dataset(
        subset_keys="token_warmup_min = 1\ntoken_warmup_step = 0.8\nshuffle_caption = true\ncaption_dropout_every_n_epochs = 2\n"
        "caption_tag_dropout_rate = 0.3\nenable_wildcard = true"
    )


def masked(work: Work) -> Path:
    """The pictures themselves serve as masks."""
    return work.dataset(subset_keys=f"conditioning_data_dir = '{work.images}'\nflip_aug = true")


def dropped_from_cache(work: Work) -> Path:
    return work.dataset(subset_keys="caption_dropout_every_n_epochs = 2\ncaption_dropout_rate = 0.2\nflip_aug = true")


VARIANTS = {
    "both text encoders": (changed_captions, ["--gradient_checkpointing", "--network_args", "train_t5xxl=True", "module_dropout=0.1"]),
    "several datasets": (several_datasets, ["--gradient_accumulation_steps=3", "--prior_loss_weight=0.3"]),
    "pixels": (
        changed_pixels,
        ["--mixed_precision=bf16", "--full_bf16", "--optimizer_type=RMSprop", "--lr_scheduler_type=CosineAnnealingLR", "--lr_scheduler_args", "T_max=7"],
    ),
    "masks": (masked, ["--masked_loss", "--cache_latents", "--cache_text_encoder_outputs"]),
    "caches": (dropped_from_cache, ["--cache_latents", "--cache_text_encoder_outputs_to_disk", "--network_train_unet_only"]),
    "ggpo": (changed_captions, ["--scale_weight_norms=0.5", "--network_args", "ggpo_sigma=0.03", "ggpo_beta=0.01", "loraplus_lr_ratio=4"]),
    "lycoris": (
        changed_captions,
        ["--network_module=lycoris.kohya", "--network_args", "algo=loha", "dropout=0.3", "rank_dropout=0.2", "module_dropout=0.2"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_resumed_with_everything_that_draws(work: Work, name: str) -> None:
    """The stopped run also samples, validates and logs; the resumed one reads with another number of workers."""
    data_of, options = VARIANTS[name][0], [BRIEF, "--max_train_steps=6", *VARIANTS[name][1]]
    data = data_of(work)
    (work.folder / "prompts.txt").write_text("a red cat --w 64 --h 64 --s 1", encoding="utf-8")
    around = [
        f"--sample_prompts={work.folder / 'prompts.txt'}",
        "--sample_every_n_steps=2",
        f"--logging_dir={work.folder / 'log'}",
    ]
    whole = work.train("whole", *options, dataset=data)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            work.train("parts", *options, *SAVING, *around, dataset=data)
    state = work.folder / "parts" / "lora-step00000002-state"
    resumed = work.train("parts", *options, "--max_data_loader_n_workers=1", f"--resume={state}", dataset=data)
    assert fingerprint(resumed) == fingerprint(whole)


def test_steps_that_fp16_leaves_out(work: Work, scaled: list[bool]) -> None:
    """A gradient that overflows spoils neither the weights nor what GGPO keeps of gradients; the factor is resumed
    too."""
    options = ["--mixed_precision=fp16", "--lr_scheduler=cosine", "--network_args", "ggpo_sigma=0.03", "ggpo_beta=0.01"]
    whole = work.train("whole", *options, *SAVING)
    assert any(scaled) and not all(scaled)
    (work.folder / "resumed").mkdir()
    left_out = scaled.index(True) + 1
    resumed = work.train("resumed", *options, f"--resume={work.folder / 'whole' / f'lora-step{left_out:08d}-state'}")
    assert fingerprint(resumed) == fingerprint(whole)


def test_ggpo_reads_gradients_of_their_true_size(work: Work, scaled: list[bool]) -> None:
    """Without clipping nobody else takes the factor off."""
    options = [
        "--mixed_precision=fp16",
        "--max_train_steps=1",
        "--save_state",
        "--network_args",
        "ggpo_sigma=0.03",
        "ggpo_beta=0.01",
    ]
    norms = []
    for name, limit in (("clipped", "1e9"), ("unclipped", "0")):
        work.train(name, *options, f"--max_grad_norm={limit}")
        hooks = torch.load(work.folder / name / "lora-state" / "hooks.bin", weights_only=True)
        norms.append(hooks["NetworkHook"])
    assert str(norms[0]) == str(norms[1])
