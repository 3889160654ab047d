"""What the denoiser of HunyuanVideo is given: guidance, first frames, times of frames, text without padding; noise of
samples."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from library.components.clip_tokens import needed_text, times_of_tokens
from library.core.errors import ConfigError
from library.generation.hunyuan_video_pipeline import HunyuanVideoPipeline
from library.generation.video_requests import VideoRequest
from library.hunyuan_video_models import HYVideoParams
from library.hunyuan_video_train_utils import predict_velocity, shown_latents

LATENTS = torch.arange(2 * 2 * 3 * 4 * 4, dtype=torch.float32).view(2, 2, 3, 4, 4)


class Denoiser(torch.nn.Module):
    """Notes what it is given."""

    device = torch.device("cpu")

    def __init__(self, **params) -> None:
        super().__init__()
        sizes = {"in_channels": 2, "out_channels": 2, "hidden_size": 16, "num_heads": 1, "rope_dim_list": (4, 6, 6)}
        self.params = HYVideoParams(**{**sizes, **params})

    def forward(self, *given, **named):
        self.given, self.named = given, named
        return given[0][:, : self.params.out_channels]


def texts(*lengths: int) -> dict[str, torch.Tensor]:
    mask = (torch.arange(8) < torch.tensor(lengths)[:, None]).long()
    return {"llm": torch.ones(len(lengths), 8, 3), "llm_mask": mask, "clipL": torch.ones(len(lengths), 5)}


def test_what_a_model_is_given() -> None:
    denoiser = Denoiser()
    predict_velocity(denoiser, LATENTS, torch.tensor([10.0, 20.0]), texts(3, 5), guidance=6.0)
    latents, times, states, mask, vector = denoiser.given
    assert torch.equal(latents, LATENTS) and times.tolist() == [10, 20] and vector.shape == (2, 5)
    assert states.shape == (2, 5, 3) and mask.sum(dim=1).tolist() == [3, 5]
    assert denoiser.named["guidance"].tolist() == [6000, 6000]
    plain = Denoiser(guidance_embed=False)
    predict_velocity(plain, LATENTS, torch.tensor([10.0, 20.0]), texts(5, 5), guidance=6.0)
    assert plain.named["guidance"] is None and plain.given[3] is None, "a mask that hides nothing is left out"


def test_the_first_frame_and_zeros_behind_it() -> None:
    first = torch.full((2, 2, 1, 4, 4), 7.0)
    assert shown_latents(first, 3)[0, 0, :, 0, 0].tolist() == [7, 0, 0] and shown_latents(first, 1).shape[2] == 1
    denoiser = Denoiser(in_channels=4)
    with pytest.raises(ValueError, match="first_frame is None"):
        predict_velocity(denoiser, LATENTS, torch.tensor([1.0, 2.0]), texts(1, 1), guidance=1.0)
    result = predict_velocity(
        denoiser, LATENTS, torch.tensor([1.0, 2.0]), texts(1, 1), guidance=1.0, first_frame=first
    )
    noisy, shown = denoiser.given[0].chunk(2, dim=1)
    assert torch.equal(noisy, LATENTS) and torch.equal(shown, shown_latents(first, 3))
    assert result.shape == LATENTS.shape


def test_times_of_frames_are_those_of_their_tokens() -> None:
    assert times_of_tokens(torch.tensor([5.0]), 3, 12).tolist() == [5]
    assert times_of_tokens(torch.tensor([[1.0, 2.0, 3.0]]), 3, 12).tolist() == [[1] * 4 + [2] * 4 + [3] * 4]
    whole = torch.rand(1, 12)
    assert times_of_tokens(whole, 3, 12) is whole


def test_padding_that_no_caption_of_the_batch_needs_is_left_out() -> None:
    def needed(*lengths: int):
        text = texts(*lengths)
        return needed_text(text["llm"], text["llm_mask"])

    states, mask = needed(2, 4)
    assert states.shape[1] == 4 and mask.shape == (2, 4)
    assert needed(0, 0)[0].shape[1] == 1, "one place stays"
    assert needed(8, 8)[1] is None


def request(**settings) -> VideoRequest:
    return VideoRequest(**{"prompt": "x", "width": 32, "height": 16, "frames": 9, "steps": 4, "seed": 3, **settings})


def test_first_frames_of_a_seed_are_equal_for_every_length() -> None:
    pipeline = HunyuanVideoPipeline(Denoiser(), None)
    long, short, picture = (pipeline.noise(request(frames=frames)) for frames in (9, 5, 1))
    assert long.shape == (1, 16, 3, 2, 4) and torch.equal(long[:, :, :2], short) and picture.shape == (1, 16, 2, 4)
    assert torch.equal(picture, long[:, :, 0]) and not torch.equal(pipeline.noise(request(seed=4)), long)


def test_the_times_of_the_steps() -> None:
    """s x / (1 + (s - 1) x) of evenly spaced x; the shift is larger where there are few steps."""
    pipeline = HunyuanVideoPipeline(Denoiser(), None)
    for steps, given, shift in ((4, None, 17.0), (20, None, 7.0), (4, 3.0, 3.0)):
        x = torch.linspace(1, 0, steps + 1)
        expected = shift * x / (1 + (shift - 1) * x)
        torch.testing.assert_close(pipeline.sigmas(request(steps=steps, flow_shift=given)), expected)


def test_a_picture_is_encoded_once_and_needed_where_a_first_frame_is_shown(tmp_path) -> None:
    from PIL import Image

    calls = []

    def encode_raw(pixels, seeds):
        calls.append((tuple(pixels.shape), tuple(seeds)))
        return torch.full((1, 2, 1, 2, 4), 2.0)

    vae = SimpleNamespace(
        device=torch.device("cpu"), to=lambda device: None, encode_raw=encode_raw,
        params=SimpleNamespace(scaling_factor=0.5),
    )  # fmt: skip
    Image.new("RGB", (40, 20)).save(tmp_path / "x.png")
    pipeline = HunyuanVideoPipeline(Denoiser(in_channels=4), vae)
    asked = request(image_path=str(tmp_path / "x.png"))
    latents = torch.zeros(2, 2, 3, 2, 4)
    for _ in range(2):
        pipeline.velocity(latents, torch.tensor([1.0, 1.0]), texts(2, 2), asked)
    assert calls == [((1, 3, 1, 16, 32), (3,))]
    shown = pipeline.denoiser.given[0][:, 2:]
    assert shown[:, :, 0].unique().tolist() == [1.0] and not shown[:, :, 1:].any()
    with pytest.raises(ConfigError, match="there is no picture for the first frame"):
        pipeline.velocity(latents, torch.tensor([1.0, 1.0]), texts(2, 2), request())
    assert HunyuanVideoPipeline(Denoiser(), None).first_frame(request()) is None
