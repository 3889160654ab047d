"""The checks that every family must pass, through the real command line; tests/families.py says who takes part.

What is special to a family is tested beside: FLUX.1 in most files here, the U-Nets in test_unet_families.py, Anima in
test_anima.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library.core.errors import ConfigError
from library.families.registry import FAMILIES
from library.tiny_models import TINY_SETS, TinySet, build_tiny
from library.tiny_models.pictures import draw_pictures as draw_shapes
from library.training.loop import fit
from tests.families import CASES, FamilyCase
from tests.runs.conftest import (
    Stopped,
    Work,
    draw_pictures,
    fingerprint,
    largest_difference,
    losses_of,
    read_parts,
    sample_pictures,
    stop_after,
)

CAPTIONS = "shuffle_caption = true\nkeep_tokens = 1\nflip_aug = true\ncaption_dropout_rate = 0.2"
DROPOUTS = ["--network_dropout=0.1", "--network_args", "rank_dropout=0.1"]
SCHEDULE = ["--lr_scheduler=cosine", "--lr_warmup_steps=2", "--max_train_steps=5"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of what data and loop do run for a U-Net, for a transformer and for others in turn; for all with --full."""
    if "case" in metafunc.fixturenames:
        test = metafunc.function
        chosen = {"sd1", "flux", *others_of(test)} if is_of_the_loop(test) else set(CASES)
        cases = [pytest.param(name, marks=() if name in chosen else pytest.mark.full) for name in CASES]
        metafunc.parametrize("case", cases, indirect=True, scope="module")


def is_of_the_loop(thing: object) -> bool:
    return any(mark.name == "of_the_loop" for mark in getattr(thing, "pytestmark", ()))


def others_of(test: object) -> list[str]:
    """Two further cases with models of their own, so that together the tests marked `of_the_loop` meet each of them."""
    own = [name for name, case in CASES.items() if not case.like and name not in ("sd1", "flux")]
    place = list(filter(is_of_the_loop, globals().values())).index(test)
    return [own[(2 * place + more) % len(own)] for more in (0, 1)]


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> FamilyCase:
    return CASES[request.param]


@pytest.fixture(scope="module")
def tiny_set(case: FamilyCase, tmp_path_factory: pytest.TempPathFactory) -> TinySet:
    return build_tiny(case.name, tmp_path_factory.mktemp(case.name))


@pytest.fixture
def work(case: FamilyCase, tiny_set: TinySet, tmp_path: Path) -> Work:
    return Work(tmp_path, tiny_set, draw_pictures(tmp_path / "images", -5), case=case)


def test_every_family_takes_part() -> None:
    assert set(CASES) == set(TINY_SETS) and {case.family for case in CASES.values()} == set(FAMILIES)


def test_the_same_command_writes_the_same_bytes_also_with_workers_and_when_resumed(work: Work) -> None:
    """Three batches in an epoch: step 2 lies inside the first, step 5 inside the second."""
    data, options = work.dataset(subset_keys=CAPTIONS), [*SCHEDULE, *DROPOUTS]
    first = work.train("first", *options, dataset=data)
    again = work.train("again", *options, dataset=data)
    workers = work.train("workers", *options, "--max_data_loader_n_workers=2", dataset=data)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            work.train("parts", *options, "--save_every_n_steps=2", "--save_state", dataset=data)
    state = work.folder / "parts" / "lora-step00000002-state"
    resumed = work.train("parts", *options, f"--resume={state}", dataset=data)
    assert len({fingerprint(path) for path in (first, again, workers, resumed)}) == 1
    assert read_parts(first)[0]["ss_base_model_version"] == work.case.version
    assert read_parts(work.train("other", *options, "--seed=6", dataset=data))[1] != read_parts(first)[1]


def test_the_held_out_loss_falls(work: Work) -> None:
    """Noise and noise levels of the measurement are fixed and its pictures are not trained on: only learning changes
    it."""
    work.images = draw_shapes(work.folder / "shapes", 8)
    data = work.dataset(dataset_keys="validation_split = 0.25", batch_size=4)
    options = ["--max_train_steps=24", "--validate_every_n_epochs=12", *work.case.caches(on_disk=False)]
    losses = losses_of(work.train("out", *options, dataset=data), "validation")
    assert losses[-1] < 0.9 * losses[0], losses


def test_caches_change_no_byte(work: Work) -> None:
    data = work.dataset(subset_keys="flip_aug = true")
    live = read_parts(work.train("live", "--network_train_unet_only", "--max_train_steps=4", dataset=data))[1]
    for name, on_disk in (("memory", False), ("disk", True), ("from disk", True)):
        cached = work.train(name, *work.case.caches(on_disk=on_disk), "--max_train_steps=4", dataset=data)
        assert read_parts(cached)[1] == live, name
    files = [path for path in work.images.iterdir() if path.suffix in (".npz", ".safetensors")]
    assert len(files) == 5 * (1 + work.case.caches_text)


@pytest.mark.of_the_loop
def test_accumulated_batches_train_like_one_larger_batch(work: Work) -> None:
    """Five images of one bucket: 4 + 1 or, in twos, (2 + 2) + 1."""
    work.images = draw_pictures(work.folder / "square", 5)
    large, small = work.dataset(batch_size=4, name="large.toml"), work.dataset(batch_size=2, name="small.toml")
    options = ["--max_train_steps=3", "--optimizer_type=SGDNesterov", "--network_args", "rank_dropout=0.2"]
    one = work.train("one", *options, dataset=large)
    two = work.train("two", *options, "--gradient_accumulation_steps=2", dataset=small)
    assert largest_difference(one, two) < 1e-5
    assert max(float(tensor.abs().max()) for key, tensor in load_file(one).items() if "lora_up" in key) > 1e-4


def test_samples_and_validation_are_made_and_change_no_byte(work: Work) -> None:
    prompts = work.folder / "prompts.txt"
    prompts.write_text(
        f"a red cat --w 64 --h 128 --s 2 --d 1{work.case.letters(work.images)}\n"
        f"a dog --w 64 --h 64 --s 2 --l 3 --n blue{work.case.letters(work.images)}\n",
        encoding="utf-8",
    )
    data = work.dataset(dataset_keys="validation_split = 0.4", subset_keys="caption_dropout_rate = 0.3")
    around = [
        f"--sample_prompts={prompts}",
        "--sample_every_n_steps=2",
        "--sample_at_first",
        "--validate_every_n_steps=2",
    ]
    plain = work.train("plain", "--max_train_steps=4", "--validate_every_n_epochs=9", dataset=data)
    full = work.train("full", "--max_train_steps=4", *around, dataset=data)
    assert read_parts(full)[1] == read_parts(plain)[1]
    images = sample_pictures(work.folder / "full")
    assert len(images) == 3 * 2 and {Image.open(path).size for path in images} == {(64, 128), (64, 64)}
    losses = losses_of(full, "validation")
    assert len(losses) == 3 and len(set(losses)) == 3


def test_the_adapter_reloads_to_the_same_output(work: Work) -> None:
    run = work.trainer("out", "--max_train_steps=2", "--save_precision=float").prepare()
    batch = next(run.data.batches(1))
    times = torch.full((len(batch),), run.step.objective.validation_times()[1])

    def loss(run) -> float:
        with torch.no_grad(), run.weights_for_eval():
            return run.step(batch, times).loss_sum.item()

    before = loss(run)
    fit(run)
    after = loss(run)
    file = work.folder / "out" / "lora.safetensors"
    reloaded = work.trainer("next", f"--network_weights={file}").prepare()
    assert loss(reloaded) == after != before


def test_denoiser_and_text_encoders_learn_alone_and_together(work: Work) -> None:
    parts, options = set(work.case.text_parts), ["--max_train_steps=1", *work.case.text_options]
    assert moved_parts(work.train("both", *options)) == {"lora_unet_", *parts}
    assert moved_parts(work.train("unet", *options, "--network_train_unet_only")) == {"lora_unet_"}
    if not parts:  # there is nothing to learn in text encoders that never do
        with pytest.raises(ConfigError, match="--network_train_text_encoder_only leaves nothing to train"):
            work.train("text", *options, "--network_train_text_encoder_only")
        return
    assert moved_parts(work.train("text", *options, "--network_train_text_encoder_only")) == parts


def moved_parts(path: Path) -> set[str]:
    """Beginnings of the keys whose `lora_up` is no longer zero."""
    moved = (key for key, tensor in load_file(path).items() if key.endswith("lora_up.weight") and tensor.any())
    return {"_".join(key.split("_")[:2]) + "_" for key in moved}


@pytest.mark.of_the_loop
def test_masks_take_part_of_the_picture_out_of_the_loss(work: Work) -> None:
    """A white mask changes nothing, a black one leaves nothing, half a mask something else."""
    masks = work.folder / "masks"
    masks.mkdir()
    data = work.dataset(subset_keys=f"conditioning_data_dir = '{masks}'", name="masked.toml")
    plain, found = losses_of(work.train("plain", "--max_train_steps=1")), {}
    for name, share in (("white", 1.0), ("half", 0.5), ("black", 0.0)):
        for path in work.images.glob("*.png"):
            size = Image.open(path).size
            mask = Image.new("RGB", size, (0, 0, 0))
            mask.paste((255, 255, 255), (0, 0, round(size[0] * share), size[1]))
            mask.save(masks / path.name)
        found[name] = losses_of(work.train(name, "--max_train_steps=1", "--masked_loss", dataset=data))
    assert found["white"] == pytest.approx(plain, rel=1e-5) and found["black"] == [0.0]
    assert 0 < found["half"][0] < found["white"][0]


@pytest.mark.of_the_loop
def test_regularisation_images_count_by_their_weight(work: Work) -> None:
    """Without weight it does not matter what they show."""
    regular = draw_shapes(work.folder / "regular", 5)
    more = f"[[datasets.subsets]]\nimage_dir = '{regular}'\nis_reg = true\nclass_tokens = 'pet'"
    data = work.dataset(subset_keys=more)
    first, weighted = (
        work.train(name, "--max_train_steps=3", f"--prior_loss_weight={name}", dataset=data) for name in ("0", "1")
    )
    draw_shapes(regular, 5, seed=1)
    other = work.train("others", "--max_train_steps=3", "--prior_loss_weight=0", dataset=data)
    assert int(read_parts(first)[0]["ss_num_reg_images"]) > 0
    assert read_parts(first)[1] == read_parts(other)[1] != read_parts(weighted)[1]


@pytest.mark.of_the_loop
def test_preserved_samples_learn_what_the_base_predicts(work: Work) -> None:
    """With a network that still does nothing the target equals the prediction: no loss, no gradient."""
    data = work.dataset(subset_keys="custom_attributes = {diff_output_preservation = true}")
    assert moved_parts(work.train("preserved", "--max_train_steps=2", dataset=data)) == set()
    run = work.trainer("out", dataset=data).prepare()
    batch = next(run.data.batches(1))
    assert run.step(batch).loss_sum.item() == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        for parameter in run.trainable.modules()["network"].parameters():
            parameter.add_(0.05)
    assert run.step(batch).loss_sum.item() > 1e-4
    assert run.trainable.network.multiplier == 1.0


@pytest.mark.of_the_loop
def test_only_preserved_samples_go_through_the_untouched_model(work: Work) -> None:
    """The conditioning is that of the untouched text encoders too, where they learn."""
    other = draw_pictures(work.folder / "other", 4)
    marks = "custom_attributes = {diff_output_preservation = true}"
    run = work.trainer(
        "out", dataset=work.dataset(batch_size=4, subset_keys=f"{marks}\n[[datasets.subsets]]\nimage_dir = '{other}'")
    ).prepare()
    with torch.no_grad():
        for parameter in run.trainable.modules()["network"].parameters():
            parameter.add_(0.05)
    is_marked = lambda attributes: "diff_output_preservation" in attributes  # noqa: E731
    batch = next(b for b in run.data.batches(1) if {is_marked(a) for a in b.custom_attributes} == {True, False})
    calls = []
    predict = run.family.predict

    def noting(models, sample, conditioning, part, **inputs):
        calls.append((len(sample.latents), len(part), conditioning))
        return predict(models, sample, conditioning, part, **inputs)

    run.family.predict = noting
    run.step(batch)
    rows = [i for i, attributes in enumerate(batch.custom_attributes) if is_marked(attributes)]
    assert [call[:2] for call in calls] == [(len(batch), len(batch)), (len(rows), len(rows))]
    with torch.no_grad(), run.trainable.disabled():
        untouched = run.step.conditioning_of(batch)
    assert calls[1][2].keys() == calls[0][2].keys() == untouched.keys()
    for name, used in calls[1][2].items():
        assert torch.allclose(used.float(), untouched[name][rows].float(), atol=1e-6)
    if any(run.step.trained_text_encoders):
        assert any(not torch.equal(calls[0][2][name][rows], used) for name, used in calls[1][2].items())
