"""Make images with Lumina-Image 2.0, with and without LoRAs."""

from library.generation import lumina_inference


def setup_parser():
    return lumina_inference.build_parser()


if __name__ == "__main__":
    lumina_inference.main()
