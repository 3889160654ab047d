"""Make videos with Wan 2.1 and 2.2, with and without LoRAs."""

from library.generation import wan_inference


def setup_parser():
    return wan_inference.build_parser()


if __name__ == "__main__":
    wan_inference.main()
