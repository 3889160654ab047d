"""Caches of clips in safetensors files: the same samples as without one, and what makes a file stale, with its reason.
The recorded format is tested in tests/golden_tests/test_video_caches.py."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.core.errors import ConfigError, TrainingError
from library.dataset.cache_io import ImageIdentity, LatentArrays, file_content_id
from library.dataset.caching import plan_latents
from library.dataset.clips.rates import Conversion
from library.dataset.clips.windows import ClipWindow
from library.dataset.items import ImageItem, SubsetParams
from library.dataset.tensor_cache_io import TensorFile
from library.dataset.text_caching import plan_text
from library.families.record import ClipFacts
from library.safetensors_utils import save_file_atomic
from tests.library.dataset import test_text_caching as text
from tests.library.dataset.images import make_image, make_item
from tests.library.dataset.small_family import SmallTextCaching, SmallTextEncoder
from tests.library.dataset.test_clips import PARTS, batches, fill, group_of, without_tokens
from tests.toy_video.family import ToyLatentsCaching
from tests.toy_video.models import ToyVideoVae, seeded
from tests.toy_video.record import FAMILY

__all__ = ["without_tokens"]

ARCHITECTURE = dataclasses.replace(
    FAMILY.architecture, latents_suffix="_toy.safetensors", text_suffix="_toy_te.safetensors",
    clips=ClipFacts(short="toy", long="toy_video_of_the_tests", fps=8.0),
)


class TensorCaching(ToyLatentsCaching):
    """Every number of the VAE is one of bfloat16, as where it runs in that."""

    architecture = ARCHITECTURE

    def encode(self, vae, images, seeds):
        return super().encode(vae, images, seeds).bfloat16()


@pytest.mark.parametrize("needs", [{}, {"flip_aug": True, "alpha_mask": True}])
def test_samples_are_those_without_a_cache(tmp_path, needs):
    live, strategy = TensorCaching(False, 2, False), TensorCaching(True, 2, False)
    wanted = batches(group_of(tmp_path, live, num_repeats=3, **needs))
    group = group_of(tmp_path, strategy, num_repeats=3, **needs)
    assert fill(group, strategy) == 5
    assert fill(group_of(tmp_path, strategy, num_repeats=3, **needs), strategy) == 0
    in_memory = group_of(tmp_path, live, num_repeats=3, **needs)
    fill(in_memory, live)
    for batch, other, expected in zip(batches(group), batches(in_memory), wanted, strict=True):
        latents, conditions = live.encode_samples(
            seeded(ToyVideoVae(), 1), PARTS, expected.images, expected.latent_seeds
        )
        for found in (batch, other):
            assert torch.equal(found.latents, latents) and found.latents.dtype == torch.float32
            assert torch.equal(found.conditions["first_frame"], conditions["first_frame"])
            assert found.conditions["first_frame"].dtype == torch.float32
            assert (found.alpha_masks is None) == (expected.alpha_masks is None)
            assert found.alpha_masks is None or torch.equal(found.alpha_masks, expected.alpha_masks)
    file = TensorFile.of(str(tmp_path / "0_0032x0032_toy.safetensors"))
    assert file.keys["latents"] == "latents_3x4x4_bfloat16" and file.keys["first_frame"] == "first_frame_bfloat16"
    assert ("alpha_mask" in file.keys) == bool(needs)
    assert file.metadata.items() >= {"architecture": "toy_video_of_the_tests", "width": "32", "height": "32"}.items()


def clip_item(group, length: int = 5, start: int = 0, source: float | None = None) -> ImageItem:
    """An item of a clip of the first file."""
    item = group.items[0]
    conversion = None if source is None else Conversion.given(source, 8.0)
    return dataclasses.replace(
        item, clip=ClipWindow(start, length, None, conversion), frames=length, latents_npz=None
    )


def written(strategy: TensorCaching, item: ImageItem) -> ImageItem:
    """The item with its file, of zeros, as if it had been encoded."""
    assert len(plan_latents([item], strategy)) == 1
    shapes = {"latents": ARCHITECTURE.latents.latent_shape(item.bucket), **strategy.condition_shapes(item.bucket.key)}
    values = {name: torch.zeros(shape) for name, shape in shapes.items()}
    arrays = LatentArrays(
        latents=values.pop("latents"), original_size=item.image_size, crop_ltrb=(0, 0, 1, 1), conditions=values
    )
    record = strategy.record_of(item, ImageIdentity.of(item.absolute_path, with_content=True))
    strategy.store.save(item.latents_npz, ARCHITECTURE, item.bucket, arrays, record)
    assert plan_latents([item], strategy) == []
    return item


def test_what_a_clip_was_made_of_is_compared_with_the_reason(tmp_path):
    """Frames, rate, size, model and file; a file that went by the rules of another trainer says its frames alone."""
    strategy = TensorCaching(True, 2, False)
    item = written(strategy, clip_item(group_of(tmp_path, strategy), source=16.0))
    assert os.path.basename(item.latents_npz) == "0_00000-005_0032x0032_toy.safetensors"

    def reason(strategy=strategy, **changes) -> str | None:
        return strategy.problem_of(dataclasses.replace(item, **changes), False, False)

    def clip(**changes) -> ClipWindow:
        return dataclasses.replace(item.clip, **changes)

    assert reason() is None
    other_rate = clip(conversion=Conversion.given(24.0, 8.0))
    assert reason(clip=other_rate).startswith("made with frame rate ") and "24" in reason(clip=other_rate)
    assert "the file's own" in reason(clip=clip(conversion=None))
    assert reason(clip=clip(start=1)) == "made with frames 0-5, and now 1-5"
    assert reason(clip=clip(length=9)) == "made of 5 frames, and now 9"
    assert reason(frames=3) == "latents of shape [4, 3, 4, 4], needed: [4, 2, 4, 4]"
    assert reason(bucket_reso=(48, 32)) == "latents of shape [4, 3, 4, 4], needed: [4, 3, 4, 6]"
    assert reason(resized_size=(40, 32)) == "made with other resize settings"
    with_model = TensorCaching(True, 2, False)
    with_model.model_identity = "a"
    assert reason(with_model) is None, "nothing is known of the first model"
    other = TensorCaching(True, 2, False)
    other.architecture = dataclasses.replace(
        ARCHITECTURE, clips=dataclasses.replace(ARCHITECTURE.clips, long="another")
    )
    assert reason(other) == "made for toy_video_of_the_tests, and not for another"
    content = Path(item.absolute_path).read_bytes()
    Path(item.absolute_path).write_bytes(content[:-1] + b"x")
    assert reason() == "the image has changed"
    file = TensorFile.of(item.latents_npz)
    tensors = {file.keys[name]: tensor for name, tensor in file.read(list(file.keys)).items()}
    save_file_atomic(tensors, item.latents_npz, {"architecture": "toy_video_of_the_tests", "frame_count": "5"})
    assert reason() is None and reason(clip=other_rate) is None
    assert reason(clip=clip(length=9)) == "made of 5 frames, and now 9"


def test_clips_lie_in_the_cache_directory_also_under_the_name_that_the_known_trainer_gives(tmp_path):
    """It takes the size that frames are read in for the size of the video."""
    strategy = TensorCaching(True, 2, False)
    group = group_of(tmp_path / "clips", strategy, cache_directory=str(tmp_path / "new" / "cache"))
    item = dataclasses.replace(clip_item(group), image_size=(64, 66))
    written(strategy, item)
    assert item.latents_npz == str(tmp_path / "new" / "cache" / "0_00000-005_0064x0066_toy.safetensors")
    known = str(tmp_path / "new" / "cache" / "0_00000-005_0032x0032_toy.safetensors")
    shutil.move(item.latents_npz, known)
    again = dataclasses.replace(item, latents_npz=None)
    assert plan_latents([again], strategy) == [] and again.latents_npz == known


def test_a_file_has_room_for_one_size_and_one_rate(tmp_path):
    strategy = TensorCaching(True, 2, False)
    item = clip_item(group_of(tmp_path, strategy))
    larger = dataclasses.replace(item, bucket_reso=(48, 48), resized_size=(48, 48))
    faster = dataclasses.replace(item, clip=dataclasses.replace(item.clip, conversion=Conversion.given(24.0, 8.0)))
    later = dataclasses.replace(item, clip=dataclasses.replace(item.clip, start=1))
    for other in (larger, faster):
        with pytest.raises(ConfigError, match=r"0\.png is used at 32x32x5 .* cache_directory of its own"):
            plan_latents([item, other], strategy)
    assert len(plan_latents([item, later], strategy)) == 2


class OneNan(TensorCaching):
    """A VAE that gives one number of a sample as NaN."""

    def encode(self, vae, images, seeds):
        latents = super().encode(vae, images, seeds)
        latents.view(len(latents), -1)[:, 0] = float("nan")
        return latents


def test_few_nans_are_0_in_files_and_stop_where_latents_stay_in_memory(tmp_path, caplog):
    strategy = OneNan(True, 2, False)
    group = group_of(tmp_path, strategy, lengths=(5,))
    strategy.encode_conditions = lambda vae, parts, images, seeds, _: {"first_frame": torch.zeros(len(images), 4, 4, 4)}
    fill(group, strategy)
    path = group.items[0].latents_npz
    assert f"latents_3x4x4_bfloat16 of {path}: 1 of 192 numbers are NaN and count as 0" in caplog.text
    latents = strategy.load_latents_from_disk(path, group.items[0].bucket.key)[0]
    assert latents.view(-1)[0] == 0 and torch.isfinite(latents).all()
    in_memory = OneNan(False, 2, False)
    in_memory.encode_conditions = strategy.encode_conditions
    with pytest.raises(TrainingError, match="not finite"):
        fill(group_of(tmp_path, in_memory, lengths=(5,)), in_memory)


def test_a_size_that_is_none_in_the_header_is_nobodys_trouble(tmp_path):
    path = str(tmp_path / "a.safetensors")
    save_file_atomic({"latents_1x4x4_float32": torch.zeros(4, 1, 4, 4)}, path, {"width": "x", "height": "9" * 5000})
    latents, size, *_ = TensorCaching(True, 2, False).load_latents_from_disk(path, (32, 32))
    assert size == [0, 0] and latents.shape == (4, 4, 4)


def test_a_folder_of_frames_is_known_by_all_of_them(tmp_path):
    (tmp_path / "clip").mkdir()
    frames = [make_image(tmp_path / "clip" / f"{i}.png", seed=i) for i in range(3)]
    identity = ImageIdentity.of(str(tmp_path / "clip"), with_content=True)
    assert identity.is_still(str(tmp_path / "clip"))
    shutil.copytree(tmp_path / "clip", tmp_path / "copy")
    os.utime(tmp_path / "copy" / "0.png", ns=(1, 1))
    assert identity.is_still(str(tmp_path / "copy")), "other times, and the same bytes"
    content = Path(frames[1]).read_bytes()
    Path(frames[1]).write_bytes(content[:-1] + b"x")
    assert not identity.is_still(str(tmp_path / "clip"))
    assert file_content_id(str(tmp_path / "clip")) != identity.content


# ---- text ------------------------------------------------------------------------------------------------------------

class TensorTextCaching(SmallTextCaching):
    def __init__(self) -> None:
        super().__init__(True)
        self.architecture = dataclasses.replace(
            self.architecture, text_suffix="_small_te.safetensors", clips=ARCHITECTURE.clips
        )


class HalfEncoder(SmallTextEncoder):
    def forward(self, ids):
        return super().forward(ids).bfloat16()


def text_item(folder: Path, caption: str = "a red cat", **subset) -> ImageItem:
    return make_item(make_image(folder / "a.png"), caption=caption, subset=SubsetParams(**subset))


def test_outputs_are_kept_in_their_number_formats(tmp_path):
    item, strategy = text_item(tmp_path), TensorTextCaching()
    assert text.fill([item], strategy, HalfEncoder()) == ["a red cat"]
    assert item.text_encoder_outputs_npz == str(tmp_path / "a_small_te.safetensors")
    found = strategy.outputs_of(item)
    in_memory = dataclasses.replace(item, text_encoder_outputs_npz=None)
    memory = TensorTextCaching()
    memory.cache_to_disk = False
    text.fill([in_memory], memory, HalfEncoder())
    assert all(torch.equal(tensor, found[name]) for name, tensor in in_memory.text_encoder_outputs.items())
    assert {str(tensor.dtype) for tensor in found.values()} >= {"torch.bfloat16"}
    assert TensorFile.of(item.text_encoder_outputs_npz).metadata["caption1"] == "a red cat"
    assert text.fill([dataclasses.replace(item)], strategy) == []


def read_by_others(path: str) -> dict[str, torch.Tensor]:
    """As the known trainer reads a cache: the part behind the last "_" is a number format, of latents the one before it
    a size; a later key of a name takes the place of an earlier one."""
    found = {}
    for key, tensor in load_file(path).items():
        name = key.removeprefix("varlen_")
        name = name if name.endswith("_mask") else name.rpartition("_")[0]
        name = name.rpartition("_")[0] if name.startswith("latents_") else name
        assert name not in found, f"{name} twice"
        found[name] = tensor
    return found


def test_what_is_ours_alone_is_in_nobodys_way(tmp_path):
    """Mirrored latents and conditions, masks and further captions have other names for readers who know none of them."""
    strategy = TensorCaching(True, 2, False)
    group = group_of(tmp_path, strategy, flip_aug=True, alpha_mask=True)
    fill(group, strategy)
    item = group.items[0]
    found = read_by_others(item.latents_npz)
    assert set(found) == {"latents", "latents_flipped", "first_frame", "first_frame_flipped", "alpha_mask"}
    latents, _, _, flipped, _ = strategy.load_latents_from_disk(item.latents_npz, item.bucket.key)
    assert torch.equal(found["latents"], latents) and torch.equal(found["latents_flipped"], flipped)
    texts = TensorTextCaching()
    items = [text_item(tmp_path, caption) for caption in ("one", "two")]
    text.fill(items, texts)
    found, first = read_by_others(items[0].text_encoder_outputs_npz), texts.outputs_of(items[0])
    assert len(found) == 2 * len(first) and all(torch.equal(found[name], tensor) for name, tensor in first.items())


def test_several_captions_of_a_file_lie_beside_the_one_that_others_read(tmp_path):
    strategy = TensorTextCaching()
    items = [text_item(tmp_path, caption) for caption in ("one", "two", "three")]
    assert text.fill(items, strategy) == ["one", "two", "three"]
    path = items[0].text_encoder_outputs_npz
    file = TensorFile.of(path)
    assert file.metadata["caption1"] == "one" and items[0].text_encoder_outputs_suffix == ""
    first = {name for name in file.keys if "." not in name}
    assert len(file.keys) == 3 * len(first) and first == set(strategy.layout.names)
    again = [dataclasses.replace(item, text_encoder_outputs_npz=None) for item in items]
    assert text.fill(again, strategy) == []
    states = [strategy.outputs_of(item) for item in again]
    name = next(name for name, tensor in states[0].items() if tensor.is_floating_point())
    assert not torch.equal(states[0][name], states[1][name])
    fewer = [dataclasses.replace(items[0], caption="four"), dataclasses.replace(items[1])]
    assert text.fill(fewer, strategy) == ["four"]
    file = TensorFile.of(path)
    assert file.metadata["caption1"] == "four" and len(file.keys) == 2 * len(first), "nobody uses one and three"


def test_stale_outputs_are_noticed_with_or_without_a_record(tmp_path):
    strategy, item = TensorTextCaching(), text_item(tmp_path)
    text.fill([item], strategy)
    path = item.text_encoder_outputs_npz

    def reason(caption: str = "a red cat", strategy=strategy) -> str:
        return strategy.find(path, caption)[1]

    assert reason() == "" and reason("a blue cat") == "made with another caption"
    other = TensorTextCaching()
    other.settings = {"fp8_llm": "True"}
    strategy.settings = {"fp8_llm": "False"}
    text.fill([dataclasses.replace(item, text_encoder_outputs_npz=None, caption="b")], strategy)
    assert reason("b") == "" and reason("b", other) == "made with another fp8_llm"
    file = TensorFile.of(path)
    tensors = {file.keys[name]: tensor for name, tensor in file.read(list(file.keys)).items()}
    changed = {key: tensor + 1 if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    save_file_atomic(changed, path, file.metadata)
    assert reason("b", other) == "", "another program wrote it anew and carried our record along"
    assert reason("a red cat") == "made with another caption"
    save_file_atomic(changed, path, {"architecture": "toy_video_of_the_tests", "caption1": "c"})
    assert reason("c") == "" and reason("b") == "made with another caption"
    keys = set(TensorFile.of(path).keys)
    header = {"architecture": "toy_video_of_the_tests", "caption1": "c"}
    save_file_atomic(changed | {"extra_float32": torch.ones(2)}, path, header)
    text.fill([dataclasses.replace(item, text_encoder_outputs_npz=None, caption="d")], strategy)
    assert set(TensorFile.of(path).keys) == keys, "nothing of another caption stays beside the new one"
    nans = {key: tensor * float("nan") if tensor.is_floating_point() else tensor for key, tensor in changed.items()}
    save_file_atomic(nans, path, header)
    assert "numbers are NaN in" in reason("c")
    save_file_atomic(changed, path, {"architecture": "another", "caption1": "c"})
    assert reason("c") == "made for another, and not for toy_video_of_the_tests"
    Path(path).write_bytes(b"x" * 100)
    assert reason("c") == "unreadable"


def test_windows_of_a_video_share_a_text_file_in_the_cache_directory(tmp_path):
    strategy, item = TensorTextCaching(), text_item(tmp_path, cache_directory=str(tmp_path / "cache"))
    windows = [dataclasses.replace(item, clip=ClipWindow(start, 5)) for start in (0, 5)]
    assert [job.caption for job in plan_text(windows, strategy).jobs] == ["a red cat"]
    assert {one.text_encoder_outputs_npz for one in windows} == {str(tmp_path / "cache" / "a_small_te.safetensors")}
