"""Make images with Anima, with and without LoRAs."""

from library.generation import anima_inference


def setup_parser():
    return anima_inference.build_parser()


if __name__ == "__main__":
    anima_inference.main()
