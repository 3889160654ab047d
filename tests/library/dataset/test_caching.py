"""The latent cache: when it is used, when it is made anew, and what happens to an interrupted or damaged one."""

from __future__ import annotations

import dataclasses
import os
import shutil
import stat
import threading
import time

import numpy as np
import pytest
import torch

from library.core.errors import CheckpointError, ConfigError, TrainingError
from library.dataset import cache_checks, cache_io, caching
from library.dataset.architectures import ARCHITECTURES
from library.dataset.background import BackgroundWriter, map_ahead
from library.dataset.cache_checks import check_cache_folders
from library.dataset.caching import encode_latents, plan_latents, unusable_items
from library.dataset.items import ImageItem, SubsetParams
from library.dataset.npz_file import read_arrays, write_arrays
from library.strategy_base import LatentsCachingStrategy
from tests.library.dataset.images import FLUX, make_folder, make_group, make_image, make_item
from tests.library.dataset.small_family import SmallLatentsCaching, SmallVae


def bucketed(items: list[ImageItem], **params) -> list[ImageItem]:
    make_group(items, **params)
    return items


def fill(
    items: list[ImageItem], strategy: LatentsCachingStrategy | None = None, vae: SmallVae | None = None, **how
) -> int:
    """Cache what is missing; the number of images that were encoded."""
    strategy = strategy or SmallLatentsCaching(FLUX, True)
    jobs = plan_latents(items, strategy)
    encode_latents(jobs, strategy, vae or SmallVae(strategy.architecture), show_progress=False, **how)
    return len(jobs)


def reason(item: ImageItem, strategy: LatentsCachingStrategy | None = None) -> str | None:
    return (strategy or SmallLatentsCaching(FLUX, True)).problem_of(item, item.subset.flip_aug, item.subset.alpha_mask)


@pytest.fixture
def item(tmp_path) -> ImageItem:
    return bucketed([make_item(make_image(tmp_path / "a.png"))])[0]


def test_a_second_run_encodes_nothing(tmp_path):
    items = bucketed(make_folder(tmp_path, 5))
    assert fill(items) == 5
    before = {path: path.read_bytes() for path in tmp_path.glob("*.npz")}
    assert fill(items) == 0
    assert {path: path.read_bytes() for path in tmp_path.glob("*.npz")} == before and len(before) == 5


def test_the_same_data_give_the_same_bytes_whatever_the_batches(tmp_path):
    first, second = make_folder(tmp_path / "a", 5), make_folder(tmp_path / "b", 5)
    torch.manual_seed(1)
    fill(bucketed(first), SmallLatentsCaching(FLUX, True, batch_size=1))
    torch.manual_seed(2)
    fill(bucketed(list(reversed(second))), SmallLatentsCaching(FLUX, True, batch_size=4))
    for a, b in zip(sorted((tmp_path / "a").glob("*.npz")), sorted((tmp_path / "b").glob("*.npz"))):
        ours, theirs = read_arrays(a), read_arrays(b)
        for key in ours:
            if key.startswith("latents"):
                np.testing.assert_allclose(ours[key], theirs[key], atol=1e-6)


def test_a_changed_image_of_the_same_size_is_encoded_again(tmp_path):
    """The same size in pixels and in bytes, as in an uncompressed format."""
    (item,) = bucketed([make_item(make_image(tmp_path / "a.bmp"))])
    fill([item])
    old = read_arrays(item.latents_npz)["latents_8x8"]
    num_bytes = os.path.getsize(item.absolute_path)
    time.sleep(0.01)
    make_image(item.absolute_path, seed=9)
    assert os.path.getsize(item.absolute_path) == num_bytes
    assert reason(item) == "the image has changed"
    assert fill([item]) == 1
    assert not np.array_equal(read_arrays(item.latents_npz)["latents_8x8"], old)
    assert reason(item) is None


def test_a_touched_or_copied_image_keeps_its_cache(item, tmp_path):
    fill([item])
    os.utime(item.absolute_path, (1, 1))
    assert reason(item) is None
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tmp_path.glob("a*"):
        shutil.copyfile(path, copy / path.name)
    (moved,) = bucketed([make_item(copy / "a.png")])
    assert fill([moved]) == 0


def test_other_settings_make_a_cache_stale(item):
    fill([item])
    other = dataclasses.replace(item, subset=dataclasses.replace(item.subset, resize_interpolation="nearest"))
    assert reason(other) == "made with other resize settings"
    flipped = dataclasses.replace(item, subset=dataclasses.replace(item.subset, flip_aug=True))
    assert reason(flipped) == "no mirrored latents"
    masked = dataclasses.replace(item, subset=dataclasses.replace(item.subset, alpha_mask=True))
    assert reason(masked) == "no alpha mask"


def test_another_vae_makes_a_cache_stale_and_an_unknown_one_does_not(item):
    strategy = SmallLatentsCaching(FLUX, True)
    strategy.model_identity = "one"
    fill([item], strategy)
    assert reason(item, strategy) is None and reason(item) is None
    strategy.model_identity = "two"
    assert reason(item, strategy) == "made with another VAE"


def test_resolutions_lie_side_by_side_in_one_file(tmp_path):
    item = make_item(make_image(tmp_path / "a.png", (128, 128)), (128, 128))
    small = bucketed([dataclasses.replace(item)], resolution=(64, 64))[0]
    large = bucketed([dataclasses.replace(item)], resolution=(96, 96))[0]
    assert fill([small, large]) == 2
    assert small.latents_npz == large.latents_npz
    assert {"latents_8x8", "latents_12x12"} <= set(read_arrays(small.latents_npz))
    assert fill([small, large]) == 0
    time.sleep(0.01)
    make_image(tmp_path / "a.png", (128, 128), seed=4)
    assert fill([small]) == 1
    assert reason(small) is None and reason(large) == "the image has changed"


def test_the_same_image_at_the_same_size_is_encoded_once_with_what_all_need(tmp_path):
    path = make_image(tmp_path / "a.png", alpha=100)
    items = [
        make_item(path),
        make_item(path, subset=SubsetParams(flip_aug=True)),
        make_item(path, subset=SubsetParams(alpha_mask=True)),
    ]
    strategy, vae = SmallLatentsCaching(FLUX, False), SmallVae(FLUX)
    assert fill(bucketed(items), strategy, vae) == 1
    assert vae.calls == 2  # plain and mirrored
    assert all(item.latents is items[0].latents and item.latents_flipped is not None for item in items)


def test_a_new_encoding_leaves_nothing_of_an_older_one_of_its_size(tmp_path):
    path = make_image(tmp_path / "a.png")
    (flipped,) = bucketed([make_item(path, subset=SubsetParams(flip_aug=True))])
    fill([flipped])
    (plain,) = bucketed([make_item(path)])
    strategy = SmallLatentsCaching(FLUX, True)
    strategy.model_identity = "new"
    record = dataclasses.replace(strategy.record_of(plain), model="old")
    arrays = cache_io.load_latents(flipped.latents_npz, FLUX, flipped.bucket_reso)
    cache_io.save_latents(flipped.latents_npz, "_8x8", arrays, record)
    assert fill([plain], strategy) == 1
    assert "latents_flipped_8x8" not in read_arrays(plain.latents_npz)


@pytest.mark.parametrize("damage", ["truncate", "empty", "garbage"])
def test_a_damaged_file_is_made_again(item, damage, caplog):
    fill([item])
    content = open(item.latents_npz, "rb").read()
    with open(item.latents_npz, "wb") as file:
        file.write({"truncate": content[: len(content) // 2], "empty": b"", "garbage": b"x" * 500}[damage])
    assert reason(item) == "unreadable" and "cannot be read" in caplog.text
    assert fill([item]) == 1
    assert reason(item) is None


def test_a_file_damaged_inside_is_named_when_it_is_read(item):
    fill([item])
    content = bytearray(open(item.latents_npz, "rb").read())
    content[len(content) // 3] ^= 0xFF
    open(item.latents_npz, "wb").write(content)
    with pytest.raises(CheckpointError, match="cannot be read.*delete it"):
        cache_io.load_latents(item.latents_npz, FLUX, item.bucket_reso)


def test_reading_a_size_that_a_file_lacks(item):
    fill([item])
    with pytest.raises(ValueError, match="latents_4x4 not found in"):
        cache_io.load_latents(item.latents_npz, FLUX, (32, 32))


def test_skip_cache_check_takes_what_is_there(item):
    fill([item])
    make_image(item.absolute_path, seed=9)
    assert reason(item, SmallLatentsCaching(FLUX, True, skip=True)) is None
    os.remove(item.latents_npz)
    assert reason(item, SmallLatentsCaching(FLUX, True, skip=True)) == "no file"


def test_a_record_does_not_vouch_for_arrays_that_another_program_wrote(item):
    """Other trainers carry unknown keys along when they rewrite a file; theirs is then judged by keys and shapes."""
    fill([item])
    strategy = SmallLatentsCaching(FLUX, True)
    strategy.model_identity = "new"
    arrays = read_arrays(item.latents_npz)
    record = dataclasses.replace(strategy.record_of(item), model="old")
    cache_io.save_latents(item.latents_npz, "_8x8", cache_io.load_latents(item.latents_npz, FLUX, (64, 64)), record)
    assert reason(item, strategy) == "made with another VAE"
    arrays = read_arrays(item.latents_npz) | {"latents_8x8": arrays["latents_8x8"] + 1}
    write_arrays(item.latents_npz, arrays)
    assert reason(item, strategy) is None


def test_latents_of_another_size_under_bare_keys_are_not_used(tmp_path):
    sd = ARCHITECTURES["sd"]
    (item,) = bucketed([make_item(make_image(tmp_path / "a.png"))], bucket_reso_steps=64, min_bucket_reso=64)
    strategy = SmallLatentsCaching(sd, True)
    path = strategy.get_latents_npz_path(item.absolute_path, item.image_size)
    for shape, wanted in (((4, 8, 8), None), ((4, 12, 12), "no latents of size 64x64")):
        write_arrays(
            path, {"latents": np.zeros(shape, np.float32), "original_size": np.zeros(2), "crop_ltrb": np.zeros(4)}
        )
        assert reason(item, strategy) == wanted
    assert fill([item], strategy) == 1
    assert {"latents", "latents_8x8"} <= set(read_arrays(path))  # the bare ones stay for whoever reads them


class BrokenVae(SmallVae):
    """Overflows for bright images, as half precision does."""

    def forward(self, images):
        latents = super().forward(images)
        return torch.where(
            images.mean(dim=(1, 2, 3), keepdim=True) > 0.9, torch.full_like(latents, float("nan")), latents
        )


def test_latents_that_are_not_finite_are_named_and_not_written(tmp_path):
    from PIL import Image

    items = make_folder(tmp_path, 2, sizes=((64, 64),))
    Image.new("RGB", (64, 64), "white").save(items[1].absolute_path)
    with pytest.raises(TrainingError, match="not finite for .*01.png.*--no_half_vae"):
        fill(bucketed(items), SmallLatentsCaching(FLUX, True, batch_size=1), BrokenVae(FLUX))
    assert os.path.exists(items[0].latents_npz) and not os.path.exists(items[1].latents_npz)


class InterruptedVae(SmallVae):
    """Ctrl-C at the fifth image, the first of the third batch."""

    def forward(self, images):
        if self.calls == 4:
            raise KeyboardInterrupt
        return super().forward(images)


def test_an_interrupted_run_keeps_what_it_finished_and_the_next_goes_on(tmp_path):
    items = bucketed(make_folder(tmp_path, 6, sizes=((64, 64),)))
    with pytest.raises(KeyboardInterrupt):
        fill(items, vae=InterruptedVae(FLUX))
    assert len(list(tmp_path.glob("*.npz"))) == 4 and not list(tmp_path.glob(".*"))
    assert fill(items) == 2


def test_processes_share_the_files_without_overlap(tmp_path):
    items = bucketed(make_folder(tmp_path, 7))
    strategy = SmallLatentsCaching(FLUX, True)
    parts = [
        [job.item.absolute_path for job in plan_latents(items, strategy, process_index=i, num_processes=3)]
        for i in range(3)
    ]
    assert sorted(sum(parts, [])) == sorted(item.absolute_path for item in items)
    for i in range(2):
        jobs = plan_latents(items, strategy, process_index=i, num_processes=3)
        encode_latents(jobs, strategy, SmallVae(FLUX), show_progress=False)
    assert [item.absolute_path for item in unusable_items(items, strategy)] == parts[2]


def test_in_memory_every_process_encodes_everything(tmp_path):
    items = bucketed(make_folder(tmp_path, 3))
    assert len(plan_latents(items, SmallLatentsCaching(FLUX, False), process_index=1, num_processes=2)) == 3


def test_batches_are_of_one_size(tmp_path, monkeypatch):
    items = bucketed(make_folder(tmp_path, 8, sizes=((96, 48), (48, 96))), resolution=(64, 64))
    seen, run_encoder = [], caching.run_encoder

    def watching(strategy, vae, batch, inputs, parts):
        seen.append([decoded.pixels.image.shape for decoded in batch])
        return run_encoder(strategy, vae, batch, inputs, parts)

    monkeypatch.setattr(caching, "run_encoder", watching)
    fill(items, SmallLatentsCaching(FLUX, True, batch_size=4))
    assert [len(shapes) for shapes in seen] == [4, 4] and all(len(set(shapes)) == 1 for shapes in seen)


def test_the_thread_of_the_encoder_does_nothing_else(tmp_path, monkeypatch):
    """Making tensors, checking and writing lie beside it, so that a device need not wait for them."""
    items, threads = bucketed(make_folder(tmp_path, 4)), {}
    for name in ("image_tensor", "run_encoder", "_is_usable", "_store_on_disk"):
        def watched(*args, _name=name, _function=getattr(caching, name), **kwargs):
            threads.setdefault(_name, set()).add(threading.get_ident())
            return _function(*args, **kwargs)

        monkeypatch.setattr(caching, name, watched)
    fill(items)
    own = threading.get_ident()
    assert threads.pop("run_encoder") == {own}
    assert len(threads) == 3 and not any(own in others for others in threads.values())


def test_what_a_device_computed_is_read_after_it_has_arrived(item):
    strategy, vae = SmallLatentsCaching(FLUX, False), SmallVae(FLUX)
    batch = [caching.decode(caching.LatentsJob([item]))]
    wanted = caching.run_encoder(strategy, vae, batch, caching.inputs_of(batch)[0]).latents
    late = torch.full_like(wanted, torch.nan)
    outputs = caching.Outputs(late, {}, arrived=lambda: late.copy_(wanted))
    assert torch.equal(caching.encoded_of(strategy, vae, batch, [outputs])[0].latents, wanted[0])


def test_latents_that_no_cache_could_be_read_back_with_are_not_written(item, tmp_path):
    class WithFrames(SmallLatentsCaching):
        def encode(self, vae, images, seeds):
            return super().encode(vae, images, seeds)[:, :, None]  # [B, C, 1, h, w]

    with pytest.raises(
        CheckpointError, match=r"latents of shape \[16, 1, \d+, \d+\].*those of flux have shape \[16, \d+, \d+\]"
    ):
        fill([item], WithFrames(FLUX, True))
    assert not list(tmp_path.glob("*.npz"))


def test_undecodable_images_are_all_named_and_the_others_are_cached(tmp_path):
    items = bucketed(make_folder(tmp_path, 4, sizes=((64, 64),)))
    for bad in (items[1], items[2]):
        content = open(bad.absolute_path, "rb").read()
        open(bad.absolute_path, "wb").write(content[: len(content) // 2])
    with pytest.raises(ConfigError) as error:
        fill(items)
    assert len(error.value.problems) == 2 and "01.png" in str(error.value) and "02.png" in str(error.value)
    assert len(list(tmp_path.glob("*.npz"))) == 2
    strategy = SmallLatentsCaching(FLUX, True)
    bad = encode_latents(
        plan_latents(items, strategy), strategy, SmallVae(FLUX), skip_bad_images=True, show_progress=False
    )
    assert bad == [items[1], items[2]]


@pytest.mark.parametrize(
    "name, value", [("color_aug", True), ("random_crop", True), ("face_crop_aug_range", (1.0, 2.0))]
)
def test_augmentations_that_have_no_single_latents_are_refused(tmp_path, name, value):
    items = bucketed(
        [
            make_item(
                make_image(tmp_path / "a.png"), subset=SubsetParams(label="datasets[0].subsets[3]", **{name: value})
            )
        ]
    )
    with pytest.raises(ConfigError, match=rf"datasets\[0\].subsets\[3\].{name} is"):
        plan_latents(items, SmallLatentsCaching(FLUX, True))


def names_of(folder, *names: str) -> list[str]:
    """Names of the cache files of pictures of one size, in their order."""
    items = bucketed([make_item(make_image(folder / name, seed=i)) for i, name in enumerate(names)])
    assert fill(items) == len(items) and fill(items) == 0
    return [os.path.basename(item.latents_npz) for item in items]


def test_two_images_of_one_stem_get_a_file_each(tmp_path):
    """And so they do for their texts; all others keep their names, and so do those that differ in case here."""
    assert names_of(tmp_path, "a.png", "a.jpg", "b.png", "B.jpg") == [
        "a.png_0064x0064_flux.npz", "a.jpg_0064x0064_flux.npz", "b_0064x0064_flux.npz", "B_0064x0064_flux.npz",
    ]  # fmt: skip


def test_images_that_a_file_system_without_case_takes_for_one_get_a_file_each(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_checks, "ignores_case", lambda path: True)
    assert names_of(tmp_path, "Cat.png", "cat.jpg", "dog.png") == [
        "Cat.png_0064x0064_flux.npz", "cat.jpg_0064x0064_flux.npz", "dog_0064x0064_flux.npz",
    ]  # fmt: skip


def test_a_name_that_is_still_shared_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="would share a cache file; rename"):
        names_of(tmp_path, "a.png", "a.jpg", "a.png.png")


def test_one_file_cannot_hold_two_ways_of_resizing(tmp_path):
    path = make_image(tmp_path / "a.png")
    items = [make_item(path), make_item(path, subset=SubsetParams(resize_interpolation="area"))]
    with pytest.raises(ConfigError, match="has room for one"):
        plan_latents(bucketed(items), SmallLatentsCaching(FLUX, True))


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_encoded(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written to .*nowhere"):
        check_cache_folders([str(tmp_path / "nowhere" / "a.npz"), str(tmp_path / "b.npz")])
    if os.geteuid() == 0:
        return  # root may write anywhere
    items = bucketed(make_folder(tmp_path / "locked", 1))
    (tmp_path / "locked").chmod(stat.S_IREAD | stat.S_IEXEC)
    try:
        with pytest.raises(ConfigError, match="cannot be written"):
            plan_latents(items, SmallLatentsCaching(FLUX, True))
    finally:
        (tmp_path / "locked").chmod(0o755)


def test_the_old_entry_point_for_plug_ins(tmp_path):
    items = bucketed(make_folder(tmp_path, 2, sizes=((64, 64),)))
    strategy = SmallLatentsCaching(FLUX, True)
    strategy.cache_batch_latents(SmallVae(FLUX), items, flip_aug=True, alpha_mask=False, random_crop=False)
    assert strategy.is_disk_cached_latents_expected((64, 64), items[0].latents_npz, True, False)
    latents, size, crop, flipped, mask = strategy.load_latents_from_disk(items[0].latents_npz, (64, 64))
    assert (
        latents.shape == (16, 8, 8)
        and size == [64, 64]
        and crop == [0, 0, 64, 64]
        and flipped is not None
        and mask is None
    )
    strategy.save_latents_to_disk(
        items[0].latents_npz, torch.ones(16, 4, 4), (64, 64), (0, 0, 32, 32), key_reso_suffix="_4x4"
    )
    assert strategy.load_latents_from_disk(items[0].latents_npz, (32, 32))[0].mean() == 1
    assert strategy.get_image_size_from_disk_cache_path(items[0].absolute_path, items[0].latents_npz) == (64, 64)
    assert strategy.get_image_size_from_disk_cache_path(items[0].absolute_path, items[1].latents_npz) == (None, None)


def test_a_name_that_only_begins_alike_is_another_images():
    path = cache_io.latents_npz_path(FLUX, "/d/a_b.png", (600, 400))
    assert cache_io.image_size_from_latents_path(FLUX, "/d/a.png", path) is None


def test_the_writer_waits_and_reports_the_first_error(tmp_path):
    running = threading.Event()
    with pytest.raises(OSError, match="disk full"):
        with BackgroundWriter(backlog=2) as writer:
            writer.submit(running.set)
            writer.submit(lambda: (_ for _ in ()).throw(OSError("disk full")))
            for _ in range(10):
                writer.submit(time.sleep, 0.001)
    assert running.is_set()


def test_decoding_runs_ahead_but_not_too_far():
    started = []
    results = map_ahead(lambda n: started.append(n) or n * 2, range(100), num_threads=2, ahead=5)
    assert next(results) == (0, 0)
    time.sleep(0.05)
    assert len(started) <= 7
    assert [value for _, value in results] == [n * 2 for n in range(1, 100)]


def test_a_half_written_file_never_appears(item, monkeypatch):
    fill([item])
    before = open(item.latents_npz, "rb").read()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        write_arrays(item.latents_npz, {"latents": np.zeros(3)})
    assert open(item.latents_npz, "rb").read() == before
    assert os.listdir(os.path.dirname(item.latents_npz)).__len__() == 2


def test_decoding_reads_the_image_once_with_its_identity(item):
    decoded = caching.decode(caching.LatentsJob([item]))
    assert decoded.identity.content == cache_io.file_content_id(item.absolute_path)
    assert decoded.pixels.image.shape == (64, 64, 3)


def test_reasons_are_counted_where_they_differ() -> None:
    from library.core.errors import counted

    assert [counted({}), counted({"no file": 3}), counted({"no file": 3, "the image has changed": 1})] == [
        "", " (no file)", " (3: no file; 1: the image has changed)",
    ]  # fmt: skip
