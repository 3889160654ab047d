"""Write the frames of videos as PNG files.

    python tools/video_to_png.py --input clip.mp4 --output frames --num_frames 10
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def setup_parser():
    from tools.frame_tools import to_png

    return to_png.TOOL.parser()


def main(argv=None) -> int:
    from tools.frame_tools import to_png

    return to_png.main(argv)


if __name__ == "__main__":
    sys.exit(main())
