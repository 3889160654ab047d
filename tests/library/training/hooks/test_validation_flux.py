"""Validation through the real step on a tiny FLUX: one number per state of the weights, whatever happened before."""

import pytest
import torch
from PIL import Image

from library.training import parser_common
from library.training.hooks.validation import ValidationHook
from library.training.trainables.network import NetworkTrainable
from library.training.trainer_base import Trainer
from library.training.wiring.flux import FluxFamily
from tests.tiny import build_tiny_flux


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_tiny_flux(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "1_cat"
    folder.mkdir()
    for i in range(8):
        Image.new("RGB", (32, 32), (30 * i, 200 - 20 * i, 90)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a red cat, {'dog, ' * i} blue")
    return folder.parent


def prepared(tiny, images, tmp_path, *more: str):
    arguments = [
        *tiny.arguments(), "--t5xxl_max_token_length=16", f"--train_data_dir={images}", "--resolution=32",
        "--caption_extension=.txt",
        "--network_module=networks.lora_flux", "--network_dim=2", "--network_train_unet_only",
        f"--output_dir={tmp_path}",
        "--max_train_steps=4", "--seed=3", "--validation_split=0.5", "--max_data_loader_n_workers=0",
        "--timestep_sampling=shift",
        "--caption_dropout_rate=0.5", "--shuffle_caption", *more,
    ]
    config = parser_common.parse(arguments, "flux", "network")
    return Trainer(config, FluxFamily(config), NetworkTrainable(config)).prepare()


def test_a_pass_does_not_depend_on_the_training_around_it(tiny, images, tmp_path):
    run = prepared(tiny, images, tmp_path)
    hook = run.hooks.find(ValidationHook)
    first = hook.validate(run)
    for batch in run.data.batches(1):
        run.step(batch)
    run.progress.global_step, run.progress.epoch = 3, 2
    assert hook.validate(run) == first
    with torch.no_grad():
        for parameter in run.trainable.modules()["network"].parameters():
            parameter.add_(0.5)
    assert hook.validate(run) != pytest.approx(first, rel=1e-3)


def test_batch_size_and_training_options_do_not_change_the_measure(tiny, images, tmp_path):
    values = []
    for more in ((), ("--train_batch_size=3",), ("--timestep_sampling=uniform",), ("--seed=9", "--validation_seed=3")):
        seed = () if any("validation_seed" in m for m in more) else ("--validation_seed=3",)
        run = prepared(tiny, images, tmp_path, *seed, *more)
        values.append(run.hooks.find(ValidationHook).validate(run))
    assert values == pytest.approx([values[0]] * 4, rel=1e-5)
