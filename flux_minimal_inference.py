"""Make images with FLUX.1, with and without LoRAs."""

from library.generation import flux_inference


def setup_parser():
    return flux_inference.build_parser()


if __name__ == "__main__":
    flux_inference.main()
