"""Clean the tags and captions of a metadata file.

    python finetune/clean_captions_and_tags.py meta.json clean.json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def setup_parser():
    from tools.caption_tools import clean

    return clean.TOOL.parser()


def main(argv=None) -> int:
    from tools.caption_tools import clean

    return clean.main(argv)


if __name__ == "__main__":
    sys.exit(main())
