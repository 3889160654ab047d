"""InfoNoise through the command line: it begins, a resumed run goes on to the byte, two processes count as one, and what
does not go with it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.training.hooks.info_noise import InfoNoiseHook
from library.training.loop import fit
from tests.runs.conftest import Work, draw_pictures, fingerprint, largest_difference
from tests.runs.families import Tinies, refused_run
from tests.runs.test_exactness import Stopped, stop_after
from tests.runs.test_processes import OPTIONS as OF_PROCESSES
from tests.runs.test_processes import train_in_two

NARROW = ("--min_timestep=300", "--max_timestep=700")
OPTIONS = (
    "--infonoise_enabled", "--infonoise_N_warm=10", "--infonoise_M=10", "--infonoise_K=16", "--infonoise_N_min=1",
    *NARROW,
)  # fmt: skip


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Tinies:
    return Tinies(tmp_path_factory)


def test_a_resumed_run_writes_the_same_bytes(work: Work) -> None:
    """Resumed before the density is there, and after."""
    whole = work.train("whole", *OPTIONS, "--max_train_steps=24")
    assert fingerprint(whole) != fingerprint(work.train("plain", *NARROW, "--max_train_steps=24"))
    for after in (7, 15):
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, after)
            with pytest.raises(Stopped):
                work.train("parts", *OPTIONS, "--max_train_steps=24", f"--save_every_n_steps={after}", "--save_state")
        state = work.folder / "parts" / f"lora-step{after:08d}-state"
        final = work.train("parts", *OPTIONS, "--max_train_steps=24", f"--resume={state}")
        assert fingerprint(final) == fingerprint(whole)


def test_two_processes_have_the_density_of_one(work: Work) -> None:
    """Also with a last batch whose slices differ."""
    work.images = draw_pictures(work.folder / "square", 7)
    more = (*OPTIONS, "--max_train_epochs=8")
    one = work.train("one", *OF_PROCESSES, *more, dataset=work.dataset(batch_size=4))
    two = train_in_two(work, "two", *more, dataset=work.dataset(2, name="two.toml"))
    assert largest_difference(two, one) < 1e-5
    plain = work.train("plain", *OF_PROCESSES, *NARROW, "--max_train_epochs=8", dataset=work.dataset(batch_size=4))
    assert largest_difference(plain, one) > 1e-4  # the density was drawn from


@pytest.mark.parametrize("family", ["sd", pytest.param("wan", marks=pytest.mark.full), "anima"])
def test_other_families_have_it(tinies: Tinies, tmp_path: Path, family: str) -> None:
    """The numbers of the log say whether it has begun."""
    run = tinies.work(family, tmp_path).prepare("out", *OPTIONS, "--max_train_steps=12")
    hook = run.hooks.find(InfoNoiseHook)
    fit(run)
    assert hook.info.is_ready and hook.info.renewals == 1
    assert hook.extra_step_logs(run) == {"infonoise/cdf_ready": 1.0, "infonoise/refresh_degraded_count": 0.0}
    drawn = run.step.timestep_sampler.sample((64, 4, 8, 8), run.step.draws_of(next(iter(run.data.batches(1))), None))
    assert torch.isfinite(drawn).all()


def test_what_does_not_go_with_it_is_refused_at_once(
    tinies: Tinies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    work = tinies.work("anima", tmp_path)
    told = refused_run(
        "anima",
        work.argv("out", "--infonoise_enabled", "--loss_type=huber", "--weighting_scheme=cosmap", "--num_timestep_buckets=4"),
        monkeypatch, capsys,
    )  # fmt: skip
    for part in ("--loss_type is huber", "--weighting_scheme is cosmap", "--num_timestep_buckets is 4"):
        assert part in told
    told = refused_run(
        "sd", tinies.work("sd", tmp_path / "sd").argv(
            "out", "--infonoise_enabled", "--min_snr_gamma=5", "--noise_offset=0.1", "--loss_weighting=cosmap",
        ),
        monkeypatch, capsys,
    )  # fmt: skip
    for part in ("--min_snr_gamma is 5.0", "--noise_offset is 0.1", "--loss_weighting is cosmap"):
        assert part in told
