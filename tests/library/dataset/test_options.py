"""The options of the data side."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from library.core.errors import ConfigError
from library.core.options import add_options, read_options
from library.dataset import CachingOptions, DatasetOptions, parse_range, parse_resolution


@pytest.mark.parametrize(
    ("text", "size"),
    [("512", (512, 512)), ("1024,768", (1024, 768)), (" 640 ", (640, 640)), (512, (512, 512)), ([64, 32], (64, 32))]
)
def test_resolution(text, size):
    assert parse_resolution(text) == size


@pytest.mark.parametrize(
    "text",
    ["big", "", "1,2,3", "512x768", "[512,768]", "1,", 1.5, [1.5, 2], [512], ["512", "768"], [True, 512], True, None],
)
def test_resolution_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="width,height"):
        parse_resolution(text)


def test_range():
    assert parse_range("1,3") == (1.0, 3.0)
    with pytest.raises(argparse.ArgumentTypeError):
        parse_range("1")


def test_all_problems_at_once():
    with pytest.raises(ConfigError) as caught:
        DatasetOptions(train_batch_size=0, caption_dropout_rate=2.0, face_crop_aug_range=(3.0, 1.0), resolution=(0, 64))
    assert len(caught.value.problems) == 4
    with pytest.raises(ConfigError, match="vae_batch_size"):
        CachingOptions(vae_batch_size=0)


def test_own_dataset_class_stands_alone():
    assert DatasetOptions(dataset_class="a.B").dataset_class == "a.B"
    with pytest.raises(ConfigError, match="--dataset_class.*--train_data_dir"):
        DatasetOptions(dataset_class="a.B", train_data_dir="x")


def test_old_spelling_of_the_extension_wins():
    assert DatasetOptions(caption_extension=".a", caption_extention=".b").effective_caption_extension == ".b"
    assert DatasetOptions(caption_extension=".a").effective_caption_extension == ".a"


def test_disk_implies_cache():
    assert CachingOptions(cache_latents_to_disk=True).caches_latents
    assert CachingOptions(cache_text_encoder_outputs_to_disk=True).caches_text
    assert not CachingOptions().caches_latents


def test_command_line():
    parser = argparse.ArgumentParser()
    add_options(parser, DatasetOptions)
    given = vars(parser.parse_args(["--resolution", "512,768", "--flip_aug", "--token_warmup_step", "0.5"]))
    options = read_options(given, DatasetOptions)
    assert (options.resolution, options.flip_aug, options.token_warmup_step) == ((512, 768), True, 0.5)


def test_options_import_nothing_heavy():
    code = "import sys, library.dataset; print([m for m in ('torch', 'numpy', 'PIL', 'cv2') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
