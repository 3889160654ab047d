"""Sample images of a tiny FLUX: when, which files, which texts, and that the training does not notice."""

import dataclasses

import pytest
import torch
from PIL import Image

from library.core.options import Config
from library.dataset import CachingOptions
from library.generation.flux_pipeline import FluxPipeline
from library.generation.picture_files import read_texts
from library.training.accelerator_setup import prepare_runtime
from library.training.hooks.base import Hook
from library.training.hooks.logging import LoggingHook
from library.training.hooks.losses import LossReader
from library.training.hooks.sample import SampleHook, encode_sample_prompts, sample_texts
from library.training.loop import fit
from library.training.option_groups import SHARED_GROUPS
from library.training.run import Models
from library.training.sampling_prompts import SamplePrompt
from library.training.start_page import unreached_intervals
from library.training.timestep_samplers import TimestepOptions
from library.training.wiring.flux import FluxFamily, FluxOptions
from tests.library.training.hooks.small_run import small_run
from tests.tiny import build_tiny_flux

SMALL = {"width": 32, "height": 32, "sample_steps": 1}
PROMPTS = [
    SamplePrompt(prompt="a red cat", enum=0, seed=7, **SMALL),
    SamplePrompt(prompt="the dog", enum=1, scale=3.0, negative_prompt="blue", **SMALL),
]


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """(family, strategies, text encoders, models)"""
    tiny = build_tiny_flux(tmp_path_factory.mktemp("tiny"))
    values = {
        "pretrained_model_name_or_path": str(tiny.flux), "clip_l": str(tiny.clip_l), "t5xxl": str(tiny.t5xxl),
        "ae": str(tiny.ae), "clip_l_tokenizer": str(tiny.clip_l_tokenizer), "t5xxl_max_token_length": 16,
    }
    family = FluxFamily(Config.read(values, [*SHARED_GROUPS, FluxOptions, CachingOptions, TimestepOptions]))
    runtime = prepare_runtime(family.config)
    return family, family.strategies(), family.load_text_encoders(runtime), Models(
        vae=family.load_vae(runtime), denoiser=family.load_denoiser(runtime)
    )


def run_with(flux, hooks, **options):
    family, strategies, _, models = flux
    options = {"sample_prompts": "prompts.txt", **options}
    return dataclasses.replace(
        small_run(hooks, steps=8, **options), family=family, strategies=strategies, models=models
    )


def sample_hook(flux) -> SampleHook:
    family, strategies, encoders, _ = flux
    return SampleHook(PROMPTS, encode_sample_prompts(family, strategies, encoders, PROMPTS), seed=1)


class CountPairs(Hook):
    def __init__(self) -> None:
        self.calls = []

    def on_before_sample_images(self, run) -> None:
        self.calls.append("before")

    def on_after_sample_images(self, run) -> None:
        self.calls.append("after")


def test_negative_texts_are_encoded_where_cfg_is_on(flux):
    prompts = [*PROMPTS, SamplePrompt(prompt="a", scale=2.0), SamplePrompt(prompt="a", negative_prompt="unused")]
    found = sample_texts(flux[0], prompts)
    assert list(dict.fromkeys(text for text, _ in found)) == ["a red cat", "the dog", "blue", "a", ""]
    assert [text for text, is_negative in found if is_negative] == ["blue", ""]


def test_files_and_sheet_of_an_occasion(flux, tmp_path):
    hook = sample_hook(flux)
    run = run_with(flux, [LossReader(), LoggingHook(False), hook], output_dir=str(tmp_path), output_name="my.lora")
    run.hooks.on_train_start(run)
    run.progress.global_step = 150
    made = hook.sample(run, "step")
    assert [file.caption for file in made] == ["a red cat", "the dog"]
    names = sorted(path.name for path in (tmp_path / "sample").iterdir())
    assert len(names) == 4 and {"my.lora_000150_grid.png", "my.lora_sheet.png"} < set(names)
    assert names[0].startswith("my.lora_000150_00_") and names[0].endswith("_7.png")
    assert names[1].startswith("my.lora_000150_01_") and names[1].count("_") == 3  # no seed was given
    with Image.open(tmp_path / "sample" / names[0]) as image:
        assert image.size == (32, 32)


def test_the_same_step_gives_the_same_pictures_and_another_step_other_drawn_seeds(flux, tmp_path):
    hook = sample_hook(flux)
    run = run_with(flux, [LossReader(), LoggingHook(False), hook], output_dir=str(tmp_path))
    run.hooks.on_train_start(run)
    pixels = []
    for step in (3, 3, 4):
        run.progress.global_step = step
        pixels.append([Image.open(file.path).tobytes() for file in hook.sample(run, "step")])
    assert pixels[0] == pixels[1]
    assert pixels[2][0] == pixels[0][0] and pixels[2][1] != pixels[0][1]


@pytest.mark.parametrize(
    ("options", "suffixes"),
    [
        ({"sample_at_first": True, "sample_every_n_steps": 4}, ["000004", "000008", "e000000"]),
        ({"sample_every_n_epochs": 2}, ["e000002"]),
        ({"sample_every_n_epochs": 1, "sample_every_n_steps": 3}, ["e000001", "e000002"]),
    ],
)
def test_occasions(flux, tmp_path, options, suffixes):
    pairs = CountPairs()
    run = run_with(
        flux, [LossReader(), LoggingHook(False), sample_hook(flux), pairs], output_dir=str(tmp_path), **options
    )
    fit(run)
    grids = sorted(path.name for path in (tmp_path / "sample").glob("*_grid.png"))
    assert grids == [f"{suffix}_grid.png" for suffix in suffixes]
    assert pairs.calls == ["before", "after"] * len(suffixes)


class FailingFamily(FluxFamily):
    """Has no memory for the first prompt."""

    def pipeline(self, models):
        class FailingPipeline(FluxPipeline):
            def latents(self, request, *conditioning):
                if request.prompt == "a red cat":
                    raise torch.OutOfMemoryError("out of memory. Tried to allocate 7 TiB\nand more lines")
                return super().latents(request, *conditioning)

        return FailingPipeline(models.denoiser, models.vae, **self.pipeline_settings())


def test_a_failing_sample_is_told_and_training_goes_on(flux, tmp_path, caplog):
    pairs, hook = CountPairs(), sample_hook(flux)
    flux = (FailingFamily(flux[0].config), *flux[1:])
    options = {"output_dir": str(tmp_path), "sample_at_first": True, "sample_every_n_steps": 4}
    run = run_with(flux, [LossReader(), LoggingHook(False), hook, pairs], **options)
    fit(run)
    assert run.progress.is_finished and pairs.calls == ["before", "after"] * 3
    told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(told) == 3 and all(
        line
        == "the sample of prompt 0 ('a red cat') could not be made: out of memory. Tried to allocate 7 TiB. Training goes on"
        for line in told
    )
    assert len(list((tmp_path / "sample").glob("*_01_*.png"))) == 3  # the other prompt


def test_pictures_that_cannot_be_written_are_told_and_training_goes_on(flux, tmp_path, caplog):
    (tmp_path / "sample").write_text("a file where the folder should be")
    run = run_with(
        flux, [LossReader(), LoggingHook(False), sample_hook(flux)], output_dir=str(tmp_path), sample_every_n_steps=8
    )
    fit(run)
    assert run.progress.is_finished
    told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(told) == 2 and all("could not be made" in line and "Training goes on" in line for line in told)


class RollingFamily(FluxFamily):
    """Reads the global generator, as samplers of other packages do."""

    def pipeline(self, models):
        torch.rand(3)
        return super().pipeline(models)


def test_modes_and_generators_are_as_before(flux, tmp_path):
    hook = sample_hook(flux)
    flux = (RollingFamily(flux[0].config), *flux[1:])
    run = run_with(flux, [LossReader(), LoggingHook(False), hook], output_dir=str(tmp_path))
    run.hooks.on_train_start(run)
    run.models.denoiser.train()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    hook.sample(run, "step")
    assert run.models.denoiser.training and torch.equal(state, torch.get_rng_state())
    run.models.denoiser.eval()


def test_texts_are_encoded_anew_while_an_encoder_learns(flux, tmp_path):
    family, _, encoders, models = flux
    hook = sample_hook(flux)
    run = run_with(flux, [LossReader(), LoggingHook(False), hook], output_dir=str(tmp_path))
    run = dataclasses.replace(run, models=dataclasses.replace(models, text_encoders=[encoders[0], None]))
    run.step.trained_text_encoders = [True, False]
    before = hook.conditioning["a red cat"]
    weight = encoders[0].text_model.final_layer_norm.bias
    saved = weight.detach().clone()
    with torch.no_grad():
        weight += 1.0
    try:
        now = hook._current_conditioning(run)["a red cat"]
    finally:
        with torch.no_grad():
            weight.copy_(saved)
    torch.testing.assert_close(now["l_pooled"], before["l_pooled"] + 1.0)
    assert now["t5_out"] is before["t5_out"]


def test_pictures_reach_tensorboard(flux, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_with(
        flux, [LossReader(), LoggingHook(False), sample_hook(flux)], output_dir=str(tmp_path), sample_every_n_steps=8,
        logging_dir=str(tmp_path / "logs"),
    )
    fit(run)
    path = next((tmp_path / "logs").rglob("events.out.tfevents.*"))
    assert EventAccumulator(str(path)).Reload().Tags()["images"] == ["sample_0", "sample_1"]


def test_samples_tell_their_settings(flux, tmp_path):
    hook = sample_hook(flux)
    run = run_with(flux, [LossReader(), LoggingHook(False), hook], output_dir=str(tmp_path), output_name="lora")
    run.hooks.on_train_start(run)
    run.progress.global_step = 3
    first, second = (read_texts(file.path) for file in hook.sample(run, "step"))
    assert first["prompt"] == "a red cat" and (first["seed"], first["steps"], first["step"], first["occasion"]) == (
        "7",
        "1",
        "3",
        "step 3",
    )
    assert (second["negative-prompt"], second["scale"]) == ("blue", "3.0") and second[
        "seed"
    ].isdecimal()  # the drawn one


def test_the_sheet_grows_and_a_resumed_run_goes_on_with_it(flux, tmp_path):
    def occasion(hook, step, at):
        run = run_with(flux, [LossReader(), LoggingHook(False), hook], output_dir=str(tmp_path), output_name="lora")
        run.progress.global_step, run.progress.epoch = step, step // 4
        run.hooks.on_train_start(run)
        hook.sample(run, at)
        return Image.open(tmp_path / "sample" / "lora_sheet.png").size

    whole = sample_hook(flux)
    sizes = [occasion(whole, 4, "epoch"), occasion(whole, 8, "epoch")]
    assert sizes[1][0] > sizes[0][0] and sizes[1][1] == sizes[0][1]
    resumed = sample_hook(flux)
    assert occasion(resumed, 12, "epoch")[0] - sizes[1][0] == sizes[1][0] - sizes[0][0]
    assert sorted(resumed.sheet.occasions) == [(4, "epoch 1"), (8, "epoch 2"), (12, "epoch 3")]
    earlier = sample_hook(flux)  # from a state before the last pictures
    occasion(earlier, 4, "epoch")
    assert sorted(earlier.sheet.occasions) == [(4, "epoch 1")]


@pytest.mark.parametrize("options", [{"sample_every_n_steps": 9}, {"sample_every_n_epochs": 3}])
def test_an_interval_longer_than_the_run_samples_at_its_end(flux, tmp_path, options):
    hook = sample_hook(flux)
    run = run_with(flux, [LossReader(), LoggingHook(False), hook], output_dir=str(tmp_path), **options)
    assert any(
        f"--{name} is {value}, longer than the run" in line
        for name, value in options.items()
        for line in unreached_intervals(run)
    )
    assert "2 pictures and a grid on 1 occasion," in hook.planned_files(run)[0]
    fit(run)
    assert [path.name for path in (tmp_path / "sample").glob("*_grid.png")] == ["000008_grid.png"]
    assert hook.written_files()[0].endswith("with 2 pictures, 1 grid and the sheet of all")
