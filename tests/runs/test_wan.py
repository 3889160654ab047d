"""Wan: what clips, pictures and single frames are conditioned on, two experts, and what is refused before a model is
loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.components.wan_vae_utils import load_wan_vae
from library.core.errors import ConfigError
from library.core.keyed_random import StepDraws
from library.core.registry import import_target
from library.dataset.items import SampleFacts
from library.families.latents import Bucket, SampleKind
from library.families.wan import FAMILY
from library.families.wan_tasks import TASKS
from library.strategy_wan import WanLatentEncoder, cleaned
from library.tiny_models.wan_tiny import TinyWan, build_tiny_wan
from library.training import cli, parser_common
from library.training.timestep_samplers import TimestepOptions, build
from library.training.trainables.network import NetworkTrainable
from library.training.trainer_base import Trainer
from library.wan_clip_utils import load_vision, vision_states
from library.wan_train_utils import OneSide
from tests.runs.conftest import draw_pictures, fingerprint, largest_difference, read_parts
from tests.runs.families import refused_run, without

CLIPS = """
[general]
caption_extension = ".txt"
resolution = [32, 32]
batch_size = 2
{general}
[[datasets]]
image_directory = '{images}'
{keys}
"""


class Tinies:
    """Sets by task, made when first asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self.factory, self.made = factory, {}

    def __getitem__(self, task: str) -> TinyWan:
        if task not in self.made:
            self.made[task] = build_tiny_wan(self.factory.mktemp("wan"), task=task)
        return self.made[task]


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Tinies:
    return Tinies(tmp_path_factory)


class WanWork:
    """Runs of a few steps on pictures in the form of the known video trainer."""

    def __init__(self, folder: Path, tiny: TinyWan, keys: str = "", general: str = "") -> None:
        self.folder, self.tiny = folder, tiny
        self.images = folder / "images"
        if not self.images.exists():
            draw_pictures(self.images, 3, (32, 32))
        self.data = folder / "data.toml"
        self.data.write_text(CLIPS.format(images=self.images, keys=keys, general=general), encoding="utf-8")

    def argv(self, out: str, *more: str) -> list[str]:
        return [
            *self.tiny.arguments(), f"--dataset_config={self.data}", f"--output_dir={self.folder / out}",
            "--output_name=lora", "--network_module=networks.lora_wan", "--network_dim=4", "--max_train_steps=4",
            "--seed=5", "--learning_rate=1e-2", "--max_data_loader_n_workers=0", "--console_log_level=WARNING", *more,
        ]  # fmt: skip

    def train(self, out: str, *more: str) -> Path:
        cli.run("wan", "network", self.argv(out, *more))
        return self.folder / out / "lora.safetensors"

    def family(self, *more: str) -> Any:
        config = parser_common.parse_command(self.argv("out", *more), "wan", "network").config
        return import_target(FAMILY.family)(config)

    def prepare(self, *more: str):
        family = self.family(*more)
        trainer = Trainer(family.config, family, NetworkTrainable(family.config))
        run = trainer.prepare()
        trainer.release()
        return run


def noise_clip(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) * 2 - 1


# -- conditions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["i2v-14B", "flf2v-14B", "i2v-A14B", "t2v-14B-FC", "i2v-14B-FC"])
@torch.no_grad()
def test_conditions_of_clips(tinies: Tinies, task: str) -> None:
    """Made by hand of the clip: its first (and last) frame with grey between them, encoded; the mask; the control clip;
    states of the frames."""
    tiny, facts = tinies[task], TASKS[task]
    vae = load_wan_vae(tiny.vae, torch.float32, "cpu")
    parts = {} if tiny.clip is None else {"clip": load_vision(tiny.clip, torch.float32, "cpu")}
    clip, control = noise_clip(1, 3, 9, 32, 48), noise_clip(1, 3, 9, 32, 48).flip(2)
    encoder = WanLatentEncoder(facts, (257, 16) if tiny.clip else None)
    bucket = Bucket(48, 32, 9)
    pictures = {"conditioning_images": control} if facts.fun_control else {}
    assert encoder.pictures_for(bucket) == tuple(pictures)
    _, made = encoder.encode_with_facts(vae, parts, clip, [0], pictures, [SampleFacts()])
    assert {name: tuple(value.shape[1:]) for name, value in made.items()} == encoder.condition_shapes(bucket)

    grey = torch.zeros_like(clip)
    grey[:, :, 0] = clip[:, :, 0]
    mask = torch.zeros(1, 4, 3, 4, 6)
    mask[:, :, 0] = 1
    wanted = {}
    if facts.takes_last:
        grey[:, :, 8] = clip[:, :, 8]
        mask[:, 3, 2] = 1
        wanted["latents_image_ends"] = torch.cat((mask, vae.encode(grey)), dim=1)
        wanted["clip_end"] = vision_states(parts["clip"], clip[:, :, 8])
    elif facts.takes_picture:
        wanted["latents_image"] = torch.cat((mask, vae.encode(grey)), dim=1)
    if facts.fun_control:
        wanted["latents_control"] = vae.encode(control)
    if tiny.clip is not None:
        wanted["clip"] = vision_states(parts["clip"], clip[:, :, 0])
    assert made.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(made[name], value, msg=name)


@torch.no_grad()
def test_a_single_frame_among_its_references(tinies: Tinies) -> None:
    """Two control pictures in the order of the dataset, at the places 8 and 0; the frame itself at 4."""
    tiny = tinies["flf2v-14B"]
    vae, vision = load_wan_vae(tiny.vae, torch.float32, "cpu"), load_vision(tiny.clip, torch.float32, "cpu")
    frame, first, second = (noise_clip(1, 3, 32, 32) * scale for scale in (1.0, 0.5, -0.5))
    kind = SampleKind(controls=((32, 32),) * 2, clean_indices=(8, 0), target_index=4)
    encoder, bucket = WanLatentEncoder(TASKS["flf2v-14B"], (257, 16)), Bucket(32, 32, 1, kind)
    pictures = {"conditioning_images": first, "conditioning_images_1": second}
    latents, made = encoder.encode_with_facts(vae, {"clip": vision}, frame, [0], pictures, [SampleFacts(kind)])
    alone = [vae.encode(picture[:, :, None]) for picture in (second, frame, first)]
    grey = vae.encode(torch.zeros(1, 3, 1, 32, 32))
    torch.testing.assert_close(latents, torch.cat(alone, dim=2))
    torch.testing.assert_close(made["latents_image"][:, 4:], torch.cat((alone[0], grey, alone[2]), dim=2))
    assert made["latents_image"][0, :4, :, 0, 0].tolist() == [[1, 0, 1]] * 4
    assert made["f_indices"].tolist() == [[0, 4, 8]] and made["f_indices"].dtype == torch.int32
    torch.testing.assert_close(made["clip"][:, 1], vision_states(vision, second))
    assert FAMILY.latents.latent_shape(bucket) == tuple(latents.shape[1:])
    assert {name: tuple(value.shape[1:]) for name, value in made.items()} == encoder.condition_shapes(bucket)


def test_single_frames_train_with_the_places_of_their_dataset(tinies: Tinies, tmp_path: Path) -> None:
    """The denoiser gets the places; caches change no byte; other places are noticed and make another adapter."""
    draw_pictures(tmp_path / "control", 3, (32, 32))
    keys = f"control_directory = '{tmp_path / 'control'}'\nfp_1f_clean_indices = [0]\nfp_1f_target_index = "
    work = WanWork(tmp_path, tinies["i2v-14B"], keys + "5")
    run, seen = work.prepare("--live_encoding"), []
    forward = run.models.denoiser.forward
    run.models.denoiser.forward = lambda *given, **more: seen.append(more["f_indices"]) or forward(*given, **more)
    run.step(next(run.data.batches(1)))
    assert seen[0].tolist() == [[0, 5]] * 2
    live, cached = work.train("live", "--live_encoding"), work.train("cached")
    assert read_parts(live)[1] == read_parts(cached)[1] == read_parts(work.train("again"))[1]
    (cache, *_) = sorted(tmp_path.glob("images/*_wan.safetensors"))
    assert load_file(cache).keys() >= {"latents_2x4x4_float32", "latents_image_2x4x4_float32", "f_indices_int32"}
    other = WanWork(tmp_path, tinies["i2v-14B"], keys + "9").train("other")
    assert largest_difference(other, cached) > 1e-6


def test_control_clips_train(tinies: Tinies, tmp_path: Path) -> None:
    """Videos in a folder beside those that follow them; other controls make another adapter."""
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        work = WanWork(tmp_path / name, tinies["t2v-14B-FC"])
        draw_pictures(work.folder / "control", 3, (32, 32) if name == "one" else (48, 32))
        work = WanWork(work.folder, work.tiny, f"control_directory = '{work.folder / 'control'}'")
        made.append(work.train("out"))
        assert read_parts(work.train("live", "--live_encoding"))[1] == read_parts(made[-1])[1]
    assert largest_difference(*made) > 1e-6


# -- two experts -------------------------------------------------------------------------------------------------------


def test_a_step_learns_on_one_side_of_the_boundary() -> None:
    """All samples and processes on one; over the steps the law is that without a boundary."""
    law = build(TimestepOptions(timestep_sampling="shift", discrete_flow_shift=3.0))
    sides = OneSide(law, 0.875)
    drawn = torch.stack([sides.sample((3, 16, 1, 4, 4), StepDraws(7, step, (0, 1, 2))) for step in range(1500)])
    assert all(len(set(row)) == 1 for row in (drawn >= 0.875).tolist())
    for step in range(40):
        alone = sides.sample((1, 16, 1, 4, 4), StepDraws(7, step, (1,)))
        assert torch.equal(alone, drawn[step, 1:2]), "whatever else is in the batch"
    plain = torch.cat([law.sample((3, 16, 1, 4, 4), StepDraws(8, step, (0, 1, 2))) for step in range(1500)])
    levels = torch.linspace(0.05, 0.95, 10)
    difference = drawn.flatten().quantile(levels) - plain.quantile(levels)
    assert difference.abs().max() < 0.03
    rare = OneSide(build(TimestepOptions(timestep_sampling="uniform", max_timestep=1)), 0.5)
    assert (rare.sample((2, 16, 1, 4, 4), StepDraws(7, 0, (0, 1))) < 0.5).all()


def test_both_experts_learn_and_each_predicts_on_its_side(tinies: Tinies, tmp_path: Path) -> None:
    """One adapter; the loss of a side is that of a run with its expert alone."""
    work, tiny = WanWork(tmp_path, tinies["i2v-A14B"]), tinies["i2v-A14B"]
    run = work.prepare("--live_encoding")
    batch = next(run.data.batches(1))
    alone = {}
    for side, path in ((False, tiny.denoiser), (True, tiny.high)):
        one = WanWork(tmp_path, dataclasses.replace(tiny, high=None, denoiser=path)).prepare("--live_encoding")
        assert one.models.denoiser.experts is None
        alone[side] = one
    for time in (0.2, 0.899, 0.9, 0.95, 0.3):
        times = torch.full((len(batch),), time)
        expected = alone[time >= 0.9].step(batch, times=times).loss_sum
        torch.testing.assert_close(run.step(batch, times=times).loss_sum, expected)


def test_idle_weights_in_main_memory_change_no_byte(tinies: Tinies, tmp_path: Path) -> None:
    work = WanWork(tmp_path, tinies["i2v-A14B"])
    kept = work.train("kept", "--timestep_sampling=uniform")
    offloaded = work.train("offloaded", "--timestep_sampling=uniform", "--offload_inactive_dit")
    assert read_parts(offloaded)[1] == read_parts(kept)[1]
    other = work.train("other", "--timestep_sampling=uniform", "--timestep_boundary=500")
    assert largest_difference(other, kept) > 1e-6 and read_parts(other)[0]["ss_timestep_boundary"] == "0.5"


def test_each_expert_may_have_an_adapter(tinies: Tinies, tmp_path: Path) -> None:
    """A step on one side leaves the other adapter as it is; both files have the names of any adapter; resumed and
    continued runs know both."""
    work = WanWork(tmp_path, tinies["i2v-A14B"])
    options = ["--adapter_per_expert", "--timestep_sampling=uniform", "--save_precision=float", "--max_train_steps=8"]
    run = work.prepare("--live_encoding", *options)
    pair, batch = run.trainable.network, next(run.data.batches(1))
    for time, learns, rests in ((0.3, pair.first, pair.second), (0.95, pair.second, pair.first)):
        run.optimizer.zero_grad(set_to_none=True)
        run.step(batch, times=torch.full((len(batch),), time)).loss.backward()
        assert all(parameter.grad is None for parameter in rests.parameters())
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in learns.parameters())

    whole = work.train("whole", *options, "--timestep_boundary=0.5", "--save_every_n_steps=2", "--save_state")
    low, high = load_file(whole), load_file(whole.with_name("lora_high.safetensors"))
    assert low.keys() == high.keys() and "lora_unet_blocks_0_self_attn_q.lora_up.weight" in low
    for state in (low, high):
        assert any(tensor.any() for key, tensor in state.items() if "lora_up" in key), "both sides were drawn"
    assert largest_difference(whole, whole.with_name("lora_high.safetensors")) > 1e-6
    state = whole.with_name("lora-step00000002-state")
    resumed = work.train("resumed", *options, "--timestep_boundary=0.5", f"--resume={state}")
    for name in ("lora.safetensors", "lora_high.safetensors"):
        assert fingerprint(resumed.with_name(name)) == fingerprint(whole.with_name(name))
    assert whole.with_name("lora-step00000002_high.safetensors").is_file()
    again = work.prepare("--live_encoding", *options, f"--network_weights={whole}").trainable.network
    for network, wanted in ((again.first, low), (again.second, high)):
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in network.file_state_dict().items())


def test_adapters_of_experts_need_one_process(tinies: Tinies, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    work = WanWork(tmp_path, tinies["i2v-A14B"])
    assert "needed: one process" in refused_run("wan", work.argv("out", "--adapter_per_expert"), monkeypatch, capsys)


def test_samples_change_the_expert_at_the_boundary(tinies: Tinies, tmp_path: Path) -> None:
    """Each step by the expert of its noise level, with the guidance of that side."""
    from library.generation.wan_pipeline import WanPipeline
    from library.training.sampling_prompts import SamplePrompt

    work = WanWork(tmp_path, tinies["i2v-A14B"])
    run, used = work.prepare("--live_encoding"), []
    prompt = SamplePrompt(
        prompt="a cat", width=32, height=32, frame_count=5, sample_steps=6, seed=1,
        image_path=str(work.images / "00.png"),
    )  # fmt: skip
    complete = run.family.sample_defaults(prompt)
    assert (complete.cfg_scale, complete.cfg_scale_high_noise, complete.discrete_flow_shift) == (3.5, 3.5, 5.0)
    assert complete.negative_prompt.startswith("色调艳丽") and run.family.needs_negative(complete)
    pipeline = run.family.pipeline(run.models)
    experts, forward = run.models.denoiser.experts, run.models.denoiser.forward

    def noting(x, t, *given, **more):
        used.append((experts.high_noise, float(t[0]) / 1000))
        assert more["y"].shape[1:] == (20, 2, 4, 4)
        return forward(x, t, *given, **more)

    run.models.denoiser.forward = noting
    texts = {"t5": [torch.randn(3, 24)]}
    frames = pipeline.sample(dataclasses.replace(complete, cfg_scale_high_noise=1.0), texts, texts)
    assert isinstance(pipeline, WanPipeline) and len(frames) == 5
    assert all(high == (sigma >= 0.9) for high, sigma in used)
    assert {high for high, _ in used} == {True, False}
    counts = [sum(high is side for high, _ in used) for side in (True, False)]
    high = pipeline.schedule(_request(pipeline, complete))[:-1] >= 0.9
    assert counts == [int(high.sum()), 2 * int((~high).sum())], "one forward without guidance, two with it"


def test_a_single_frame_is_made_among_its_references(tinies: Tinies, tmp_path: Path) -> None:
    """Three latent frames at the places of the prompt, of which the target alone is decoded."""
    from library.training.sampling_prompts import SamplePrompt

    work = WanWork(tmp_path, tinies["flf2v-14B"])
    run, seen = work.prepare("--live_encoding"), []
    pictures = tuple(str(work.images / f"0{number}.png") for number in (0, 1))
    prompt = SamplePrompt(
        prompt="a cat", width=32, height=32, sample_steps=2, seed=1, cfg_scale=1.0, control_image_path=pictures,
        one_frame="control_index=8;0,target_index=4",
    )  # fmt: skip
    complete, forward = run.family.sample_defaults(prompt), run.models.denoiser.forward

    def noting(x, t, *given, **more):
        seen.append((tuple(x.shape), more["f_indices"].tolist(), more["clip_fea"].shape[1]))
        return forward(x, t, *given, **more)

    run.models.denoiser.forward = noting
    texts = {"t5": [torch.randn(3, 24)]}
    picture = run.family.pipeline(run.models).sample(complete, texts, None)
    assert set(map(str, seen)) == {str(((1, 16, 3, 4, 4), [[0, 4, 8]], 2 * 257))} and picture.size == (32, 32)
    with pytest.raises(ConfigError, match="one_frame names places of 1 control pictures .control_index., 2 are given"):
        run.family.sample_defaults(dataclasses.replace(prompt, one_frame="control_index=0"))
    with pytest.raises(ConfigError, match="begins with a picture"):
        run.family.sample_defaults(dataclasses.replace(prompt, one_frame=None))


def _request(pipeline, prompt):
    from library.generation.requests import VIDEO_SAMPLE_NAMES, request_of

    return request_of(pipeline.request_class, prompt, VIDEO_SAMPLE_NAMES)


# -- refused and told --------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_one_message(tinies: Tinies, tmp_path: Path, monkeypatch, capsys) -> None:
    t2v, i2v, pair = (WanWork(tmp_path, tinies[task]) for task in ("t2v-14B", "i2v-14B", "i2v-A14B"))
    small = build_tiny_wan(tmp_path / "small", task="i2v-A14B", num_blocks=1)
    wrong_vae = tmp_path / "vae.safetensors"
    save_file({"encoder.down.0.block.0.norm1.weight": torch.zeros(2)}, wrong_vae)
    wide = tmp_path / "t5.safetensors"
    state = load_file(t2v.tiny.t5)
    save_file({key: value.repeat_interleave(2, -1) if value.ndim == 2 else value for key, value in state.items()}, wide)

    def told(work: WanWork, *more: str, left_out: tuple[str, ...] = ()) -> str:
        return refused_run("wan", [*without(work.argv("out"), *left_out), *more], monkeypatch, capsys)

    message = told(t2v, "--task=i2v-14B", left_out=("task",))
    assert "--task is i2v-14B" in message and "16 input channels" in message and "--task t2v-14B or t2v-1.3B" in message
    assert "--clip is not given" in message, "all problems at once"
    message = told(pair, "--task=i2v-14B", left_out=("task",))
    assert "no image branch" in message and "needed: --task i2v-A14B" in message
    assert "--clip is not given" in told(i2v, left_out=("clip",))
    assert f"--vae is {wrong_vae}" in told(t2v, f"--vae={wrong_vae}", left_out=("vae",))
    assert f"--clip is {t2v.tiny.t5}" in told(i2v, f"--clip={t2v.tiny.t5}", left_out=("clip",))
    assert "--dit_high_noise is given with the task t2v-14B" in told(t2v, f"--dit_high_noise={t2v.tiny.denoiser}")
    message = told(pair, f"--dit_high_noise={small.high}", left_out=("dit_high_noise",))
    assert "are no pair: they have num_layers 2 and 1" in message
    message = told(pair, f"--dit_high_noise={pair.tiny.denoiser}", left_out=("dit_high_noise",))
    assert "which is the file of --dit too" in message
    assert f"--t5 is {wide}: its width is 48" in told(t2v, f"--t5={wide}", left_out=("t5",))
    assert "--timestep_boundary is -1" in told(pair, "--timestep_boundary=-1")
    assert "--blocks_to_swap is 2" in told(t2v, "--blocks_to_swap=2")


def test_single_frames_need_a_task_with_pictures(tinies: Tinies, tmp_path: Path, monkeypatch, capsys) -> None:
    draw_pictures(tmp_path / "control", 3, (32, 32))
    keys = f"control_directory = '{tmp_path / 'control'}'\nfp_1f_clean_indices = [0]"
    message = refused_run("wan", WanWork(tmp_path, tinies["t2v-14B"], keys).argv("out"), monkeypatch, capsys)
    assert "the task is t2v-14B: needed: a task with a first frame" in message


def test_the_task_is_read_from_the_file(tinies: Tinies, tmp_path: Path) -> None:
    for task, found in (
        ("t2v-14B", "t2v-14B"), ("i2v-14B", "i2v-14B"), ("flf2v-14B", "flf2v-14B"), ("i2v-A14B", "i2v-A14B"),
    ):  # fmt: skip
        work = WanWork(tmp_path, tinies[task])
        config = parser_common.parse_command(without(work.argv("out"), "task"), "wan", "network").config
        assert import_target(FAMILY.family)(config).task.name == found


def test_notices_name_the_range_of_one_expert_and_the_cleaning(tinies: Tinies, tmp_path: Path) -> None:
    tiny = tinies["i2v-A14B"]
    high = tmp_path / "wan2.2_i2v_high_noise.safetensors"
    high.symlink_to(tiny.high)
    one = WanWork(tmp_path, dataclasses.replace(tiny, high=None))
    assert any("--min_timestep 0 --max_timestep 900" in line for line in one.family()._notices())
    assert not any("--max_timestep" in line for line in one.family("--min_timestep=0", "--max_timestep=900")._notices())
    named = WanWork(tmp_path, dataclasses.replace(tiny, high=None, denoiser=high))
    assert any("--min_timestep 900 --max_timestep 1000" in line for line in named.family()._notices())
    swapped = WanWork(tmp_path, dataclasses.replace(tiny, denoiser=high, high=tiny.denoiser))
    assert any("whose name says much noise" in line for line in swapped.family()._notices())
    assert any("ftfy is not installed" in line for line in one.family()._notices())
    buckets = WanWork(tmp_path, tiny).family("--num_timestep_buckets=4", "--timestep_sampling=uniform")
    assert any("--num_timestep_buckets" in line for line in buckets._notices())
    drawn = buckets.timestep_sampler(buckets.objective()).sample((2, 16, 1, 4, 4), StepDraws(1, 0, (0, 1)))
    assert len({float(time) >= 0.9 for time in drawn}) == 1
    idle = {item.written for item in one.family("--offload_inactive_dit", "--guidance_scale=3").idle()}
    assert idle == {"--offload_inactive_dit", "--guidance_scale"}


def test_captions_are_cleaned() -> None:
    assert cleaned(" a  cat &amp;amp;\n\tdog\u3000 ") == "a cat & dog"


def test_caches_alone_train_and_the_adapter_has_known_names(tinies: Tinies, tmp_path: Path) -> None:
    """Without VAE, text encoder and vision encoder, once the caches are there."""
    work = WanWork(tmp_path, tinies["i2v-14B"])
    first = work.train("first")
    argv = without(work.argv("bare"), "vae", "t5", "clip", "t5_tokenizer")
    cli.run("wan", "network", argv)
    bare = tmp_path / "bare" / "lora.safetensors"
    assert read_parts(bare)[1] == read_parts(first)[1]
    with safe_open(first, "pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
    assert "lora_unet_blocks_0_cross_attn_k_img.lora_down.weight" in keys and len(keys) == 3 * 12 * 2
    assert metadata["ss_base_model_version"] == "wan" and metadata["modelspec.architecture"] == "wan2.1/lora"
    assert fingerprint(work.train("again")) == fingerprint(first)


def test_the_known_cache_tools_make_what_a_run_needs(tinies: Tinies, tmp_path: Path) -> None:
    """--i2v --clip of the known tool stand for a task; a run without the files of encoders trains on what they made."""
    from library.training import cache_tools

    work = WanWork(tmp_path, tinies["i2v-14B"])
    data, tiny = f"--dataset_config={work.data}", work.tiny
    cache_tools.run("latents", ["--family=wan", data, f"--vae={tiny.vae}", "--i2v", f"--clip={tiny.clip}"])
    cache_tools.run("text", ["--family=wan", data, f"--t5={tiny.t5}", f"--t5_tokenizer={tiny.tokenizer}"])
    cli.run("wan", "network", without(work.argv("bare"), "vae", "t5", "clip", "t5_tokenizer", "task"))
    assert read_parts(tmp_path / "bare" / "lora.safetensors")[1] == read_parts(work.train("whole"))[1]

    draw_pictures(tmp_path / "control", 3, (32, 32))
    control = WanWork(tmp_path, tinies["t2v-14B-FC"], f"control_directory = '{tmp_path / 'control'}'")
    cache_tools.run("latents", ["--family=wan", f"--dataset_config={control.data}", f"--vae={control.tiny.vae}"])
    (cache, *_) = sorted(control.images.glob("*_wan.safetensors"))
    assert {name.partition("_1x")[0] for name in load_file(cache)} >= {"latents", "latents_control"}


def test_caches_of_the_known_tool_train(tinies: Tinies, tmp_path: Path) -> None:
    """Written by hand by its rules, without what our own files say beside."""
    work = WanWork(tmp_path, tinies["i2v-14B"])
    first = work.train("first")
    for path in [*work.images.glob("*_wan.safetensors"), *work.images.glob("*_wan_te.safetensors")]:
        state = load_file(path)
        is_text = path.stem.endswith("_te")
        caption = path.with_name(f"{path.stem[:2]}.txt").read_text(encoding="utf-8")
        known = {"caption1": caption} if is_text else {"width": "32", "height": "32"}
        if is_text:
            assert set(state) == {"varlen_t5_float32"}
        else:
            latents, y, states = (state[f"{name}_float32"] for name in ("latents_1x4x4", "latents_image_1x4x4", "clip"))
            assert (latents.shape, y.shape, states.shape) == ((16, 1, 4, 4), (20, 1, 4, 4), (257, 16))
            assert set(state) == {"latents_1x4x4_float32", "latents_image_1x4x4_float32", "clip_float32"}
        save_file(state, path, {"architecture": "wan", "format_version": "1.0.1", **known})
    cli.run("wan", "network", without(work.argv("bare"), "vae", "t5", "clip", "t5_tokenizer"))
    assert read_parts(tmp_path / "bare" / "lora.safetensors")[1] == read_parts(first)[1]
