"""Draw the edges of an image, white on black, as control images need them.

    python tools/canny.py --input picture.png --output edges.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def setup_parser():
    from tools.image_tools import edges

    return edges.TOOL.parser()


def main(argv=None) -> int:
    from tools.image_tools import edges

    return edges.main(argv)


if __name__ == "__main__":
    sys.exit(main())
