"""Trainers as classes to derive from: `train(args)` with methods that a script or notebook overrides.

A method that nobody overrides is not called: the run is then that of the script, byte for byte. What an override gives
is put in the place of our own object by `library/compat/trainer_run.py`; what `super()` does is in `trainer_calls.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.families.record import ClipFacts
    from library.training.run import DiTOutput


class NetworkTrainer:
    """Trains a network (LoRA and so on) of Stable Diffusion 1 and 2. `args` is what the parser of the script gives."""

    family = "sd"
    trainable = "network"
    is_sdxl = False
    is_video = False
    """whether the step has the methods of VideoDialect"""
    never_called: Mapping[str, str] = {}
    """methods of known trainers that have no place here -> what there is instead"""
    vae_scale_factor = 0.18215

    def __init__(self) -> None:
        self.run: Any = None
        """the Calls of the run that goes on; see trainer_calls"""

    def train(self, args: Any) -> None:
        """Prepare and train. Raises AtelierError (ConfigError before any model is loaded) with what is wrong."""
        from library.compat.trainer_run import train

        train(self, args)

    def _overrides(self, name: str) -> bool:
        """Whether a method is not ours: of a subclass, or put on the class or the object."""
        method = getattr(self, name)
        return getattr(method, "__func__", method) not in OWN

    def _overridden(self) -> dict[str, Any]:
        """Name -> our version, of the methods that are not ours."""
        known = KNOWN | (KNOWN_VIDEO if self.is_video else {})
        return {name: own for name, own in known.items() if self._overrides(name)}

    # -- before the models ---------------------------------------------------------------------------------------------

    def get_model_version(self, args: Any) -> str:
        """What metadata call the base model (ss_base_model_version)."""
        return self.run.family.own("metadata")()["ss_base_model_version"]

    def assert_extra_args(self, args: Any, train_dataset_group: Any, val_dataset_group: Any | None) -> None:
        """Raise for what does not go together; options and data are read, no model is loaded."""

    def get_tokenize_strategy(self, args: Any) -> Any:
        return self.run.strategies.tokenize

    def get_tokenizers(self, tokenize_strategy: Any) -> list[Any]:
        """Those of the strategy, which `sample_images` gets."""
        return [value for value in vars(tokenize_strategy).values() if hasattr(value, "model_max_length")]

    def get_text_encoding_strategy(self, args: Any) -> Any:
        return self.run.strategies.text_encoding

    def get_latents_caching_strategy(self, args: Any) -> Any:
        from library.strategy_base import latents_strategy_of

        return latents_strategy_of(self.run.family.own("latents_caching")())

    def get_text_encoder_outputs_caching_strategy(self, args: Any) -> Any | None:
        """None: captions are encoded in the step."""
        from library.strategy_base import text_strategy_of

        return text_strategy_of(self.run.strategies.text_encoder_outputs_caching)

    def get_noise_scheduler(self, args: Any, device: torch.device) -> Any:
        """What `noise_scheduler` is elsewhere: it has a table `alphas_cumprod` [1000], or none for a flow."""
        return self.run.own_scheduler()

    # -- text encoders -------------------------------------------------------------------------------------------------

    def is_train_text_encoder(self, args: Any) -> bool:
        """False: no text encoder learns, whatever the options say."""
        return any(self.run.own_train_flags())

    def get_text_encoders_train_flags(self, args: Any, text_encoders: Sequence[Any]) -> list[bool]:
        """For each text encoder, whether it learns; asked before they are loaded (`text_encoders` are None)."""
        return self.run.own_train_flags() if self.is_train_text_encoder(args) else [False] * len(text_encoders)

    def cache_text_encoder_outputs_if_needed(
        self, args: Any, accelerator: Any, unet: Any, vae: Any, text_encoders: list[Any], dataset: Any,
        weight_dtype: torch.dtype,
    ) -> None:
        """Fill the cache of one dataset group, if captions are cached; neither VAE nor denoiser is in memory (None)."""
        self.run.own_text_cache(text_encoders, dataset)

    def get_models_for_text_encoding(
        self, args: Any, accelerator: Any, text_encoders: list[Any]
    ) -> list[Any] | None:
        """What encodes captions in the step, None in the place of one that is not needed; None: the cache has all."""
        return text_encoders

    def is_text_encoder_not_needed_for_training(self, args: Any) -> bool:
        """True: no text encoder is kept after captions and sample prompts are encoded."""
        return self.run.text_encoders is not None and not any(e is not None for e in self.run.text_encoders)

    def prepare_text_encoder_grad_ckpt_workaround(self, index: int, text_encoder: nn.Module) -> None:
        """A text encoder that learns has gradient checkpointing now; ours needs no input that requires a gradient."""

    def prepare_text_encoder_fp8(
        self, index: int, text_encoder: nn.Module, te_weight_dtype: torch.dtype, weight_dtype: torch.dtype
    ) -> None:
        """A text encoder was loaded in 8 bits; embeddings and norms are in `weight_dtype` already."""

    # -- models --------------------------------------------------------------------------------------------------------

    def load_target_model(
        self, args: Any, weight_dtype: torch.dtype, accelerator: Any
    ) -> tuple[str, Any, nn.Module, nn.Module | None]:
        """(version, text encoder or list of them, VAE, denoiser). An override of it has all of them in memory at once;
        with None for the denoiser `load_unet_lazily` is asked when captions are encoded."""
        load, runtime = self.run.own_load, self.run.runtime
        encoders = load("load_text_encoders", runtime)
        text = encoders[0] if len(encoders) == 1 else encoders
        return self.get_model_version(args), text, load("load_vae", runtime), load("load_denoiser", runtime)

    def load_unet_lazily(
        self, args: Any, weight_dtype: torch.dtype, accelerator: Any, text_encoders: list[Any]
    ) -> tuple[nn.Module, list[Any]]:
        """(denoiser, text encoders); only the denoiser is read."""
        return self.run.own_load("load_denoiser", self.run.runtime), text_encoders

    def cast_text_encoder(self, args: Any) -> bool:
        """False: the weights keep the number format of their file."""
        return True

    def cast_vae(self, args: Any) -> bool:
        """False: the weights keep the number format of their file."""
        return True

    def cast_unet(self, args: Any) -> bool:
        """False: the weights keep the number format of their file."""
        return True

    def on_transformer_loaded(self, args: Any, accelerator: Any, transformer: nn.Module) -> None:
        """Right after the denoiser is loaded, before it is frozen and adapters are attached."""

    def post_process_network(
        self, args: Any, accelerator: Any, network: nn.Module, text_encoders: list[Any], unet: nn.Module
    ) -> None:
        """After the network is attached."""

    def prepare_unet_with_accelerator(self, args: Any, accelerator: Any, unet: nn.Module) -> nn.Module:
        """The denoiser that trains, after the network is attached; a wrapper must pass its attributes on."""
        return unet

    def extra_trainable_params(
        self, args: Any, accelerator: Any, network: nn.Module, transformer: nn.Module,
        trainable_params: list[dict[str, Any]],
    ) -> list[dict[str, Any]]:
        """The groups of the optimizer: those given, and further ones ({"params", "lr"})."""
        return trainable_params

    # -- the step ------------------------------------------------------------------------------------------------------

    def on_train_start(
        self, args: Any, accelerator: Any, network: nn.Module, transformer: nn.Module, optimizer: Any
    ) -> None: ...

    def on_step_start(
        self, args: Any, accelerator: Any, network: nn.Module, text_encoders: list[Any], unet: nn.Module, batch: Any,
        weight_dtype: torch.dtype, is_train: bool = True,
    ) -> None:
        """Before each micro-batch, and before each batch of a validation."""

    def process_batch(
        self, batch: Any, text_encoders: list[Any], unet: nn.Module, network: nn.Module, vae: nn.Module | None,
        noise_scheduler: Any, vae_dtype: torch.dtype, weight_dtype: torch.dtype, accelerator: Any, args: Any,
        text_encoding_strategy: Any, tokenize_strategy: Any, is_train: bool = True, train_text_encoder: bool = True,
        train_unet: bool = True,
    ) -> Tensor:
        """The loss of one batch, a number: the mean over its samples."""
        return self.run.own_loss(batch)

    def encode_images_to_latents(self, args: Any, vae: nn.Module, images: Tensor) -> Tensor:
        """Latents [B, C, h, w], not scaled, of images in -1..1; asked where latents are not cached."""
        return self.run.own_latents(vae, images)

    def shift_scale_latents(self, args: Any, latents: Tensor) -> Tensor:
        """From what the VAE gives to what the denoiser sees."""
        return self.run.family.own("scale_latents")(latents)

    def get_noise_pred_and_target(
        self, args: Any, accelerator: Any, noise_scheduler: Any, latents: Tensor, batch: Any,
        text_encoder_conds: list[Any], unet: nn.Module, network: nn.Module, weight_dtype: torch.dtype, train_unet: bool,
        is_train: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(prediction, target, timesteps [B] on the 0..1000 scale, weights of the element-wise loss or None)."""
        return self.run.own_prediction_and_target(latents, batch, text_encoder_conds, unet)

    def call_unet(
        self, args: Any, accelerator: Any, unet: nn.Module, noisy_latents: Tensor, timesteps: Tensor,
        text_conds: list[Any], batch: Any, weight_dtype: torch.dtype, **kwargs: Any,
    ) -> Tensor:
        """What is compared with the target, of the shape of the latents; timesteps [B] on the 0..1000 scale."""
        return self.run.own_prediction(unet, noisy_latents, timesteps, text_conds, batch, kwargs)

    def compute_loss(
        self, args: Any, output: Any, timesteps: Tensor, noise_scheduler: Any, dit_dtype: torch.dtype,
        network_dtype: torch.dtype, global_step: int,
    ) -> tuple[Tensor, dict[str, Any]]:
        """(loss of each sample [B], or one number for all; values for the log). `output` has `pred` and `target`."""
        return self.run.own_losses(output, timesteps)

    def post_process_loss(self, loss: Tensor, args: Any, timesteps: Tensor, noise_scheduler: Any) -> Tensor:
        """Losses [B] times their weights by noise level (min-SNR and its like)."""
        return self.run.own_weighted(loss, timesteps)

    def all_reduce_network(self, accelerator: Any, network: nn.Module) -> None:
        """Gradients become their mean over the processes."""
        self.run.own_reduce(network)

    def on_post_optimizer_step(
        self, args: Any, accelerator: Any, network: nn.Module, transformer: nn.Module, sync_gradients: bool,
        global_step: int,
    ) -> None: ...

    def on_validation_step_end(
        self, args: Any, accelerator: Any, network: nn.Module, text_encoders: list[Any], unet: nn.Module, batch: Any,
        weight_dtype: torch.dtype,
    ) -> None:
        """After each batch of a validation."""

    # -- samples, files, logs ------------------------------------------------------------------------------------------

    def sample_images(
        self, accelerator: Any, args: Any, epoch: int | None, global_step: int, device: Any, vae: nn.Module | None,
        tokenizers: Any, text_encoder: Any, unet: nn.Module,
    ) -> None:
        """Called at the start (epoch 0, step 0), after every step (epoch None) and every epoch; makes what is due."""
        self.run.own_samples("first" if global_step == 0 else "step" if epoch is None else "epoch")

    def on_before_sample_images(
        self, accelerator: Any, args: Any, epoch: int | None, steps: int, vae: Any, transformer: Any, network: Any,
        sample_parameters: Any, dit_dtype: torch.dtype,
    ) -> None: ...

    def on_after_sample_images(
        self, accelerator: Any, args: Any, epoch: int | None, steps: int, vae: Any, transformer: Any, network: Any,
        sample_parameters: Any, dit_dtype: torch.dtype,
    ) -> None: ...

    def on_post_save(
        self, args: Any, accelerator: Any, network: nn.Module, transformer: nn.Module, ckpt_name: str, save_dtype: Any,
        metadata: dict[str, str], force_sync_upload: bool,
    ) -> None:
        """On the main process, after a model file was written; `metadata` is what it holds."""

    def update_metadata(self, metadata: dict[str, Any], args: Any) -> None:
        """Put further keys into `metadata`."""

    def extra_metadata(self, args: Any) -> dict[str, Any]:
        return {}

    def get_sai_model_spec(self, args: Any) -> dict[str, str]:
        """The modelspec.* entries of a file."""
        return self.run.own_model_spec()

    def generate_step_logs(
        self, args: Any, current_loss: float, avr_loss: float, lr_scheduler: Any, lr_descriptions: list[str] | None,
        optimizer: Any = None, keys_scaled: int | None = None, mean_norm: float | None = None,
        maximum_norm: float | None = None, mean_grad_norm: float | None = None, mean_combined_norm: float | None = None,
    ) -> dict[str, float]:
        """The values that the log has of a step."""
        return self.run.own_step_logs()

    def step_logging(self, accelerator: Any, logs: Mapping[str, float], global_step: int, epoch: int) -> None:
        self.run.own_log(logs, "step", global_step, epoch)

    def epoch_logging(self, accelerator: Any, logs: Mapping[str, float], global_step: int, epoch: int) -> None:
        self.run.own_log(logs, "epoch", global_step, epoch)

    def val_logging(
        self, accelerator: Any, logs: Mapping[str, float], global_step: int, epoch: int, val_step: int
    ) -> None:
        """The losses of a validation, after it."""
        self.run.own_log(logs, self.run.axis, global_step, epoch)

    def extra_step_logs(self, args: Any, logs: dict[str, float]) -> dict[str, float]:
        """Further values of a step."""
        return {}


class VideoDialect:
    """Mixed into a trainer (`class Mine(VideoDialect, FluxNetworkTrainer)`): the step has the methods and parameters
    that trainers of video models know."""

    is_video = True
    never_called = {
        "process_sample_prompts": "sample prompts are encoded by the family; see get_text_encoding_strategy",
        "do_inference": "samples are made by the pipeline of the family; override sample_images",
        "compile_transformer": "blocks are compiled where they are (--compile); override on_transformer_loaded",
        "convert_weight_keys": "files of adapters are read in every known layout",
    }
    family: str
    run: Any
    compute_loss: Any
    default_guidance_scale = 1.0
    _i2v_training = False
    _control_training = False

    @property
    def architecture(self) -> str:
        """The family in names of cache files."""
        return _clips_of(self.family).short

    @property
    def architecture_full_name(self) -> str:
        """The family in metadata."""
        return _clips_of(self.family).long

    @property
    def i2v_training(self) -> bool:
        return self._i2v_training

    @property
    def control_training(self) -> bool:
        return self._control_training

    def handle_model_specific_args(self, args: Any) -> None:
        """Before anything is read; what is changed in `args` counts."""

    def load_vae(self, args: Any, vae_dtype: torch.dtype, vae_path: str | None) -> nn.Module:
        return self.run.own_load("load_vae", self.run.runtime)

    def load_transformer(
        self, accelerator: Any, args: Any, dit_path: str, attn_mode: str, split_attn: bool, loading_device: Any,
        dit_weight_dtype: torch.dtype | None,
    ) -> nn.Module:
        """The denoiser, where it computes; `attn_mode` is "torch" and nothing is split."""
        return self.run.own_load("load_denoiser", self.run.runtime)

    def scale_shift_latents(self, latents: Tensor) -> Tensor:
        """From what the VAE gives to what the denoiser sees."""
        return self.run.family.own("scale_latents")(latents)

    def get_noisy_model_input_and_timesteps(
        self, args: Any, noise: Tensor, latents: Tensor, timesteps: Tensor | None, noise_scheduler: Any,
        device: torch.device, dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """(noisy latents, timesteps [B] on the 0..1000 scale); `timesteps` are noise levels 0..1, None draws them."""
        return self.run.own_noisy_latents(latents, noise, timesteps, dtype)

    def call_dit(
        self, args: Any, accelerator: Any, transformer: nn.Module, latents: Tensor, batch: Any, noise: Tensor,
        noisy_model_input: Tensor, timesteps: Tensor, network_dtype: torch.dtype, **kwargs: Any,
    ) -> DiTOutput:
        """Prediction and target, of the shape of the latents."""
        return self.run.own_output(transformer, latents, noise, noisy_model_input, timesteps, batch, kwargs)

    def process_batch(
        self, args: Any, accelerator: Any, transformer: nn.Module, network: nn.Module, batch: Any, latents: Tensor,
        noise: Tensor, noise_scheduler: Any, dit_dtype: torch.dtype, network_dtype: torch.dtype, vae: nn.Module | None,
        global_step: int,
    ) -> tuple[Tensor, dict[str, Any]]:
        """(the loss of one batch, or one for each sample; values for the log). Latents are scaled, noise is drawn."""
        noisy, timesteps = self.get_noisy_model_input_and_timesteps(
            args, noise, latents, None, noise_scheduler, latents.device, latents.dtype
        )
        output = self.call_dit(args, accelerator, transformer, latents, batch, noise, noisy, timesteps, network_dtype)
        return self.compute_loss(args, output, timesteps, noise_scheduler, dit_dtype, network_dtype, global_step)


KNOWN, KNOWN_VIDEO = (
    {name: method for name, method in vars(cls).items() if callable(method) and not name.startswith("_")}
    for cls in (NetworkTrainer, VideoDialect)
)
OWN = {*KNOWN.values(), *KNOWN_VIDEO.values()}


def _clips_of(family: str) -> ClipFacts:
    from library.families.registry import record_of

    clips = record_of(family).clips
    if clips is None:
        raise AttributeError(f"{family} has no clips, and no name among trainers of video models")
    return clips


class SdxlNetworkTrainer(NetworkTrainer):
    family = "sdxl"
    is_sdxl = True
    vae_scale_factor = 0.13025


def __getattr__(name: str) -> type[NetworkTrainer]:
    """`FooNetworkTrainer` of every family `foo`, made when it is first asked for; those of videos have their step."""
    from library.families.registry import FAMILIES

    families = {f"{''.join(map(str.capitalize, family.split('_')))}NetworkTrainer": family for family in FAMILIES}
    if name not in families:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    latents = FAMILIES[families[name]].latents
    bases = (VideoDialect, NetworkTrainer) if latents is not None and latents.clips else (NetworkTrainer,)
    made = type(name, bases, {"family": families[name], "__module__": __name__})
    globals()[name] = made
    return made
