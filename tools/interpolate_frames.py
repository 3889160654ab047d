"""Put frames between those of videos.

    python tools/interpolate_frames.py --input clip.mp4 --factor 2 --codec h264
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def setup_parser():
    from tools.frame_tools import interpolate

    return interpolate.TOOL.folder_tool.parser()


def main(argv=None) -> int:
    from tools.frame_tools import interpolate

    return interpolate.main(argv)


if __name__ == "__main__":
    sys.exit(main())
