"""Trainer: prepares a run in phases, trains it, finishes it. Phases return values; the Run is built once, complete."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from library.attention import use_attention
from library.components.transformers_import import import_in_background
from library.core.attention_modes import AttentionChoice
from library.core.errors import AtelierError, ConfigError, Problems, RunInterrupted
from library.core.garbage import started
from library.core.memory_room import resident_memory
from library.core.options import AUTO, Config, option_fields, shortened
from library.dataset import CachingOptions, DatasetOptions
from library.dataset.fill_caches import fill_text_cache, uncached
from library.dataset.strategies import StrategySet, Texts
from library.device_utils import clean_memory_on_device
from library.training import checks, loss_weights, losses, optimizers, schedulers
from library.training.accelerator_setup import Runtime, is_main_process, prepare_runtime, with_forms
from library.training.alignment import alignment_hooks
from library.training.checkpoint import resume_point
from library.training.compilation import checkpoint_activations, compile_blocks
from library.training.computing_options import MemoryOptions, PrecisionOptions
from library.training.data import TrainingData, loading_of
from library.training.data_phase import (
    DataGroups,
    FoundData,
    KeptModels,
    TextPhase,
    cache_latents,
    find_data,
    group_data,
    lacking_problems,
    prepare_text,
    preserving_problems,
    side_limit_of,
    side_problems,
)
from library.training.earlier_runs import clean_up, final_file, keep_earlier_files
from library.training.hooks.base import Hook, HookList
from library.training.hooks.checkpoint import CheckpointHook
from library.training.hooks.losses import gather_objects
from library.training.hooks.sample import encode_sample_prompts
from library.training.hooks.standard import standard_hooks
from library.training.loop import fit
from library.training.loss import LossFunction
from library.training.memory.choice import RESERVED, Chooser, changed
from library.training.memory.plan import GB, FewerSamples, MemoryPlan, Planner, capacity_of, quiet
from library.training.metadata import BaseModelHashes
from library.training.optimizers import OptimizerOptions
from library.training.optimizers.host_states import keep_on_host
from library.training.option_groups import LoopOptions, ResumeOptions, SamplingOptions, SavingOptions
from library.training.own_hooks import make_hooks, names_never_called
from library.training.packing_options import NavitOptions, check_packing
from library.training.progress import Progress
from library.training.prompt_files import check_files
from library.training.run import Models, Run
from library.training.run_lock import claimed_output
from library.training.run_record import RunRecord
from library.training.run_settings import settings_of
from library.training.sampling_prompts import SamplePrompt, holds_no_prompt, load_prompts
from library.training.schedulers import SchedulerOptions
from library.training.start_page import print_start
from library.training.state import check_hook_weights, local_state_folder, resume
from library.training.state_files import read_train_state
from library.training.step import TrainStep, check_replacements
from library.training.stopping import command_going_on, exit_code_of_signal
from library.training.timestep_samplers import info_noise_options
from library.training.trainables.base import Trainable
from library.training.wiring.base import ModelFamily

if TYPE_CHECKING:
    from library.generation.words import PromptWords

logger = logging.getLogger(__name__)


class Trainer:
    """One run of one family and one trainable.

    `prepare` goes through the phases in the order in which memory is needed: text encoders and denoiser meet only when
    the text encoders run in the step. `run` is prepare and fit.
    """

    step_class: ClassVar[type[TrainStep]] = TrainStep
    fill_text: Callable[..., object] = staticmethod(fill_text_cache)
    """what encodes captions for the cache"""

    def __init__(
        self, config: Config, family: ModelFamily, trainable: Trainable, hooks: list[Hook] | None = None
    ) -> None:
        self.config = config
        self.family = family
        self.trainable = trainable
        self.own_hooks = [*(hooks or ()), *make_hooks(config), *alignment_hooks(config)]
        self.trainable_hooks = trainable.hooks()
        self.started_at = time.time()
        self._claims = ExitStack()
        self._prompt_words: PromptWords | None = None
        self._program_bytes: int | None = None
        """main memory of this process before models are loaded"""
        self._untouched: tuple[Config, Trainable] = (config, trainable)
        """a configuration, and a trainable of it that no model has seen"""
        self._encoded: set[str] = set()
        """"vae" and "text_encoders", where they were loaded to encode"""

    def run(self) -> None:
        """Prepare and train, alone under the name of the output; returns early for --debug_dataset."""
        with self._claims:
            run = self.prepare()
            if run is not None:
                fit(run)
                run.runtime.leave_group()
        if run is not None and not run.progress.is_finished:
            raise self.interrupted(run)

    def interrupted(self, run: Run) -> RunInterrupted:
        """What is told of a run that a signal ended."""
        hook, code = run.hooks.find(CheckpointHook), exit_code_of_signal(run.stop.agreed)
        secrets = [
            name for group in self.config.classes() for name, (_, spec) in option_fields(group).items() if spec.secret
        ]
        state = (
            Path(self.config[SavingOptions].output_dir) if hook is None or hook.last_state is None else hook.last_state
        )
        return RunInterrupted(
            f"interrupted after step {run.progress.global_step} of {run.progress.max_train_steps}; saved as {state}. "
            "Go on with:\n"
            f"  {command_going_on(state, secrets)}",
            code,
        )

    def prepare(self) -> Run | None:
        """Every phase up to the complete Run; None when there is nothing to train (--debug_dataset)."""
        if is_main_process() and not self.config[DatasetOptions].debug_dataset:
            clean_up(self.config)
        found, prompts = self.check()
        started()
        runtime = prepare_runtime(self.config)
        data, strategies, trained = self.data_phase(found, runtime)
        if self.config[DatasetOptions].debug_dataset:
            data.show(runtime.seed, self.config[SavingOptions].output_dir)
            return None
        if problems := lacking_problems(self.family, data, strategies):
            raise ConfigError(problems)
        runtime = self.settle_memory(data, strategies, runtime, keeps_vae=bool(prompts))
        state = local_state_folder(self.config, runtime)
        if state is not None:
            check_hook_weights(state, self.added_hooks.by_key())
        self.check_length(data, runtime, state)
        self.on_main(runtime, self.take_output)
        self.family.transform = self.trainable.transform(self.family)
        vae, beside_vae = self.vae_phase(data, strategies, runtime, keep=bool(prompts))
        if prompts:
            strategies = self.know_prompt_words(strategies)
        text = self.text_phase(data, strategies, runtime, prompts)
        self.show_plan(self.planner(data, strategies, runtime, keeps_vae=bool(prompts), encodes=self._encoded))
        denoiser = self.denoiser_phase(runtime)
        extra = {**beside_vae, **self.parts_beside(runtime, "denoiser")}
        models = Models(vae, text.text_encoders, denoiser, extra)
        self.trainable.attach(self.family, models, runtime)
        self.arm(models, trained)
        return self.assemble(runtime, data, models, strategies, trained, prompts, text, state)

    def plans(self, device: torch.device | None = None) -> list[MemoryPlan]:
        """What `prepare` and the steps would hold in memory, for each size of batches, the largest first; nothing is
        written and no weight is read. `device`: another one than the run would have here."""
        found, prompts = self.check()
        runtime = prepare_runtime(self.config)
        if device is not None:
            runtime = dataclasses.replace(runtime, device=device)
        data, strategies, _ = self.data_phase(found, runtime)
        if problems := lacking_problems(self.family, data, strategies):
            raise ConfigError(problems)
        runtime = self.settle_memory(data, strategies, runtime, keeps_vae=bool(prompts))
        planner = self.planner(data, strategies, runtime, keeps_vae=bool(prompts), encodes=None)
        return [planner.plan(self.config, demand) for demand in planner.demands(self.family.architecture.latents)]

    def planner(
        self, data: DataGroups, strategies: StrategySet, runtime: Runtime, *, keeps_vae: bool,
        encodes: Collection[str] | None,
    ) -> Planner:
        """What makes plans of this run; `encodes` None: what the caches on the disk lack."""
        if encodes is None:
            caching = self.config[CachingOptions]
            on_disk = {"vae"} if caching.cache_latents_to_disk else set()
            on_disk |= {"text_encoders"} if caching.cache_text_encoder_outputs_to_disk else set()
            lacking = uncached(data.groups, strategies, data.index) if on_disk else {}
            encodes = {part for part in ("vae", "text_encoders") if part not in on_disk or part in lacking}
        return Planner(
            self.twin, data, strategies, runtime, keeps_vae=keeps_vae, encodes=encodes, program=self._program_bytes
        )

    def settle_memory(
        self, data: DataGroups, strategies: StrategySet, runtime: Runtime, *, keeps_vae: bool
    ) -> Runtime:
        """Choose what --vram_budget and --blocks_to_swap auto leave open, before anything is loaded; the runtime for
        it."""
        memory = self.config[MemoryOptions]
        if memory.vram_budget is None and memory.blocks_to_swap != AUTO:
            return runtime
        planner = self.planner(data, strategies, runtime, keeps_vae=keeps_vae, encodes=None)
        demand = next(iter(planner.demands(self.family.architecture.latents)), None)
        if demand is None:
            raise ConfigError(
                "--vram_budget and --blocks_to_swap auto need buckets of the data, which --dataset_class does not have;"
                " give the options themselves"
            )
        chooser = Chooser(
            lambda config: planner.measured(config, demand), planner.assembled,
            self._has_no_problem, FewerSamples(planner, demand),
        )
        budget, capacity = memory.vram_budget, capacity_of(runtime.device)
        if budget is None and (capacity is None or runtime.device.type == "cpu"):
            chosen = changed(self.config, MemoryOptions, blocks_to_swap=0)
            where = f"{runtime.device}, whose size is not known (--vram_budget tells it)"
            where = "main memory" if runtime.device.type == "cpu" else where
            logger.info("--blocks_to_swap auto: 0, as the run computes in %s", where)
        else:
            limit = (1 - RESERVED) * min(gather_objects(capacity)) if budget is None else budget * GB
            choice = chooser.choose(self.config, limit, given=budget is not None)
            chosen = choice.config
            for line in choice.lines if runtime.is_main_process else ():
                logger.info("%s", line)
        self.config = self.family.config = self.trainable.config = chosen
        return with_forms(runtime, chosen)

    def _has_no_problem(self, config: Config) -> bool:
        """Whether the checks of a start have nothing against another configuration of the run."""
        with quiet():
            return not checks.collect(config, type(self.family)(config), type(self.trainable)(config))

    def show_plan(self, planner: Planner) -> None:
        """The table of memory in the log. What cannot be planned does not stop the run."""
        if not (planner.runtime.is_main_process and logger.isEnabledFor(logging.INFO)):
            return
        try:
            demand = next(iter(planner.demands(self.family.architecture.latents)), None)
            text = "memory plan: none, as the data has no buckets"
            if demand is not None:
                text = planner.plan(self.config, demand).table()
        except AtelierError as error:
            text = f"memory plan: none, as {error}"
        logger.info("%s", text)

    def twin(self, config: Config) -> Trainer:
        """A trainer of the same run with this configuration, for a plan: what is attached to its family and its
        trainable is not to this one's. Its blocks are not compiled: that would take longer than the plan; texts keep
        their padding, as where it begins is in their values."""
        config = changed(config, MemoryOptions, torch_compile=False)
        config = changed(config, NavitOptions, navit_text_trim_padding=False)
        twin = copy.copy(self)
        twin.config = config
        twin.family = copy.copy(self.family)
        twin.family.config = config
        twin.family.transform = None  # what it changes are values
        of_config, trainable = self._untouched
        twin.trainable = copy.deepcopy(trainable, {id(of_config): config})
        twin.trainable_hooks, twin.own_hooks = [], []
        return twin

    def release(self) -> None:
        """Give the name of the output free, after `prepare` without `run`."""
        self._claims.close()

    def take_output(self) -> None:
        """The folder of the output, for this run alone."""
        checks.make_output_folder(self.config)
        self._claims.enter_context(claimed_output(self.config))

    @staticmethod
    def on_main(runtime: Runtime, action: Callable[[], object]) -> None:
        """What the main process does for all; when it fails, all do."""
        problem = None
        if runtime.is_main_process:
            try:
                action()
            except ConfigError as error:
                problem = str(error)
        problem = runtime.from_main(problem)
        if problem is not None:
            raise ConfigError(problem)

    def check(self) -> tuple[FoundData, list[SamplePrompt]]:
        """Everything that can be wrong before models are loaded, in one error; the images and the sample prompts."""
        problems = Problems()
        for message in checks.collect(self.config, self.family, self.trainable):
            problems.add(message)
        problems.attempt(lambda: check_replacements(self.added_hooks))
        problems.attempt(lambda: info_noise_options.check_hooks(self.config, self.added_hooks))
        problems.attempt(lambda: check_packing(self.config, self.family, self.trainable, self.added_hooks))
        for hook in self.added_hooks:
            problems.attempt(lambda hook=hook: hook.check(self.config, self.family, self.trainable))
            for line in names_never_called(type(hook)) if is_main_process() else ():
                logger.warning(line)
        rules = self.trainable.dataset_rules(self.family)
        limit = side_limit_of(self.family)
        found = problems.attempt(lambda: find_data(self.config, self.family.architecture, rules, limit))
        too_large = side_problems(found, limit) if found is not None else []
        preserving = preserving_problems(found, [self.trainable, *self.added_hooks]) if found is not None else []
        for message in (*too_large, *preserving):
            problems.add(message)
        problems.raise_if_any()
        sampling = self.config[SamplingOptions]
        path, wants = sampling.sample_prompts, checks.wants_samples(sampling)
        return found, self._sample_prompts(path) if path and wants and not holds_no_prompt(path) else []

    def _sample_prompts(self, path: str) -> list[SamplePrompt]:
        """The prompts that can be read and that the family has the sizes and samplers for: another one does not cost
        the training."""
        left_out: list[str] = []
        prompts, limit = [], self.family.side_limit()
        for prompt in load_prompts(path, self.family.prompt_options(), left_out):
            try:
                complete = self.family.sample_defaults(prompt)
                prompt = self.trainable.sample_prompt(prompt)
                check_files(complete, self.family.prompt_options(), self.family.first_frames)
            except ConfigError as error:
                left_out += error.problems
                continue
            too_large = limit and limit.problem(complete.width, complete.height)
            if too_large:
                left_out.append(f"'{shortened(prompt.prompt)}': {too_large}")
            else:
                prompts.append(prompt)
        for problem in left_out:
            logger.warning("%s; this sample prompt is left out", problem)
        return prompts

    def data_phase(
        self, found: FoundData, runtime: Runtime
    ) -> tuple[DataGroups, StrategySet, list[bool]]:
        """The data in its buckets, how it is encoded, and per text encoder whether gradients go through it."""
        trained = self.trainable.follows_text_encoders(self.family)
        strategies = self.family.strategies(trained)
        self.trainable.prepare_tokenizers(self.family, strategies)
        strategies = self.trainable.text_strategies(strategies)
        strategies.mark_text_models(self.trainable.transform_identity(self.family))
        data = group_data(self.config, found, self.family.architecture, runtime.seed)
        data.set_strategies(strategies)
        if texts := self.family.texts_to_cut():
            data.train.cut_texts_of_packs(texts)
        self.trainable.prepare_data(data)
        for group in data.groups:
            strategies.latents_caching.check_pictures(group.items)
        self._program_bytes = max(gather_objects(resident_memory() or 0))  # so that all processes plan alike
        self._untouched = (self.config, copy.deepcopy(self.trainable, {id(self.config): self.config}))
        return data, strategies, trained

    def check_length(self, data: DataGroups, runtime: Runtime, state: Path | None) -> None:
        """What depends on the number of batches, before models are loaded: the schedule, and whether steps are left."""
        batches, options = self.loader(data, runtime), self.config[ResumeOptions]
        progress = self.new_progress(batches)
        schedulers.check(self.config[SchedulerOptions], self.config[OptimizerOptions], progress.max_train_steps)
        resume_point(
            options, None if state is None else read_train_state(state), steps_per_epoch=progress.steps_per_epoch,
            accumulation=batches.accumulation, max_train_steps=progress.max_train_steps,
            lacks_final_file=not final_file(self.config).exists(),
        )

    # ---- models ------------------------------------------------------------------------------------------------------

    def vae_phase(
        self, data: DataGroups, strategies: StrategySet, runtime: Runtime, *, keep: bool
    ) -> tuple[torch.nn.Module | None, dict[str, torch.nn.Module]]:
        """Cache latents. The VAE and the parts beside it stay, on the CPU for samples or on the device for live
        encoding, or are released."""

        def load_vae() -> torch.nn.Module:
            if not self.family.lacks("text_encoders"):
                import_in_background()  # they come next, and images are encoded meanwhile
            self._encoded.add("vae")
            return self.frozen(self.family.load_vae(runtime))

        vae = KeptModels(load_vae)
        parts = KeptModels(lambda: self.parts_beside(runtime, "vae"))
        cache_latents(self.config, data, strategies, runtime, vae, parts)
        live = not self.config[CachingOptions].caches_latents
        place = runtime.device if live else "cpu"
        kept = (
            (vae().to(place), {name: part.to(place) for name, part in parts().items()}) if live or keep else (None, {})
        )
        del vae, parts
        clean_memory_on_device()
        return kept

    def parts_beside(self, runtime: Runtime, beside: str) -> dict[str, torch.nn.Module]:
        return {name: self.frozen(part) for name, part in self.family.load_parts(runtime, beside).items()}

    def text_phase(
        self, data: DataGroups, strategies: StrategySet, runtime: Runtime, prompts: list[SamplePrompt]
    ) -> TextPhase:
        """Encode captions and sample prompts; afterwards only encoders that the step needs are in memory."""

        def load() -> list[torch.nn.Module | None]:
            self._encoded.add("text_encoders")
            encoders = self.loaded_text_encoders(runtime)
            if self._prompt_words is not None:
                self._prompt_words.join(encoders, checks.prompt_words(self.config, self.family))
            return encoders

        def encode(encoders: list[torch.nn.Module | None]) -> Texts:
            return encode_sample_prompts(self.family, strategies, encoders, prompts)

        phase = prepare_text(
            data, strategies, runtime, load=load, encode_prompts=encode if prompts else None, fill=self.fill_text
        )
        clean_memory_on_device()
        return phase

    def loaded_text_encoders(self, runtime: Runtime) -> list[torch.nn.Module | None]:
        """In the type in which they learn or stay as they are, with new tokens in them."""
        dtype = self.trainable.text_encoder_dtype(self.family, runtime)
        held = runtime
        if dtype is not None:
            held = dataclasses.replace(runtime, weight_dtype=dtype, text_encoder_dtype=dtype, text_form=None)
        encoders = [e if e is None else self.frozen(e) for e in self.family.load_text_encoders(held)]
        self.trainable.prepare_text_encoders(self.family, encoders, runtime)
        return encoders

    def know_prompt_words(self, strategies: StrategySet) -> StrategySet:
        """Strategies that read words of embedding files in sample prompts, once the text encoders are there."""
        if not self.config[SamplingOptions].textual_inversion_embeddings:
            return strategies
        from library.generation.words import PromptWords

        keys = self.family.record.embedding_keys
        self._prompt_words = PromptWords(strategies.tokenize.tokenizers, (), keys)
        return dataclasses.replace(strategies, prompt_text=self._prompt_words.text)

    def denoiser_phase(self, runtime: Runtime) -> torch.nn.Module:
        denoiser = self.family.load_denoiser(
            dataclasses.replace(runtime, denoiser_dtype=self.trainable.denoiser_dtype(runtime))
        )
        if self.config[PrecisionOptions].mixed_precision_transformer:
            from library.components.mixed_models import compute_as_stored

            found = compute_as_stored(denoiser, runtime.weight_dtype, in_autocast=True)
            logger.info("--mixed_precision_transformer: %s", found)
        if self.config[PrecisionOptions].multiplies_fp8:
            from library.fp8_optimization_utils import multiply_in_fp8

            logger.info("--fp8_fast: %d layers of the denoiser multiply in 8 bits", multiply_in_fp8(denoiser))
        self.added_hooks.on_transformer_loaded(denoiser)
        return self.frozen(denoiser)

    @staticmethod
    def frozen(module: torch.nn.Module) -> torch.nn.Module:
        return module.requires_grad_(False).eval()

    def arm(self, models: Models, trained: list[bool]) -> None:
        """Gradient checkpointing and compilation, after adapters are in place, of the denoiser and of further parts that
        can do it. Checkpointing works in train mode only; the models have no dropout of their own that it would switch
        on."""
        memory = self.config[MemoryOptions]
        self.choose_attention(models.of_step)
        if memory.gradient_checkpointing:
            for part in models.of_step:
                if hasattr(part, "enable_gradient_checkpointing"):
                    part.enable_gradient_checkpointing(cpu_offload=memory.cpu_offload_checkpointing)
                    part.train()
            for encoder, learns in zip(models.text_encoders, trained):
                if encoder is not None and learns:
                    checkpoint_activations(encoder)
                    encoder.train()
        if memory.compiles:
            for part in models.of_step:
                if hasattr(part, "repeated_blocks"):
                    compile_blocks(
                        part, memory.dynamo_backend, mode=memory.dynamo_mode, fullgraph=memory.dynamo_fullgraph,
                        dynamic=memory.dynamo_dynamic, variants=memory.dynamo_cache_size_limit,
                    )  # fmt: skip

    def choose_attention(self, parts: list[torch.nn.Module]) -> None:
        """Tell these models, which compute in the step, how to compute their attention."""
        settings = self.family.attention
        for line in settings.notes if is_main_process() else ():
            logger.info(line)
        number = sum(use_attention(part, settings.choice) for part in parts)
        if not number and settings.choice != AttentionChoice():
            logger.warning(
                "--attn_mode and --split_attn have no effect: the model computes its attention in a way of its own"
            )

    # ---- the Run -----------------------------------------------------------------------------------------------------

    def assemble(
        self, runtime: Runtime, data: DataGroups, models: Models, strategies: StrategySet, trained: list[bool],
        prompts: list[SamplePrompt], text: TextPhase, state: Path | None,
    ) -> Run:
        """Optimizer, schedule, loaders, hooks and step; resume; the complete Run, for whose files there is room."""
        batches = self.loader(data, runtime)
        progress = self.new_progress(batches)
        data.train.set_max_train_steps(progress.max_train_steps)
        schedulers.check(self.config[SchedulerOptions], self.config[OptimizerOptions], progress.max_train_steps)
        hook_modules = self.added_hooks.all_modules()
        for module in hook_modules.values():
            module.to(runtime.device, runtime.trained_dtype)
        extra = [group for groups in self.added_hooks.extra_trainable_params() for group in groups]
        built = optimizers.build(
            self.config[OptimizerOptions], [*self.trainable.param_groups(), *extra],
            # A fused kernel skips steps of fp16 by itself, and the schedule would not learn of it.
            fused=runtime.accelerator.scaler is None,
        )
        host_states = keep_on_host(self.config[OptimizerOptions], built.optimizer, runtime.device)
        settings = settings_of(
            self.config, self.family, self.trainable, built, progress.max_train_steps, hook_modules, data.shadowed
        )
        scheduler = schedulers.build(
            self.config[SchedulerOptions], built, learning_rate=self.config[OptimizerOptions].learning_rate,
            max_train_steps=progress.max_train_steps,
        )
        optimizer = built.optimizer
        if runtime.accelerator.scaler is not None:  # the wrapper scales and skips in fp16; it does nothing else for us
            optimizer = runtime.accelerator.prepare_optimizer(optimizer)
        record = RunRecord(self.started_at, built, data, BaseModelHashes(self.config))
        hooks = HookList(
            standard_hooks(
                self.config, runtime, prompts=prompts, conditioning=text.sample_conditioning, trainable=self.trainable,
                of_trainable=self.trainable_hooks, own=self.own_hooks, metadata=record.metadata,
            )
        )
        run = Run(
            config=self.config, runtime=runtime, family=self.family, trainable=self.trainable, models=models,
            strategies=strategies, step=self.new_step(runtime, models, strategies, trained, hooks), data=batches,
            optimizer=optimizer, lr_scheduler=scheduler, progress=progress, hooks=hooks,
            max_grad_norm=self.config[OptimizerOptions].max_grad_norm, settings=settings,
            updater=self.trainable.updater(),
        )
        if hasattr(run.step.timestep_sampler, "know_epochs"):
            run.step.timestep_sampler.know_epochs(batches.steps_per_epoch, batches.samples_per_step)
        resume(run, state)
        if host_states is not None:
            host_states.send_all()
        # Now that inputs among them (--network_weights) are read, and nothing more can be refused.
        self.on_main(runtime, lambda: keep_earlier_files(self.config))
        if runtime.is_main_process:
            print_start(run, built, data)
        return run

    @property
    def added_hooks(self) -> HookList:
        """Those of the trainable, of the caller and of --hook; the standard ones are made when the run is complete."""
        return HookList([*self.trainable_hooks, *self.own_hooks])

    def loader(self, data: DataGroups, runtime: Runtime) -> TrainingData:
        loop = self.config[LoopOptions]
        return TrainingData(
            data.train, data.validation, seed=runtime.seed, accumulation=loop.gradient_accumulation_steps,
            rank=runtime.rank,
            num_processes=runtime.num_processes,
            loading=loading_of(loop, self.config.explicit, pin_memory=runtime.device.type == "cuda"),
        )

    def new_progress(self, batches: TrainingData) -> Progress:
        """Length of the run in optimizer steps; --max_train_epochs replaces --max_train_steps."""
        loop, per_epoch = self.config[LoopOptions], batches.steps_per_epoch
        steps = loop.max_train_epochs * per_epoch if loop.max_train_epochs else loop.max_train_steps
        return Progress(
            max_train_steps=steps, num_epochs=math.ceil(steps / per_epoch), steps_per_epoch=per_epoch,
            batches_per_epoch=batches.batches_per_epoch,
        )

    def new_step(
        self, runtime: Runtime, models: Models, strategies: StrategySet, trained: list[bool], hooks: HookList
    ) -> TrainStep:
        objective, data = self.family.objective(), self.config[DatasetOptions]
        loss = LossFunction(
            losses.build(self.config[losses.LossOptions]),
            loss_weights.build(self.config[loss_weights.LossWeightOptions]),
            objective, data.masked_loss,
        )
        validation_seed = runtime.seed if data.validation_seed is None else data.validation_seed
        return self.step_class(
            runtime, self.family, self.trainable, models, strategies, objective,
            self.family.timestep_sampler(objective), loss,
            seed=runtime.seed, validation_seed=validation_seed, trained_text_encoders=trained, hooks=list(hooks),
        )
