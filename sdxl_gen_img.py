"""Make images with SDXL, with and without networks: gen_img.py with --sdxl."""

from library.generation.gen_img import script


def setup_parser():
    return script.build_parser(sdxl=True)


if __name__ == "__main__":
    script.main(sdxl=True)
