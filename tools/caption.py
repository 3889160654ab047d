"""Everything about captions and tags in one place.

    python tools/caption.py tag images --model_dir tagger
    python tools/caption.py clean meta.json clean.json
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PARTS = {
    "tag": ("tagger", "tags beside images, by an ONNX model"),
    "blip": ("blip", "captions beside images, by BLIP"),
    "git": ("git", "captions beside images, by GIT"),
    "merge": ("metadata", "captions, or with --tags tags, beside images into a metadata file"),
    "clean": ("clean", "tags and captions of a metadata file made clean"),
    "buckets": ("buckets", "training sizes and latents of the images of a metadata file"),
}
"""word on the command line -> module of tools/caption_tools, what it does"""


def setup_parser():
    lines = [f"  {name:8} {text}" for name, (_, text) in PARTS.items()]
    parser = argparse.ArgumentParser(
        description="Write, gather and clean captions and tags.", formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s PART [options]",
        epilog="\n".join(["parts:", *lines, "", "options of a part: PART --help"]),
    )  # fmt: skip
    parser.add_argument("part", choices=tuple(PARTS), metavar="PART", help="one of the parts below")
    return parser


def main(argv=None) -> int:
    from importlib import import_module

    words = list(sys.argv[1:] if argv is None else argv)
    part = setup_parser().parse_args(words[:1]).part
    return import_module(f"tools.caption_tools.{PARTS[part][0]}").main(words[1:])


if __name__ == "__main__":
    sys.exit(main())
