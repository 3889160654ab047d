"""Gather the tags beside images in a metadata file.

    python finetune/merge_dd_tags_to_metadata.py images meta.json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def setup_parser():
    from tools.caption_tools import metadata

    return metadata.TOOL.parser()


def main(argv=None) -> int:
    from tools.caption_tools import metadata

    return metadata.main(["--tags", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
