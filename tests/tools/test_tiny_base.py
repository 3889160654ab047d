"""The making of the embedded base: scenes and captions are functions of the seed, vocabularies cover them, and the
training parts do what they say on a model of a few thousand parameters."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from library.components.tokenizers import load_clip_tokenizer, load_t5_tokenizer
from library.flux_models import AutoEncoder, AutoEncoderParams
from library.flux_utils import pack_latents, unpack_latents
from tools.tiny_base import captions, denoiser_training, vocabulary
from tools.tiny_base.autoencoder_training import (
    LATENT_CHANNELS,
    AutoencoderPlan,
    calibrate,
    draw_pictures,
    encode_mean,
    train_autoencoder,
)
from tools.tiny_base.scenes import draw_scene, render
from tools.tiny_base.shapes import COLOURS, SHAPES


def test_a_scene_and_its_picture_follow_from_the_seed():
    assert draw_scene(1, 5) == draw_scene(1, 5) and draw_scene(1, 5) != draw_scene(2, 5)
    first, second = (np.asarray(render(draw_scene(1, 5), random.Random(5))) for _ in range(2))
    assert first.shape == (64, 64, 3) and np.array_equal(first, second)


def test_every_shape_is_visible_and_of_its_colour():
    from PIL import Image, ImageDraw

    for name, paint in SHAPES.items():
        image = Image.new("RGB", (64, 64), (255, 255, 255))
        paint(ImageDraw.Draw(image), 32, 32, 20, COLOURS["red"])
        covered = np.abs(np.asarray(image).astype(int) - COLOURS["red"]).sum(axis=-1) == 0
        assert covered.mean() > 0.04, name


@pytest.mark.parametrize("index", range(40))
def test_a_caption_tells_colour_and_background(index):
    scene = draw_scene(3, index)
    text = captions.caption_of(scene, 3, index).lower()
    for thing in scene.things:
        assert any(word in text for word in captions.COLOUR_WORDS.get(thing.colour, (thing.colour,)))
    names = captions.LANDSCAPE_PHRASES.get(scene.background.pattern)
    if names is not None:
        assert any(phrase in text for phrase in names)
    for colour in scene.background.colours:
        assert any(word in text for word in captions.COLOUR_WORDS.get(colour, (colour,)))


def test_every_word_of_captions_is_one_piece(tmp_path):
    vocabulary.write_clip_tokenizer(tmp_path / "clip")
    vocabulary.write_t5_tokenizer(tmp_path / "t5")
    clip, t5 = load_clip_tokenizer(str(tmp_path / "clip")), load_t5_tokenizer(str(tmp_path / "t5"))
    for word in captions.vocabulary_words():
        assert len(clip(word).input_ids) == 3 and len(t5(word).input_ids) == 2, word


def test_the_sentencepiece_file_means_the_same_to_the_sentencepiece_package(tmp_path):
    package = pytest.importorskip("sentencepiece")
    vocabulary.write_t5_tokenizer(tmp_path)
    theirs = package.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    ours = load_t5_tokenizer(str(tmp_path))
    for text in ("a large red circle, blue background", "A zorbit on a meadow.", "naïve 猫 {x}"):
        assert ours(text).input_ids == [*theirs.encode(text), theirs.eos_id()]


def test_packing_is_that_of_the_family():
    latents = torch.randn(2, LATENT_CHANNELS, 8, 8)
    packed = denoiser_training.pack(latents)
    assert torch.equal(packed, pack_latents(latents))
    assert torch.equal(denoiser_training.unpack(packed), unpack_latents(packed, 4, 4))


def small_autoencoder() -> AutoEncoder:
    torch.manual_seed(0)
    return AutoEncoder(AutoEncoderParams(ch=8, ch_mult=(1, 1, 1, 1), num_res_blocks=1, norm_groups=4))


def test_calibration_gives_the_latents_of_the_family_and_tells_the_decoder():
    model, pictures = small_autoencoder().eval(), draw_pictures(1, 16)
    before = model.decoder.conv_in(encode_mean(model, pictures)).detach()
    calibrate(model, pictures)
    mean = encode_mean(model, pictures)
    scaled = model.scale(mean)
    assert scaled.mean(dim=(0, 2, 3)).abs().max() < 0.05 and (scaled.std(dim=(0, 2, 3)) - 1).abs().max() < 0.05
    after = model.decoder.conv_in(mean).detach()
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))  # borders see another padding
    assert (after - before)[inside].norm() < 0.02 * before[inside].norm()  # encoded in bfloat16


def test_a_few_steps_of_the_autoencoder_run_through_all_phases():
    model, pictures = small_autoencoder(), draw_pictures(1, 8)
    plan = AutoencoderPlan(crop_steps=2, whole_steps=1, decoder_crop_steps=2, decoder_whole_steps=1, batch_size=2)
    train_autoencoder(model, pictures, plan, seed=1)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
