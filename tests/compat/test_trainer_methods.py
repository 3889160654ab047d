"""Methods that forks of known trainers override, one by one: what they give is what the run computes with."""

import copy
from pathlib import Path

import pytest
import torch

from library import train_util
from library.core.errors import AtelierError, ConfigError
from library.custom_train_functions import apply_masked_loss
from library.safetensors_utils import read_header
from tests.compat.test_trainers import train, trainer_class
from tests.runs.conftest import read_parts
from tests.runs.families import FamilyWork, Tinies
from train_network import VideoDialect


@pytest.fixture(scope="module")
def sd(tmp_path_factory) -> FamilyWork:
    return Tinies(tmp_path_factory).work("sd", tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> FamilyWork:
    return Tinies(tmp_path_factory).work("flux", tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def plain(flux) -> bytes:
    return tensors(flux.train("script", "--max_train_steps=2"))


@pytest.fixture(scope="module")
def plain_sd(sd) -> bytes:
    return tensors(sd.train("script", "--max_train_steps=2"))


def tensors(path: Path) -> bytes:
    return read_parts(path)[1]


def made(work: FamilyWork, out: str, methods: dict, *more: str, bases: tuple[type, ...] = ()) -> Path:
    """Train with a class that has these methods; they find the base's version as `base`."""
    base = trainer_class(work.family)
    return train(type("Mine", (*bases, base), {**methods, "base": base})(), work, out, *more)


def test_methods_of_a_run_with_caches_and_validation(flux):
    calls: dict[str, int] = {}

    def passing(name):
        own = getattr(trainer_class("flux"), name)

        def method(self, *args, **kwargs):
            calls[name] = calls.get(name, 0) + 1
            return own(self, *args, **kwargs)

        return method

    names = (
        "cache_text_encoder_outputs_if_needed", "load_unet_lazily", "on_validation_step_end", "val_logging",
        "prepare_text_encoder_grad_ckpt_workaround", "prepare_text_encoder_fp8",
    )
    options = [
        "--cache_text_encoder_outputs", "--cache_latents", "--gradient_checkpointing", "--fp8_base",
        "--mixed_precision=bf16", "--validation_split=0.5", "--validation_seed=1", "--max_train_steps=2",
    ]
    mine = made(flux, "cached", {name: passing(name) for name in names}, *options)
    assert tensors(mine) == tensors(flux.train("cached_script", *options))
    assert set(calls) == set(names)
    assert calls["cache_text_encoder_outputs_if_needed"] == 2  # the images that train, and those that validate
    assert calls["prepare_text_encoder_grad_ckpt_workaround"] == 1  # CLIP-L learns, T5 does not


def known_process_batch(
    self, batch, text_encoders, unet, network, vae, noise_scheduler, vae_dtype, weight_dtype, accelerator, args,
    text_encoding_strategy, tokenize_strategy, is_train=True, train_text_encoder=True, train_unet=True,
):
    """From the batch to the loss, of the pieces that known trainers have."""
    if batch.get("latents") is not None:
        latents = batch["latents"].to(accelerator.device)
    else:
        latents = self.encode_images_to_latents(args, vae, batch["images"])
    latents = self.shift_scale_latents(args, latents)
    models = self.get_models_for_text_encoding(args, accelerator, text_encoders)
    with accelerator.autocast():
        conditions = text_encoding_strategy.encode_tokens(tokenize_strategy, models, batch["input_ids_list"])
    prediction, target, timesteps, weights = self.get_noise_pred_and_target(
        args, accelerator, noise_scheduler, latents, batch, conditions, unet, network, weight_dtype, train_unet,
        is_train=is_train,
    )
    threshold = train_util.get_huber_threshold_if_needed(args, timesteps, noise_scheduler)
    loss = train_util.conditional_loss(prediction.float(), target.float(), args.loss_type, "none", threshold)
    loss = loss if weights is None else loss * weights
    if args.masked_loss or batch.get("alpha_masks") is not None:
        loss = apply_masked_loss(loss, batch)
    loss = loss.mean([1, 2, 3]) * batch["loss_weights"]
    return self.post_process_loss(loss, args, timesteps, noise_scheduler).mean()


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_step_put_together_from_the_pieces_is_that_of_the_script(family, request):
    work = request.getfixturevalue(family)
    snr = ["--min_snr_gamma=3"] if family == "sd" else []
    mine = made(work, "pieces", {"process_batch": known_process_batch}, *snr)
    assert tensors(mine) == tensors(work.train("pieces_script", "--max_train_steps=2", *snr))


def own_prediction(self, args, accelerator, noise_scheduler, latents, batch, conds, unet, network, dtype, train_unet,
                   is_train=True):
    """A prediction as forks write it, with noise of their own."""
    noise, noisy, timesteps = train_util.get_noise_noisy_latents_and_timesteps(args, noise_scheduler, latents)
    self.seen.append((noise_scheduler.config.num_train_timesteps, tuple(latents.shape), is_train, train_unet))
    with accelerator.autocast():
        prediction = self.call_unet(args, accelerator, unet, noisy, timesteps, conds, batch, dtype)
    target = noise_scheduler.get_velocity(latents, noise, timesteps) if args.v_parameterization else noise
    assert torch.allclose(noise_scheduler.add_noise(latents, noise, timesteps), noisy, atol=1e-5)
    return prediction, target, timesteps, self.weights


def test_an_own_prediction_and_its_weights(sd, plain_sd):
    class Own:
        get_noise_pred_and_target = own_prediction
        weights, seen = None, []

    class Still(Own):
        weights, seen = torch.zeros(1, 1, 1, 1), []

    still, moved = (tensors(made(sd, cls.__name__, {}, bases=(cls,))) for cls in (Still, Own))
    assert len({still, moved, plain_sd}) == 3 and Own.seen[0][0] == 1000 and Own.seen[0][2:] == (True, True)
    nothing = {"post_process_loss": lambda self, loss, args, timesteps, noise_scheduler: loss * 0}
    assert tensors(made(sd, "nothing", nothing)) == still


def test_wrong_predictions_are_named(sd):
    for number, (result, message) in enumerate([
        (torch.zeros(2), r"gave a tensor of shape \[2\]; needed: \(prediction, target"),
        ((torch.zeros(2, 4), torch.zeros(2, 3), torch.zeros(2), None), "the shape of the target"),
        ((torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(7), None), "timesteps of"),
    ]):
        methods = {"get_noise_pred_and_target": lambda self, *args, is_train, result=result: result}
        with pytest.raises(ConfigError, match=message):
            made(sd, f"wrong{number}", methods)


def test_another_table_of_noise_levels(sd, plain_sd):
    class Scheduler:
        alphas_cumprod = torch.linspace(0.9, 0.1, 1000)

    found = []

    def process_batch(self, batch, *rest, **kwargs):
        found.append(rest[4])
        return self.base.process_batch(self, batch, *rest, **kwargs)

    methods = {"get_noise_scheduler": lambda self, args, device: Scheduler(), "process_batch": process_batch}
    assert tensors(made(sd, "table", methods)) != plain_sd
    assert isinstance(found[0], Scheduler)
    Scheduler.alphas_cumprod = torch.ones(3)
    with pytest.raises(ConfigError, match=r"gave a Scheduler; needed: one with alphas_cumprod \[1000\]"):
        made(sd, "short", methods)


def test_which_text_encoders_learn(flux):
    off = {"is_train_text_encoder": lambda self, args: False}
    assert tensors(made(flux, "off", off)) == tensors(
        flux.train("unet_only", "--network_train_unet_only", "--max_train_steps=2")
    )
    flags = {"get_text_encoders_train_flags": lambda self, args, text_encoders: [True] * len(text_encoders)}
    with pytest.raises(ConfigError, match="the options train .*True, False"):
        made(flux, "more", flags)
    released = {"is_text_encoder_not_needed_for_training": lambda self, args: True}
    with pytest.raises(ConfigError, match="a text encoder learns"):
        made(flux, "released", released)


def test_logs_and_the_model_specification(flux):
    logged = []

    def generate_step_logs(self, args, current_loss, avr_loss, lr_scheduler, lr_descriptions, optimizer=None, **norms):
        assert lr_descriptions and optimizer.param_groups and norms["keys_scaled"] is None
        return {"loss/mine": current_loss + 1}

    methods = {
        "generate_step_logs": generate_step_logs,
        "step_logging": lambda self, accelerator, logs, step, epoch: logged.append(("step", logs, step, epoch)),
        "epoch_logging": lambda self, accelerator, logs, step, epoch: logged.append(("epoch", logs, step, epoch)),
        "get_sai_model_spec": lambda self, args: {**self.base.get_sai_model_spec(self, args), "modelspec.title": "mine"},
    }
    metadata = read_header(made(flux, "logs", methods))[1]
    assert metadata["modelspec.title"] == "mine" and metadata["modelspec.architecture"].startswith("flux-1")
    steps = [entry for entry in logged if entry[0] == "step"]
    assert [entry[2] for entry in steps] == [1, 2] and all(entry[1]["loss/mine"] > 1 for entry in steps)


def test_the_step_of_trainers_of_video_models(flux, plain):
    called = []

    def passing(name):
        def method(self, *args, **kwargs):
            called.append(name)
            return getattr(VideoDialect, name)(self, *args, **kwargs)

        return method

    names = ("process_batch", "call_dit", "get_noisy_model_input_and_timesteps", "scale_shift_latents")
    mine = made(flux, "video", {name: passing(name) for name in names}, bases=(VideoDialect,))
    assert tensors(mine) == plain and set(called) == set(names)

    def process_batch(
        self, args, accelerator, transformer, network, batch, latents, noise, noise_scheduler, dit_dtype,
        network_dtype, vae, global_step,
    ):
        assert latents.shape == noise.shape and global_step in (0, 1, 2)
        noisy, timesteps = self.get_noisy_model_input_and_timesteps(
            args, noise, latents, torch.full((len(latents),), 0.25), noise_scheduler, latents.device, latents.dtype
        )
        assert torch.allclose(noisy, 0.75 * latents + 0.25 * noise) and timesteps.tolist() == [250.0] * len(latents)
        output = self.call_dit(
            args, accelerator, transformer, latents, batch, noise, noisy, timesteps, network_dtype
        )
        return ((output.pred - output.target) ** 2).mean() * 0, {"loss/mine": 1.0}

    still = made(flux, "video_still", {"process_batch": process_batch}, bases=(VideoDialect,))
    nothing = {"post_process_loss": lambda self, loss, args, timesteps, noise_scheduler: loss * 0}
    assert tensors(still) == tensors(made(flux, "nothing", nothing))


def test_a_method_with_other_parameters_is_told_before_anything_is_read(flux):
    def video(self, args, accelerator, transformer, network, batch, latents, noise, noise_scheduler, dit_dtype,
              network_dtype, vae, global_step): ...

    methods = {"process_batch": video, "post_process_loss": lambda self, loss: loss}
    with pytest.raises(ConfigError) as error:
        made(flux, "other", methods, "--pretrained_model_name_or_path=nowhere")
    assert "Mine.post_process_loss is called with (loss, args, timesteps, noise_scheduler)" in str(error.value)
    assert "train_network.VideoDialect" in str(error.value) and "nowhere" not in str(error.value)


def test_a_method_put_on_an_object_counts(flux, plain):
    trainer = trainer_class("flux")()
    trainer.post_process_loss = lambda loss, args, timesteps, noise_scheduler: loss * 0
    assert tensors(train(trainer, flux, "object")) != plain


def test_what_methods_around_the_step_give_is_used(flux):
    seen: dict[str, list] = {"train": [], "scaled": [], "tokenizers": [], "dtypes": set(), "models": []}

    def on_step_start(self, args, accelerator, network, text_encoders, unet, batch, dtype, is_train=True):
        seen["train"].append(is_train)
        assert unet.is_mine

    def prepare_unet_with_accelerator(self, args, accelerator, unet):
        other = copy.copy(unet)
        other.is_mine = True
        return other

    def shift_scale_latents(self, args, latents):
        seen["scaled"].append(float(latents.abs().max()))
        return self.base.shift_scale_latents(self, args, latents)

    def get_models_for_text_encoding(self, args, accelerator, text_encoders):
        seen["models"].append(len(text_encoders))
        return text_encoders

    def sample_images(self, accelerator, args, epoch, global_step, device, vae, tokenizers, text_encoder, unet):
        seen["tokenizers"].append(tokenizers)

    methods = {
        "on_step_start": on_step_start, "prepare_unet_with_accelerator": prepare_unet_with_accelerator,
        "shift_scale_latents": shift_scale_latents, "get_models_for_text_encoding": get_models_for_text_encoding,
        "sample_images": sample_images, "get_tokenizers": lambda self, strategy: ["mine"],
        "encode_images_to_latents": lambda self, args, vae, images: self.base.encode_images_to_latents(
            self, args, vae, images) * 0 + 7,
        "cast_unet": lambda self, args: False,
        "on_transformer_loaded": lambda self, args, accelerator, transformer: seen["dtypes"].add(transformer.dtype),
    }
    made(flux, "around", methods, "--mixed_precision=bf16", "--validation_split=0.5", "--validation_seed=1")
    assert set(seen["train"]) == {True, False} and set(seen["scaled"]) == {7.0} and set(seen["models"]) == {2}
    assert seen["tokenizers"] and all(tokenizers == ["mine"] for tokenizers in seen["tokenizers"])
    assert seen["dtypes"] == {torch.float32}  # as in the file


def test_the_denoiser_may_be_loaded_after_the_captions(flux, plain):
    order = []

    def load_target_model(self, args, weight_dtype, accelerator):
        order.append("models")
        return *self.base.load_target_model(self, args, weight_dtype, accelerator)[:3], None

    def load_unet_lazily(self, args, weight_dtype, accelerator, text_encoders):
        order.append(len(text_encoders))
        return self.base.load_unet_lazily(self, args, weight_dtype, accelerator, text_encoders)

    methods = {"load_target_model": load_target_model, "load_unet_lazily": load_unet_lazily}
    assert tensors(made(flux, "lazy", methods)) == plain and order == ["models", 2]


def test_a_mean_over_processes_is_the_gradient_of_all_of_them():
    """The loss of a process is divided by the samples of all, so that a mean of it would be too small."""
    from types import SimpleNamespace

    from library.compat.trainer_calls import Calls
    from library.compat.trainer_run import CalledUpdater

    network, other = torch.nn.Linear(2, 1), torch.nn.Parameter(torch.ones(2))
    parameters = [*network.parameters(), other]

    def summed(of):
        for parameter in of:
            parameter.grad = parameter.grad * 2  # as if the other process had the same

    runtime = SimpleNamespace(num_processes=2, reduce_gradients=summed, accelerator=None)
    owner = trainer_class("sd")()
    owner.run = calls = Calls(owner, None, None, SimpleNamespace(modules=lambda: {"network": network}))
    calls.runtime = runtime
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    CalledUpdater(calls).reduce(SimpleNamespace(runtime=runtime), parameters)
    assert all(torch.equal(parameter.grad, torch.full_like(parameter, 2.0)) for parameter in parameters)


def test_own_draws_of_a_step_are_the_same_in_a_resumed_run(sd):
    class Own:
        get_noise_pred_and_target = own_prediction
        weights, seen = None, []

    save = ["--save_every_n_steps=1", "--save_state"]
    whole = tensors(made(sd, "whole", {}, *save, bases=(Own,)))
    state = sd.folder / "whole" / "lora-step00000001-state"
    assert tensors(made(sd, "resumed", {}, f"--resume={state}", bases=(Own,))) == whole


def test_no_plan_of_memory_calls_them(flux):
    """They load and compute by themselves, each as often as the run itself wants, and no plan can know what."""
    names = ("load_target_model", "post_process_network", "prepare_unet_with_accelerator", "call_unet")
    calls: dict[str, int] = {}

    def passing(name):
        own = getattr(trainer_class("flux"), name)

        def method(self, *args, **kwargs):
            calls[name] = calls.get(name, 0) + 1
            return own(self, *args, **kwargs)

        return method

    methods = {name: passing(name) for name in names}
    mine = made(flux, "shown", methods, "--console_log_level=INFO")
    assert calls == {**dict.fromkeys(names, 1), "call_unet": 2}
    assert tensors(mine) == tensors(flux.train("shown_script", "--max_train_steps=2"))
    with pytest.raises(AtelierError, match="Mine.*--vram_budget"):
        made(flux, "budget", methods, "--vram_budget=8")


def test_a_plan_of_memory_without_own_methods_changes_nothing(flux, plain):
    assert tensors(made(flux, "planned", {}, "--console_log_level=INFO")) == plain
