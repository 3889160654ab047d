"""Train a whole Stable Diffusion 1 or 2 model by DreamBooth: folders of images with captions or a class."""

from library.training import cli


def setup_parser():
    return cli.build_parser(family="sd", trainable="dreambooth")


if __name__ == "__main__":
    cli.main(family="sd", trainable="dreambooth")
