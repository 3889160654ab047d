"""A step on a device makes the host wait for nothing. A stand-in for one counts: tests/host_waits.py."""

from __future__ import annotations

import dataclasses
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image

from library.training.hooks.losses import LossReader
from library.training.hooks.sample import SampleHook
from library.training.loop import micro_step, update
from library.training.run import Run
from tests.families import CASES, FamilyCase, marks_of
from tests.host_waits import HostWaits, imitate, move_run
from tests.runs.conftest import draw_pictures
from tests.runs.families import Tinies

DROPOUTS = ["--network_dropout=0.2", "--network_args", "rank_dropout=0.2", "module_dropout=0.2"]
NOISE = ["--ip_noise_gamma=0.1", "--ip_noise_gamma_random_strength"]
DDPM_NOISE = [*NOISE, "--noise_offset=0.1", "--adaptive_noise_scale=0.1", "--multires_noise_iterations=3"]


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Tinies:
    return Tinies(tmp_path_factory)


def options_of(case: FamilyCase, kind: str) -> list[str]:
    """`cached`: all that makes draws of its own beside; `live`: text encoders and VAE in the step."""
    noise = DDPM_NOISE if case.family in ("sd", "sdxl") else NOISE
    if kind == "live":
        return [*case.text_options]
    return [*case.caches(on_disk=False), "--gradient_checkpointing", "--ema", "--ema_on_cpu", *noise, *DROPOUTS]


def waits_of_second_step(run: Run) -> Counter[str]:
    """The first step makes tables that stay, once for each size of pictures."""
    move_run(run)
    run.updater.begin(run)
    with HostWaits():
        run.hooks.on_train_start(run)
    run.hooks.find(LossReader).every = 1000
    for number, batch in enumerate(run.data.batches(1)):
        with HostWaits() if number == 1 else nullcontext() as waits:
            run.hooks.on_step_start(run, batch)
            output = micro_step(run, batch)
            update(run)
            run.progress.advance()
            run.hooks.on_post_optimizer_step(run)
            run.hooks.on_step_end(run, output)
        if number == 1:
            break
    return waits.places


LIVE_FIRST = ("sdxl", "sd3", "anima", "lumina", "framepack")
"""families of whose two kinds of runs the live one is tested by default, and the cached one of the others"""
KINDS = [
    pytest.param(
        name, kind,
        marks=marks_of(name) or ([] if (name in LIVE_FIRST) == (kind == "live") else [pytest.mark.full]),
    )
    for name in CASES
    for kind in ("cached", "live")
]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_step_waits_for_nothing(
    name: str, kind: str, tinies: Tinies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tinies.work(name, tmp_path)
    run = work.prepare("out", *options_of(work.case, kind))
    imitate(monkeypatch)
    assert not waits_of_second_step(run)


@pytest.mark.parametrize("name", ["flux", "wan", *(pytest.param(n, marks=pytest.mark.full) for n in (
    "chroma", "sd3", "lumina", "anima", "hunyuan_image", "hunyuan_video"
))])  # fmt: skip
def test_nor_does_a_step_of_a_pack(
    name: str, tinies: Tinies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second pack has the sizes of the first."""
    work = tinies.work(name, tmp_path)
    work.images = draw_pictures(tmp_path / "mixed", 8)
    for number in (1, 2, 5, 6):
        with Image.open(work.images / f"{number:02d}.png") as picture:
            picture.resize((128, 64)).save(work.images / f"{number:02d}.png")
    caches = work.case.caches(on_disk=False)
    keys = "bucket_no_upscale = true"
    cut = ("--apply_t5_attn_mask", "--navit_text_trim_padding") if name == "flux" else ()
    packing = ("--navit_packing", "--navit_max_images_per_pack=4", *cut)
    run = work.prepare("out", *caches, *packing, dataset=work.dataset(dataset_keys=keys))
    assert all(len(batch.parts) == 2 for batch in run.data.batches(1))
    imitate(monkeypatch)
    assert not waits_of_second_step(run)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_torch_sees_no_waiting_on_a_gpu(name: str, kind: str, tinies: Tinies, tmp_path: Path) -> None:
    work = tinies.work(name, tmp_path)
    run = work.prepare("out", *options_of(work.case, kind))
    run.updater.begin(run)
    run.hooks.on_train_start(run)
    run.hooks.find(LossReader).every = 1000
    batches = list(run.data.batches(1))[:2]
    for batch in batches:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if batch is batches[1] else "default")
        try:
            micro_step(run, batch)
            update(run)
        finally:
            torch.cuda.set_sync_debug_mode("default")


OWN_STEPS = ("flux", "sd1", "hunyuan_image", "framepack")
"""families whose steps of a sample are not those of another one here"""
OF_SAMPLES = [pytest.param(name, marks=[] if name in OWN_STEPS else [pytest.mark.full]) for name in CASES]


@pytest.mark.parametrize("name", OF_SAMPLES)
def test_steps_of_a_sample_wait_for_nothing_and_bring_nothing(
    name: str, tinies: Tinies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a picture needs is brought once, however many steps it takes; but for the time of a step, which U-Nets read
    on the CPU, too."""
    work = tinies.work(name, tmp_path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"a cat --w 64 --h 64 --l 4 --d 3 --n a dog{work.case.letters(work.images)}\n", encoding="utf-8")
    run = work.prepare("out", f"--sample_prompts={prompts}", "--sample_every_n_steps=9", *work.case.text_options)
    hook = run.hooks.find(SampleHook)
    prompt = hook._complete(run, 0)
    texts = [hook.conditioning[key] for key in (prompt.prompt, run.strategies.negative_key(prompt.negative_prompt))]
    imitate(monkeypatch)
    move_run(run)
    counted = []
    for steps in (2, 2, 3):
        pipeline = run.family.pipeline(run.models)
        monkeypatch.setattr(type(pipeline), "frames", lambda self, latents: [None])
        with HostWaits() as waits:
            pipeline.sample(dataclasses.replace(prompt, sample_steps=steps), *texts)
        counted.append(waits.places + waits.queued)
    more = counted[2] - counted[1]
    assert not [place for place in more if "unet_models.py" not in place], more
    assert sum(more.values()) <= 2, "at most one for each of two texts"
