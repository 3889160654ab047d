"""The family's script, for tests that start processes."""

from library.families.registry import register_family
from library.training import cli
from tests.toy_video.record import FAMILY

register_family(FAMILY)

if __name__ == "__main__":
    cli.main("toy_video", "network")
