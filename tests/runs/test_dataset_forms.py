"""Datasets with and without subsets, from folders and from lists: one run, the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.runs.conftest import Work, draw_pictures, largest_difference, read_parts
from tests.runs.families import refused_run

KEYS = "resolution = 64\nbatch_size = 2"
TEXT = "caption_extension = '.txt'"
FEW = ("--max_train_steps=2", "--network_train_unet_only")


def test_a_video_for_a_family_of_pictures_is_refused_at_the_start(work: Work, monkeypatch, capsys) -> None:
    path = work.folder / "videos.toml"
    path.write_text("[[datasets]]\nvideo_directory = 'v'\ntarget_frames = [5, 25]\nframe_extraction = 'tail'\n")
    message = refused_run("flux", work.argv("out", dataset=path), monkeypatch, capsys)
    assert "datasets[0].video_directory: flux learns pictures, not videos" in message
    assert "datasets[0].frame_extraction: is \"tail\"; one of head, chunk, slide, uniform, full is needed" in message
    assert "Wan" in message and "target_frames" not in message


def test_one_folder_in_three_forms(tmp_path: Path, tiny) -> None:
    """Without buckets all of them train the same samples; caches of a folder of their own leave the images alone."""
    work = Work(tmp_path, tiny, draw_pictures(tmp_path / "images", 3))
    pictures = sorted(work.images.glob("*.png"))
    rows = [{"image_path": str(path), "caption": path.with_suffix(".txt").read_text()} for path in pictures]
    listed = tmp_path / "images.jsonl"
    listed.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    caches = tmp_path / "caches"
    forms = {
        "subsets": f"[[datasets]]\n{KEYS}\n[[datasets.subsets]]\nimage_dir = '{work.images}'\n{TEXT}\n",
        "flat": f"[[datasets]]\n{KEYS}\nimage_directory = '{work.images}'\n{TEXT}\n",
        "list": f"[[datasets]]\n{KEYS}\nimage_jsonl_file = '{listed}'\ncache_directory = '{caches}'\n",
    }
    made = {}
    for name, text in forms.items():
        path = tmp_path / f"{name}.toml"
        path.write_text(text, encoding="utf-8")
        if name == "flat":
            shutil.copy(pictures[0], work.images / "bare.png")  # without a caption: left out there
        more = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"] if name == "list" else []
        made[name] = work.train(name, *FEW, *more, dataset=path)
    assert largest_difference(made["subsets"], made["flat"]) == largest_difference(made["subsets"], made["list"]) == 0
    assert len(list(caches.glob("*_flux.npz"))) == len(list(caches.glob("*_flux_te.npz"))) == 3
    assert not list(work.images.glob("*.npz"))
    metadata = read_parts(made["list"])[0]
    [dataset] = json.loads(metadata["ss_datasets"])
    assert dataset["subsets"][0]["image_jsonl_file"] == "images.jsonl"
    assert json.loads(metadata["ss_dataset_dirs"]) == {"images.jsonl": {"n_repeats": 1, "img_count": 3}}
