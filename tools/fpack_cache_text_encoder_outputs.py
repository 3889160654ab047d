"""Fill the text encoder cache of a data set for FramePack: the text encoders' outputs of every caption,
in files of the known format.

Another name of `tools/cache_text_encoder_outputs.py --family framepack`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.training import cache_tools  # noqa: E402

FAMILY = "framepack"


def setup_parser():
    return cache_tools.build_parser("text", FAMILY)


if __name__ == "__main__":
    cache_tools.main("text", family=FAMILY)
