"""A full or read-only disk: one message with the file, what is kept and how to go on; curves, logs and samples cost no
run.

Disks are small file systems where this may mount them, else the system's error is raised by a writer that fails.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from library.core.atomic_file import atomic_folder, atomic_path, write_text_atomically
from library.core.errors import AtelierError
from library.core.write_errors import WriteError
from library.dataset.npz_file import write_arrays
from library.generation.script import write_picture
from library.safetensors_utils import save_file_atomic
from library.training import cli
from networks.files.network_files import write_adapter_file
from tests.runs.conftest import Work

BRIEF = "--t5xxl_max_token_length=32"
pytestmark = pytest.mark.usefixtures("drawn_curves")
KILOBYTES = 256


@pytest.fixture(params=["full", "read-only"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A small file system: full but for some bytes, or read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None or subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={KILOBYTES}k", "tmpfs", str(folder)], capture_output=True, check=False
    ).returncode:
        pytest.skip("no file system can be mounted here (needs root)")
    try:
        (folder / "earlier").write_text("earlier")
        if request.param == "full":
            (folder / "ballast").write_bytes(b"0" * (KILOBYTES - 24) * 1024)
        else:
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def a_folder(path: Path) -> None:
    with atomic_folder(path) as work:
        (work / "a").write_bytes(b"0" * 200_000)


def a_picture(path: Path) -> None:
    from PIL import Image

    write_picture(Image.fromarray(np.random.RandomState(0).randint(0, 255, (256, 256, 3), dtype=np.uint8)), path)


def a_plot(path: Path) -> None:
    from library.training.hooks.loss_curve import plot_losses

    plot_losses(path, list(range(400)), list(np.random.rand(400)), list(np.random.rand(400)), [])


WRITERS = {
    "text": lambda path: write_text_atomically(path, "0" * 200_000),
    "safetensors": lambda path: save_file_atomic({"a": torch.zeros(50_000)}, path),
    "pickle": lambda path: write_adapter_file(str(path), {"a": torch.zeros(50_000)}, None, None),
    "cache": lambda path: write_arrays(path, {"a": np.zeros(50_000, np.float32)}),
    "picture": a_picture,
    "plot": a_plot,
    "folder": a_folder,
}
SUFFIXES = {"safetensors": ".safetensors", "pickle": ".pt", "cache": ".npz", "picture": ".png", "plot": ".png"}


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_says_which_file_and_why(disk: Path, name: str) -> None:
    path = disk / f"new{SUFFIXES.get(name, '')}"
    before = sorted(disk.iterdir())
    with pytest.raises(WriteError) as caught:
        WRITERS[name](path)
    message = str(caught.value)
    assert str(path) in message and ".tmp" not in message
    assert "no space is left on the disk" in message or "is read-only" in message
    assert sorted(disk.iterdir()) == before


def test_an_earlier_file_stays(disk: Path) -> None:
    with pytest.raises(WriteError, match="the earlier one of this name is unchanged"):
        write_text_atomically(disk / "earlier", "0" * 200_000)
    assert (disk / "earlier").read_text() == "earlier"


@pytest.mark.parametrize("error, known", [
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "no space"),
    (RuntimeError("[enforce fail] . unexpected pos 64 vs 0"), "could not be written"),
    (RuntimeError("I/O error: No space left on device (os error 28)"), "no space"),
    (OSError(errno.EROFS, "x"), "read-only"),
    (OSError(errno.EFBIG, "x"), "FAT32"), (OSError(errno.EIO, "x"), "disk reports"),
])  # fmt: skip
def test_what_libraries_make_of_it(tmp_path: Path, error: Exception, known: str) -> None:
    with pytest.raises(WriteError, match=known), atomic_path(tmp_path / "a.bin"):
        raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file", "/other/input"), ValueError("x"), RuntimeError("shape")]
)
def test_errors_of_reading_pass(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, atomic_path(tmp_path / "a.bin"):
        raise error
    assert caught.value is error


# ---- runs ------------------------------------------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, ending: str, after: int = 0) -> None:
    """The disk is full whenever a file or folder whose name ends so takes its name, after `after` of them."""
    from library.core import atomic_file

    for name in ("_take_name", "_replace_folder"):
        original = getattr(atomic_file, name)
        count = [0]

        def write(temporary: Path, target: Path, original=original, count=count) -> None:
            if target.name.endswith(ending) and target.name != "model.safetensors":  # of a state
                count[0] += 1
                if count[0] > after:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            original(temporary, target)

        monkeypatch.setattr(atomic_file, name, write)


def told(work: Work, capsys: pytest.CaptureFixture, *more: str) -> str:
    """The one line of a run that fails."""
    with pytest.raises(SystemExit) as ended:
        cli.main("flux", "network", work.argv("out", BRIEF, "--max_train_steps=3", *more))
    assert ended.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in lines)
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


@pytest.mark.parametrize("ending", [".safetensors", "-state"])
def test_a_run_tells_what_is_kept_and_how_to_go_on(work: Work, monkeypatch, capsys, ending: str) -> None:
    failing(monkeypatch, ending, after=1)
    message = told(work, capsys, "--save_every_n_steps=1", "--save_state")
    state = work.folder / "out" / "lora-step00000001-state"
    assert (
        f"lora-step00000002{ending} could not be written: no space" in message
        and f"Go on with --resume {state}" in message
    )
    monkeypatch.undo()
    assert work.train("out", BRIEF, "--max_train_steps=3", f"--resume={state}").exists()


def test_a_run_without_states_says_so(work: Work, monkeypatch, capsys) -> None:
    failing(monkeypatch, ".safetensors")
    assert "Nothing was saved before; there is no state to go on from (--save_state writes them)" in told(work, capsys)


def test_curves_and_samples_cost_no_run(work: Work, monkeypatch, caplog) -> None:
    from library.training.hooks.trackers import TensorBoardTracker

    (work.folder / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1", encoding="utf-8")
    for ending in (".png", ".csv"):
        failing(monkeypatch, ending)

    def full(self, point) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(TensorBoardTracker, "log", full)
    caplog.set_level(logging.WARNING)
    samples = [f"--sample_prompts={work.folder / 'prompts.txt'}", "--sample_every_n_steps=1"]
    done = work.train("out", BRIEF, "--max_train_steps=2", f"--logging_dir={work.folder / 'log'}", *samples)
    assert done.exists() and caplog.text.count("training goes on without them") == 1
    assert "lora-loss.png could not be written: no space" in caplog.text and "sample/lora_000001" in caplog.text


@pytest.mark.parametrize("kind", ["latents", "text_encoder_outputs"])
def test_caches(work: Work, monkeypatch, capsys, kind: str) -> None:
    """What is finished stays, and the next run goes on from there."""
    failing(monkeypatch, ".npz", after=2)
    message = told(work, capsys, f"--cache_{kind}_to_disk", "--network_train_unet_only")
    assert ".npz could not be written: no space" in message
    assert len(list(work.images.glob("*.npz"))) == 2 and not list(work.images.glob(".*"))


def test_a_log_file_on_a_full_disk(tmp_path: Path, capsys) -> None:
    from library.training.option_groups import ConsoleOptions

    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    (tmp_path / "run.log").symlink_to("/dev/full")
    cli.set_up_logging(ConsoleOptions(console_log_file=str(tmp_path / "run.log")))
    for _ in range(3):
        logging.getLogger("atelier").warning("a line")
    shown = capsys.readouterr().err
    assert shown.count("no space is left on the disk") == 1 and "Traceback" not in shown
    cli.set_up_logging(ConsoleOptions())


def test_tools(disk: Path, tmp_path: Path, capsys) -> None:
    """One of each way to write: a merged adapter, a converted one."""
    from safetensors.torch import save_file

    import tools.convert_lora as convert

    adapter = {
        "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.zeros(64, 600),
        "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": torch.zeros(600, 64),
        "lora_unet_double_blocks_0_img_attn_proj.alpha": torch.tensor(4.0),
    }
    save_file(adapter, tmp_path / "a.safetensors")
    code = convert.main([str(tmp_path / "a.safetensors"), str(disk / "b.safetensors"), "--to", "diffusers"])
    shown = capsys.readouterr().err
    assert code == 1 and "b.safetensors could not be written" in shown and "Traceback" not in shown


def test_an_os_error_too(tmp_path: Path) -> None:
    """Code that can do without a file passes over it."""
    try:
        with atomic_path(tmp_path / "a"):
            raise OSError(errno.ENOSPC, "x")
    except OSError as error:
        assert isinstance(error, AtelierError) and error.errno == errno.ENOSPC
