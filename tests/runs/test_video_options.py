"""Command lines as users of the known video trainer write them, on tiny models of each family: with all that saves memory and
chooses noise levels they train, and what saves memory alone changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs.conftest import largest_difference, losses_of
from tests.runs.families import Tinies

FAMILIES = ("hunyuan_video", "wan", "framepack")
SAVING = (
    "--sdpa --split_attn --gradient_checkpointing --gradient_checkpointing_cpu_offload --disable_numpy_memmap"
    " --use_pinned_memory_for_block_swap --block_swap_h2d_only --block_swap_ring_size=1 --img_in_txt_in_offloading"
    " --max_data_loader_n_workers=0"
)
COMPILING = "--compile --compile_backend=eager --compile_dynamic=auto --compile_cache_size_limit=32"
"""takes seconds, in one family"""
CHANGING = (
    "--mixed_precision=bf16 --fp8_base --fp8_scaled --timestep_sampling=shift --discrete_flow_shift=7.0 --guidance_scale=2"
    " --weighting_scheme=cosmap --min_timestep=300 --max_timestep=900 --preserve_distribution_shape"
    " --num_timestep_buckets=4 --lr_scheduler=rex --lr_warmup_steps=50% --save_precision=bf16"
)


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Tinies:
    return Tinies(tmp_path_factory)


@pytest.mark.parametrize("name", FAMILIES)
def test_options_of_the_known_scripts(name: str, tinies: Tinies, tmp_path: Path, capfd, caplog):
    work = tinies.work(name, tmp_path)
    plain = work.train("plain", "--max_train_steps=1")
    saving = [*SAVING.split(), *(COMPILING.split() if name == "wan" else ())]
    assert largest_difference(plain, work.train("saving", "--max_train_steps=1", *saving)) < 1e-4
    told = "".join(capfd.readouterr()) + caplog.text
    assert ("--img_in_txt_in_offloading: has no effect" in told) == (name != "hunyuan_video")
    losses = losses_of(work.train("changed", "--max_train_steps=1", *CHANGING.split()))
    assert all(0 < loss < 100 for loss in losses) and losses != losses_of(plain)
