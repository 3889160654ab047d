"""Packs of pictures at their own size, and texts without padding, through the command line."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from library.core.errors import AtelierError
from library.dataset.packed_batch import PackedBatch
from library.training import cache_tools
from library.training.hooks.info_noise import InfoNoiseHook, some_of
from library.training.packing_options import idle_beside_packs
from tests.golden_tests.test_metadata_run import metadata_of
from tests.runs.conftest import Work, fingerprint
from tests.runs.families import Tinies, refused_run
from tests.runs.test_packing import FAMILIES as PACKING_FAMILIES
from tests.runs.test_packing import draw, mixed_dataset, shaken, step_results
from tests.tiny_clips import write_moving_shapes

NATIVE = ("--navit_packing", "--navit_native_resolution")
SIZES = ((70, 55), (90, 64), (64, 110), (130, 40), (64, 64))
CUT = {(64, 48), (80, 64), (64, 96), (128, 32), (64, 64)}


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Tinies:
    return Tinies(tmp_path_factory)


@pytest.fixture
def odd(work: Work, tmp_path: Path) -> Work:
    """FLUX.1 on pictures of odd sizes."""
    work.images = draw(tmp_path / "odd", SIZES)
    return work


def sizes_of(pack: PackedBatch) -> set[tuple[int, int]]:
    return {tuple(reversed(size)) for part in pack.parts for size in part.target_sizes_hw.tolist()}


def test_pictures_keep_their_sizes(odd: Work) -> None:
    run = odd.prepare("out", *NATIVE)
    (pack,) = run.data.batches(1)
    assert len(pack) == 5 and sizes_of(pack) == CUT
    for part in pack.parts:
        assert ((part.original_sizes_hw - part.target_sizes_hw) < 16).all()
        assert part.images.shape[-2:] == tuple(part.target_sizes_hw[0].tolist())


def test_what_is_over_the_budget_is_scaled_or_refused(
    odd: Work, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = odd.prepare("out", *NATIVE, "--navit_token_budget=16")
    parts = [part for pack in run.data.batches(1) for part in pack.parts]
    assert all(part.images.shape[-1] * part.images.shape[-2] <= 16 * 256 for part in parts)
    refused = odd.argv("refused", *NATIVE, "--navit_token_budget=16", "--navit_native_over_budget=fail")
    message = refused_run("flux", refused, monkeypatch, capsys)
    assert "2 of the samples" in message and "(64x110, 24 tokens)" in message


def test_a_cache_that_is_made_beforehand_is_used(odd: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = odd.dataset()
    sizes = (*NATIVE, "--navit_token_budget=24")
    cache_tools.run("latents", [
        "--family=flux", *odd.tiny.arguments(), f"--dataset_config={dataset}", "--seed=5", *sizes,
    ])  # fmt: skip
    made = {path: path.read_bytes() for path in odd.images.glob("*.npz")}
    assert len(made) == 5
    from_files = odd.train("files", *sizes, "--cache_latents_to_disk", dataset=dataset)
    assert {path: path.read_bytes() for path in odd.images.glob("*.npz")} == made
    in_memory = odd.train("memory", *sizes, "--cache_latents", dataset=dataset)
    assert fingerprint(from_files) == fingerprint(in_memory)


CACHED = ("--cache_text_encoder_outputs", "--network_train_unet_only")


@pytest.mark.parametrize(("family", "more"), [
    ("flux", ("--apply_t5_attn_mask",)), ("flux", ("--apply_t5_attn_mask", *CACHED)), ("chroma", ()), ("lumina", ()),
    ("lumina", CACHED), ("lumina", ("--cache_text_encoder_outputs", "--text_encoder_lr=1e-3")), ("hunyuan_video", ()),
])  # fmt: skip
def test_losses_without_padding_are_those_with_it(
    tinies: Tinies, tmp_path: Path, family: str, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tinies.work(family, tmp_path)
    work.images = draw(tmp_path / "mixed")
    lengths: list[dict[str, int]] = []
    results = []
    for out, options in (("whole", ()), ("cut", ("--navit_text_trim_padding",))):
        run = work.prepare(out, "--navit_packing", *more, *options, dataset=mixed_dataset(work))
        original, masks = run.step.inputs_of, [text.mask for text in run.family.padded_texts]

        def noting(sample, conditioning, batch):
            lengths.append({mask: conditioning[mask].shape[1] for mask in masks})
            return original(sample, conditioning, batch)

        run.step.inputs_of = noting
        shaken(run)
        (pack,) = run.data.batches(1)
        results.append(step_results(run, [pack]))
    (losses, gradients), (expected, of_padded) = reversed(results)
    half = len(lengths) // 2
    assert all(cut[mask] < whole[mask] for whole, cut in zip(lengths[:half], lengths[half:]) for mask in whole)
    assert losses == pytest.approx(expected, rel=1e-5)
    scale = max(float(one.norm()) for one in of_padded)
    for one, other in zip(gradients, of_padded, strict=True):
        assert float((one - other).norm()) <= 1e-5 * max(float(other.norm()), 1e-2 * scale)


@pytest.mark.parametrize(("family", "way"), [
    ("flux", "leave it out, or set --apply_t5_attn_mask"), ("sd3", "leave it out"), ("wan", "leave it out"),
    ("anima", "leave it out"),
])  # fmt: skip
def test_padding_that_is_attended_to_is_not_cut(
    tinies: Tinies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, family: str,
    way: str,
) -> None:
    argv = tinies.work(family, tmp_path).argv("out", "--navit_packing", "--navit_text_trim_padding")
    message = refused_run(family, argv, monkeypatch, capsys)
    assert f"attends to the padding of captions: without it the prediction would be another; {way}" in message


def test_texts_without_padding_are_told(tinies: Tinies, tmp_path: Path) -> None:
    work = tinies.work("hunyuan_image", tmp_path)
    run = work.prepare("out", "--navit_packing", "--navit_text_trim_padding")
    told = [str(item) for item in idle_beside_packs(run.config, run.family)]
    assert any("--navit_text_trim_padding" in line and "no further than the longest" in line for line in told)


def activations(work: Work, out: str, *more: str, dataset: Path) -> tuple[str, int]:
    """(what the plan is for, bytes that its forward pass keeps)"""
    plan = work.trainer(out, *more, dataset=dataset).plans()[0]
    return plan.settings, next(phase.parts["activations"] for phase in plan.phases if phase.name == "forward")


def test_the_plan_of_memory_counts_the_fullest_pack(odd: Work) -> None:
    dataset = odd.dataset()
    told, of_all = activations(odd, "all", *NATIVE, dataset=dataset)
    assert told.startswith("pack of 5 at 5 sizes up to 64x96")
    told, of_some = activations(odd, "some", *NATIVE, "--navit_token_budget=36", dataset=dataset)
    assert "pack of 2 at 2 sizes up to" in told
    assert 1.5 < of_all / of_some < 3.5  # 84 tokens and their texts, and up to 36


@pytest.mark.parametrize("more", [(), ("--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only")])
def test_a_pack_of_one_size_is_planned_as_a_batch(work: Work, more: tuple[str, ...]) -> None:
    draw(work.images, ((64, 64),) * 9)
    packing = ("--navit_packing", "--navit_token_budget=64")
    told, packed = activations(work, "pack", *packing, *more, dataset=work.dataset())
    assert told.startswith("pack of 4 at 64x64")
    _, batch = activations(work, "batch", *more, dataset=work.dataset(batch_size=4))
    assert packed == pytest.approx(batch, rel=0.1)


def test_a_budget_that_no_pack_meets_names_the_budget_of_tokens(odd: Work) -> None:
    with pytest.raises(AtelierError, match="A smaller --navit_token_budget"):
        odd.train("refused", *NATIVE, "--vram_budget=0.001")


def test_the_start_and_the_file_tell_of_packs(odd: Work, caplog: pytest.LogCaptureFixture) -> None:
    options = ("--navit_packing", "--navit_token_budget=30", "--navit_drop_last", "--train_batch_size=3")
    with caplog.at_level(logging.INFO):
        file = odd.train("out", *options, "--console_log_level=INFO", dataset=odd.dataset(batch_size=2))
    page = next(record.getMessage() for record in caplog.records if "packs per epoch" in record.getMessage())
    assert "1 pack per epoch" not in page and "packs per epoch of 30 tokens at most" in page
    assert "one pack of every epoch is left out (--navit_drop_last)" in page
    assert "batch_size is 2 and has no effect; --navit_token_budget says" in page
    assert "leaves nothing out" not in page
    assert "--train_batch_size: has no effect" in page
    metadata = metadata_of(file)
    assert metadata["ss_navit_packing"] == "True" and metadata["ss_navit_token_budget"] == "30"
    assert not any(name.startswith("ss_navit") for name in metadata_of(odd.train("plain")))


def test_samples_over_the_budget_are_told(odd: Work, caplog: pytest.LogCaptureFixture) -> None:
    run = odd.prepare("out", "--navit_packing", "--navit_token_budget=3")
    assert "5 samples have more tokens than --navit_token_budget 3, each a pack of its own" in caplog.text
    assert [len(pack) for pack in run.data.batches(1)] == [1] * 5


def test_what_one_pack_has_no_use_for_is_told(odd: Work, caplog: pytest.LogCaptureFixture) -> None:
    options = ("--navit_packing", "--navit_drop_last", "--validation_split=0.4", "--max_train_steps=1")
    with caplog.at_level(logging.INFO):
        odd.train("out", *options, "--console_log_level=INFO", "--network_args", "rank_dropout=0.00")
    page = next(record.getMessage() for record in caplog.records if "per epoch of" in record.getMessage())
    assert "--navit_drop_last leaves nothing out, as there is one pack" in page
    assert "counts for validation alone" in page


def test_another_budget_is_told_of_a_state(odd: Work, caplog: pytest.LogCaptureFixture) -> None:
    odd.train("first", "--navit_packing", "--navit_token_budget=40", "--max_train_steps=2", "--save_state")
    (state,) = (odd.folder / "first").glob("*-state")
    file = odd.train("second", "--navit_packing", "--navit_token_budget=50", f"--resume={state}")
    (change,) = json.loads(metadata_of(file)["ss_resume_changes"])
    assert change["changed"]["navit_token_budget"] == [40, 50]
    assert "steps_per_epoch was 3 when the state was saved and is 2 now" in caplog.text
    assert "the images, batch size, packs or number of processes changed" in caplog.text


def test_packs_are_shown(odd: Work, capsys: pytest.CaptureFixture) -> None:
    odd.trainer("out", *NATIVE, "--debug_dataset").prepare()
    shown = capsys.readouterr().out
    assert shown.count("pack 1 of 1") == 5 and "70x55 to 64x48" in shown


def test_infonoise_learns_from_packs(odd: Work) -> None:
    run = odd.prepare("out", *NATIVE, "--infonoise_enabled")
    (pack,) = run.data.batches(1)
    hook = run.hooks.find(InfoNoiseHook)
    hook.on_train_start(run)
    run.step(pack)
    rows = torch.cat(hook._of_step)  # (place, log ratio, error)
    assert sorted(rows[:, 0].tolist()) == [0, 1, 2, 3, 4] and rows.isfinite().all()


CLIPS = """
[[datasets]]
video_directory = '{folder}'
caption_extension = ".txt"
resolution = [32, 32]
target_frames = [5, 9]
frame_extraction = "head"
"""


def test_clips_of_several_sizes_and_lengths_are_packed(tinies: Tinies, tmp_path: Path) -> None:
    for size in ((70, 54), (100, 40)):
        write_moving_shapes(tmp_path / f"{size[0]}", 1, size=size)
    work, dataset = tinies.work("wan", tmp_path), tmp_path / "clips.toml"
    dataset.write_text("".join(CLIPS.format(folder=tmp_path / name) for name in ("70", "100")), encoding="utf-8")
    run = work.prepare("out", *NATIVE, dataset=dataset)
    shaken(run)
    packs = list(run.data.batches(1))
    shapes = {tuple(part.images.shape[-3:]) for pack in packs for part in pack.parts}
    assert shapes == {(5, 48, 64), (9, 48, 64), (5, 32, 96), (9, 32, 96)}
    for pack in packs:
        losses, _ = step_results(run, [pack])
        assert losses == pytest.approx(step_results(run, pack.parts)[0], rel=1e-5)


def test_sides_are_within_the_positions_of_the_model(tinies: Tinies, tmp_path: Path) -> None:
    work = tinies.work("sd3", tmp_path)
    limit = work.trainer("out").family.side_limit().pixels
    draw(work.images, ((limit + 40, 64), (limit, 64)))
    run = work.prepare("out", *NATIVE)
    sizes = {size for pack in run.data.batches(1) for size in sizes_of(pack)}
    assert {(limit, 64), (limit, 48)} <= sizes and max(width for width, _ in sizes) == limit


def test_the_resolution_of_flat_datasets_is_of_any_sides(tinies: Tinies, tmp_path: Path) -> None:
    work, dataset = tinies.work("wan", tmp_path), tmp_path / "flat.toml"
    draw(work.images, ((70, 50),) * 4)
    keys = f"image_directory = '{work.images}'\ncaption_extension = '.txt'\nresolution = [50, 50]\n"
    dataset.write_text(f"[[datasets]]\n{keys}")
    run = work.prepare("out", *NATIVE, dataset=dataset)
    assert {size for pack in run.data.batches(1) for size in sizes_of(pack)} == {(64, 48)}


def test_of_many_sizes_some_tell_the_law() -> None:
    shapes = [(16, 4 + number % 37, 4 + number // 37) for number in range(37 * 50)]
    chosen = some_of(shapes)
    areas = [height * width for _, height, width in chosen]
    assert len(chosen) == 64 and areas == sorted(areas) and areas[0] == 16 and areas[-1] == 40 * 53
    assert some_of(shapes[:64]) == shapes[:64]


def test_no_step_of_any_epoch_has_more_samples_than_samplers_are_told(odd: Work) -> None:
    draw(odd.images, ((64, 64),) * 6 + ((128, 64),) * 7)
    run = odd.prepare("out", *NATIVE, "--navit_token_budget=64")
    most = [
        max(sum(len(batch.items) for batch in step) for step in run.data.train.plan(epoch, 5, 1))
        for epoch in range(1, 60)
    ]  # fmt: skip
    assert most[0] < max(most) <= run.data.samples_per_step == 4


@pytest.mark.parametrize("family", PACKING_FAMILIES)
def test_denoisers_make_as_many_tokens_as_the_budget_counts(tinies: Tinies, tmp_path: Path, family: str) -> None:
    work = tinies.work(family, tmp_path)
    work.images = draw(tmp_path / "mixed")
    run = work.prepare("out", "--navit_packing", dataset=mixed_dataset(work))
    (pack,) = run.data.batches(1)
    latents = run.family.architecture.latents
    for part in pack.parts:
        output, _, _ = run.step.forward(part, feature_layer=0)  # [B, tokens, D] behind the first block
        (height, width), *_ = part.target_sizes_hw.tolist()
        assert output.extra["features"].shape[1] == latents.tokens((width, height))
