"""Pictures of the steps in between: by colours and by tiny autoencoders, computed a second time; what is made is the
same with and without them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional

from library.core.errors import AtelierError, ConfigError
from library.families.registry import record_of
from library.generation import flux_inference
from library.generation.preview_options import PreviewOptions
from library.generation.previews import Previews, linear_pictures, preview_problems, previews_of
from library.generation.tiny_decoders import clip_layers, load_tiny_decoder, picture_layers
from library.generation.video_files import read_video
from library.tiny_models import build_tiny
from library.training.inference_samplers import FLOW_SAMPLER_NAMES
from library.training.inference_samplers.common import noise_of
from library.training.inference_samplers.flow import flow_sampler, flow_schedule, observed
from tests.library.test_framepack_inference import run as run_framepack
from tests.library.test_framepack_inference import tiny as framepack  # noqa: F401
from tests.library.test_wan_inference import run as run_wan
from tests.library.test_wan_inference import tiny as wan  # noqa: F401


def randomized(layers: torch.nn.Module, seed: int = 3) -> torch.nn.Module:
    draws = torch.Generator().manual_seed(seed)
    for parameter in layers.parameters():
        spread = 0.7 / parameter[0].numel() ** 0.5 if parameter.ndim == 4 else 0.1
        parameter.data = torch.randn(parameter.shape, generator=draws) * spread
    parameter.data += 0.5  # of the last layer: the middle of the colours
    return layers


def convolved(x: np.ndarray, state: dict[str, torch.Tensor], name: str) -> np.ndarray:
    """[C, h, w], by sums over the places of the kernel."""
    weight = state[f"{name}.weight"].double().numpy()
    edge, (height, width) = weight.shape[-1] // 2, x.shape[1:]
    padded = np.pad(x, ((0, 0), (edge, edge), (edge, edge)))
    made = sum(
        np.einsum("oc,chw->ohw", weight[:, :, i, j], padded[:, i : i + height, j : j + width])
        for i in range(weight.shape[2]) for j in range(weight.shape[3])
    )
    bias = state.get(f"{name}.bias")
    return made if bias is None else made + bias.double().numpy()[:, None, None]


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def block(x: np.ndarray, seen: np.ndarray, state: dict[str, torch.Tensor], number: int) -> np.ndarray:
    hidden = relu(convolved(seen, state, f"{number}.conv.0"))
    hidden = relu(convolved(hidden, state, f"{number}.conv.2"))
    return relu(convolved(hidden, state, f"{number}.conv.4") + x)


def twice(x: np.ndarray) -> np.ndarray:
    return x.repeat(2, axis=1).repeat(2, axis=2)


def test_a_preview_that_comes_too_late_is_told(tmp_path, caplog):
    caplog.set_level("INFO")
    seen = Previews(tmp_path, 5, lambda latents: torch.zeros(1, 3, 8, 8), 1)
    for step in range(1, 5):
        seen(step, 4, torch.zeros(1, 16, 2, 2))
    assert [record.message for record in caplog.records] == ["no preview: --preview_latent_every is 5, and there are 4"]
    seen(5, 5, torch.zeros(1, 16, 2, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["latent_preview.png"]


def test_colours_are_those_of_the_table():
    latents = torch.randn(16, 2, 3, 4, generator=torch.Generator().manual_seed(1))
    for family in ("flux", "wan", "hunyuan_video"):
        colours = record_of(family).latent_colours
        table = np.array(colours)
        rgb = np.einsum("cfhw,ck->fkhw", latents.double().numpy(), table[:16]) + table[16][None, :, None, None]
        rgb = (rgb - rgb.min()) / (rgb.max() - rgb.min())
        made = linear_pictures(latents, colours)
        assert made.shape == (2, 3, 24, 32) and made.min() >= 0 and made.max() <= 1
        expected = functional.interpolate(torch.from_numpy(rgb), size=(24, 32), mode="bicubic").clamp(0, 1)
        torch.testing.assert_close(made.double(), expected, atol=1e-5, rtol=0)
    assert record_of("flux").latent_colours[0] == (-0.0346, 0.0244, 0.0681)
    assert record_of("wan").latent_colours[16] == (-0.1835, -0.0868, -0.336)
    shared = {"framepack": "hunyuan_video", "chroma": "flux", "lumina": "flux", "anima": "wan"}
    assert all(record_of(a).latent_colours == record_of(b).latent_colours for a, b in shared.items())
    assert not record_of("sd3").latent_colours and not record_of("hunyuan_image").latent_colours


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_taesd_by_hand(tmp_path, layout):
    state = randomized(picture_layers(16, 6)).state_dict()
    named = state
    if layout == "diffusers":
        named = {f"decoder.layers.{int(k.split('.')[0]) - 1}.{k.partition('.')[2]}": v for k, v in state.items()}
        named["encoder.layers.0.weight"] = torch.zeros(6, 3, 3, 3)
    save_file(named, tmp_path / "tiny.safetensors")
    latents = torch.randn(16, 1, 2, 3, generator=torch.Generator().manual_seed(2))
    x = 3 * np.tanh(latents[:, 0].double().numpy() / 3)
    x = relu(convolved(x, state, "1"))
    for start in (3, 8, 13):
        for number in range(start, start + 3):
            x = block(x, x, state, number)
        x = convolved(twice(x), state, str(start + 4))
    expected = convolved(block(x, x, state, 18), state, "19").clip(0, 1)
    decoder = load_tiny_decoder(str(tmp_path / "tiny.safetensors"))
    assert not decoder.is_clips and decoder.channels == 16
    assert 0.05 < ((expected > 0) & (expected < 1)).mean()
    np.testing.assert_allclose(decoder(latents)[0].numpy(), expected, atol=1e-3)


def test_taehv_by_hand(tmp_path):
    """Twice, so that nothing is remembered from one clip to the next; one file makes more frames than count."""
    layers = randomized(clip_layers(16, (6, 4, 3, 3)))
    state = layers.state_dict()
    kept = dict(state)
    kept["7.conv.weight"] = torch.cat((torch.ones(6, 6, 1, 1), state["7.conv.weight"]))
    torch.save({f"decoder.{key}": value for key, value in kept.items()}, tmp_path / "tiny.pth")
    latents = torch.randn(16, 3, 2, 2, generator=torch.Generator().manual_seed(2))
    frames = [relu(convolved(3 * np.tanh(f.double().numpy() / 3), state, "1")) for f in latents.movedim(1, 0)]
    for start, count in ((3, 1), (9, 2), (15, 2)):
        for number in range(start, start + 3):
            before = [np.zeros_like(frames[0]), *frames[:-1]]
            frames = [block(x, np.concatenate((x, old)), state, number) for x, old in zip(frames, before)]
        grown = [np.split(convolved(twice(x), state, f"{start + 4}.conv"), count) for x in frames]
        frames = [convolved(part, state, f"{start + 5}") for parts in grown for part in parts]
    expected = np.stack([convolved(relu(x), state, "22") for x in frames])[3:].clip(0, 1)
    decoder = load_tiny_decoder(str(tmp_path / "tiny.pth"))
    assert decoder.is_clips and expected.shape == (9, 3, 16, 16)
    assert 0.05 < ((expected > 0) & (expected < 1)).mean()
    for _ in range(2):
        np.testing.assert_allclose(decoder(latents).numpy(), expected, atol=1e-3)


def test_files_that_do_not_fit_are_refused(tmp_path):
    pictures, clips, few, other, text = (tmp_path / f"{n}.safetensors" for n in ("p", "c", "f", "o", "t"))
    save_file(picture_layers(16, 4).state_dict(), pictures)
    save_file(clip_layers(16, (4, 4, 4, 4)).state_dict(), clips)
    save_file(picture_layers(4, 4).state_dict(), few)
    save_file({"1.weight": torch.zeros(3)}, other)
    text.write_text("no tensors")
    assert preview_problems("flux", str(pictures)) == [] == preview_problems("sd3", str(pictures))
    assert preview_problems("wan", str(clips)) == [] == preview_problems("wan", None)
    for family, file, words in (
        ("wan", pictures, "needed for Wan.*TAEHV"), ("flux", clips, "needed for FLUX.*TAESD"),
        ("flux", few, "4 channels; the latents of FLUX.* have 16"), ("flux", other, "no tiny autoencoder"),
        ("flux", text, "--preview_vae"), ("flux", tmp_path / "none.pth", "no such file"),
        ("sd3", None, "no table of colours.*--preview_vae FILE"), ("hunyuan_image", None, "64 channels"),
    ):  # fmt: skip
        problem = preview_problems(family, None if file is None else str(file))
        assert len(problem) == 1, (family, file, problem)
        with pytest.raises(ConfigError, match=words):
            raise ConfigError(problem)
    with pytest.raises(ConfigError, match="--preview_latent_every is -1"):
        PreviewOptions(preview_latent_every=-1)
    assert "no effect" in PreviewOptions(preview_vae="x").notices()[0] and PreviewOptions().notices() == []


def test_every_flow_sampler_is_seen_once_in_each_step():
    """With a model that knows the data, each estimate is the data; what is made does not change."""
    data, start = torch.full((1, 2, 2), 0.25), torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(0))
    sigmas = flow_schedule(4, 3.0)

    def velocity(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return (latents - data) / float(sigma)

    for name in FLOW_SAMPLER_NAMES:
        seen: list[tuple[int, int]] = []

        def observe(step: int, steps: int, clean: torch.Tensor) -> None:
            seen.append((step, steps))
            torch.testing.assert_close(clean, data)

        made = [
            flow_sampler(name)(denoise, start, sigmas, noise_of([torch.Generator().manual_seed(1)], start))
            for denoise in (velocity, observed(velocity, sigmas, observe))
        ]
        assert torch.equal(*made), name
        assert seen == [(step, 4) for step in range(1, 5)], name


def test_clips_are_written_at_their_rate(tmp_path):
    latents = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    observe = previews_of("wan", tmp_path, 2, None, 3)
    assert isinstance(observe, Previews) and observe.fps == 1
    assert previews_of("wan", tmp_path, 2, None, 24.0).fps == 6
    observe(1, 4, latents)
    assert not list(tmp_path.iterdir())
    observe(2, 4, latents)
    assert [path.name for path in tmp_path.iterdir()] == ["latent_preview.mp4"]
    frames = read_video(tmp_path / "latent_preview.mp4")
    assert len(frames) == 3 and frames[0].size == (32, 32)
    observe(4, 4, latents[:, :, :1])
    assert (tmp_path / "latent_preview.png").is_file()


def test_a_preview_that_cannot_be_written_is_told(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    previews_of("flux", tmp_path / "file", 1, None, 1)(1, 2, torch.zeros(1, 16, 2, 2))
    assert "no preview of step 1 of 2" in caplog.text


def test_a_picture_script_makes_the_same_with_previews(tmp_path):
    tiny = build_tiny("flux", tmp_path / "tiny")
    names = ("ae", "clip_l", "t5xxl", "clip_l_tokenizer")
    words = [f"--ckpt_path={tiny.flux}", *(f"--{name}={getattr(tiny, name)}" for name in names)]
    words += ["--prompt=a red cat", "--seed=5", "--width=64", "--height=32", "--steps=3", "--dtype=float32"]
    words += ["--t5xxl_max_token_length=16"]
    save_file(randomized(picture_layers(16, 4)).state_dict(), tmp_path / "tiny.safetensors")
    made = []
    for name, more in {
        "without": [], "colours": ["--preview_latent_every=2"],
        "tiny": ["--preview_latent_every=1", f"--preview_vae={tmp_path / 'tiny.safetensors'}"],
    }.items():  # fmt: skip
        (path,) = flux_inference.SCRIPT.run([*words, f"--output_dir={tmp_path / name}", *more])
        made.append(Path(path).read_bytes())
        preview = tmp_path / name / "latent_preview.png"
        assert preview.is_file() == bool(more)
        if more:
            with Image.open(preview) as image:
                assert image.size == (64, 32)
    assert made[0] == made[1] == made[2], "pictures and what they tell of their settings"
    with pytest.raises(AtelierError, match="--preview_vae is .*no such file"):
        given = ["--preview_latent_every=1", "--preview_vae=x.pth"]
        flux_inference.SCRIPT.run([*words, f"--output_dir={tmp_path}", *given])


def test_a_video_script_makes_the_same_with_previews(wan, tmp_path):  # noqa: F811
    save_file(randomized(clip_layers(16, (4, 4, 4, 4))).state_dict(), tmp_path / "tiny.safetensors")
    made = []
    for name, more, frames in (
        ("without", [], 0), ("colours", ["--preview_latent_every=2"], 2),
        ("tiny", ["--preview_latent_every=1", f"--preview_vae={tmp_path / 'tiny.safetensors'}"], 5),
    ):  # fmt: skip
        (path,) = run_wan(wan, tmp_path / name, *more)
        made.append(Path(path).read_bytes())
        preview = tmp_path / name / "latent_preview.mp4"
        assert len(read_video(preview) if preview.exists() else []) == frames
    assert made[0] == made[1] == made[2], "clips and what they tell of their settings"


def test_clips_of_sections_are_shown_by_section(framepack, tmp_path, caplog):  # noqa: F811
    caplog.set_level("INFO")
    run_framepack(framepack, tmp_path, "--video_sections=2", "--preview_latent_every=1", "--output_type=latent")
    assert "preview of step 1 of 2" in caplog.text and "preview of step 2 of 2" in caplog.text
