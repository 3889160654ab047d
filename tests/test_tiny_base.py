"""The embedded base: small enough, complete, read by the loaders that real checkpoints go through, and obedient to
prompts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from library.components.text_encoder_utils import load_clip_l, load_t5xxl
from library.components.tokenizers import load_clip_tokenizer, load_t5_tokenizer, vocabulary_problem
from library.flux_utils import (
    inspect_ae,
    inspect_flow_model,
    load_ae,
    load_flux,
    pack_latents,
    prepare_img_ids,
    unpack_latents,
)
from library.safetensors_utils import read_header

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "tiny-flux"
FILES = ("flux1-tiny.safetensors", "ae.safetensors", "clip_l.safetensors", "t5xxl.safetensors")
LARGEST_BYTES = 20_000_000
T5_LENGTH = 32


@pytest.fixture(scope="module")
def tokenizers():
    cache = str(FOLDER / "tokenizers")
    return load_clip_tokenizer(cache_dir=cache), load_t5_tokenizer(cache_dir=cache)


@pytest.fixture(scope="module")
def base():
    loaders = (load_flux, load_ae, load_clip_l, load_t5xxl)
    return tuple(
        load(str(FOLDER / name), torch.float32, "cpu").eval().requires_grad_(False)
        for load, name in zip(loaders, FILES)
    )


def test_all_files_together_stay_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= LARGEST_BYTES


@pytest.mark.parametrize("name", FILES)
def test_a_file_carries_its_hyper_parameters(name):
    infos, metadata = read_header(FOLDER / name)
    assert json.loads(metadata["model_config"])
    floats = {info.dtype for key, info in infos.items() if key != "spiece_model"}
    assert floats == {torch.float16}


def test_it_is_of_the_dev_type_and_its_shapes_tell_the_rest():
    params = inspect_flow_model(str(FOLDER / FILES[0])).params
    head = params.head_dim
    assert params.guidance_embed and params.axes_dim == (head // 8, 7 * head // 16, 7 * head // 16)
    autoencoder = inspect_ae(str(FOLDER / FILES[1])).params
    assert (autoencoder.z_channels, autoencoder.spatial_stride) == (16, 8)


def test_vocabularies_fit_the_encoders(base, tokenizers):
    _, _, clip, t5 = base
    assert (
        vocabulary_problem(tokenizers[0], clip.text_model.embeddings.token_embedding.num_embeddings, "CLIP", "clip_l")
        is None
    )
    assert vocabulary_problem(tokenizers[1], t5.shared.num_embeddings, "T5", "t5xxl") is None


def test_the_vocabulary_inside_the_t5_file_is_the_one_in_the_folder(tokenizers):
    inside = load_t5_tokenizer(model_path=str(FOLDER / "t5xxl.safetensors"))
    for text in ("a large red circle, blue background", "A zorbit!", "naïve 猫"):
        assert inside(text).input_ids == tokenizers[1](text).input_ids


@pytest.mark.parametrize("text", ["zorbit", "Xyqwlk9", "übergröße", "猫", "sks-person_01"])
def test_any_word_becomes_known_pieces(tokenizers, text):
    clip, t5 = tokenizers
    t5_ids = t5(text).input_ids
    assert t5.unk_token_id not in t5_ids and len(t5_ids) > 2
    assert len(clip(text).input_ids) > 3  # more than start, one piece, end


def test_known_words_are_one_piece(tokenizers):
    clip, t5 = tokenizers
    assert len(t5("a large red circle on a blue background").input_ids) == 9
    assert len(clip("a large red circle on a blue background").input_ids) == 10


def sample_pictures(
    base, tokenizers, prompts: list[str], seed: int = 3, steps: int = 16, cfg_scale: float = 3.0
) -> np.ndarray:
    """[N, 64, 64, 3] in 0..255, all from the same noise; the plain formulas of the model card, apart from the project's
    sampler."""
    denoiser, autoencoder, clip, t5 = base
    ids = [
        torch.tensor(tokenizer([*prompts, ""], padding="max_length", truncation=True, max_length=length).input_ids)
        for tokenizer, length in zip(tokenizers, (77, T5_LENGTH))
    ]
    pooled, text = clip(input_ids=ids[0]).text_embeds, t5(input_ids=ids[1]).last_hidden_state
    count = len(prompts)
    order = [*range(count), *[count] * count]  # with text, then without
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(seed)).expand(count, -1, -1, -1)
    state, img_ids = pack_latents(noise), prepare_img_ids(2 * count, 4, 4)
    even = torch.linspace(1, 0, steps + 1)
    shift = math.exp(0.46)
    sigmas = shift * even / (1 + (shift - 1) * even)
    for now, following in zip(sigmas, sigmas[1:]):
        velocity = denoiser(
            torch.cat((state, state)), img_ids, text[order], torch.zeros(2 * count, T5_LENGTH, 3),
            now.expand(2 * count), pooled[order],
            torch.ones(2 * count),
        )
        told, untold = velocity.chunk(2)
        state = state + (following - now) * (untold + cfg_scale * (told - untold))
    pictures = autoencoder.decode(unpack_latents(state, 4, 4)).clamp(-1, 1)
    return ((pictures + 1) * 127.5).permute(0, 2, 3, 1).numpy()


def test_samples_follow_the_prompt(base, tokenizers):
    colours = {"red": (220, 45, 45), "green": (50, 160, 75), "blue": (50, 90, 220), "yellow": (250, 215, 55)}
    things, grounds = ("red", "yellow", "blue", "green"), ("blue", "green", "yellow", "red")
    pictures = sample_pictures(
        base, tokenizers, [f"a large {t} circle on a {g} background" for t, g in zip(things, grounds)]
    )
    for picture, thing, ground in zip(pictures, things, grounds):
        middle = picture[28:36, 28:36].mean(axis=(0, 1))
        corners = np.concatenate([picture[:6, :6], picture[:6, -6:], picture[-6:, :6], picture[-6:, -6:]]).mean(
            axis=(0, 1)
        )
        assert nearest(middle, colours) == thing and nearest(corners, colours) == ground


def nearest(colour: np.ndarray, colours: dict[str, tuple[int, int, int]]) -> str:
    return min(colours, key=lambda name: float(np.square(colour - np.array(colours[name])).sum()))


def test_the_autoencoder_keeps_a_picture(base):
    from PIL import Image

    _, autoencoder, _, _ = base
    with Image.open(sorted((FOLDER.parents[1] / "examples/demo/images").glob("*.png"))[0]) as image:
        pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    latents = autoencoder.encode(pixels)
    assert latents.shape == (1, 16, 8, 8) and 0.5 < latents.std() < 1.6
    assert (autoencoder.decode(latents) - pixels).abs().mean() < 0.12
