"""ControlNets through their command line, on every family that has them: what learns, files, resuming, pictures of
samples, what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.checkpoints.kinds import describe_checkpoint
from library.components.control_nets import control_nets_of
from library.core.errors import TrainingError
from library.core.registry import import_target
from library.families.registry import FAMILIES, record_of
from library.generation.picture_files import read_frames
from library.safetensors_utils import load_safetensors, save_file_atomic
from library.training import cli
from library.training.loop import fit
from library.training.run import Run
from library.training.trainables.control_net import ControlNetTrainable
from tests.families import CASES, marks_of
from tests.forked import run_ranks
from tests.runs.conftest import ControlWork, Work, Stopped, largest_difference, read_parts, sample_pictures, stop_after
from tests.runs.families import Tinies

SETS = [name for name, case in CASES.items() if FAMILIES[case.family].control_nets]


class NetWork(ControlWork):
    trainable = ControlNetTrainable


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Tinies:
    return Tinies(tmp_path_factory)


def work_of(tinies: Tinies, name: str, folder: Path) -> NetWork:
    plain = tinies.work(name, folder)
    work = NetWork(folder, plain.tiny, plain.images, case=plain.case)
    work.control.mkdir()
    random = np.random.RandomState(9)
    for path in sorted(work.images.glob("*.png")):
        Image.fromarray(random.randint(0, 255, (64, 64, 3), dtype=np.uint8)).save(work.control / path.name)
    return work


@pytest.fixture(params=[pytest.param(name, marks=marks_of(name)) for name in SETS])
def work(request: pytest.FixtureRequest, tinies: Tinies, tmp_path: Path) -> NetWork:
    return work_of(tinies, request.param, tmp_path)


def test_a_net_learns_and_nothing_else_does(work: NetWork) -> None:
    """A new one changes nothing; then the loss of a batch falls; the file, read again, gives the same loss."""
    run = work.prepare(
        "out", "--max_train_steps=8", "--learning_rate=4e-3", "--save_precision=float", "--control_net_lr=4e-3"
    )
    batch = next(run.data.batches(1))

    def loss(run: Run) -> float:
        with torch.no_grad(), run.weights_for_eval():
            return run.step(batch).loss_sum.item()

    def alone(run: Run) -> float:
        with run.trainable.disabled():
            return loss(run)

    (part,) = run.trainable.inputs(batch, None, {})["control"].parts
    with pytest.raises(TrainingError, match="no conditioning images"):
        run.trainable.inputs(dataclasses.replace(batch, conditions={}), None, {})
    darkest = -1.0 if work.case.family == "flux" else 0.0
    assert darkest <= float(part.picture.min()) < darkest + 0.02 and 0.98 < float(part.picture.max()) <= 1
    frozen = {name: p.detach().clone() for name, p in run.models.denoiser.named_parameters()}
    start = loss(run)
    assert start == alone(run)
    fit(run)
    end = loss(run)
    assert end < start and alone(run) == start
    assert all(torch.equal(p, frozen[name]) for name, p in run.models.denoiser.named_parameters())
    file = work.folder / "out" / "lora.safetensors"
    assert describe_checkpoint(file).kind in control_nets_of(work.case.family).kinds
    assert read_parts(file)[0]["modelspec.architecture"].endswith("/controlnet")
    assert loss(work.prepare("next", f"--controlnet_model_name_or_path={file}")) == end


def test_the_same_command_writes_the_same_bytes_also_when_resumed(work: NetWork) -> None:
    """With caches, validation, samples, averages and checkpointed activations in one of them and not in the other."""
    prompts = work.folder / "prompts.txt"
    guided = work.control / "00.png"
    prompts.write_text(
        f"a cat --w 64 --h 64 --s 2 --d 1 --cn {guided}\na cat --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8"
    )
    more = [
        "--ema",
        "--ema_decay=0.5",
        "--lr_scheduler=cosine",
        "--max_train_steps=4",
        "--gradient_accumulation_steps=2",
        f"--sample_prompts={prompts}",
        "--sample_every_n_steps=4",
        "--control_net_lr=1e-2",
    ]
    caches = [word for word in work.case.caches(on_disk=True) if not word.startswith("--network")]
    data = work.dataset(dataset_keys="validation_split = 0.25", subset_keys="flip_aug = true")
    first = work.train("first", *more, dataset=data)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            work.train(
                "parts",
                *more,
                *caches,
                "--gradient_checkpointing",
                "--save_every_n_steps=2",
                "--save_state",
                dataset=data,
            )
    again = work.train("parts", *more, *caches, "--resume=latest", dataset=data)
    for stem in ("lora", "lora-ema"):
        files = [path.with_name(f"{stem}.safetensors") for path in (first, again)]
        assert read_parts(files[0])[1] == read_parts(files[1])[1]
    guided_sample, plain_sample = (read_frames(path)[0] for path in sample_pictures(work.folder / "first"))
    assert np.abs(np.asarray(guided_sample, float) - np.asarray(plain_sample, float)).mean() > 0.1
    sheet = read_frames(work.folder / "first" / "sample" / "lora_sheet.png")[0]
    grid = read_frames(next((work.folder / "first" / "sample").glob("*_grid.png")))[0]
    with Image.open(guided) as picture:
        for page in (sheet, grid):
            assert shows(page, picture)


def shows(page: Image.Image, picture: Image.Image) -> bool:
    """Whether a picture is on a page at three times its size."""
    pixels, small = np.asarray(page.convert("RGB")), np.asarray(picture.convert("RGB"))
    found = np.argwhere((pixels == small[0, 0]).all(axis=2))
    return any(np.array_equal(pixels[top : top + 192 : 3, left : left + 192 : 3], small) for top, left in found)


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {key for key, tensor in before.items() if not torch.equal(tensor.float(), after[key].float())}


def test_parts_have_rates_of_their_own(tinies: Tinies, tmp_path: Path) -> None:
    """Rate 0 leaves bytes as they are, and the layers of no optimizer group; the names are those of files."""
    work = work_of(tinies, "sdxl", tmp_path)
    run = work.prepare("start", "--save_precision=float")
    start = control_nets_of("sdxl").file_state(run.trainable.net)
    assert [group["lr"] for group in run.optimizer.param_groups] == [1e-2, 1e-4], "1e-4 when not given"
    words = ["--max_train_steps=2", "--save_precision=float"]
    alone = load_safetensors(work.train("alone", *words, "--learning_rate=0", "--control_net_lr=1e-3"))
    assert changed(start, alone) and all(key.startswith("controlnet_") for key in changed(start, alone))
    rates = ["--control_net_lr=1e-3", "--layer_lrs=^down_blocks=0,^controlnet_cond_embedding=0"]
    parts = changed(start, load_safetensors(work.train("parts", *words, *rates)))
    assert not any(key.startswith(("down_blocks", "controlnet_cond_embedding")) for key in parts)
    assert {"controlnet_mid_block.weight", "mid_block.resnets.0.conv1.weight"} <= parts


LAYOUTS = {"ckpt": "lora.ckpt", "diffusers": "lora", "diffusers_safetensors": "lora"}


@pytest.mark.parametrize("name", ["sd1", "sdxl", "flux"])
def test_every_layout_is_a_start(name: str, tinies: Tinies, tmp_path: Path) -> None:
    """That diffusers reads such folders: tests/library/test_control_nets.py."""
    work = work_of(tinies, name, tmp_path)
    words = ["--max_train_steps=2", "--save_precision=float"]
    file = load_safetensors(work.train("file", *words))
    for layout, written in LAYOUTS.items():
        work.train(layout, *words, f"--save_model_as={layout}")
        start = work.folder / layout / written
        net = work.prepare(f"next_{layout}", f"--controlnet_model_name_or_path={start}").trainable.net
        assert not changed(file, control_nets_of(work.case.family).file_state(net))
    config = json.loads((work.folder / "diffusers" / "lora" / "config.json").read_text(encoding="utf-8"))
    assert config["_class_name"] in ("ControlNetModel", "FluxControlNetModel")


WAYS = {
    "flux": [
        ("--mixed_precision=bf16", "--full_bf16", "--blockwise_fused_optimizers", "--max_grad_norm=0"),
        (
            "--mixed_precision=bf16",
            "--fp8_base",
            "--gradient_checkpointing",
            "--cpu_offload_checkpointing",
            "--cache_latents",
        ),
        ("--apply_t5_attn_mask", "--cache_text_encoder_outputs", "--cache_latents", "--fused_backward_pass"),
    ],
    "sd1": [
        (
            "--mixed_precision=bf16",
            "--full_bf16",
            "--bf16_update=kahan",
            "--weighted_captions",
            "--conditioning_range=legacy",
        )
    ],
}


@pytest.mark.parametrize("name", WAYS)
def test_ways_to_save_memory(name: str, tinies: Tinies, tmp_path: Path) -> None:
    work = work_of(tinies, name, tmp_path)
    for number, words in enumerate(WAYS[name]):
        state = load_safetensors(work.train(f"{number}", *words, "--max_train_steps=2"))
        assert all(bool(tensor.isfinite().all()) for tensor in state.values()), words
        ends = [key for key in state if key.startswith(("controlnet_blocks.", "zero_convs."))]
        assert ends and all(bool(state[key].any()) for key in ends), words


def test_two_processes_train_like_one_with_twice_the_batch(tinies: Tinies, tmp_path: Path) -> None:
    """With an optimizer that is linear in the gradient, and masks in the alpha channels of the images."""
    work = work_of(tinies, "sd1", tmp_path)
    for path in work.images.glob("*.png"):
        with Image.open(path) as picture:
            mask = Image.new("L", picture.size)
            mask.paste(255, (0, 0, 32, 64))
            picture.putalpha(mask)
            picture.save(path)
    words = ["--max_train_steps=2", "--optimizer_type=SGDNesterov", "--save_precision=float"]
    plain = work.train("plain", *words, dataset=work.dataset(4))
    one = work.train("one", *words, dataset=work.dataset(4, subset_keys="alpha_mask = true", name="four.toml"))
    argv = work.argv("two", *words, dataset=work.dataset(2, subset_keys="alpha_mask = true", name="two.toml"))
    caches = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    run_ranks(2, lambda: cli.run("sd", "control_net", argv), tmp_path / "told", caches)
    assert largest_difference(one, work.folder / "two" / "lora.safetensors") < 1e-6
    assert largest_difference(one, plain) > 1e-5


def refused(work: NetWork, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    """The one message of a run that ends before a model is loaded."""
    family = import_target(record_of(work.case.family).family)
    for name in ("load_vae", "load_text_encoders", "load_denoiser"):
        monkeypatch.setattr(family, name, lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(SystemExit):
        cli.main(work.case.family, "control_net", words)
    message = capsys.readouterr().err
    assert message.count("error: ") == 1 and "Traceback" not in message
    return message


def test_what_cannot_be(
    tinies: Tinies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """All of it in one message: options, files, conditioning images that are not there or of another size."""
    work = work_of(tinies, "sd1", tmp_path)
    other = tmp_path / "other.safetensors"
    save_file_atomic(
        {"controlnet_blocks.0.weight": torch.zeros(1), "double_blocks.0.img_attn.proj.bias": torch.zeros(1)}, other
    )
    for number in (1, 3):
        (work.control / f"{number:02d}.png").unlink()
    Image.new("RGB", (32, 64)).save(work.control / "00.png")
    message = refused(
        work,
        work.argv(
            "out",
            "--masked_loss",
            "--learning_rate=0",
            "--control_net_lr=0",
            "--fused_backward_pass",
            "--gradient_accumulation_steps=2",
            "--save_model_as=pt",
            f"--controlnet_model_name_or_path={other}",
        ),
        monkeypatch,
        capsys,
    )
    for told in (
        "--masked_loss is True; it is not available here: the conditioning images are what the net sees",
        "every learning rate is 0",
        "gradients are gone after each backward pass",
        "in which no program looks for a model",
        f"--controlnet_model_name_or_path is {other}: this is a FLUX.1 ControlNet; needed: a ControlNet of Stable",
        "00.png is 32x64, its image is 64x64",
        *(f"{work.images / f'{number:02d}.png'} has no image named {number:02d}" for number in (1, 3)),
    ):
        assert told in message, (told, message)


@pytest.mark.parametrize(
    "words, told",
    [
        (["--network_dim=4"], "--network_dim is an option of other scripts"),
        (["--control_net_lr=-1"], "--control_net_lr is -1.0; needed: 0"),
        (["--controlnet_model_name_or_path=none.safetensors"], "there is no such file"),
        (["--blocks_to_swap=1"], "has no row of equal blocks"),
        (["--strict", "--bf16_update=kahan"], "--bf16_update"),
        (["--fused_optimizer_groups=2"], "--fused_backward_pass does it here"),
    ],
)
def test_options_that_mean_nothing(
    words: list[str],
    told: str,
    tinies: Tinies,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    work = work_of(tinies, "sd1", tmp_path)
    assert told in refused(work, work.argv("out", *words), monkeypatch, capsys)


def test_files_of_another_size_and_families_without_control_nets(
    tinies: Tinies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A net of the right kind for a model of other widths; a variant, and a family, that has none; plain data."""
    work = work_of(tinies, "sdxl", tmp_path)
    state = load_safetensors(work.train("out", "--max_train_steps=1"))
    narrow = {
        key: tensor[:8].clone() if key.startswith("controlnet_mid_block") else tensor for key, tensor in state.items()
    }
    save_file_atomic(narrow, tmp_path / "narrow.safetensors")
    words = work.argv("next", f"--controlnet_model_name_or_path={tmp_path / 'narrow.safetensors'}")
    message = refused(work, words, monkeypatch, capsys)
    assert "controlnet_mid_block.weight is [8," in message and "needed [" in message
    plain = Work.dataset(work, name="plain.toml")
    message = refused(work, work.argv("next", dataset=plain), monkeypatch, capsys)
    assert "the subset has no conditioning_data_dir" in message
    for family, more in (("flux", ["--model_type=chroma"]), ("anima", [])):
        with pytest.raises(SystemExit):
            cli.main(family, "control_net", [f"--output_dir={tmp_path / 'none'}", *more])
        assert re.search("there are no ControlNets of (Chroma|Anima) here", capsys.readouterr().err)


def test_sample_prompts_without_their_picture_are_left_out(
    tinies: Tinies, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = work_of(tinies, "sd1", tmp_path)
    (tmp_path / "p.txt").write_text("a --w 64 --h 64 --s 1 --cn none.png\nb --w 64 --h 64 --s 1\n", encoding="utf-8")
    work.train("out", "--max_train_steps=1", f"--sample_prompts={tmp_path / 'p.txt'}", "--sample_every_n_steps=1")
    assert "the control picture none.png does not exist; this sample prompt is left out" in caplog.text
    assert len(sample_pictures(work.folder / "out")) == 1
