"""Two processes train like one with twice the batch, started the ways people start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from library.dataset.plan import BucketList, plan_epoch, requests_of_epoch
from library.training import cli
from tests.forked import run_ranks
from tests.runs.conftest import Work, draw_pictures, fingerprint, largest_difference
from tests.waiting import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("noting_script.py")
BIN = Path(sys.executable).parent
OPTIONS = ["--max_train_epochs=2", "--optimizer_type=SGDNesterov", "--network_args", "rank_dropout=0.2"]
"""An optimizer that is linear in the gradient: Adam divides by the gradient's size and makes rounding errors of tiny
gradients as large as any other."""


def start(work: Work, out: str, launcher: list[str], *more: str, dataset: Path) -> subprocess.CompletedProcess[str]:
    notes = work.folder / f"notes-{out}"
    notes.mkdir()
    environment = {
        **os.environ, "NOTES": str(notes), "OMP_NUM_THREADS": "1", "MASTER_PORT": str(20000 + os.getpid() % 20000),
        "XDG_CACHE_HOME": str(work.folder / "cache"),
    }
    argv = [a for a in work.argv(out, *OPTIONS, *more, dataset=dataset) if not a.startswith("--console_log_level")]
    return subprocess.run(
        [*launcher, str(SCRIPT), *argv], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )


def train_in_two(work: Work, out: str, *more: str, dataset: Path) -> Path:
    """Two processes without a launcher; the written file."""
    argv = work.argv(out, *OPTIONS, *more, dataset=dataset)
    caches = {"XDG_CACHE_HOME": str(work.folder / "cache")}
    run_ranks(2, lambda: cli.run("flux", "network", argv), work.folder / f"told-{out}", caches)
    return work.folder / out / "lora.safetensors"


LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--main_process_port", str(20000 + os.getpid() % 20000),
    ],
}


@pytest.mark.parametrize("launcher", [
    pytest.param("torchrun", marks=pytest.mark.full),  # accelerate's command starts it
    "accelerate",
])  # fmt: skip
def test_two_processes_equal_one_with_twice_the_batch(work: Work, launcher: str) -> None:
    """Seven images in twos: the last global batch of four has three samples, so that the slices differ."""
    work.images = draw_pictures(work.folder / "square", 7)
    two = start(work, "two", LAUNCHERS[launcher], dataset=work.dataset(batch_size=2, name="two.toml"))
    assert two.returncode == 0, two.stderr
    assert "2 processes on cpu" in two.stderr
    one = work.train("one", *OPTIONS, dataset=work.dataset(batch_size=4, name="four.toml"))
    assert largest_difference(one, work.folder / "two" / "lora.safetensors") < 1e-5
    parts = [json.loads((work.folder / "notes-two" / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert all(parts), "both processes load images"
    for epoch in (1, 2):
        names = sorted(name for part in parts for e, name in part if e == epoch)
        assert names == [f"{i:02d}.png" for i in range(7)]


def test_a_process_without_images_and_a_resumed_run(work: Work) -> None:
    """Three images for two processes: one of them has none in the last batch. Resumed, the same bytes."""
    work.images = draw_pictures(work.folder / "square", 3)
    small, brief = work.dataset(batch_size=1, name="small.toml"), "--t5xxl_max_token_length=32"
    whole = train_in_two(work, "two", brief, "--save_every_n_steps=3", "--save_state", dataset=small)
    one = work.train("one", *OPTIONS, brief, dataset=work.dataset(batch_size=2, name="large.toml"))
    assert largest_difference(one, whole) < 1e-5
    state = whole.with_name("lora-step00000003-state")
    resumed = train_in_two(work, "resumed", brief, f"--resume={state}", dataset=small)
    assert fingerprint(resumed) == fingerprint(whole)


def test_caches_made_by_two_processes_are_whole(work: Work) -> None:
    caching = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--network_train_unet_only"]
    train_in_two(work, "two", *caching, dataset=work.dataset())
    assert len(list(work.images.glob("*_flux.npz"))) == len(list(work.images.glob("*_flux_te.npz"))) == 9


def test_the_summary_tells_that_plain_accelerate_starts_one_process(work: Work) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    done = start(work, "plain", launcher, dataset=work.dataset())
    assert done.returncode == 0, done.stderr
    assert "1 process on cpu" in done.stderr


def test_processes_that_do_not_find_each_other_are_an_error(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    from library.core.errors import TrainingError
    from library.training.accelerator_setup import _check_process_group

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="only 1 joined"):
        _check_process_group(1)


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_ranks_cut_every_epoch_without_loss(num_processes: int, accumulation: int) -> None:
    buckets = [
        BucketList(0, (64, 64), tuple(range(11)), 2), BucketList(0, (96, 64), (20, 21, 21, 22), 2),
        BucketList(1, (64, 64), (0,), 4),
    ]
    plan = plan_epoch(buckets, seed=3, epoch=4, num_processes=num_processes, accumulation=accumulation)
    ranks = [
        list(requests_of_epoch(plan, epoch=4, first_step=30, rank=rank, num_processes=num_processes))
        for rank in range(num_processes)
    ]
    assert len({len(requests) for requests in ranks}) == 1, "every rank joins every reduction"
    seen = sorted((r.dataset, item) for requests in ranks for r in requests for item in r.items)
    assert seen == sorted((b.dataset, item) for b in buckets for item in b.samples)
    micro = sum(-(-len(b.samples) // (b.batch_size * num_processes)) for b in buckets)
    assert len(plan) == -(-micro // accumulation)
    for step in {r.step for r in ranks[0]}:
        group = [r for requests in ranks for r in requests if r.step == step]
        positions = sorted(p for r in group for p in r.positions)
        assert positions == list(range(group[0].group_size))
        assert sum(r.is_last_of_group for r in group) == num_processes


def test_the_rest_of_an_epoch_is_the_same_from_any_step() -> None:
    plan = plan_epoch([BucketList(0, (64, 64), tuple(range(13)), 2)], seed=1, epoch=2, num_processes=1, accumulation=2)
    whole = list(requests_of_epoch(plan, epoch=2, first_step=10, rank=0, num_processes=1))
    for start_step in range(len(plan)):
        rest = list(requests_of_epoch(plan, epoch=2, first_step=10, rank=0, num_processes=1, start=start_step))
        assert rest == whole[-len(rest):]
