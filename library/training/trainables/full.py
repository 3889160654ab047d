"""Training of whole models: the denoiser learns, and the text encoders where the script lets them; the file is a model
like the base."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from library.core.atomic_file import scratch_path
from library.core.errors import ConfigError, Problems, TrainingError
from library.core.learning_rates import Rates, parse_rates, rate_groups
from library.core.options import Config, Ignored, without_effect
from library.dataset import CachingOptions
from library.dataset.batch import PRESERVED
from library.families.registry import record_of
from library.training.checkpoint import FOLDER_FORMATS, side_name
from library.training.computing_options import PrecisionOptions
from library.training.hooks.base import Hook
from library.training.option_groups import SavingOptions
from library.training.trainables.weights import WeightsTrainable
from library.training.whole_models import TEXT_RATES, WholeModelOptions

if TYPE_CHECKING:
    import torch

    from library.dataset.batch import Batch
    from library.training.accelerator_setup import Runtime
    from library.training.protocols import ParamGroup, Plain
    from library.training.run import Models, Run
    from library.training.wiring.base import ModelFamily


class FullTrainable(WeightsTrainable):
    """All weights of the denoiser, and with --train_text_encoder those of the text encoders."""

    without_untouched = (
        "needs the model as it was before training, which is not kept where the whole model learns; take it out, or train"
        " an adapter"
    )

    name, options, script = "full", WholeModelOptions, "train"
    keeps_text_still = "leave out --train_text_encoder"
    lets_text_learn: ClassVar[str] = "add --train_text_encoder"
    begins_with = "--pretrained_model_name_or_path"
    writes_folders = True
    opts: WholeModelOptions
    rate_options = "--learning_rate, --layer_lrs and the rates of text encoders and blocks"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._text: dict[int, torch.nn.Module] = {}
        """number -> text encoder that learns"""

    # -- before models are loaded ------------------------------------------------------------------------------------

    def check(self, family: ModelFamily) -> None:
        """Rates, precision and ways to update."""
        problems = Problems()
        if self.name not in record_of(family.name).scripts:
            raise ConfigError(f"whole models of {record_of(family.name).title} are not trained here; adapters of them are")
        rates = problems.attempt(lambda: self._denoiser_rates(family))
        for message in (*self._text_problems(family), *self._memory_problems(family), *self.update_problems()):
            problems.add(message)
        if rates is not None:
            problems.attempt(lambda: self.check_used_rates([*(rate for _, rate in rates), *self._text_rates(family)]))
        problems.raise_if_any()

    def _denoiser_rates(self, family: ModelFamily) -> Rates:
        """0 for what --trainable_modules leaves out, then those that the user wrote, before those of the family's own
        options."""
        of_family = [(re.compile(f"^(?:{pattern})"), rate) for pattern, rate in family.layer_rates().items()]
        parts = self.opts.trainable_modules or ["."]
        others = "|".join(re.escape(part) for part in parts)
        still = [] if "." in parts else [(re.compile(f"^(?!.*(?:{others}))"), 0.0)]
        return [*still, *parse_rates(self.opts.layer_lrs, "layer_lrs"), *of_family]

    def _denoiser_learns(self, family: ModelFamily) -> bool:
        return bool(self.rate) or any(rate for _, rate in self._denoiser_rates(family))

    @property
    def _is_text_trained(self) -> bool:
        return self.opts.train_text_encoder and self.opts.stop_text_encoder_training != -1

    def _text_rates(self, family: ModelFamily) -> list[float]:
        """Of each text encoder that could learn; 0 = it does not."""
        script = record_of(family.name).scripts.get(self.name)
        if script is None:
            return []
        rates = []
        for number, name in enumerate(name for name in TEXT_RATES if name in script.options):
            switch, given = script.text_switches.get(number), getattr(self.opts, name)
            learns = self._is_text_trained and (switch is None or getattr(self.opts, switch))
            rates.append((self.rate if given is None else given) if learns else 0.0)
        return rates

    def fixed_settings(self, family: ModelFamily) -> dict[str, Plain]:
        learn = self.trains_text_encoders(family)
        return {"train_text_encoder": {_text_name(i, learn): learns for i, learns in enumerate(learn)}} if learn else {}

    def trains_text_encoders(self, family: ModelFamily) -> list[bool]:
        return [rate > 0 for rate in self._text_rates(family)]

    def _text_problems(self, family: ModelFamily) -> Iterator[str]:
        opts, script = self.opts, record_of(family.name).scripts[self.name]
        switches = list(script.text_switches.values())
        if not self._is_text_trained:
            for name in TEXT_RATES:
                if getattr(opts, name):
                    yield f"--{name} is {getattr(opts, name)}, and no text encoder learns; {self.lets_text_learn}"
            for name in switches:
                if getattr(opts, name):
                    yield f"--{name} is given without --train_text_encoder, which lets text encoders learn; add it"
            return
        named = [name for name in TEXT_RATES if name in script.options]
        for number, switch in script.text_switches.items():
            if getattr(opts, named[number]) and not getattr(opts, switch):
                given = getattr(opts, named[number])
                yield f"--{named[number]} is {given}, and that encoder learns with --{switch} alone; add it"
        learn, caching = self.trains_text_encoders(family), self.config[CachingOptions]
        if "use_t5xxl_cache_only" in script.options and caching.caches_text and any(learn):
            cached = [name for name in switches if getattr(opts, name)]
            if cached:
                yield (
                    f"--{cached[0]} with cached outputs of text encoders: what learns is not cached; leave one of them"
                    " out"
                )
            elif not opts.use_t5xxl_cache_only:
                yield (
                    "--train_text_encoder with --cache_text_encoder_outputs: what learns is not cached; add"
                    " --use_t5xxl_cache_only, which caches what T5 says alone, or leave one of them out"
                )

    def idle(self, family: ModelFamily) -> list[Ignored]:
        found = super().idle(family)
        stop = self.opts.stop_text_encoder_training
        if stop is not None and stop != -1 and not any(self.trains_text_encoders(family)):
            found += without_effect(["stop_text_encoder_training"], "no text encoder learns")
        return [*found, *self._idle_switches(family)]

    def _idle_switches(self, family: ModelFamily) -> list[Ignored]:
        """Switches that let text encoders learn whose rates are all 0."""
        learn, script = self.trains_text_encoders(family), record_of(family.name).scripts.get(self.name)
        if script is None or not self._is_text_trained:
            return []
        still = [name for number, name in script.text_switches.items() if getattr(self.opts, name) and not learn[number]]
        if "train_text_encoder" in script.options and not any(learn):
            still = ["train_text_encoder", *still]
        return without_effect(list(dict.fromkeys(still)), "the learning rate of what it lets learn is 0")

    def _memory_problems(self, family: ModelFamily) -> Iterator[str]:
        form = self.config[PrecisionOptions].quantize_text_encoder
        if form and any(self.trains_text_encoders(family)):
            yield (
                f"--quantize_text_encoder is {form}, and text encoders learn, for which their weights are held as they"
                " are computed with; leave it out, or --train_text_encoder"
            )
        if family.swaps_blocks and not self._is_fused:
            yield (
                "--blocks_to_swap sends weights away before an update at the end of the step could reach them; add"
                " --fused_backward_pass, which updates them while they are there, or leave it out"
            )
        if family.swaps_blocks:
            yield from self._optimizers_that_miss_weights()

    def _optimizers_that_miss_weights(self) -> Iterator[str]:
        from library.training import optimizers

        try:
            choice = optimizers.choose(self.config[optimizers.OptimizerOptions])
        except ConfigError:
            return  # told by the check of the optimizer
        if choice.named_schedule_free:
            yield (
                f"--blocks_to_swap with --optimizer_type {choice.name}, which changes all weights before and after"
                " samples and files, when those that are swapped are not on the device; use another optimizer, AdamW"
                " say, or leave it out"
            )

    # -- the models --------------------------------------------------------------------------------------------------

    def denoiser_dtype(self, runtime: Runtime) -> torch.dtype:
        return runtime.trained_dtype  # float32, unless --full_bf16 or --full_fp16

    def text_encoder_dtype(self, family: ModelFamily, runtime: Runtime) -> torch.dtype | None:
        return runtime.trained_dtype if any(self.trains_text_encoders(family)) else None

    def attach(self, family: ModelFamily, models: Models, runtime: Runtime) -> None:
        super().attach(family, models, runtime)
        learns = self.trains_text_encoders(family)
        for number, encoder in enumerate(models.text_encoders):
            if encoder is None:
                continue
            if number < len(learns) and learns[number]:
                encoder.train()
                self._text[number] = encoder
            elif any(learns):
                encoder.to(runtime.weight_dtype)
        models.denoiser.train()

    def param_groups(self) -> list[ParamGroup]:
        """Parameters of rate 0 are frozen: they would collect gradients that nobody uses."""
        denoiser, text_rates = self.models.denoiser, self._text_rates(self.family)
        groups: list[ParamGroup] = rate_groups(
            denoiser.named_parameters(), self.rate, self._denoiser_rates(self.family), name="denoiser"
        )
        if not groups and self.opts.trainable_modules and not self._text:
            first = next(name for name, _ in denoiser.named_parameters())
            raise ConfigError(
                f"--trainable_modules is {' '.join(self.opts.trainable_modules)}; no parameter has that in its path"
                f" (the first path: {first}), so that nothing would learn"
            )
        for number, encoder in self._text.items():
            unused = tuple(self.family.unused_text_layers(number, encoder))
            used = [(name, p) for name, p in encoder.named_parameters() if not (unused and name.startswith(unused))]
            groups += rate_groups(used, text_rates[number], name=self._text_name(number))
        return groups

    def _text_name(self, number: int) -> str:
        return _text_name(number, self.trains_text_encoders(self.family))

    def modules(self) -> dict[str, torch.nn.Module]:
        found = {"denoiser": self.models.denoiser} if self._denoiser_learns(self.family) else {}
        return {**found, **{self._text_name(number): encoder for number, encoder in self._text.items()}}

    @contextmanager
    def disabled(self):
        raise TrainingError(f"{PRESERVED} in the dataset configuration {self.without_untouched}")
        yield

    def hooks(self) -> list[Hook]:
        stop = self.opts.stop_text_encoder_training
        return [] if stop is None or stop < 0 else [TextEncoderStop(self, stop)]

    def still_texts(self) -> None:
        """From here on text encoders stay as they are."""
        for encoder in self._text.values():
            encoder.requires_grad_(False)
            encoder.zero_grad(set_to_none=True)

    def description(self) -> str:
        parts = ["denoiser"] if self._denoiser_learns(self.family) else []
        parts += [self._text_name(number).replace("_", " ") for number in self._text]
        return f"the weights of the model: {', '.join(parts)}"

    def notices(self) -> list[str]:
        lines = super().notices()
        lines += self._layout_notices()
        stop = self.opts.stop_text_encoder_training
        if self._text and stop is not None:
            lines.append(f"text encoders stay as they are after step {stop}")
        return lines

    def _layout_notices(self) -> Iterator[str]:
        """What a base that is a folder becomes, where no layout was asked for."""
        base = self.config.value("pretrained_model_name_or_path")
        if not base or not os.path.isdir(base) or "save_model_as" in self.config.explicit:
            return
        if self.config[SavingOptions].save_model_as in FOLDER_FORMATS:
            yield "models are saved as folders, as the base is one; --save_model_as safetensors writes single files"
        else:
            yield "the base is a folder; models are saved as single files in the original layout"

    # -- files -------------------------------------------------------------------------------------------------------

    def _learned_parts(self, family: ModelFamily) -> set[str]:
        """As ModelFamily.save_model names them."""
        parts = {"denoiser"} if self._denoiser_learns(family) else set()
        learn = self.trains_text_encoders(family)
        return parts | {f"text_encoders.{number}" for number, learns in enumerate(learn) if learns}

    def side_files(self, family: ModelFamily) -> list[str]:
        return list(family.side_files(self._learned_parts(family)).values())

    def save(self, path: str, dtype: torch.dtype | None, metadata: dict[str, str]) -> None:
        """The model, and beside it what the family writes into files of their own."""
        parts = self._learned_parts(self.family)
        self._save_model(path, dtype, metadata, parts)
        for part, ending in self.family.side_files(parts).items():
            self.family.save_side_file(self.models, part, side_name(path, ending), dtype)

    def _save_model(self, path: str, dtype: torch.dtype | None, metadata: dict[str, str], parts: set[str]) -> None:
        layout = self.config[SavingOptions].save_model_as
        if layout in FOLDER_FORMATS:
            is_pickled = layout == "diffusers"
            self.family.save_folder(self.models, path, dtype, metadata, parts, pickled=is_pickled)
            return
        if not path.endswith(".ckpt"):
            self.family.save_model(self.models, path, dtype, metadata, parts)
            return
        from library.safetensors_utils import load_safetensors, save_pickled_atomic

        with scratch_path(path) as temporary:
            self.family.save_model(self.models, str(temporary), dtype, metadata, parts)
            tensors = load_safetensors(temporary, device="cpu", disable_mmap=True)
        save_pickled_atomic({"state_dict": tensors}, path)

    def load(self, path: str) -> None:
        raise ConfigError(f"{path} is a whole model, with which a run begins as --pretrained_model_name_or_path")

    def metadata(self) -> dict[str, Plain]:
        names = ("layer_lrs", "trainable_modules", "block_lr", *TEXT_RATES, "stop_text_encoder_training")
        given = {f"ss_{name}": getattr(self.opts, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}


def _text_name(number: int, learn: Sequence[bool]) -> str:
    """Of one among as many text encoders as `learn` tells of."""
    return "text_encoder" if len(learn) == 1 else f"text_encoder_{number + 1}"


class DreamBooth(FullTrainable):
    """All weights of denoiser and text encoder, which learns unless it is told not to."""

    name = "dreambooth"
    state_kind = "full"
    keeps_text_still = "add --stop_text_encoder_training -1"
    lets_text_learn = "leave out --stop_text_encoder_training -1"

    @property
    def _is_text_trained(self) -> bool:
        return self.opts.stop_text_encoder_training != -1


class TextEncoderStop(Hook):
    """`--stop_text_encoder_training`: text encoders stay as they are after so many optimizer steps."""

    def __init__(self, trainable: FullTrainable, steps: int) -> None:
        self._trainable = trainable
        self._steps = steps
        self._is_done = False

    def on_step_start(self, run: Run, batch: Batch) -> None:
        if not self._is_done and run.progress.global_step >= self._steps:
            self._is_done = True
            self._trainable.still_texts()
