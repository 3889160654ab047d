"""Denoisers on batches of several sizes at once: predictions and gradients are those of each batch alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from library.attention import use_attention
from library.components.block_calls import DenoiserCall, denoise_together
from library.components.packed_tokens import Piece, SampleVectors, Segments, Stream, ropes, segments, vectors
from library.core.attention_modes import AttentionChoice
from library.core.courses import course, run_together
from library.flux_utils import prepare_img_ids
from tests.library.components.deep_denoisers import Denoiser
from tests.library.components.test_block_ring import learn_beside, learn_whole, swapped
from tests.simulated_device import simulated_device

SIZES = ((2, 4, 6, 5), (1, 6, 4, 3), (3, 4, 2, 5), (1, 2, 8, 4))
"""(samples, rows, columns, text tokens) of each part; two of them have as many picture tokens as another"""
Inputs = dict[str, Any]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(97 * seed + sum(shape)))


def mask(samples: int, tokens: int) -> Tensor:
    """Of the captions, each shorter than the one before."""
    return torch.tensor([[1] * max(tokens - i, 1) + [0] * min(i, tokens - 1) for i in range(samples)])


def times(samples: int, scale: float) -> Tensor:
    return torch.linspace(0.2, 0.9, samples) * scale


def flux(params: Any, b: int, h: int, w: int, t: int) -> Inputs:
    return {
        "img": normal(b, h * w // 4, params.in_channels), "img_ids": prepare_img_ids(1, h // 2, w // 2),
        "txt": normal(b, t, params.context_in_dim), "txt_ids": torch.zeros(1, t, 3), "timesteps": times(b, 1.0),
        "y": normal(b, params.vec_in_dim), "guidance": torch.full((b,), 3.5), "txt_attention_mask": mask(b, t),
    }  # fmt: skip


def chroma(params: Any, b: int, h: int, w: int, t: int) -> Inputs:
    return {
        "img": normal(b, h * w // 4, params.in_channels), "img_ids": prepare_img_ids(1, h // 2, w // 2),
        "txt": normal(b, t, params.context_in_dim), "txt_ids": torch.zeros(1, t, 3), "timesteps": times(b, 1.0),
        "txt_attention_mask": mask(b, t),
    }  # fmt: skip


def sd3(params: Any, b: int, h: int, w: int, t: int) -> Inputs:
    return {
        "x": normal(b, 16, h, w), "t": times(b, 1000), "y": normal(b, params.adm_in_channels),
        "context": normal(b, t, params.context_in),
    }  # fmt: skip


def lumina(params: Any, b: int, h: int, w: int, t: int) -> Inputs:
    return {
        "x": normal(b, 16, h, w), "t": times(b, 1.0), "cap_feats": normal(b, t, params.cap_feat_dim),
        "cap_mask": mask(b, t),
    }  # fmt: skip


def anima(params: Any, b: int, h: int, w: int, t: int) -> Inputs:
    return {"x": normal(b, 16, 1, h, w), "timesteps": times(b, 1.0), "context": normal(b, t, params.context_dim)}


def hunyuan_image(params: Any, b: int, h: int, w: int, t: int) -> Inputs:
    return {
        "hidden_states": normal(b, params.in_channels, h, w), "timestep": times(b, 1000),
        "text_states": normal(b, t, params.text_dim), "encoder_attention_mask": mask(b, t),
        "byt5_text_states": normal(b, 2, params.byt5_dim), "byt5_text_mask": mask(b, 2),
    }  # fmt: skip


def wan(params: Any, b: int, h: int, w: int, t: int) -> Inputs:
    return {"x": normal(b, 4, 1 + h // 4, h, w), "t": times(b, 1000), "context": normal(b, t, params.text_dim)}


def hunyuan_video(params: Any, b: int, h: int, w: int, t: int) -> Inputs:
    return {
        "hidden_states": normal(b, params.in_channels, 1 + h // 4, h, w), "timestep": times(b, 1000),
        "text_states": normal(b, t, params.text_dim), "encoder_attention_mask": mask(b, t),
        "text_vector": normal(b, params.vec_dim), "guidance": times(b, 6000),
    }  # fmt: skip


INPUTS: dict[str, Callable[..., Inputs]] = {
    "flux": flux, "chroma": chroma, "sd3": sd3, "lumina": lumina, "anima": anima, "hunyuan_image": hunyuan_image,
    "wan": wan, "hunyuan_video": hunyuan_video,
}  # fmt: skip


def parts_of(denoiser: Denoiser) -> list[Inputs]:
    return [INPUTS[denoiser.family](denoiser.model.params, *size) for size in SIZES]


def apart(denoiser: Denoiser, parts: list[Inputs]) -> list[Tensor]:
    return [denoiser.model(**part) for part in parts]


def together(denoiser: Denoiser, parts: list[Inputs]) -> list[Tensor]:
    return denoise_together([DenoiserCall(denoiser.model, inputs=part) for part in parts])


def results(denoiser: Denoiser, trained: list[Tensor], run: Callable[..., list[Tensor]]) -> list[Tensor]:
    """The predictions and the gradients of a loss in which every sample has its own weight."""
    for one in trained:
        one.grad = None
    made = run(denoiser, parts_of(denoiser))
    weights = itertools.count(1)
    sum(next(weights) * row.float().square().mean() for part in made for row in part).backward()
    return [*(one.detach().clone() for one in made), *(one.grad.clone() for one in trained if one.grad is not None)]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    """To 1e-5 of each tensor; what is a hundredth of the largest and less is a sum that nearly vanishes."""
    largest = max(float(other.norm()) for other in expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert float((one - other).norm()) <= 1e-5 * max(float(other.norm()), 1e-2 * largest)


@pytest.mark.parametrize("learning", [learn_beside, learn_whole])
@pytest.mark.parametrize("family", INPUTS)
def test_equal_to_every_size_alone(family: str, learning: Callable) -> None:
    denoiser = Denoiser(family)
    trained = learning(denoiser)
    assert_close(results(denoiser, trained, together), results(denoiser, trained, apart))


@pytest.mark.parametrize("family", INPUTS)
def test_with_checkpoints_and_features(family: str) -> None:
    """Blocks that are computed again read what they were given, and side outputs are those of each batch."""
    denoiser = Denoiser(family)
    trained = learn_beside(denoiser)
    expected = results(denoiser, trained, together)
    denoiser.model.enable_gradient_checkpointing()
    again = results(denoiser, trained, together)
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))
    last = denoiser.model.depth - 1
    parts = [{**part, "feature_layer": last} for part in parts_of(denoiser)]
    for (velocity, tokens), part in zip(together(denoiser, parts), parts, strict=True):
        alone, own = denoiser.model(**part)
        assert_close([velocity.detach(), tokens.detach()], [alone.detach(), own.detach()])


@pytest.mark.parametrize(("family", "name"), [("wan", "t"), ("anima", "timesteps")])
def test_with_a_time_for_every_frame(family: str, name: str) -> None:
    denoiser = Denoiser(family)
    trained = learn_beside(denoiser)

    def with_frames(run: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
        def of_frames(denoiser: Denoiser, parts: list[Inputs]) -> list[Tensor]:
            for part in parts:
                later = torch.linspace(0.4, 1.0, part["x"].shape[2])
                part[name] = part[name][:, None] * later
            return run(denoiser, parts)

        return of_frames

    assert_close(
        results(denoiser, trained, with_frames(together)), results(denoiser, trained, with_frames(apart))
    )


@pytest.mark.parametrize("family", ["flux", "sd3", "wan"])
def test_with_swapped_blocks(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block travels once for all sizes."""
    plain = Denoiser(family)
    expected = results(plain, learn_beside(plain), together)
    with simulated_device() as device:
        denoiser = swapped(family, device)
        begun = []
        for offloader in denoiser.offloaders:
            monkeypatch.setattr(offloader, "arm", lambda arm=offloader.arm: begun.append(1) or arm())
        found = results(denoiser, learn_beside(denoiser), together)
        assert len(begun) == len(denoiser.offloaders)
        apart(denoiser, parts_of(denoiser)[:2])
        assert len(begun) == 3 * len(denoiser.offloaders)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("choice", [AttentionChoice("torch", split=True), AttentionChoice("flex")])
def test_with_other_attention(choice: AttentionChoice) -> None:
    denoiser = Denoiser("flux")
    with torch.no_grad():
        expected = apart(denoiser, parts_of(denoiser))
        use_attention(denoiser.model, choice)
        assert_close(together(denoiser, parts_of(denoiser)), expected)


def test_one_size_is_an_ordinary_batch() -> None:
    denoiser = Denoiser("flux")
    (part, *_) = parts_of(denoiser)
    assert torch.equal(together(denoiser, [part])[0], denoiser.model(**part))


def test_every_block_runs_once() -> None:
    denoiser, runs = Denoiser("hunyuan_image"), []
    for block in denoiser.model.repeated_blocks():
        block.register_forward_hook(lambda block, *_: runs.append(block))
    together(denoiser, parts_of(denoiser))
    assert runs == denoiser.model.repeated_blocks()


# -- the pieces --------------------------------------------------------------------------------------------------------


def test_streams_join_split_and_spread() -> None:
    parts = [normal(2, 3, 4), normal(1, 5, 4)]
    stream = Stream.of(parts)
    row = stream.join(parts)
    assert row.shape == (1, 11, 4)
    assert all(torch.equal(one, other) for one, other in zip(stream.split(row), parts, strict=True))
    spread = stream.spread(torch.tensor([[1.0], [2.0], [3.0]]))
    assert spread[0, :, 0].tolist() == [1.0] * 3 + [2.0] * 3 + [3.0] * 5


def test_vectors_of_tokens_join_and_have_no_text() -> None:
    stream = Stream(((1, 2), (1, 3)))
    assert isinstance(vectors([normal(1, 4), normal(1, 4)], stream), SampleVectors)
    of_tokens = [normal(1, 2, 4), normal(1, 3, 4)]
    assert torch.equal(vectors(of_tokens, stream), torch.cat(of_tokens, dim=1))
    with pytest.raises(ValueError, match="single tokens"):
        vectors(of_tokens, stream, text=stream)


def test_tables_are_those_of_the_row_and_end_where_nothing_is_turned() -> None:
    text, image = Stream(((2, 1), (1, 2))), Stream(((2, 2), (1, 1)))
    one, two = normal(1, 3, 1), normal(1, 2, 1)  # the second ends before its last token
    cosines, sines = ropes([(one, one), (two, two)], (text, image))
    assert cosines.flatten().tolist() == [*[one[0, 0, 0]] * 2, *two[0, :, 0], *[*one[0, 1:, 0]] * 2, 1.0]
    assert sines.flatten().tolist() == [*[one[0, 0, 0]] * 2, *two[0, :, 0], *[*one[0, 1:, 0]] * 2, 0.0]


def test_segments_say_where_the_tokens_of_a_part_lie() -> None:
    text, image = Stream(((2, 1), (1, 2))), Stream(((2, 3), (1, 4)))
    found = segments((text, image))
    assert found == Segments(
        ((Piece(0, 2, 1), Piece(4, 2, 3)), (Piece(2, 1, 2), Piece(10, 1, 4))),
        ((Piece(0, 2, 1), Piece(4, 2, 3)), (Piece(2, 1, 2), Piece(10, 1, 4))), (None, None),
    )  # fmt: skip


def test_courses_end_together() -> None:
    @course
    def counted(number: int):
        for _ in range(number):
            yield DenoiserCall(torch.nn.Identity(), (torch.zeros(1),))
        return number

    assert counted(2) == 2
    with pytest.raises(RuntimeError, match="of 2 courses 1 end before the others"):
        run_together([counted.course(1), counted.course(2)], lambda requests: [None] * len(requests))
