"""What is special to SD3, through the command line: its three files layouts, masks, dropouts, positions, partial
caches, wrong files. What holds for every family is in test_families.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.core.errors import ConfigError
from library.sd3_utils import ENCODER_SLOTS, inspect_encoder, load_sd3
from library.tiny_models.sd3_tiny import TinySd3, build_tiny_sd3
from library.training import cache_tools
from library.training.wiring.sd3 import Sd3Family
from tests.families import CASES
from tests.runs.conftest import Work, draw_pictures, largest_difference, losses_of, read_parts, sample_pictures
from tests.runs.families import MODEL, refused_run, without
from tools import convert_model

CACHED = ["--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only"]
ON_DISK = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--network_train_unet_only"]
TWO_STEPS = "--max_train_steps=2"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinySd3:
    return build_tiny_sd3(tmp_path_factory.mktemp("tiny_sd3"), with_whole=True)


@pytest.fixture
def work(tmp_path: Path, tiny: TinySd3) -> Work:
    return Work(tmp_path, tiny, draw_pictures(tmp_path / "images", -4), case=CASES["sd3"])


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny: TinySd3) -> bytes:
    """The tensors of a run with caches and nothing else."""
    folder = tmp_path_factory.mktemp("plain")
    work = Work(folder, tiny, draw_pictures(folder / "images", -4), case=CASES["sd3"])
    return read_parts(work.train("plain", TWO_STEPS, *CACHED))[1]


class Arranged(Work):
    """A run whose model options are others than those of the set."""

    parts: tuple[str, ...] = ()

    def argv(self, out: str, *more: str, dataset: Path | None = None) -> list[str]:
        argv = super().argv(out, *more, dataset=dataset)
        return [*without(argv, MODEL, "clip_l", "clip_g", "t5xxl"), *self.parts]


def arranged(work: Work, *parts: str) -> Arranged:
    other = Arranged(work.folder, work.tiny, work.images, case=work.case)
    other.parts = parts
    return other


# -- files -------------------------------------------------------------------------------------------------------------


def test_encoders_inside_the_model_train_like_those_in_files_of_their_own(work: Work, tiny: TinySd3) -> None:
    options = [TWO_STEPS, "--optimizer_type=SGDNesterov"]  # which does not magnify rounding
    apart = work.train("apart", *options)
    inside = arranged(work, f"--{MODEL}={tiny.whole}").train("inside", *options)
    parts = [f"--{MODEL}={tiny.model}", f"--t5xxl={tiny.t5xxl}"]
    parts += [f"--{slot}={tiny.whole}" for slot in ("clip_l", "clip_g", "vae")]
    mixed = arranged(work, *parts).train("mixed", *options)
    assert largest_difference(inside, apart) < 1e-5  # the places of tensors in memory differ
    assert largest_difference(mixed, apart) < 1e-5


def test_a_diffusers_folder_trains_like_the_file_it_was_made_of(work: Work, tiny: TinySd3, tmp_path: Path) -> None:
    folder, options = tmp_path / "folder", [TWO_STEPS, "--optimizer_type=SGDNesterov", *ON_DISK]
    assert (
        convert_model.main([str(tiny.whole), str(folder), "--to", "diffusers", "--tokenizer", str(tiny.tokenizer)]) == 0
    )
    inside = arranged(work, f"--{MODEL}={tiny.whole}").train("inside", *options)
    assert largest_difference(arranged(work, f"--{MODEL}={folder}").train("folder", *options), inside) < 1e-5


def test_without_t5(work: Work, tiny: TinySd3, capsys) -> None:
    files = (f"--{MODEL}={tiny.model}", f"--clip_l={tiny.clip_l}", f"--clip_g={tiny.clip_g}")
    other, options = arranged(work, *files), ["--console_log_level=INFO", TWO_STEPS, "--network_train_unet_only"]
    live = other.train("live", *options)
    said = capsys.readouterr()
    assert "there is no T5" in said.out + said.err
    cached = other.train("cached", TWO_STEPS, *ON_DISK)
    assert read_parts(cached)[1] == read_parts(live)[1]
    assert read_parts(work.train("with", TWO_STEPS, *ON_DISK))[1] != read_parts(live)[1], "the cache of another set"


def test_metadata_and_layers(work: Work) -> None:
    path = work.train("out", TWO_STEPS, "--training_shift=3", "--apply_t5_attn_mask", *CACHED)
    metadata = read_parts(path)[0]
    wanted = {
        "ss_base_model_version": "5-medium", "modelspec.architecture": "stable-diffusion-3-5-medium/lora",
        "ss_apply_lg_attn_mask": "False", "ss_apply_t5_attn_mask": "True", "ss_weighting_scheme": "uniform",
        "ss_logit_mean": "0.0", "ss_logit_std": "1.0", "ss_mode_scale": "1.29",
    }  # fmt: skip
    assert {name: metadata[name] for name in wanted} == wanted
    modules = {key.partition(".")[0] for key in load_file(path)}
    assert "lora_unet_joint_blocks_0_x_block_attn2_qkv" in modules and len(modules) == 3 * 10 + 2 - 3


def test_the_base_is_written_whole_with_what_is_asked_for(work: Work, tiny: TinySd3, tmp_path: Path) -> None:
    """A fine-tune writes denoiser and autoencoder, with --save_clip and --save_t5xxl the text encoders too."""
    run = work.trainer("out", "--save_clip", "--save_t5xxl").prepare()
    run.family.save_model(run.models, str(tmp_path / "whole.safetensors"), None, {"a": "b"})
    written, wanted = load_file(tmp_path / "whole.safetensors"), load_file(tiny.whole)
    assert written.keys() == wanted.keys(), "the tokenizer that T5 carries among them"
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in written.items())
    assert load_sd3(tmp_path / "whole.safetensors", None, "cpu").params == tiny.params
    for slot in ENCODER_SLOTS:
        sizes = [inspect_encoder(slot, path) for path in (tmp_path / "whole.safetensors", getattr(tiny, slot))]
        assert sizes[0] == sizes[1]
    plain = work.trainer("plain").prepare()
    plain.family.save_model(plain.models, str(tmp_path / "plain.safetensors"), None, {})
    assert load_file(tmp_path / "plain.safetensors").keys() == load_file(tiny.model).keys()


def test_saving_encoders_is_idle_beside_an_adapter(work: Work, capsys) -> None:
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["sd3_train_network.py"])
        from library.training import cli

        cli.main("sd3", "network", [*work.argv("out", "--save_clip", "--save_t5xxl", "--strict")])
    message = capsys.readouterr().err
    assert "--save_clip" in message and "--save_t5xxl" in message and "an adapter file holds" in message


# -- text --------------------------------------------------------------------------------------------------------------


DROPOUTS = ["--clip_l_dropout_rate=0.5", "--clip_g_dropout_rate=0.5", "--t5_dropout_rate=0.5"]


def test_dropout_of_encoders_acts_on_cached_outputs_as_on_live_ones(work: Work, plain: bytes) -> None:
    live = work.train("live", *DROPOUTS, "--network_train_unet_only", TWO_STEPS)
    for name, caches in (("memory", CACHED), ("disk", ON_DISK)):
        assert read_parts(work.train(name, *DROPOUTS, TWO_STEPS, *caches))[1] == read_parts(live)[1], name
    assert plain != read_parts(live)[1]


VARYING = [*DROPOUTS, "--pos_emb_random_crop_rate=0.5"]


def test_what_varies_hangs_on_the_place_in_the_global_batch(work: Work) -> None:
    """Four pictures at once, or two and two."""
    work.images = draw_pictures(work.folder / "square", 4)
    options = [*VARYING, TWO_STEPS, "--optimizer_type=SGDNesterov"]
    large, small = work.dataset(batch_size=4, name="large.toml"), work.dataset(batch_size=2, name="small.toml")
    one = work.train("one", *options, dataset=large)
    two = work.train("two", *options, "--gradient_accumulation_steps=2", dataset=small)
    assert largest_difference(one, two) < 1e-5


def test_preserved_samples_vary_like_those_that_they_are_compared_with(work: Work) -> None:
    """A network that does nothing yet gives them no loss, so that the others' is that of the batch."""
    other = draw_pictures(work.folder / "other", 4)
    marks = "custom_attributes = {diff_output_preservation = true}"
    subsets = f"{marks}\n[[datasets.subsets]]\nimage_dir = '{other}'"
    run = work.trainer("out", *VARYING, dataset=work.dataset(batch_size=6, subset_keys=subsets)).prepare()
    batch = next(b for b in run.data.batches(1) if 0 < sum(map(bool, b.custom_attributes)) < len(b))
    rest = [row for row, attributes in enumerate(batch.custom_attributes) if not attributes]
    alone = run.step(batch.rows(rest)).loss_sum.item()
    assert run.step(batch).loss_sum.item() == pytest.approx(alone, rel=1e-5) and alone > 0


def test_validation_drops_nothing(work: Work) -> None:
    data = work.dataset(dataset_keys="validation_split = 0.5")
    options = [TWO_STEPS, "--learning_rate=0", "--unet_lr=1e-30", *CACHED]
    plain = losses_of(work.train("plain", *options, dataset=data), "validation")
    dropped = losses_of(work.train("dropped", *options, *VARYING, dataset=data), "validation")
    assert plain == dropped


def test_masks_act_live_in_caches_and_in_samples(work: Work) -> None:
    prompts, masks = work.folder / "prompts.txt", ["--apply_lg_attn_mask", "--apply_t5_attn_mask"]
    prompts.write_text("a red cat --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8")
    sampling = [f"--sample_prompts={prompts}", "--sample_at_first", TWO_STEPS]
    live = work.train("live", *masks, "--network_train_unet_only", *sampling)
    cached = work.train("cached", *masks, *ON_DISK, *sampling)
    assert read_parts(cached)[1] == read_parts(live)[1]
    one = work.train("one", masks[0], *ON_DISK, *sampling)  # the files are made anew
    assert read_parts(one)[1] != read_parts(live)[1]
    pictures = [sample_pictures(work.folder / name)[0].read_bytes() for name in ("live", "cached", "one")]
    assert pictures[0] == pictures[1] != pictures[2]


def test_both_clips_learn_beside_cached_outputs_of_t5(work: Work) -> None:
    live = work.train("live", TWO_STEPS)
    for name, cache in (("memory", "--cache_text_encoder_outputs"), ("disk", "--cache_text_encoder_outputs_to_disk")):
        assert read_parts(work.train(name, cache, TWO_STEPS))[1] == read_parts(live)[1], name
    state = load_file(live)
    assert {key[:8] for key in state if state[key].any() and "lora_up" in key} == {"lora_une", "lora_te1", "lora_te2"}


def test_t5_learns_too_and_rates_are_per_encoder(work: Work) -> None:
    all_three = ["--network_args", "train_t5xxl=True"]
    moved = load_file(work.train("out", TWO_STEPS, "--text_encoder_lr", "0", "1e-2", "1e-2", *all_three))
    parts = {key[:8] for key, tensor in moved.items() if "lora_up" in key and tensor.any()}
    assert parts == {"lora_une", "lora_te2", "lora_te3"}


# -- positions and options ---------------------------------------------------------------------------------------------


CHANGING = [
    "--pos_emb_random_crop_rate=1", "--enable_scaled_pos_embed", "--training_shift=3", "--t5xxl_max_token_length=12",
    "--weighting_scheme=cosmap", "--weighting_scheme=logit_normal --logit_mean=1", "--weighting_scheme=mode",
    "--max_timestep=300", "--ip_noise_gamma=0.3", "--loss_type=huber", "--mixed_precision=bf16 --fp8_base",
    "--network_args x_attn_dim=0", "--network_args train_block_indices=0-1", "--network_args emb_dims=[2,2,2,2,2,2]",
]  # fmt: skip


@pytest.mark.parametrize("options", CHANGING)
def test_options_that_change_the_result(work: Work, plain: bytes, options: str) -> None:
    assert read_parts(work.train("other", TWO_STEPS, *CACHED, *options.split()))[1] != plain


def test_block_swap_and_checkpointing_change_nothing(work: Work, plain: bytes) -> None:
    for name, option in (("swap", "--blocks_to_swap=1"), ("checkpoints", "--gradient_checkpointing")):
        assert read_parts(work.train(name, TWO_STEPS, *CACHED, option))[1] == plain
    with pytest.raises(ConfigError, match="--blocks_to_swap is 2; .*at most 1"):
        work.train("many", "--blocks_to_swap=2")


@pytest.mark.parametrize("option, words", [
    ("--training_shift=0", "training_shift is 0"), ("--t5_dropout_rate=1.5", "t5_dropout_rate is 1.5"),
    ("--pos_emb_random_crop_rate=-1", "pos_emb_random_crop_rate is -1"),
    ("--timestep_sampling=sigmoid", "timestep_sampling"), ("--discrete_flow_shift=2", "--training_shift"),
    ("--weighted_captions", "weighted_captions"),
])  # fmt: skip
def test_options_that_are_refused(work: Work, option: str, words: str, monkeypatch, capsys) -> None:
    assert words in refused_run("sd3", work.argv("out", option), monkeypatch, capsys)


# -- wrong files -------------------------------------------------------------------------------------------------------


def test_a_model_without_encoders_and_none_given(work: Work, tiny: TinySd3, monkeypatch, capsys) -> None:
    message = refused_run("sd3", arranged(work, f"--{MODEL}={tiny.model}").argv("out"), monkeypatch, capsys)
    for slot in ("clip_l", "clip_g"):
        assert f"--{slot} is not given, and {tiny.model} holds no " in message
    assert "--t5xxl is not given" not in message


def test_clips_in_each_others_slots(work: Work, tiny: TinySd3, monkeypatch, capsys) -> None:
    files = (f"--{MODEL}={tiny.model}", f"--clip_l={tiny.clip_g}", f"--clip_g={tiny.clip_l}", f"--t5xxl={tiny.t5xxl}")
    message = refused_run("sd3", arranged(work, *files).argv("out"), monkeypatch, capsys)
    assert f"--clip_l is {tiny.clip_g}: its width is 24, that of CLIP-G 16; are they exchanged?" in message


def test_a_t5_of_another_size(work: Work, tiny: TinySd3, tmp_path: Path, monkeypatch, capsys) -> None:
    from library.tiny_models.flux_tiny import build_tiny_flux

    other = build_tiny_flux(tmp_path / "flux").t5xxl
    message = refused_run("sd3", [*without(work.argv("out"), "t5xxl"), f"--t5xxl={other}"], monkeypatch, capsys)
    assert f"--t5xxl is {other}: its width is 24, the denoiser {tiny.model} takes 48; use T5-XXL" in message


def test_eight_bit_files_with_scales_load_as_wide_ones(work: Work, tiny: TinySd3, tmp_path: Path) -> None:
    """As ComfyUI packs them: `scaled_fp8`, and a scale beside each matrix."""
    state, packed = load_file(tiny.model), {"model.diffusion_model.scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    for key, tensor in state.items():
        is_matrix = key.startswith("model.diffusion_model.joint") and key.endswith(".weight") and tensor.ndim == 2
        if not is_matrix:
            packed[key] = tensor
            continue
        scale = tensor.abs().max() / 448
        packed[key] = (tensor / scale).to(torch.float8_e4m3fn)
        packed[key.removesuffix("weight") + "scale_weight"] = scale.reshape(1)
    from safetensors import safe_open

    with safe_open(tiny.model, "pt") as file:
        save_file(packed, tmp_path / "fp8.safetensors", file.metadata())
    wide, loaded = (
        load_sd3(tiny.model, torch.float32, "cpu"),
        load_sd3(tmp_path / "fp8.safetensors", torch.float32, "cpu"),
    )
    one, other = (model.joint_blocks[1].x_block.mlp.fc1.weight for model in (wide, loaded))
    assert other.dtype == torch.float32 and not torch.equal(one, other) and (one - other).norm() / one.norm() < 0.05


def test_caches_of_the_tools_are_those_of_the_training(work: Work, plain: bytes) -> None:
    """Filled beforehand, they leave nothing to encode."""
    files = [word for word in work.tiny.arguments() if "tokenizer" not in word]
    common = [*files, "--family=sd3", f"--dataset_config={work.dataset()}", "--max_data_loader_n_workers=0"]
    cache_tools.run("latents", common)
    text = [f"--clip_l_tokenizer={work.tiny.tokenizer}", "--t5xxl_max_token_length=48", "--clip_l_dropout_rate=0"]
    cache_tools.run("text", [*common, *text])
    assert {path.name.split("_", 1)[1] for path in work.images.glob("*.npz")} == {
        "0064x0064_sd3.npz",
        "0096x0064_sd3.npz",
        "sd3_te.npz",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in ("load_vae", "load_text_encoders"):
            patch.setattr(Sd3Family, name, lambda *_: pytest.fail("something is encoded"))
        assert read_parts(work.train("out", TWO_STEPS, *ON_DISK))[1] == plain
