"""Tags for images by an ONNX model: the tool's options, its run, its output."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from library.core.errors import AtelierError, CheckpointError, ConfigError
from library.core.options import Config, equivalent_option, option
from library.scripts.folder_tool import (
    DetailOptions,
    FolderTool,
    Tally,
    WriteOptions,
    batches,
    folder_problem,
    images_of,
    logger,
    read_ahead,
    read_text_file,
)
from library.scripts.tool_script import tool_exit_code
from library.training.option_groups import ConsoleOptions
from tools.caption_tools.captioning import caption_path, ending_problem
from tools.caption_tools.metadata import read_metadata, write_metadata
from tools.caption_tools.tag_models import (
    FILES,
    OnnxNetwork,
    OpenNetwork,
    Tag,
    download,
    layout_of,
    model_folder,
    package_problem,
    pixels_for,
    probabilities,
    read_tags,
)  # fmt: skip
from tools.caption_tools.tag_rules import TagRules, read_replacements, split_list

CATEGORIES = ("general", "character", "meta", "model", "copyright", "artist")


@dataclass(frozen=True, kw_only=True)
class TagModelOptions:
    """Images and model"""

    train_data_dir: str | None = option(None, help="folder of the images")
    recursive: bool = option(False, help="images in folders within the folder too")
    model_dir: str = option(
        "wd14_tagger_model", help="folder of the model's files, or of folders named after --repo_id"
    )
    repo_id: str = option(
        "SmilingWolf/wd-v1-4-convnext-tagger-v2", help="model of the hub, fetched into --model_dir when it is not there"
    )
    force_download: bool = option(False, help="fetch the model again")
    onnx: bool = equivalent_option(False, help="deprecated", reason="--onnx: models always run in onnxruntime")
    batch_size: int = option(
        1, help="images that go through the model at a time; that of the model's file where it has one"
    )
    max_data_loader_n_workers: int | None = option(None, help="images that are read at a time")


@dataclass(frozen=True, kw_only=True)
class ThresholdOptions:
    """Least probabilities"""

    thresh: float = option(0.35, help="of tags whose kind has none of its own")
    general_threshold: float | None = option(None, help="of general tags")
    character_threshold: float | None = option(None, help="of characters")
    meta_threshold: float | None = option(None, help="of tags about the file")
    model_threshold: float | None = option(None, help="of tags about the model that made the image")
    copyright_threshold: float | None = option(None, help="of the works that characters come from")
    artist_threshold: float | None = option(None, help="of artists")


@dataclass(frozen=True, kw_only=True)
class TagTextOptions:
    """Which tags, and how"""

    remove_underscore: bool = option(False, help="spaces for underscores in tags of more than three characters")
    undesired_tags: str = option("", help="tags that are left out, with the separator between")
    tag_replacement: str | None = option(
        None, help=r"old,new;old,new: tags that are written otherwise; \, and \; for the signs themselves"
    )
    character_tag_expand: bool = option(False, help="name_(work) as two tags, name and work")
    character_tags_first: bool = option(False, help="characters before other tags")
    always_first_tags: str | None = option(None, help="tags that come first, in this order, where an image has them")
    use_rating_tags: bool = option(False, help="the likeliest rating, first")
    use_rating_tags_as_last_tag: bool = option(False, help="the likeliest rating, last")
    use_quality_tags: bool = option(False, help="the likeliest quality, first (models with a tag_mapping.json)")
    use_quality_tags_as_last_tag: bool = option(False, help="the likeliest quality, last")
    caption_separator: str = option(", ", help="what stands between tags")


@dataclass(frozen=True, kw_only=True)
class TagOutputOptions:
    """Where tags go"""

    caption_extension: str = option(".txt", flags=("--caption_extention",), help="ending of the files beside images")
    output_path: str | None = option(None, help="one file for all images instead, .json or .jsonl")
    append_tags: bool = option(False, help="keep the tags that a file has and add new ones behind them")
    frequency_tags: bool = option(False, help="show how many images have each tag")


CLASSES = (
    TagModelOptions,
    ThresholdOptions,
    TagTextOptions,
    TagOutputOptions,
    DetailOptions,
    WriteOptions,
    ConsoleOptions,
)
TOOL = FolderTool("Write tags beside images by an ONNX model", CLASSES, ("train_data_dir",))


def main(argv: Sequence[str] | None = None) -> int:
    return tool_exit_code(run, argv)


# -- checks ------------------------------------------------------------------------------------------------------------


def problems_of(config: Config) -> Iterator[str]:
    model, output = config[TagModelOptions], config[TagOutputOptions]
    found = folder_problem("train_data_dir", model.train_data_dir)
    if found:
        yield found
    if model.batch_size < 1:
        yield f"--batch_size is {model.batch_size}; needed: 1 or more"
    for name in ("thresh", *(f"{category}_threshold" for category in CATEGORIES)):
        value = getattr(config[ThresholdOptions], name)
        if value is not None and not 0 <= value <= 1:
            yield f"--{name} is {value}; needed: 0 to 1"
    try:
        read_replacements(config[TagTextOptions].tag_replacement)
    except ConfigError as error:
        yield str(error)
    for kind in ("rating", "quality"):
        if all(getattr(config[TagTextOptions], f"use_{kind}_tags{end}") for end in ("", "_as_last_tag")):
            yield f"--use_{kind}_tags and --use_{kind}_tags_as_last_tag are both given; leave one out"
    if not config[TagTextOptions].caption_separator:
        yield "--caption_separator is empty; needed: what stands between tags, e.g. a comma"
    found = ending_problem(output.caption_extension)
    if found:
        yield found
    if output.output_path:
        yield from _output_problems(output, config[WriteOptions].overwrite)
    yield from _model_problems(config)


def _output_problems(output: TagOutputOptions, overwrite: bool) -> Iterator[str]:
    if not output.output_path.lower().endswith((".json", ".jsonl")):
        yield f"--output_path is {output.output_path}; needed: a name that ends in .json or .jsonl"
    elif os.path.exists(output.output_path) and not overwrite and not output.append_tags:
        yield f"--output_path is {output.output_path}, which exists; give another name, --append_tags, or --overwrite"


def _model_problems(config: Config) -> Iterator[str]:
    """A model in the folder is known before it is loaded; one that is to be fetched is judged by its name."""
    options, texts = config[TagModelOptions], config[TagTextOptions]
    layout = layout_of(model_folder(options.model_dir, options.repo_id)) if not options.force_download else None
    has_mapping = layout == "mapping" if layout else options.repo_id.count("/") > 1
    if (texts.use_quality_tags or texts.use_quality_tags_as_last_tag) and not has_mapping:
        yield "--use_quality_tags: this model has no tags for quality; needed: a model with a tag_mapping.json"
    if layout is None and options.repo_id.count("/") < 1:
        yield f"--repo_id is {options.repo_id}; needed: namespace/name of a model of the hub"


# -- run ---------------------------------------------------------------------------------------------------------------


def run(argv: Sequence[str] | None = None, open_network: OpenNetwork | None = None) -> None:
    """`open_network` stands in for onnxruntime."""
    config = TOOL.read(
        argv, lambda config: [*problems_of(config), *filter(None, [open_network is None and package_problem()])]
    )
    options, tally = config[TagModelOptions], Tally()
    output = Output(config)
    images = [path for path in images_of(options.train_data_dir, options.recursive) if output.wants(path, tally)]
    if images:
        tag_images(images, config, tally, output, open_network or OnnxNetwork)
        output.finish(tally)
    if config[TagOutputOptions].frequency_tags:
        for tag, count in output.counts.most_common():
            print(f"{tag}: {count}")
    tally.finish("tagged images")


def rules_of(config: Config, layout: str) -> TagRules:
    thresholds, texts = config[ThresholdOptions], config[TagTextOptions]
    own = {category: getattr(thresholds, f"{category}_threshold") for category in CATEGORIES}

    def place(kind: str) -> str | None:
        return (
            "first"
            if getattr(texts, f"use_{kind}_tags")
            else "last"
            if getattr(texts, f"use_{kind}_tags_as_last_tag")
            else None
        )

    return TagRules(
        thresholds={category: thresholds.thresh if value is None else value for category, value in own.items()},
        by_probability=layout == "mapping", remove_underscore=texts.remove_underscore,
        character_tag_expand=texts.character_tag_expand,
        character_tags_first=texts.character_tags_first, replacements=read_replacements(texts.tag_replacement),
        undesired=frozenset(split_list(texts.undesired_tags, texts.caption_separator)), rating=place("rating"),
        quality=place("quality"),
        always_first=tuple(split_list(texts.always_first_tags, texts.caption_separator)),
    )  # fmt: skip


def tag_images(images: Sequence[str], config: Config, tally: Tally, output: Output, open_network: OpenNetwork) -> None:
    import numpy as np

    from library.dataset.image_files import read_on_white

    options = config[TagModelOptions]
    folder = model_folder(options.model_dir, options.repo_id)
    if options.force_download or layout_of(folder) is None:
        folder = os.path.join(options.model_dir, options.repo_id.replace("/", "_"))
        download(options.repo_id, folder)
    layout = layout_of(folder)
    tags, network, rules = (
        read_tags(folder),
        open_network(os.path.join(folder, FILES[layout][0])),
        rules_of(config, layout),
    )
    size = network.batch_size or options.batch_size
    if len(rules.always_first) > 1:
        logger.info("--always_first_tags come in the order given: %s", ", ".join(rules.always_first))
    if size != options.batch_size:
        logger.info("--batch_size is %d; the model takes %d images at a time", options.batch_size, size)

    def read(path: str) -> tuple[tuple[int, int], Any]:
        image = read_on_white(path)
        return (image.shape[1], image.shape[0]), pixels_for(image, layout)

    pixels = read_ahead(read, images, tally, what="tagging", workers=options.max_data_loader_n_workers)
    for batch in batches(pixels, size):
        stacked = np.stack([image for _, (_, image) in batch])
        padding = np.repeat(stacked[-1:], size - len(batch), axis=0) if network.batch_size else stacked[:0]
        values = probabilities(network(np.concatenate((stacked, padding))), layout)[: len(batch)]
        check_outputs(values, tags, folder)
        for (path, (size_wh, _)), one in zip(batch, values):
            output.add(path, size_wh, rules.tags_of(tags, one), tally)


def check_outputs(values: Any, tags: Sequence[Tag], folder: str) -> None:
    if values.shape[1] != len(tags):
        raise CheckpointError(
            f"the model in {folder} gives {values.shape[1]} numbers for {len(tags)} tags; its files belong to two "
            "models"
        )


# -- output ------------------------------------------------------------------------------------------------------------


@dataclass
class Output:
    """Files beside images, or one file for all of them, which is written in the end."""

    config: Config
    counts: Counter = field(default_factory=Counter)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        options = self.config[TagOutputOptions]
        if options.output_path and options.append_tags and os.path.exists(options.output_path):
            self.entries = read_metadata(options.output_path)

    @property
    def separator(self) -> str:
        return self.config[TagTextOptions].caption_separator

    @property
    def part(self) -> str:
        """Under which name tags stand in the file for all images."""
        return "caption" if self.config[TagOutputOptions].output_path.lower().endswith(".jsonl") else "tags"

    def wants(self, path: str, tally: Tally) -> bool:
        options = self.config[TagOutputOptions]
        if options.output_path:
            return True
        target = caption_path(path, options.caption_extension)
        if target in self.seen:
            tally.skip("sharing its name, and so its tags, with another image")
            return False
        self.seen.add(target)
        if os.path.exists(target) and not (options.append_tags or self.config[WriteOptions].overwrite):
            tally.skip(
                f"whose {options.caption_extension} file exists; --overwrite makes it anew, --append_tags adds to it"
            )
            return False
        return True

    def add(self, path: str, size_wh: tuple[int, int], tags: list[str], tally: Tally) -> None:
        from library.core.atomic_file import write_text_atomically

        options = self.config[TagOutputOptions]
        try:
            before = self.before(path) if options.append_tags else []
        except AtelierError as error:
            tally.fail(error)
            return
        tags = before + [tag for tag in tags if tag not in before]
        if options.output_path:
            key = os.path.abspath(path)
            self.entries[key] = {
                **self.entries.get(key, {}),
                self.part: self.separator.join(tags),
                "image_size": list(size_wh),
            }
        else:
            write_text_atomically(caption_path(path, options.caption_extension), self.separator.join(tags) + "\n")
        self.counts.update(tags)
        tally.done += 1
        if self.config[DetailOptions].debug:
            logger.info("%s: %s", path, self.separator.join(tags))

    def before(self, path: str) -> list[str]:
        """The tags that an image has already."""
        options = self.config[TagOutputOptions]
        if options.output_path:
            return split_list(self.entries.get(os.path.abspath(path), {}).get(self.part), self.separator)
        target = caption_path(path, options.caption_extension)
        return split_list(read_text_file(target), self.separator) if os.path.exists(target) else []

    def finish(self, tally: Tally) -> None:
        options = self.config[TagOutputOptions]
        if options.output_path and tally.done:
            entries = self.entries
            if self.part == "caption":
                entries = {
                    key: {name: value for name, value in entry.items() if name != "image_path"}
                    for key, entry in entries.items()
                }
            write_metadata(options.output_path, entries)
