"""How much of the time of caching the encoder computes, and what the rest costs.

Pictures are read from JPEG files of half as many pixels again, scaled, encoded and written to cache files by the tool
that users call; the encoder is a tiny random model of the family, on one thread. `busy` is the share of the time
between the encoder's first and last call in which it runs: reading, scaling, checking and writing lie beside it. The
baseline is the same encoder on the same inputs in a loop that does nothing else. Tiny text encoders take less than
their tokenizers, so that their share says little of real ones.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.figures import Baseline, Figure, spread
from benchmarks.words import count, tiny_family

WANTED_BUSY = 0.9


@dataclass
class Watch:
    """When an encoder ran: seconds inside of it, and its inputs, to be given to it once more."""

    busy: float = 0.0
    first: float | None = None
    last: float = 0.0
    alone: float = 0.0
    """seconds of the same calls with nothing beside them"""
    calls: list[Callable[[], Any]] = field(default_factory=list)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            self.first = started if self.first is None else self.first
            try:
                return function(*args, **kwargs)
            finally:
                self.last = time.perf_counter()
                self.busy += self.last - started
                self.calls.append(lambda: function(*args, **kwargs))

        return watched

    @property
    def share(self) -> float:
        return self.busy / (self.last - (self.first or 0.0))


@contextlib.contextmanager
def watching(owner: type, name: str) -> Iterator[Watch]:
    """A method of the class that all encoding goes through, watched."""
    watch, original = Watch(), getattr(owner, name)
    setattr(owner, name, watch.around(original))
    try:
        yield watch
    finally:
        setattr(owner, name, original)


def write_photos(folder: Path, count: int, size: int) -> None:
    """Smooth colours with some noise, which JPEG packs like a photo."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    side = round(size * 1.5**0.5)
    for number in range(count):
        small = Image.fromarray(random.integers(0, 255, (12, 12, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), np.int16)
        noisy = (pixels + random.integers(-12, 12, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:04d}.jpg", quality=92)
        (folder / f"{number:04d}.txt").write_text(f"picture {number} of smooth colours, grey, wide", encoding="utf-8")


def cached(
    what: str, family: str, folder: Path, watch: Callable[[], contextlib.AbstractContextManager[Watch]]
) -> Watch:
    """Run the cache tool on a folder of pictures whose cache files are not there."""
    import torch

    from library.tiny_models import build_tiny
    from library.training import cache_tools

    for path in [*(folder / "images").glob("*.npz"), *(folder / "images").glob("*.safetensors")]:
        path.unlink()
    tiny = build_tiny(family, folder / "model")
    parser = cache_tools.build_parser(what, family)
    known = {word for action in parser._actions for word in action.option_strings}
    words = [word for word in tiny.arguments() if word.partition("=")[0] in known]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    words += [f"--family={family}", f"--dataset_config={folder / 'data.toml'}", "--console_log_level=WARNING"]
    try:
        with contextlib.redirect_stderr(io.StringIO()), watch() as watched:  # no progress bars between the figures
            cache_tools.run(what, words)
        with torch.no_grad():
            started = time.perf_counter()
            for call in watched.calls:
                call()
            watched.alone = time.perf_counter() - started
    finally:
        torch.set_num_threads(threads)
    return watched


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--families", nargs="+", type=tiny_family, default=["sdxl", "flux"], help="tiny models (default: sdxl flux)"
    )
    parser.add_argument("--count", type=count, default=32, help="pictures (default: 32)")
    parser.add_argument("--size", type=count, default=384, help="side of a picture in pixels (default: 384)")
    parser.add_argument("--rounds", type=count, default=3, help="times that all is cached anew (default: 3)")


def measure(options: argparse.Namespace) -> list[Figure]:
    from library.dataset.latent_cache import LatentCache
    from library.dataset.text_cache import TextCache
    from library.tiny_models.pictures import write_configuration

    count, size, rounds = (8, 64, 1) if options.quick else (options.count, options.size, options.rounds)
    figures = []
    for family in options.families:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write_photos(folder / "images", count, size)
            write_configuration(folder / "data.toml", folder / "images", size, batch_size=4)
            for what, owner, name in (("latents", LatentCache, "encode_as_made"), ("text", TextCache, "encode")):
                watches = [cached(what, family, folder, lambda: watching(owner, name)) for _ in range(rounds)]
                figures.append(
                    Figure(
                        "caching", f"{family}, {what}: encoder busy", "share", spread(w.share for w in watches),
                        wanted=WANTED_BUSY, at_least=True, notes={"pictures": count, "side": size},
                    )
                )
                figures.append(
                    Figure(
                        "caching", f"{family}, {what}", "s", spread(w.last - w.first for w in watches),
                        [Baseline("the encoder alone", spread(w.alone for w in watches))],
                    )
                )
    return figures
