"""Adapters of the image scripts in models: merged for good, hooked, or added to the weights for a picture; their
strengths."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from library.core.errors import CheckpointError, ConfigError, foreign_errors
from library.generation.adapter_files import AdapterChoice, AdapterFile

if TYPE_CHECKING:
    from torch import nn

    from library.lora_utils import MergeOnLoad

logger = logging.getLogger(__name__)


def _told(adapter: AdapterFile) -> AbstractContextManager[None]:
    """Inside, whatever another package's module raises is one message with its name, its arguments and the reason."""
    if adapter.module.startswith("networks."):
        return nullcontext()
    pairs = " ".join(f"{key}={value}" for key, value in adapter.arguments.items())
    told = f" with {pairs}" if pairs else ""
    return foreign_errors(
        ConfigError, f"{adapter.path}: the network module {adapter.module} makes no network of it{told}"
    )


def network_of(adapter: AdapterFile, text_encoders: Sequence[nn.Module | None], denoiser: nn.Module) -> tuple[Any, Any]:
    """(network for a file, not loaded yet; the file's tensors). CheckpointError when it has no layer of these
    models."""
    import importlib

    with _told(adapter):
        network, tensors = importlib.import_module(adapter.module).create_network_from_weights(
            adapter.multiplier, adapter.path, None, _as_argument(text_encoders), denoiser, for_inference=True,
            **adapter.arguments
        )
    if not [*network.unet_loras, *network.text_encoder_loras]:
        raise CheckpointError(f"{adapter.path} has no layer of this model; is it an adapter for another one?")
    _tell_what_is_left(adapter, network, tensors)
    return network, tensors


def _tell_what_is_left(adapter: AdapterFile, network: Any, tensors: Any) -> None:
    """Another package's module passes layers by that it does not find, ours tells of them itself."""
    from networks.files.network_files import by_module

    if adapter.module.startswith("networks.") or not isinstance(tensors, Mapping):
        return
    held, made = len(by_module(tensors)), len(network.unet_loras) + len(network.text_encoder_loras)
    if made < held:
        logger.warning(
            "%s: %s finds %d of its %d layers, the others change nothing; where their names are those of another"
            " program, tools/convert_lora.py --to kohya gives them the ones that it knows",
            adapter.path, adapter.module, made, held,
        )  # fmt: skip


def hook(network: Any, adapter: AdapterFile, text_encoders: Sequence[nn.Module | None], denoiser: nn.Module) -> None:
    """Put a network into the layers and load its file."""
    with _told(adapter):
        network.apply_to(_as_argument(text_encoders), denoiser, True, True)
        network.load_weights(adapter.path)
        network.set_multiplier(adapter.multiplier)
    network.eval().requires_grad_(False)
    logger.info("hooked %s with multiplier %s", adapter.path, adapter.multiplier)


def merging(family: str, adapters: Sequence[AdapterFile]) -> MergeOnLoad:
    """What loaders are given as `transform`, so that these files are part of the weights: rounded once to the type that
    the weights get. Call `finish` on it when the models are there."""
    from library.lora_utils import MergeOnLoad, read_adapter
    from networks.kinds.targets import targets_of_family

    targets = targets_of_family(family)
    read = [
        read_adapter(adapter.path, targets, adapter.multiplier, adapter.layer_filter.accepts) for adapter in adapters
    ]
    return MergeOnLoad(targets, read)


def load_with_adapters(
    family: str, choice: AdapterChoice, load: Callable[[MergeOnLoad | None], tuple[nn.Module, list[nn.Module]]]
) -> tuple[nn.Module, list[nn.Module], LoadedAdapters]:
    """(denoiser, text encoders, adapters). `load` reads the models, with what is done to their tensors on the way:
    adapters that are merged become part of them, the others are hooked into the finished models."""
    merge = merging(family, choice.files) if choice.files and choice.merged else None
    denoiser, text_encoders = load(merge)
    if merge:
        merge.finish()
    adapters = LoadedAdapters(denoiser, text_encoders)
    for adapter in [] if merge else choice.files:
        adapters.add(adapter)
    return denoiser, text_encoders, adapters


@dataclass
class LoadedAdapters:
    """Adapters of a set of models, in their order. The first `merged` ones are part of the weights; the others can
    change their strength from picture to picture: they are hooked or, with `pre_calc`, added to the weights for a
    picture and taken out again."""

    denoiser: nn.Module
    text_encoders: Sequence[nn.Module | None]
    pre_calc: bool = False
    networks: list[Any] = field(default_factory=list)
    multipliers: tuple[float, ...] = ()
    """of those that can change, as loaded"""
    merged: int = 0

    @property
    def changing(self) -> list[Any]:
        """Those whose strength can change."""
        return self.networks[self.merged :]

    def add(self, adapter: AdapterFile) -> None:
        """Load a file. CheckpointError when it has no layer of these models; ConfigError when its module cannot be used
        as asked."""
        network, _ = network_of(adapter, self.text_encoders, self.denoiser)
        self._filter(network, adapter)
        if not self.pre_calc:
            hook(network, adapter, self.text_encoders, self.denoiser)
        elif hasattr(network, "backup_weights"):
            network.load_weights(adapter.path)
            network.eval()
        else:
            raise ConfigError(
                f"--network_pre_calc: {adapter.module} cannot take a network out of the weights again; leave the "
                "option out"
            )
        network.to(self.denoiser.device)
        self.networks.append(network)
        self.multipliers = (*self.multipliers, adapter.multiplier)

    def merge(self, adapter: AdapterFile) -> None:
        """Add a file to the weights for good; before any other is loaded."""
        network, tensors = network_of(adapter, self.text_encoders, self.denoiser)
        network.merge_to(
            _as_argument(self.text_encoders), self.denoiser, tensors, self.denoiser.dtype, self.denoiser.device
        )
        self.networks.append(network)
        self.merged += 1

    def set_multipliers(self, multipliers: Sequence[float] | None) -> None:
        """Strengths of those that can change, in the order of the files; those that are not given are as loaded."""
        wanted = self.multipliers if multipliers is None else multipliers
        for network, multiplier in zip(self.changing, (*wanted, *self.multipliers[len(wanted) :])):
            network.set_multiplier(multiplier)

    @contextmanager
    def at(self, multipliers: Sequence[float]) -> Iterator[None]:
        """The strengths of a batch, one for each network; those that are merged stay as they are."""
        self.set_multipliers(multipliers[self.merged :])
        if not self.pre_calc:
            yield
            return
        try:
            for network in self.changing:
                network.backup_weights()
                network.merge_to(None, None)
            yield
        finally:
            for network in reversed(self.changing):  # networks on one layer: the first one holds the layer's own weight
                network.restore_weights()

    @contextmanager
    def only(self, place: int | None) -> Iterator[None]:
        """Hooked networks other than number `place` switched off (None: all work). ConfigError for one that has no
        switch."""
        for network in self.changing:
            if not hasattr(network, "set_enabled"):
                raise ConfigError(
                    f"regions of --mask_path need networks that can be switched off; {type(network).__name__} cannot"
                )
        try:
            for number, network in enumerate(self.changing, start=self.merged):
                network.set_enabled(place is None or number == place)
            yield
        finally:
            for network in self.changing:
                network.set_enabled(True)

    def follow_models(self) -> None:
        """Put every adapter where its layer is; call it after models have moved."""
        for network in self.networks:
            for module in (*network.unet_loras, *network.text_encoder_loras):
                module.to(next(_layer_of(module).parameters(recurse=False)).device)

    def _filter(self, network: Any, adapter: AdapterFile) -> None:
        """Take the layers out that the patterns leave out. ConfigError when nothing is left."""
        wanted = adapter.layer_filter
        if not (wanted.include or wanted.exclude):
            return
        models = [self.denoiser, *(encoder for encoder in self.text_encoders if encoder is not None)]
        paths = {id(module): name for model in models for name, module in model.named_modules()}

        def kept(modules: Sequence[Any]) -> list[Any]:
            return [m for m in modules if wanted.accepts([m.lora_name, paths.get(id(_layer_of(m)), "")])]

        total = len(network.unet_loras) + len(network.text_encoder_loras)
        network.unet_loras, network.text_encoder_loras = kept(network.unet_loras), kept(network.text_encoder_loras)
        left = len(network.unet_loras) + len(network.text_encoder_loras)
        if not left:
            raise ConfigError(
                f"--include_patterns and --exclude_patterns leave none of the {total} layers of {adapter.path}"
            )
        logger.info("%s: %d of %d layers are used", adapter.path, left, total)


def _layer_of(module: Any) -> nn.Module:
    """The layer that an adapter module belongs to; foreign ones keep it in a list."""
    layer = module.org_module
    return layer[0] if isinstance(layer, (list, tuple)) else layer


def _as_argument(text_encoders: Sequence[nn.Module | None]) -> Any:
    """One text encoder goes without a list: foreign network modules number the names of listed ones."""
    return text_encoders[0] if len(text_encoders) == 1 else list(text_encoders)
