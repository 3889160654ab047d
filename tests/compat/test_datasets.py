"""Datasets by hand, by configuration and of one's own, their buckets, and strategies of plug-ins that really run."""

import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from library import config_util, train_util
from library.config_util import load_blueprint
from library.core.errors import ConfigError
from library.dataset import DatasetOptions
from library.dataset.architectures import ARCHITECTURES
from library.dataset.bucket import BucketSelector
from library.dataset.build import build_dataset_groups
from library.flux_utils import load_ae, load_clip_l, load_t5xxl
from library.strategy_base import (
    LatentsCachingStrategy,
    PluginSlot,
    TextEncoderOutputsCachingStrategy,
    TextEncodingStrategy,
    TokenizeStrategy,
)
from library.strategy_flux import (
    FluxLatentsCachingStrategy,
    FluxTextEncoderOutputsCachingStrategy,
    FluxTextEncodingStrategy,
    FluxTokenizeStrategy,
)
from tests.runs.conftest import draw_pictures
from tests.tiny import build_tiny_flux

SIZE = {"resolution": (64, 64), "network_multiplier": 1.0, "enable_bucket": True, "min_bucket_reso": 32, "max_bucket_reso": 128,
        "bucket_reso_steps": 16, "bucket_no_upscale": False}  # fmt: skip


def folder_dataset(folder: Path, **more):
    subset = train_util.DreamBoothSubset(str(folder), False, "cat", ".txt", num_repeats=2)
    return train_util.DreamBoothDataset([subset], True, batch_size=2, prior_loss_weight=1.0, **{**SIZE, **more})


def test_a_dataset_by_hand_is_that_of_a_configuration(tmp_path):
    images = draw_pictures(tmp_path / "images", -6)
    mine = train_util.DatasetGroup([folder_dataset(images)])
    text = f"""
[general]
enable_bucket = true
min_bucket_reso = 32
max_bucket_reso = 128
bucket_reso_steps = 16
[[datasets]]
resolution = 64
batch_size = 2
[[datasets.subsets]]
image_dir = '{images}'
caption_extension = ".txt"
num_repeats = 2
class_tokens = "cat"
"""
    path = tmp_path / "data.toml"
    path.write_text(text)
    options = DatasetOptions(dataset_config=path)
    blueprint = load_blueprint(options, architecture=ARCHITECTURES["flux"])
    own, _ = build_dataset_groups(blueprint, options, architecture=ARCHITECTURES["flux"], seed=0)
    assert mine.metadata() == own.metadata() and len(mine) == len(own) == 6
    sanitizer = config_util.ConfigSanitizer(True, True, False, True)
    namespace = sanitizer.sanitize_argparse_namespace(SimpleNamespace(seed=0))
    content = sanitizer.sanitize_user_config(config_util.load_user_config(str(path)))
    generated = config_util.BlueprintGenerator(sanitizer).generate(content, namespace, tokenizer=None)
    assert generated.dataset_group.datasets == blueprint.datasets
    group, validation = config_util.generate_dataset_group_by_blueprint(generated.dataset_group)
    assert group.metadata() == own.metadata() and validation is None
    assert sorted(group.image_data) == sorted(mine.image_data) and group.get_resolutions() == [(64, 64)]
    first, again = group[0], mine[0]
    assert torch.equal(first.images, again.images) and first["captions"] == again["captions"]


def test_batches_of_an_epoch_and_the_collator(tmp_path):
    group = train_util.DatasetGroup([folder_dataset(draw_pictures(tmp_path / "images", -6))])
    epoch, step = multiprocessing.Value("i", 1), multiprocessing.Value("i", 0)
    collate = train_util.collator_class(epoch, step, group)
    loader = torch.utils.data.DataLoader(group, batch_size=1, shuffle=True, collate_fn=collate, num_workers=0)
    seen = [key for batch in loader for key in batch["image_keys"]]
    assert len(seen) == 12 and len(set(seen)) == 6
    order = [group[i].image_keys for i in range(len(group))]
    epoch.value = 2
    list(loader)
    assert group.epoch == 2 and [group[i].image_keys for i in range(len(group))] != order
    lines: list[str] = []
    from library.compat.datasets import debug_dataset

    assert debug_dataset(group, show=lines.append) == 12 and "epoch 1, batch 1 of 6" in lines[0]
    assert group.is_latent_cacheable() and group.is_text_encoder_output_cacheable()
    group.verify_bucket_reso_steps(8)
    with pytest.raises(ConfigError, match="bucket_reso_steps is 16; needed: a multiple of 32"):
        group.verify_bucket_reso_steps(32)
    group.add_replacement("cat", "dog")
    group.set_max_train_steps(3)
    assert "a red dog" in group[0].captions[0]
    random_crop = train_util.DreamBoothSubset(
        str(tmp_path / "images"), num_repeats=1, random_crop=True, shuffle_caption=True
    )
    other = train_util.DatasetGroup(
        [train_util.DreamBoothDataset([random_crop], True, batch_size=1, prior_loss_weight=1.0, **SIZE)]
    )
    assert not other.is_latent_cacheable() and not other.is_text_encoder_output_cacheable()


def test_validation_and_metadata_files(tmp_path):
    images = draw_pictures(tmp_path / "images", 5)
    parts = [
        train_util.DreamBoothDataset(
            [train_util.DreamBoothSubset(str(images))], training, 1, prior_loss_weight=1.0, validation_split=0.4,
            validation_seed=3, **SIZE
        )
        for training in (True, False)
    ]
    assert [len(part.image_data) for part in parts] == [3, 2]
    names = sorted(str(path) for path in images.glob("*.png"))
    for part, is_training in zip(parts, (True, False)):
        paths, sizes = train_util.split_train_val(names, [(64, 64)] * 5, is_training, 0.4, 3)
        assert sorted(part.image_data) == paths and len(sizes) == len(paths)
    (tmp_path / "meta.json").write_text('{"%s": {"caption": "a cube"}}' % names[0])
    subset = train_util.FineTuningSubset(None, str(tmp_path / "meta.json"), num_repeats=3)
    tuned = train_util.FineTuningDataset([subset], 1, **SIZE)
    assert len(tuned) == 3 and [item.caption for item in tuned.items] == ["a cube"] and tuned.subsets == (subset,)
    assert [path.name for path in train_util.glob_images_pathlib(images, False)] == [Path(name).name for name in names]
    assert len(train_util.glob_images_pathlib(tmp_path, True)) == 5 and not train_util.glob_images_pathlib(
        tmp_path, False
    )


def test_subsets_by_folders(tmp_path):
    draw_pictures(tmp_path / "train" / "3_red cat", 2)
    draw_pictures(tmp_path / "reg" / "1_cat", 1)
    found = config_util.generate_dreambooth_subsets_config_by_subdirs(str(tmp_path / "train"), str(tmp_path / "reg"))
    assert [
        (Path(s["image_dir"]).name, s["num_repeats"], s["class_tokens"], s.get("is_reg", False)) for s in found
    ] == [
        ("3_red cat", 3, "red cat", False),
        ("1_cat", 1, "cat", True),
    ]
    masks = config_util.generate_controlnet_subsets_config_by_subdirs(str(tmp_path / "train"), str(tmp_path / "masks"))
    assert masks == [
        {
            "image_dir": str(tmp_path / "train"),
            "conditioning_data_dir": str(tmp_path / "masks"),
            "num_repeats": 1,
            "caption_extension": ".txt",
        }
    ]
    with pytest.raises(ConfigError, match="is not a folder"):
        config_util.generate_dreambooth_subsets_config_by_subdirs(str(tmp_path / "no"))


def test_wrong_configurations_are_named():
    sanitizer = config_util.ConfigSanitizer(True, False, False, False)
    with pytest.raises(ConfigError, match="did you mean 'num_repeats'"):
        sanitizer.sanitize_user_config({"datasets": [{"subsets": [{"image_dir": "a", "num_repeat": 1}]}]})
    with pytest.raises(ConfigError, match="caption dropout"):
        sanitizer.sanitize_user_config({"datasets": [{"subsets": [{"image_dir": "a", "caption_dropout_rate": 0.1}]}]})
    with pytest.raises(ConfigError, match="folders with caption files"):
        config_util.BlueprintGenerator(sanitizer).generate(
            {"datasets": [{"resolution": 64, "subsets": [{"metadata_file": "a"}]}]}, SimpleNamespace()
        )
    with pytest.raises(ValueError, match="one kind"):
        config_util.ConfigSanitizer(False, False, False, True)


@pytest.mark.parametrize("no_upscale", [False, True])
def test_buckets(no_upscale):
    manager = train_util.BucketManager(no_upscale, (512, 512), 256, 1024, 64)
    manager.make_buckets()
    selector = BucketSelector((512, 512), bucket_no_upscale=no_upscale)
    assert manager.predefined_resos == selector.predefined and manager.max_area == 512 * 512
    for size in ((640, 480), (300, 900), (2000, 1000), (640, 480)):
        choice = selector.select(size)
        reso, resized, error = manager.select_bucket(*size)
        assert (reso, resized, error) == (choice.bucket_reso, choice.resized_size, choice.ar_error)
        manager.add_image(reso, size)
        if not no_upscale:
            assert manager.get_crop_ltrb(reso, size) == choice.crop_ltrb
    manager.sort()
    assert manager.resos == sorted(manager.resos) and sum(map(len, manager.buckets)) == 4
    assert (640, 480) in manager.buckets[manager.reso_to_id[selector.select((640, 480)).bucket_reso]]
    manager.shuffle()
    given = train_util.BucketManager(False, None, 256, 1024, 64)
    given.set_predefined_resos([(512, 512)])
    assert given.select_bucket(100, 300)[0] == (512, 512)
    if no_upscale:
        with pytest.raises(ValueError, match="fits no bucket"):
            manager.select_bucket(10, 900)


class Own(train_util.MinimalDataset):
    def __init__(self, tokenizer, max_token_length, resolution, debug_dataset=False):
        super().__init__(resolution, 1.0, debug_dataset)
        self.tokenizer, self.num_train_images = tokenizer, 2

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"images": torch.zeros(1, 3, 64, 64), "captions": [f"number {index}"]}


def test_a_dataset_of_ones_own(tmp_path):
    options = SimpleNamespace(
        dataset_class=f"{__name__}.Own", resolution=(64, 64), max_token_length=75, debug_dataset=False
    )
    dataset = train_util.load_arbitrary_dataset(options, "tokenizer")
    assert type(dataset).__name__ == "Own" and dataset.tokenizer == "tokenizer" and not dataset.is_latent_cacheable()
    assert dataset[1]["captions"] == ["number 1"]
    with pytest.raises(NotImplementedError, match="MinimalDataset has no __len__"):
        len(train_util.MinimalDataset(None, 1.0))


# -- strategies of plug-ins ------------------------------------------------------------------------------------------


class OwnLatents(FluxLatentsCachingStrategy):
    """Files of its own in the known four calls."""

    def get_latents_npz_path(self, absolute_path, image_size):
        return str(Path(absolute_path).with_suffix(".own.npz"))

    def is_disk_cached_latents_expected(self, bucket_reso, npz_path, flip_aug, alpha_mask):
        return Path(npz_path).exists()

    def cache_batch_latents(self, vae, infos, flip_aug, alpha_mask, random_crop):
        assert not random_crop
        for info in infos:
            width, height = info.bucket_reso
            pixels = np.array(Image.open(info.absolute_path).convert("RGB").resize((width, height)))
            image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
            latents = self.encode(vae, image, [0])[0]
            if self.cache_to_disk:
                np.savez(info.latents_npz, own=latents.numpy(), size=info.image_size)
            else:
                info.latents, info.latents_original_size, info.latents_crop_ltrb = (
                    latents,
                    info.image_size,
                    (0, 0, width, height),
                )

    def load_latents_from_disk(self, npz_path, bucket_reso):
        content = np.load(npz_path)
        return content["own"] + 1, content["size"].tolist(), [0, 0, *bucket_reso], None, None


class OwnOutputs(FluxTextEncoderOutputsCachingStrategy):
    def get_outputs_npz_path(self, image_abs_path):
        return str(Path(image_abs_path).with_suffix(".text.npz"))

    def is_disk_cached_outputs_expected(self, npz_path):
        return Path(npz_path).exists()

    def cache_batch_outputs(self, tokenize_strategy, models, text_encoding_strategy, infos):
        tokens = tokenize_strategy.tokenize([info.caption for info in infos])
        with torch.no_grad():
            outputs = text_encoding_strategy.encode_tokens(tokenize_strategy, models, tokens)
        for number, info in enumerate(infos):
            rows = [output[number] for output in outputs]
            if self.cache_to_disk:
                np.savez(info.text_encoder_outputs_npz, *[row.numpy() for row in rows])
            else:
                info.text_encoder_outputs = rows

    def load_outputs_npz(self, npz_path):
        return list(np.load(npz_path).values())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_tiny_flux(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def slots(monkeypatch):
    """The four slots, empty again afterwards."""
    monkeypatch.setattr(PluginSlot, "_slots", {})


@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_a_group_is_cached_by_the_strategies_that_were_set(tmp_path, tiny, slots, to_disk, own):
    group = train_util.DatasetGroup([folder_dataset(draw_pictures(tmp_path / "images", -4))])
    latents_class = OwnLatents if own else FluxLatentsCachingStrategy
    outputs_class = OwnOutputs if own else FluxTextEncoderOutputsCachingStrategy
    TokenizeStrategy.set_strategy(
        FluxTokenizeStrategy(16, clip_l_tokenizer=str(tiny.clip_l_tokenizer), t5xxl_tokenizer=str(tiny.t5xxl_tokenizer))
    )
    TextEncodingStrategy.set_strategy(FluxTextEncodingStrategy(False))
    LatentsCachingStrategy.set_strategy(latents_class(to_disk, 2, False))
    TextEncoderOutputsCachingStrategy.set_strategy(outputs_class(to_disk, 2, False))
    encoders = [load_clip_l(str(tiny.clip_l), torch.float32, "cpu"), load_t5xxl(str(tiny.t5xxl), torch.float32, "cpu")]
    group.new_cache_latents(load_ae(str(tiny.ae), torch.float32, "cpu"), None)
    group.new_cache_text_encoder_outputs(encoders, None)
    batch = group[0]
    assert batch.images is None and batch.latents.shape[1] == 16
    assert {"t5_out", "l_pooled"} <= set(batch.conditioning) and torch.isfinite(batch.latents).all()
    files = sorted(path.suffixes[0] for path in (tmp_path / "images").glob("*.npz"))
    assert bool(files) == to_disk
    if to_disk and own:
        assert set(files) == {".own", ".text"}
        item = group.datasets[0].items[0]
        stored = np.load(item.latents_npz)["own"]
        found = next(b for b in (group[i] for i in range(len(group))) if item.absolute_path in b.image_keys)
        assert np.allclose(found.latents[found.image_keys.index(item.absolute_path)].numpy(), stored + 1)


def test_a_run_uses_the_strategies_of_a_trainer(tmp_path, tiny):
    import flux_train_network
    from tests.runs.conftest import Work, read_parts

    class Mine(flux_train_network.FluxNetworkTrainer):
        def get_latents_caching_strategy(self, args):
            return OwnLatents(args.cache_latents_to_disk, args.vae_batch_size, False)

        def get_text_encoder_outputs_caching_strategy(self, args):
            return OwnOutputs(args.cache_text_encoder_outputs_to_disk, args.text_encoder_batch_size, False)

    work = Work(tmp_path, tiny, draw_pictures(tmp_path / "images", 3))
    caches = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"]
    plain = work.train("plain", "--max_train_steps=2", *caches)
    Mine().train(flux_train_network.setup_parser().parse_args(work.argv("mine", "--max_train_steps=2", *caches)))
    assert {path.suffixes[0] for path in (tmp_path / "images").glob("*.own.npz")} == {".own"}
    assert len(list((tmp_path / "images").glob("*.text.npz"))) == 3
    assert read_parts(tmp_path / "mine" / "lora.safetensors")[1] != read_parts(plain)[1]


def test_a_dataset_without_subsets_stays_one():
    flat = {"image_directory": "i", "resolution": (64, 64), "fp_1f_clean_indices": (0, 1)}
    sanitizer = config_util.ConfigSanitizer(True, True, False, True)
    content = sanitizer.sanitize_user_config({"datasets": [flat]})
    assert content["datasets"] == [flat]
    [dataset] = config_util.BlueprintGenerator(sanitizer).generate(content, SimpleNamespace()).dataset_group.datasets
    assert dataset.bucket_rule == "area" and dataset.subsets[0].image_dir == "i"
