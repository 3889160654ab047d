"""The phases of a run on the meta device, one after the other as `Trainer.prepare` and the loop have them, and what
each takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from library.components.transformers_import import finish_background, import_transformers_models
from library.core.keyed_random import isolated_rng
from library.dataset import CachingOptions
from library.dataset.collate import stack_padded
from library.training import optimizers
from library.training.accelerator_setup import Runtime
from library.training.computing_options import MemoryOptions
from library.training.hooks.base import HookList
from library.training.memory.samples import Demand, joined
from library.training.memory.tracing import META, MemoryTracker, bytes_of, tracing
from library.training.optimizers import OptimizerOptions
from library.training.option_groups import LoopOptions
from library.training.run import Models

if TYPE_CHECKING:
    from library.dataset.items import ImageItem
    from library.dataset.strategies import Conditioning, StrategySet
    from library.training.protocols import ParamGroup
    from library.training.trainer_base import Trainer


@dataclass(frozen=True)
class TracedRuntime(Runtime):
    """A runtime on the meta device."""

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def clip_gradients(self, parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def unscale_gradients(self) -> None: ...

    def seed_foreign_code(self, seed: int) -> None: ...


@dataclass
class Sizes:
    """Bytes. `weights`: frozen and trained ones by part; `phases`: what a part of the run takes beside weights."""

    demand: Demand
    kind: str
    """of the device"""
    weights: dict[str, int] = field(default_factory=dict)
    encoding: dict[str, int] = field(default_factory=dict)
    """activations while "latents" and "captions" are encoded"""
    in_step: set[str] = field(default_factory=set)
    """the parts that are in memory with the denoiser"""
    images: int = 0
    """of a batch, where it is encoded in the step"""
    trained: int = 0
    """parameters that are no weights of the models: those of an adapter"""
    num_trained: int = 0
    """trained parameters, counted one by one"""
    gradients: int = 0
    optimizer: int = 0
    forward: int = 0
    backward: int = 0
    """with the gradients that are there at its largest moment"""
    is_paged: bool = False
    """whether the optimizer keeps its states where a device reads them from main memory"""
    update: int = 0
    """beside gradients and states"""
    swaps: list[tuple[int, int]] = field(default_factory=list)
    """for each number of swapped blocks, from 0: bytes of the denoiser that lie in main memory, and those on the device
    through which they pass"""
    away: int = 0
    """activations that wait in main memory"""
    sample_bytes: int = 0
    """of what caches hold of one sample: latents, conditions, outputs of text encoders"""


Latents = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""latents [B, ...] of a batch, and its conditions by name"""


class PhaseTracer:
    """Runs the phases of a trainer, whose family and trainable are copies for this alone. `encodes`: the parts that have
    something to encode; what others would make lies in caches."""

    def __init__(
        self, trainer: Trainer, runtime: Runtime, strategies: StrategySet, kind: str,
        encodes: Collection[str] = ("vae", "text_encoders"),
    ) -> None:
        fields = {f.name: getattr(runtime, f.name) for f in dataclasses.fields(runtime)}
        self.trainer, self.strategies, self.kind = trainer, strategies, kind
        self.runtime = TracedRuntime(**{**fields, "device": META})
        self.config, self.encodes = trainer.config, encodes

    def sizes(self, demand: Demand) -> Sizes:
        """What a run takes whose batches are all as large as `demand`."""
        found = Sizes(demand, self.kind)
        # what is imported while torch stands in for another device would keep that
        finish_background()
        if not self._captions_are_cached and not self.trainer.family.lacks("text_encoders"):
            import_transformers_models()
        with isolated_rng(0), tracing(self.kind) as tracker:
            models = Models()
            latents = self._latents(demand, models, found, tracker)
            models.text_encoders, texts = self._captions(demand, found, tracker)
            batches = [
                dataclasses.replace(part.batch().to(META), latents=made, conditions=conditions, **text)
                for part, (made, conditions), text in zip(demand.parts, latents, texts, strict=True)
            ]
            found.sample_bytes = max(
                _bytes_per_sample((made, conditions, text["conditioning"]), len(part.items))
                for part, (made, conditions), text in zip(demand.parts, latents, texts)
            )
            self._train(batches[0] if demand.parts == (demand,) else joined(batches), models, found, tracker)
        return found

    # -- before the denoiser -----------------------------------------------------------------------------------------

    def _latents(
        self, demand: Demand, models: Models, found: Sizes, tracker: MemoryTracker
    ) -> list[Latents]:
        """Latents [B, ...] and conditions of every part; those of the largest from a VAE where there is one."""
        first, *others = demand.parts
        live = not self.config[CachingOptions].caches_latents
        if self.trainer.family.lacks("vae") or (not live and "vae" not in self.encodes):
            return [self._empty_latents(part) for part in demand.parts]
        made = self._encoded(first, models, found, tracker)
        if live:
            found.images = bytes_of([part.images(len(part.items), META) for part in demand.parts])
        return [made, *map(self._empty_latents, others)]

    def _kept(self, part: Demand) -> dict[str, torch.Tensor]:
        """The pictures beside the images that no encoder reads."""
        read = self.strategies.latents_caching.encoder.pictures_for(part.bucket)
        return part.pictures([name for name in part.own_picture if name not in read], len(part.items), META)

    def _empty_latents(self, part: Demand) -> Latents:
        """As a cache has them."""
        size, shapes = len(part.items), self.strategies.latents_caching.encoder.condition_shapes(part.bucket)
        empty = {name: torch.empty(size, *map(abs, shape), device=META) for name, shape in shapes.items()}
        shape = self.trainer.family.architecture.latents.latent_shape(part.bucket)
        return torch.empty(size, *shape, device=META), {**self._kept(part), **empty}

    def _encoded(self, demand: Demand, models: Models, found: Sizes, tracker: MemoryTracker) -> Latents:
        caching, family, options = self.strategies.latents_caching, self.trainer.family, self.config[CachingOptions]
        size, live = len(demand.items), not options.caches_latents
        read = caching.encoder.pictures_for(demand.bucket)
        vae = self.trainer.frozen(family.load_vae(self.runtime))
        parts = self.trainer.parts_beside(self.runtime, "vae")
        together = 1 if self.kind == "cpu" else size if live else options.vae_batch_size
        images, pictures = demand.images(together, META), demand.pictures(read, together, META)
        facts = [demand.items[0].facts] * together
        with tracker.measured() as taken:
            latents, made = caching.encode_samples(vae, parts, images, [0] * together, pictures, facts)
        found.weights["VAE"] = weights_of(vae)
        found.weights |= {name: weights_of(part) for name, part in parts.items()}
        found.encoding["latents"] = taken.peak
        if live:
            found.in_step |= {"VAE", *parts}
        models.vae, models.extra = vae, dict(parts)
        rows = {"latents": latents, **made}
        rows = {
            name: torch.empty(size, *value.shape[1:], dtype=value.dtype, device=META) for name, value in rows.items()
        }
        return rows.pop("latents"), {**self._kept(demand), **rows}

    def _captions(
        self, demand: Demand, found: Sizes, tracker: MemoryTracker
    ) -> tuple[list[torch.nn.Module | None], list[dict[str, Any]]]:
        """The text encoders of the step, and the fields of the batch of every part: what is cached of the captions, and
        the tokens for what is not."""
        trainer, strategies, runtime = self.trainer, self.strategies, self.runtime
        caching = strategies.text_encoder_outputs_caching
        if self._captions_are_cached or trainer.family.lacks("text_encoders"):
            return [], [{"conditioning": self._cached_captions(part, tracker)} for part in demand.parts]
        encoders = trainer.loaded_text_encoders(runtime)
        for number, encoder in enumerate(encoders, start=1):
            if encoder is not None:
                name = f"text encoder {number}" if len(encoders) > 1 else "text encoder"
                found.weights[name] = weights_of(encoder)
        tokens = [self._tokens(part, tracker) for part in demand.parts]
        if caching is None:
            found.in_step |= {name for name in found.weights if name.startswith("text encoder")}
            return encoders, [{"conditioning": None, **own} for own in tokens]
        made, found.encoding["captions"] = [], 0
        for own in tokens:
            with tracker.measured() as taken, torch.no_grad(), runtime.autocast():
                outputs = strategies.encode(encoders, own["input_ids_list"], own["token_weights_list"])
            found.encoding["captions"] = max(found.encoding["captions"], taken.peak)
            made.append({name: value for name, value in outputs.items() if name not in caching.live})
        needed = set(strategies.layout.encoders_for(caching.live)) if caching.live else set()
        for number, encoder in enumerate(encoders):
            if number not in needed:
                encoders[number] = None
            elif encoder is not None:
                found.in_step.add(f"text encoder {number + 1}" if len(encoders) > 1 else "text encoder")
        return encoders, [
            {"conditioning": found_of, **(own if caching.live else {})} for found_of, own in zip(made, tokens)
        ]

    def _tokens(self, part: Demand, tracker: MemoryTracker) -> dict[str, Any]:
        ids, weights = self.strategies.tokenize.tokens_of([item.caption for item in part.items])
        ids, weights = [tracker.know(one) for one in ids], weights and [one.to(META) for one in weights]
        return {"input_ids_list": ids, "token_weights_list": weights}

    @property
    def _captions_are_cached(self) -> bool:
        caching = self.strategies.text_encoder_outputs_caching
        return caching is not None and "text_encoders" not in self.encodes and not caching.live

    def _cached_captions(self, demand: Demand, tracker: MemoryTracker) -> Conditioning:
        """The outputs in caches, where these are complete."""
        rows = [self._cached_caption(item) for item in demand.items]

        def on_meta(value: torch.Tensor) -> torch.Tensor:
            return value.to(META) if value.is_floating_point() else tracker.know(value)

        lists = self.strategies.layout.lists
        return {
            name: [on_meta(row[name]) for row in rows]
            if name in lists
            else on_meta(stack_padded([row[name] for row in rows]))
            for name in rows[0]
        }

    def _cached_caption(self, item: ImageItem) -> Conditioning:
        caching = self.strategies.text_encoder_outputs_caching
        kept = caching.outputs_of(item)
        if kept is not None:
            return kept
        path = caching.path_of(item)
        suffix, _ = caching.find(path, item.caption)
        return caching.read(path, suffix or "")

    # -- the step ----------------------------------------------------------------------------------------------------

    def _train(self, batch: object, models: Models, found: Sizes, tracker: MemoryTracker) -> None:
        trainer, runtime = self.trainer, self.runtime
        models.denoiser = trainer.denoiser_phase(runtime)
        beside = trainer.parts_beside(runtime, "denoiser")
        models.extra |= beside
        found.in_step |= {"denoiser", *beside}
        trained = trainer.trainable.follows_text_encoders(trainer.family)
        trainer.trainable.attach(trainer.family, models, runtime)
        trainer.arm(models, trained)
        found.weights |= {"denoiser": weights_of(models.denoiser)}
        found.swaps = [(0, 0)]
        if self.kind != "cpu" and hasattr(models.denoiser, "swapped_bytes"):
            ring = self.config[MemoryOptions].block_swap_ring_size
            most = models.denoiser.most_blocks_to_swap
            found.swaps += [models.denoiser.swapped_bytes(count, ring) for count in range(1, most + 1)]
        found.weights |= {name: weights_of(part) for name, part in beside.items()}
        groups = trainer.trainable.param_groups()
        of_models = {id(p) for part in (*models.of_step, *models.text_encoders) if part for p in part.parameters()}
        parameters = [p for group in groups for p in group["params"]]
        found.trained = bytes_of(p for p in parameters if id(p) not in of_models)
        found.num_trained = sum(p.numel() for p in parameters)

        step = trainer.new_step(runtime, models, self.strategies, trained, HookList([]))
        run, updater = self._stand_in(groups, step, models, found), trainer.trainable.updater()
        updater.begin(run)
        before = tracker.reset()
        output = step(batch)
        found.forward = tracker.peak - before
        tracker.reset()
        updater.backward(run, output.loss)
        found.backward = tracker.peak - before
        del output
        found.away = tracker.away.most
        found.gradients = bytes_of(p.grad for p in parameters if p.grad is not None)
        if self.config[LoopOptions].gradient_accumulation_steps > 1:  # those of the micro-batches before are there
            found.forward += found.gradients
            found.backward = max(found.backward, found.forward)
        with tracker.measured() as taken:
            updater.update(run)
        found.optimizer = states_of(run.optimizer)
        if updater.gathers_gradients:
            found.update = max(0, taken.peak - found.optimizer)
        else:  # states are made, and gradients are gone, while the backward pass runs
            found.backward = max(0, found.backward - found.optimizer)
        updater.end(run)

    def _stand_in(
        self, groups: Iterable[ParamGroup], step: object, models: Models, found: Sizes
    ) -> SimpleNamespace:
        """What updaters read of a Run."""
        options = self.config[OptimizerOptions]
        built = optimizers.build(options, groups)
        found.is_paged = bool(getattr(built.optimizer, "is_paged", False))
        prepare_for_meta(built.optimizer, self.kind)
        schedule = SimpleNamespace(step=lambda: None)
        return SimpleNamespace(
            config=self.config, runtime=self.runtime, optimizer=built.optimizer, lr_scheduler=schedule, step=step,
            models=models, hooks=SimpleNamespace(on_gradients_ready=lambda run: None),
            progress=SimpleNamespace(global_step=0), max_grad_norm=options.max_grad_norm,
        )


def prepare_for_meta(optimizer: torch.optim.Optimizer, kind: str) -> None:
    """Let an optimizer step where there are no values: as it does on a device of `kind`, all tensors of a group at
    once, or by making its states alone where its kernels are for GPUs only."""
    if "foreach" in optimizer.defaults and optimizer.defaults["foreach"] is None and kind == "cuda":
        for group in optimizer.param_groups:
            group["foreach"] = not group.get("fused")
    if hasattr(optimizer, "init_state"):  # of bitsandbytes

        def step(closure: object = None) -> None:
            for g, group in enumerate(optimizer.param_groups):
                for p, parameter in enumerate(group["params"]):
                    if parameter.grad is not None:
                        optimizer.init_state(group, parameter, g, p)

        optimizer.is_paged = False
        optimizer.step = step


def states_of(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of what an optimizer keeps."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return bytes_of(value for value in values if isinstance(value, torch.Tensor))


def weights_of(module: torch.nn.Module) -> int:
    return bytes_of([*module.parameters(), *module.buffers()])


def _bytes_per_sample(parts: Iterable[object], count: int) -> int:
    total = 0
    for part in parts:
        values = part.values() if isinstance(part, Mapping) else [part]
        for value in values:
            for tensor in value if isinstance(value, list) else [value]:
                total += 0 if tensor is None else tensor.numel() * tensor.element_size()
    return total // max(1, count)

