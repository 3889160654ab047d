"""The denoiser of FramePack against the class of diffusers, whose random weights it is given."""

from __future__ import annotations

import pytest
import torch

from library.framepack_models import CleanFrames, FramePackParams, HunyuanVideoTransformer3DModelPacked

diffusers = pytest.importorskip("diffusers")

SIZES = {
    "num_attention_heads": 3, "attention_head_dim": 24, "num_layers": 2, "num_single_layers": 3,
    "num_refiner_layers": 2, "text_embed_dim": 20, "pooled_projection_dim": 12, "image_proj_dim": 10,
    "rope_axes_dim": (4, 8, 12),
}  # fmt: skip


@pytest.fixture(scope="module")
def models() -> tuple[torch.nn.Module, HunyuanVideoTransformer3DModelPacked]:
    torch.manual_seed(3)
    theirs = diffusers.HunyuanVideoFramepackTransformer3DModel(
        **SIZES, has_image_proj=True, has_clean_x_embedder=True
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.12)
    ours = HunyuanVideoTransformer3DModelPacked(FramePackParams(**SIZES)).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def drawn(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


@pytest.mark.parametrize(("height", "width", "far"), [(8, 8, 16), (6, 10, 4), (4, 14, 5), (2, 2, 1)])
@torch.no_grad()
def test_denoiser(models, height: int, width: int, far: int) -> None:
    """Sizes and numbers of frames that patches of coarse frames do not divide; samples with captions of several
    lengths, which diffusers computes one by one as batches of it let padded text see the frames."""
    theirs, ours = models
    draws = torch.Generator().manual_seed(5)
    x, near, middle, coarse = (drawn(draws, 2, 16, frames, height, width) for frames in (3, 2, 2, far))
    txt, pooled, image = drawn(draws, 2, 7, 20), drawn(draws, 2, 12), drawn(draws, 2, 5, 10)
    mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4])
    times, guidance = torch.tensor([130.0, 912.5]), torch.tensor([1000.0, 10000.0])
    rows = (torch.arange(1, 4), torch.tensor([0, 4]), torch.arange(5, 7), torch.arange(7, 7 + far))
    places = [torch.stack((row, row + 9)) for row in rows]
    clean = CleanFrames(near=(near, places[1]), middle=(middle, places[2]), far=(coarse, places[3]))
    result = ours(x, times, txt, mask, pooled, image, places[0], clean, guidance=guidance)
    for row in range(2):
        one = slice(row, row + 1)
        expected = theirs(
            x[one], times[one], txt[one], mask[one], pooled[one], image[one], places[0][row], guidance[one],
            near[one], places[1][row], middle[one], places[2][row], coarse[one], places[3][row], return_dict=False,
        )[0]  # fmt: skip
        assert ((result[one] - expected).norm() / expected.norm()).item() < 1e-5


@torch.no_grad()
def test_times_of_tokens_and_what_is_left_out(models) -> None:
    """One time for all tokens is the time of the sample; a section without other frames has tokens of its own alone,
    and coarse frames take part."""
    _, ours = models
    draws = torch.Generator().manual_seed(6)
    x, near = drawn(draws, 1, 16, 2, 4, 6), drawn(draws, 1, 16, 1, 4, 6)
    text = (drawn(draws, 1, 7, 20), None, drawn(draws, 1, 12), drawn(draws, 1, 5, 10), torch.tensor([[3, 4]]))
    time, guidance = torch.tensor([250.0]), torch.tensor([1000.0])
    clean = CleanFrames(near=(near, torch.tensor([[0]])))
    plain = ours(x, time, *text, clean, guidance=guidance)
    per_token, features = ours(x, time.expand(1, 12), *text, clean, guidance=guidance, feature_layer=4)
    torch.testing.assert_close(per_token, plain)
    assert features.shape == (1, 12, 72)
    coarse = CleanFrames(near=clean.near, far=(near.repeat(1, 1, 4, 1, 1), torch.tensor([[8, 9, 10, 11]])))
    others = [
        ours(x, time, *text, guidance=guidance),
        ours(x, time, *text, coarse, guidance=guidance),
        ours(x, time, *text, clean, guidance=guidance, rope_scale=0.5),
    ]
    assert min(((other - plain).norm() / plain.norm()).item() for other in others) > 1e-5
