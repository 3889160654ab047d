"""What every script of whole models does with data, processes and steps; families take part by their records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from library.safetensors_utils import load_safetensors
from library.training import cli
from tests.families import CASES
from tests.forked import run_ranks
from tests.runs.conftest import losses_of
from tests.runs.families import FamilyWork, Tinies, without
from tests.runs.test_whole_models import CELLS, TEXT, argv, changed, side_files

EXACT = ("--optimizer_type=SGD", "--learning_rate=1e-2", "--max_grad_norm=0", "--max_train_steps=2")
"""an optimizer that takes differences of rounding as they are"""
ONE_EACH = list({CASES[cell.values[0]].family: cell for cell in reversed(CELLS)}.values())
"""a script of each family"""


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Tinies:
    return Tinies(tmp_path_factory)


def run(work: FamilyWork, trainable: str, out: str, *more: str, dataset: Path | None = None) -> Path:
    words = argv(work, trainable, out, *more)
    if dataset is not None:
        words = [*without(words, "dataset_config"), f"--dataset_config={dataset}"]
    cli.run(work.case.family, trainable, words)
    return work.folder / out / "lora.safetensors"


def text_options(work: FamilyWork, trainable: str) -> Sequence[str]:
    return TEXT.get(work.case.family, ()) if trainable == "full" else ()


def dataset_of(work: FamilyWork, trainable: str, batch_size: int) -> Path:
    """That of the script, with batches of this size."""
    given = next(word for word in argv(work, trainable, "out") if word.startswith("--dataset_config="))
    text = Path(given.partition("=")[2]).read_text(encoding="utf-8")
    path = work.folder / f"batches_of_{batch_size}.toml"
    path.write_text(text.replace("batch_size = 2", f"batch_size = {batch_size}"), encoding="utf-8")
    return path


def far(base: Path, one: Path, other: Path) -> float:
    """The difference of two trained models, relative to how far one went from the base."""
    start, left, right = (load_safetensors(path) for path in (base, one, other))
    shared = [key for key in left if key in start and start[key].is_floating_point()]
    moved = sum((left[key].double() - start[key].double()).square().sum() for key in shared)
    apart = sum((left[key].double() - right[key].double()).square().sum() for key in shared)
    assert moved > 0
    return float((apart / moved) ** 0.5)


def base_of(work: FamilyWork) -> Path:
    """The file of the denoiser that runs begin with."""
    word = next(word for word in work.tiny.arguments() if word.startswith("--pretrained_model_name_or_path="))
    return Path(word.partition("=")[2])


@pytest.mark.parametrize("name, trainable", CELLS)
def test_the_loss_falls(name: str, trainable: str, tinies: Tinies, tmp_path: Path) -> None:
    """The same pictures at one noise level again and again."""
    work = tinies.work(name, tmp_path)
    words = ["--max_train_steps=16", "--min_timestep=500", "--max_timestep=501", "--learning_rate=3e-3"]
    losses = losses_of(run(work, trainable, "out", *words, "--cache_latents"))
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


@pytest.mark.parametrize("name, trainable", ONE_EACH)
def test_accumulated_batches_train_like_one(name: str, trainable: str, tinies: Tinies, tmp_path: Path) -> None:
    work = tinies.work(name, tmp_path)
    more = (*EXACT, *text_options(work, trainable))
    one = run(work, trainable, "one", *more, dataset=dataset_of(work, trainable, 2))
    two = run(work, trainable, "two", *more, "--gradient_accumulation_steps=2", dataset=dataset_of(work, trainable, 1))
    assert far(base_of(work), one, two) < 1e-4


@pytest.mark.parametrize("name, trainable", [("sd1", "dreambooth"), ("flux", "full")])
def test_two_processes_train_like_one(name: str, trainable: str, tinies: Tinies, tmp_path: Path) -> None:
    work = tinies.work(name, tmp_path)
    one = run(work, trainable, "one", *EXACT, dataset=dataset_of(work, trainable, 2))
    dataset = dataset_of(work, trainable, 1)
    run_ranks(2, lambda: run(work, trainable, "two", *EXACT, dataset=dataset), tmp_path / "notes")
    assert far(base_of(work), one, work.folder / "two" / "lora.safetensors") < 1e-4


@pytest.mark.parametrize("name, trainable", [("sd1", "dreambooth"), ("sdxl", "full")])
def test_weights_in_captions_count(name: str, trainable: str, tinies: Tinies, tmp_path: Path) -> None:
    """A weight of 1 is none, a heavier word trains another model."""
    work = tinies.work(name, tmp_path)
    found = {}
    for which, text in {"plain": "a red cat", "even": "a (red:1.0) cat", "heavy": "a (red:1.8) cat"}.items():
        for path in work.images.glob("*.txt"):
            path.write_text(text, encoding="utf-8")
        found[which] = run(work, trainable, which, *EXACT, "--weighted_captions")
    assert far(base_of(work), found["plain"], found["even"]) < 1e-5 < far(base_of(work), found["plain"], found["heavy"])


@pytest.mark.parametrize("name, trainable", [cell for cell in CELLS if cell.values[0] in ("sd1", "sd3")])
def test_text_encoders_stop(name: str, trainable: str, tinies: Tinies, tmp_path: Path) -> None:
    """After the step that is given they keep their bytes, and the denoiser learns on."""
    work = tinies.work(name, tmp_path)
    words = ["--stop_text_encoder_training=1", "--save_every_n_steps=1"]
    last = run(work, trainable, "out", *text_options(work, trainable), *words)
    first = last.with_name("lora-step00000001.safetensors")
    moved = changed(first, last)
    assert moved and all(key.startswith("model.diffusion_model.") for key in moved)
    for earlier, later in zip(side_files(first), side_files(last), strict=True):
        assert changed(Path(earlier.partition("=")[2]), Path(later.partition("=")[2])) == set()


def test_masks_leave_out_what_is_black(tinies: Tinies, tmp_path: Path) -> None:
    """With a mask that is black everywhere nothing is learned; half of a picture trains another model than all."""
    import numpy as np
    from PIL import Image

    work = tinies.work("sd1", tmp_path)
    found = {}
    for which, rows in (("none", 0), ("half", 32), ("whole", 64)):
        for number, path in enumerate(sorted(work.images.glob("*.png"))):
            picture = np.random.RandomState(number).randint(0, 255, (64, 64, 4), dtype=np.uint8)
            picture[:, :, 3] = 0
            picture[:rows, :, 3] = 255
            Image.fromarray(picture).save(path)
        found[which] = run(work, "dreambooth", which, *EXACT, "--alpha_mask")
    assert changed(base_of(work), found["none"]) == set()
    assert far(base_of(work), found["whole"], found["half"]) > 0.1
