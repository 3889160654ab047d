"""ControlNet-LLLite through its command line: what learns, the file, resuming, what goes with it, what is refused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.core.errors import ConfigError, TrainingError
from library.core.registry import import_target
from library.families.registry import FAMILIES, record_of
from library.generation.picture_files import read_frames
from library.safetensors_utils import load_safetensors, save_file_atomic
from library.training.loop import fit
from library.training.run import Run
from library.training.trainables.lllite import LLLiteTrainable
from tests.families import CASES
from tests.runs.conftest import (
    ControlWork,
    Stopped,
    Work,
    draw_pictures,
    fingerprint,
    losses_of,
    read_parts,
    sample_pictures,
    stop_after,
)
from tests.runs.families import Tinies

FAMILIES_WITH_IT = [name for name, case in CASES.items() if "lllite" in FAMILIES[case.family].scripts]
SIZES = ("--network_dim=8", "--cond_emb_dim=6")


class LLLiteWork(ControlWork):
    trainable = LLLiteTrainable

    def argv(self, out: str, *more: str, dataset: Path | None = None) -> list[str]:
        return super().argv(out, *SIZES, "--max_train_steps=4", *more, dataset=dataset)


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Tinies:
    return Tinies(tmp_path_factory)


@pytest.fixture(params=FAMILIES_WITH_IT)
def work(request: pytest.FixtureRequest, tinies: Tinies, tmp_path: Path) -> LLLiteWork:
    """Control pictures are what is learned from: the pictures, darker."""
    images = draw_pictures(tmp_path / "images", 4)
    (tmp_path / "control").mkdir()
    for path in images.glob("*.png"):
        Image.fromarray(np.asarray(Image.open(path)) // 2).save(tmp_path / "control" / path.name)
    return LLLiteWork(tmp_path, tinies[request.param], images, case=CASES[request.param])


def test_the_modules_learn_and_nothing_else(work: LLLiteWork) -> None:
    """The loss of a batch with its own noise falls; the base stays to the bit; the file gives the same loss."""
    run = work.prepare("out", "--max_train_steps=12", "--save_precision=float")
    batch = next(run.data.batches(1))

    def loss(run: Run, untouched: bool = False) -> float:
        with torch.no_grad(), run.weights_for_eval():
            if not untouched:
                return run.step(batch).loss_sum.item()
            with run.trainable.disabled():
                return run.step(batch).loss_sum.item()

    with pytest.raises(TrainingError, match="no conditioning images"):
        run.trainable.inputs(dataclasses.replace(batch, conditions={}), None, {})
    base = {name: p.detach().clone() for name, p in run.models.denoiser.named_parameters()}
    start = loss(run)
    fit(run)
    end = loss(run)
    assert end < 0.97 * start and loss(run, untouched=True) == start, "a new one changes nothing"
    assert all(torch.equal(p, base[name]) for name, p in run.models.denoiser.named_parameters())
    file = work.folder / "out" / "lora.safetensors"
    written, metadata = load_safetensors(str(file)), read_parts(file)[0]
    assert written.keys() == run.trainable.net.state_dict().keys()
    assert all(key.startswith("lllite_unet_") for key in written) and all(t.abs().sum() > 0 for t in written.values())
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/control-net-lllite"
    assert (metadata["ss_cond_emb_dim"], metadata["ss_network_dim"]) == ("6", "8")
    again = work.prepare("next", f"--network_weights={file}")
    assert loss(again) == end


def test_the_same_command_writes_the_same_bytes_also_when_resumed(work: LLLiteWork) -> None:
    """With dropout, validation, averages, accumulation, caches, masks, samples and checkpointed activations. Samples
    follow the picture of their prompt."""
    prompts = work.folder / "prompts.txt"
    line = "a cat --w 64 --h 64 --s 2 --d 1 --l 3"
    prompts.write_text(f"{line} --cn {work.folder / 'control' / '00.png'}\n{line}\n", encoding="utf-8")
    around = [
        "--network_dropout=0.3", "--ema", "--ema_decay=0.5", "--lr_scheduler=cosine", "--gradient_checkpointing",
        "--gradient_accumulation_steps=2", "--cache_latents", "--cache_text_encoder_outputs", "--validate_every_n_steps=2",
        f"--sample_prompts={prompts}", "--sample_every_n_steps=4", "--sample_at_first",
    ]  # fmt: skip
    data = work.dataset(dataset_keys="validation_split = 0.25", subset_keys="flip_aug = true\nalpha_mask = true")
    first = work.train("first", *around, dataset=data)
    assert losses_of(first, "validation")
    pictures = [np.asarray(read_frames(path)[0]).astype(int) for path in sample_pictures(first.parent)]
    steered, plain, at_first, plain_at_first = pictures
    assert np.array_equal(at_first, plain_at_first) and np.array_equal(plain, plain_at_first)
    assert abs(steered - plain).max() > 2
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            work.train("parts", *around, "--save_every_n_steps=2", "--save_state", dataset=data)
    resumed = work.train("parts", *around, "--resume=latest", dataset=data)
    for stem in ("lora", "lora-ema"):
        assert fingerprint(first.with_name(f"{stem}.safetensors")) == fingerprint(resumed.with_name(f"{stem}.safetensors"))


def test_caches_live_encoding_and_accumulated_batches_learn_the_same(work: LLLiteWork) -> None:
    """Control pictures are flipped with their pictures, cached or not; dropout is drawn by sample."""
    drops = "--network_dropout=0.4"
    data = work.dataset(subset_keys="flip_aug = true")
    made = [
        work.train(f"out{number}", drops, *words, dataset=data)
        for number, words in enumerate(((), ("--cache_latents",), ("--cache_latents_to_disk",)))
    ]
    first, *others = (load_safetensors(str(path)) for path in made)
    for other in others:
        assert all(torch.equal(other[key], first[key]) for key in first)
    ones = work.dataset(batch_size=1, subset_keys="flip_aug = true", name="ones.toml")
    parts = work.train("parts", drops, "--gradient_accumulation_steps=2", dataset=ones)
    assert losses_of(parts) == pytest.approx(losses_of(made[0]), rel=1e-4)
    plain = load_safetensors(str(work.train("plain", drops, dataset=work.dataset())))
    assert max(float((plain[key].float() - first[key].float()).abs().max()) for key in first) > 5e-3


def refused(work: LLLiteWork, words: Sequence[str], monkeypatch: pytest.MonkeyPatch, **more: Path) -> str:
    """The message of a run that ends before a model is loaded."""
    for name in ("load_vae", "load_text_encoders", "load_denoiser"):
        family = import_target(record_of(work.case.family).family)
        monkeypatch.setattr(family, name, lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(ConfigError) as ended:
        work.train("bad", *words, **more)
    return str(ended.value)


def test_what_cannot_be_is_refused_at_start(work: LLLiteWork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "net.safetensors"
    tensors = work.prepare("net", "--network_dim=5").trainable.net.state_dict()
    save_file_atomic(tensors, file)
    foreign = tmp_path / "foreign.safetensors"
    save_file_atomic({key.replace("middle_block", "middle_block_9"): tensor for key, tensor in tensors.items()}, foreign)
    half = tmp_path / "half.safetensors"
    save_file_atomic(dict(list(tensors.items())[1:]), half)
    lora = tmp_path / "lora.safetensors"
    save_file_atomic({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, lora)
    for words, message in (
        (["--cond_emb_dim=7", "--network_dim=0", "--network_dropout=1"], "--cond_emb_dim is 7.*--network_dim is 0.*--network_dropout is 1"),
        ([f"--network_weights={file}", "--network_dim=9"], "--network_dim is 9, --network_weights .* has 5"),
        ([f"--network_weights={foreign}", "--network_dim=5"], "made for another model"),
        ([f"--network_weights={half}"], "--network_weights: .*half.safetensors: .* is incomplete"),
        ([f"--network_weights={lora}"], "a LoRA-type adapter.*; needed: a ControlNet-LLLite"),
        (["--learning_rate=0"], "nothing to train"),
        (["--fused_backward_pass"], "--fused_backward_pass"), (["--masked_loss"], "what the net sees"),
    ):  # fmt: skip
        assert re.search(message, refused(work, words, monkeypatch), re.DOTALL), words
    (tmp_path / "control" / "02.png").unlink()
    assert "02.png" in refused(work, [], monkeypatch)
    plain = Work.dataset(work, name="plain.toml")
    assert "conditioning_data_dir" in refused(work, [], monkeypatch, dataset=plain)


def test_other_families_have_none(tmp_path: Path, tinies: Tinies) -> None:
    work = LLLiteWork(tmp_path, tinies["sd1"], draw_pictures(tmp_path / "images", 2), case=CASES["sd1"])
    with pytest.raises(ConfigError, match="no ControlNet-LLLites of Stable Diffusion"):
        work.train("out", dataset=Work.dataset(work))
