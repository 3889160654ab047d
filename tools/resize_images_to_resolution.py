"""Make copies of images with at most as many pixels as a resolution has.

    python tools/resize_images_to_resolution.py images smaller --max_resolution 512x512,256x256
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def setup_parser():
    from tools.image_tools import resize

    return resize.TOOL.parser()


def main(argv=None) -> int:
    from tools.image_tools import resize

    return resize.main(argv)


if __name__ == "__main__":
    sys.exit(main())
