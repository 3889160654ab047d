"""Show what a made picture, video or file of latents tells of how it was made.

    python tools/metaview.py images/20250102_030405_7_00.png
    python tools/metaview.py videos/*.mkv --json
    python tools/metaview.py images/20250102_030405_7_00.webp --command
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def setup_parser():
    from tools.frame_tools import metaview

    return metaview.build_parser()


def main(argv=None) -> int:
    from tools.frame_tools import metaview

    return metaview.main(argv)


if __name__ == "__main__":
    sys.exit(main())
