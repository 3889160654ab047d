"""What the project must know of a family of models, in strings and numbers: importing a record imports nothing else.

`library/families/<name>.py` holds the record of each family; `registry.py` finds them, and those of other packages.
Whatever is a class or a function stands here as "package.module:attribute" and is imported when it is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from library.families.latent_colours import Colours
from library.families.latents import LatentSpec


@dataclass(frozen=True, kw_only=True)
class CacheNames:
    """Endings of cache files. `text`: None where captions are encoded in the step; `legacy_keys`: latents of old caches
    carry no size in their keys."""

    latents: str
    text: str | None = None
    legacy_keys: bool = False


@dataclass(frozen=True, kw_only=True)
class ClipFacts:
    """What the data side knows of a family beside pictures with captions: clips, and control pictures by file name.

    `short` stands in names of cache files and holds no "_"; `long` is what their header says of the architecture.
    """

    short: str
    long: str
    fps: float | None = None
    """frames per second that the family was trained on; None where it learns from no videos"""
    controls: int | None = 1
    """control pictures of a picture, where a dataset has some; None: any number"""
    one_frame: bool = False
    """whether single frames may be trained with others as reference, which then say how many control pictures a
    picture has (fp_1f_clean_indices)"""
    sections: bool = False
    """whether a clip is learned in sections of so many latent frames (fp_latent_window_size)"""
    layers: bool = False
    """whether a picture is learned with its layers (multiple_target)"""


@dataclass(frozen=True, kw_only=True)
class DataArchitecture:
    """What the data side knows of a family. `bucket_step`: what sizes must be a multiple of."""

    name: str
    latents: LatentSpec
    bucket_step: int
    latents_suffix: str
    text_suffix: str | None
    legacy_keys: bool = False
    clips: ClipFacts | None = None


@dataclass(frozen=True)
class TextKey:
    """One named tensor of a family's conditioning, as a cache stores it for one caption.

    `rank`: its dimensions without the batch; `dtype`: float (bfloat16 becomes float32, float16 stays), or the one it
    always has. `encoders`: places of the text encoders that make it, none for what comes from the tokens alone.
    `is_sized`: the first dimension is the family's maximum token length. `constant`: a number that files of known
    trainers carry and nothing reads; no encoder gives it. `mask`: the key, this one itself perhaps, whose last 1 ends
    what is stored; what follows is padding, which hangs on the captions that it was encoded with. `varlen`: batches
    have a list of such tensors, one for each caption and each of its own length, and encoders give such a list.
    """

    name: str
    rank: int = 2
    dtype: str = "float"
    encoders: tuple[int, ...] = ()
    is_sized: bool = False
    constant: float | None = None
    mask: str = ""
    varlen: bool = False


@dataclass(frozen=True)
class SampleDefaults:
    """What a family uses where a sample prompt says nothing. Sides are rounded down to a multiple of `size_step`.

    `reads` names settings without a default that the family looks at, beside size, seed and negative prompt.
    """

    size: int
    size_step: int
    settings: Mapping[str, Any]
    reads: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Signature:
    """How a model file is recognised by the names and shapes of its tensors. Everything that is given must hold: names
    that are there, parts that occur in some name, (name, dimension, sizes) and (name, number of dimensions).

    `title` is what a reader is told; `detail` names a function KeyTable -> what the shapes say beside it. Of signatures
    of one role that hold, that of the highest `priority` counts: a narrower test has a higher one.
    """

    title: str
    has: tuple[str, ...] = ()
    contains: tuple[str, ...] = ()
    sizes: tuple[tuple[str, int, tuple[int, ...]], ...] = ()
    ranks: tuple[tuple[str, int], ...] = ()
    detail: str = ""
    layout: str = "original"
    priority: int = 0


@dataclass(frozen=True, kw_only=True)
class ModelKind:
    """One kind of model file, by the name that slots ask for.

    `role`: denoiser (the family's scripts take it), relative (stands where a denoiser could, and is none of the
    family's), vae, text_encoder or other. `wanted`: what a slot needs, in words; `subfolder`: its place in a pipeline
    folder of diffusers; `base_version` and `modelspec`: ss_base_model_version and modelspec.architecture of adapters
    that are made without training, `metadata` what else they say. `layouts`: the DenoiserLayouts by which files of a
    kind that is no denoiser are rewritten, each for itself. `script`: which of the family's `scripts` trains a
    relative.
    """

    name: str
    role: str = "denoiser"
    signatures: tuple[Signature, ...] = ()
    wanted: str = ""
    subfolder: str = ""
    base_version: str = ""
    modelspec: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    layouts: str = ""
    script: str = ""


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """How adapter files of a family are told from others, and which layouts they have.

    `title`: whom they are for, in words. `parts` of keys tell the family where no other of a higher `priority` has its
    own; before those count `text_widths`, the widths of text that the cross-attention of a U-Net reads, and `pattern`,
    a regular expression for keys that no other family has. `base_versions` and `modelspec` are beginnings of
    ss_base_model_version and modelspec.architecture.
    """

    title: str
    parts: tuple[str, ...] = ()
    priority: int = 0
    pattern: str = ""
    text_widths: tuple[int, ...] = ()
    shared_parts: tuple[str, ...] = ()
    """parts of keys that another family has too: they tell it with one of these `widths` as inputs of a layer"""
    widths: tuple[int, ...] = ()
    released_widths: tuple[int, ...] = ()
    """inputs of layers in released models: where `parts` tell the family, one of them leaves no doubt, and without one
    a file may be for any family that calls its layers so (`shared_parts`)"""
    aliases: tuple[str, ...] = ()
    """further names that --family takes"""
    base_versions: tuple[str, ...] = ()
    modelspec: tuple[str, ...] = ()
    ai_toolkit: str = "kohya"
    """names that AI-Toolkit writes: kohya, diffusers or dotted"""
    has_xlabs: bool = False
    """whether XLabs has a layout for them"""


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """A set of random tiny files of the family. `build`: a function (folder, *, seed, dtype) -> TinySet; `options`
    train it beside those that name its files."""

    name: str
    title: str
    build: str
    network_module: str = "networks.lora"
    options: tuple[str, ...] = ()
    first_frame: bool = False
    """whether its samples begin with a picture"""


@dataclass(frozen=True, kw_only=True)
class EncoderFile:
    """A text encoder in a file of its own: the option that names it, and what messages call it."""

    option: str
    title: str


@dataclass(frozen=True, kw_only=True)
class OtherScript:
    """A script of a family that trains something else than an adapter. `options`: those that it has of the options of
    what is trained, where not every script has them all."""

    name: str
    """without .py"""
    options: frozenset[str] = frozenset()
    defaults: Mapping[str, object] = field(default_factory=dict)
    """options whose default differs here: name -> default"""
    foreign: Mapping[str, str] = field(default_factory=dict)
    """options of every script of the family, or of its kind, that the known one lacks: name -> reason"""
    text_switches: Mapping[int, str] = field(default_factory=dict)
    """text encoders, by their place, that learn only with an option of their own"""
    text_files: Mapping[int, str] = field(default_factory=dict)
    """text encoders, by their place, that get a file beside the model's when they learned -> what its name has more"""
    page_name: str = ""
    """of its documentation, where it is the script of another family too"""

    @property
    def page(self) -> str:
        """Documentation with the table of its options."""
        return f"docs/{self.page_name or self.name}.md"


@dataclass(frozen=True, kw_only=True)
class FamilyRecord:
    """One family. Without `family` nothing trains it: the record says how its files are recognised, cached and
    renamed."""

    name: str
    title: str
    prefix: str = ""
    """what the names of its scripts begin with"""
    page: str = ""
    """documentation of that script, with the table of its options"""
    scripts: Mapping[str, OtherScript] = field(default_factory=dict)
    """what else is trained, by the name of the trainable, and in which script"""
    place: int = 100
    """where it stands in lists; families of equal place stand by their names"""

    family: str = ""
    """class of library/training/wiring"""
    denoisers: tuple[str, ...] = ()
    """class names of the denoiser, by which a network module recognises the family"""
    targets: str = ""
    """the table of layers that adapters train, in a module that makes LoRAs for the family"""
    pipeline: str = ""
    """class of library/generation that makes pictures: the samples while training, and those of its image scripts"""
    pictures: str = ""
    """the script that makes images with it"""
    control_nets: str = ""
    """the ControlNets object (library/components/control_nets) that makes, reads and writes nets which guide its
    denoiser; "" = there are none"""
    image_script: str = ""
    """what that script does for it alone: an ImageScript, in library/generation"""
    tiny: tuple[TinyModel, ...] = ()

    latents: LatentSpec | None = None
    latent_colours: Colours = ()
    """how latents are shown without their autoencoder; () = there is no such table"""
    bucket_step: int = 16
    caches: CacheNames | None = None
    clips: ClipFacts | None = None
    """of a family that learns from videos or from control pictures by file name"""
    conditioning: tuple[TextKey, ...] = ()
    """in the order of the conditioning list"""
    text_flags: tuple[str, ...] = ()
    """options stored beside cached text outputs that must be equal to use the file"""
    weighted_texts: Mapping[str, int] = field(default_factory=dict)
    """keys of the conditioning whose states take weights of words, and the tokenizer of each by its place"""
    embedding_keys: tuple[str, ...] = ()
    """names of the vectors of each text encoder in files of textual inversions; none where no words can be added"""
    learning_encoders: tuple[int, ...] = ()
    """text encoders that can learn while the outputs of the others are cached"""
    foreign_text: str = ""
    """how the numbers in cache files of known trainers differ from ours"""
    samples: SampleDefaults | None = None

    model_kinds: tuple[ModelKind, ...] = ()
    autoencoders: Mapping[str, str] = field(default_factory=dict)
    """kind of autoencoder, by its shapes -> the name of the family's own, where others have another one of these
    shapes; only a file with the denoiser in it tells them apart"""
    wanted_denoiser: str = ""
    """what a slot needs that takes every kind of the family's denoisers, in fewer words than one by one"""
    layouts: str = ""
    """the DenoiserLayouts (library/checkpoints/layout_rules) of its denoiser, by which model files are rewritten"""
    encoder_files: tuple[EncoderFile, ...] = ()
    """text encoders that tools for files take beside the denoiser"""
    adapters: AdapterFacts | None = None
    adapters_of: str = ""
    """the family whose adapters these are too"""
    variant_of: tuple[str, str, str] | None = None
    """(family, option, value): the option of that family's scripts that chooses this record; both families have the
    option"""

    @property
    def network_module(self) -> str:
        """The network module of its LoRAs."""
        return self.targets.partition(":")[0]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the model files that its scripts take as denoiser."""
        return tuple(kind.name for kind in self.model_kinds if kind.role == "denoiser")

    @property
    def architecture(self) -> DataArchitecture:
        """What the data side knows of it; only for families with latents and caches."""
        assert self.latents is not None and self.caches is not None, f"{self.name} has no latents"
        return DataArchitecture(
            name=self.name, latents=self.latents, bucket_step=self.bucket_step, latents_suffix=self.caches.latents,
            text_suffix=self.caches.text, legacy_keys=self.caches.legacy_keys, clips=self.clips,
        )
