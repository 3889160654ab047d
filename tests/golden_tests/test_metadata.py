"""Metadata and hashes of trained files."""

import json
import re

import pytest
import torch

from library.checkpoints.hashes import BackgroundHashes, adapter_hashes, calculate_sha256, model_hash
from library.core.registry import import_target
from library.families.registry import FAMILIES, record_of
from library.training.metadata import BaseModelHashes, MetadataInputs, at_save, build_metadata
from tests.golden_dir import behaviour, behaviour_cases

ANY = "ANY"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
COUNTS = (
    "seed", "num_train_images", "num_validation_images", "num_reg_images", "num_batches_per_epoch", "num_epochs",
    "max_train_steps",
)
WRITTEN_BY_THE_FILE = {"sshs_model_hash", "sshs_legacy_hash"}


def family_of(name):
    """The family of a recorded case: its name, or the name up to a version (sd1) or an underscore (flux_dev)."""
    return max((family for family in FAMILIES if re.fullmatch(rf"{family}\d?(_.*)?", name)), key=len, default=name)


def recipe_tensor(recipe):
    count = torch.Size(recipe["shape"]).numel()
    index = torch.arange(count, dtype=torch.int64)
    values = ((index * recipe["mul"]) % recipe["mod"] - recipe["mod"] // 2).double() / recipe["div"]
    return values.reshape(recipe["shape"]).to(DTYPES[recipe["dtype"]])


@pytest.mark.parametrize("case", behaviour_cases("metadata.json", "lora_hashes"))
def test_hashes_of_an_adapter(case):
    tensors = {name: recipe_tensor(recipe) for name, recipe in case["tensors"].items()}
    hashes = adapter_hashes(tensors, case["metadata"])
    assert hashes == {key: case[key] for key in ("sshs_model_hash", "sshs_legacy_hash")}


@pytest.mark.parametrize("case", behaviour_cases("metadata.json", "file_hashes"))
def test_hashes_of_a_base_model(case, tmp_path):
    index = torch.arange(case["length"], dtype=torch.int64)
    path = tmp_path / "model.safetensors"
    path.write_bytes(((index * case["mul"] + (index >> 8)) & 255).to(torch.uint8).numpy().tobytes())
    assert (model_hash(path), calculate_sha256(path)) == (case["ss_sd_model_hash"], case["ss_new_sd_model_hash"])
    memory = tmp_path / "memory" / "hashes.json"
    for _ in range(2):  # the second time from memory
        assert BackgroundHashes(memory).result(path) == (case["ss_sd_model_hash"], case["ss_new_sd_model_hash"])
    assert list(json.loads(memory.read_text()).values()) == [case["ss_new_sd_model_hash"]]


def test_hashes_of_folders_and_missing_files(tmp_path):
    recorded = behaviour("metadata.json")
    assert model_hash(tmp_path) == calculate_sha256(tmp_path) == recorded["hash_of_folder"]
    assert model_hash(tmp_path / "no") == calculate_sha256(tmp_path / "no") == recorded["hash_of_missing"]


def assert_metadata(expected, metadata):
    """Metadata of a written file against the `final_file` of a recorded case; more keys are allowed."""
    wrong = {
        key: (metadata.get(key), value)
        for key, value in expected["text"].items()
        if key not in metadata or (value != ANY and metadata[key] != value)
    }
    wrong |= {
        key: (metadata.get(key), value) for key,
        value in expected["json"].items() if json.loads(metadata.get(key, "null")) != value
    }
    assert not wrong
    assert not [key for key in expected["absent"] if key in metadata]


def inputs_of(case, tmp_path, *more):
    """What a run of the case hands to build_metadata: its options parsed, its data as recorded."""
    from library.training.parser_common import parse

    model = tmp_path / "model.safetensors"
    model.write_bytes(bytes(2000))
    dataset = tmp_path / "dataset.toml"
    dataset.write_text(behaviour("metadata.json")["dataset_toml"])
    arguments = [
        *case["arguments"],
        "--pretrained_model_name_or_path",
        str(model),
        "--dataset_config",
        str(dataset),
        *more,
    ]
    if "ss_vae_name" in case["final_file"]["text"]:
        arguments += ["--vae", str(model)]
    config = parse(arguments, family_of(case["name"]), "network")
    family = import_target(record_of(family_of(case["name"])).family)(config)
    trainable = import_target("library.training.trainables.network:NetworkTrainable")(config)
    recorded, text = case["final_file"]["json"], case["final_file"]["text"]
    counts = {name: int(text[f"ss_{name}"]) for name in COUNTS}
    spec = {
        "architecture": text["modelspec.architecture"].partition("/")[0],
        "implementation": text["modelspec.implementation"],
    }
    if "modelspec.prediction_type" in text:
        spec["prediction_type"] = text["modelspec.prediction_type"]
    return MetadataInputs(
        config=config, session_id=7, started_at=1e9, datasets=recorded["ss_datasets"],
        tag_frequency=recorded["ss_tag_frequency"], num_processes=1, optimizer=text["ss_optimizer"],
        family=family.metadata(),
        modelspec=spec, trainable=trainable.metadata(), **counts,
    )


@pytest.mark.parametrize("case", behaviour_cases("metadata.json"))
def test_metadata_of_the_final_file(case, tmp_path):
    inputs = inputs_of(case, tmp_path)
    hashes = BaseModelHashes(inputs.config, tmp_path / "hashes.json")
    text = case["final_file"]["text"]
    metadata = at_save(
        build_metadata(inputs), steps=int(text["ss_steps"]), epoch=int(text["ss_epoch"]), finished_at=2e9, hashes=hashes
    )
    metadata |= dict.fromkeys(WRITTEN_BY_THE_FILE, "")
    assert_metadata(case["final_file"], metadata)
    assert metadata["ss_sd_model_name"] == "model.safetensors" and len(metadata["ss_new_sd_model_hash"]) == 64


@pytest.mark.parametrize("case", behaviour_cases("metadata.json"))
def test_no_metadata(case, tmp_path):
    inputs = inputs_of(case, tmp_path, "--no_metadata")
    hashes = BaseModelHashes(inputs.config, tmp_path / "hashes.json")
    metadata = at_save(build_metadata(inputs), steps=12, epoch=2, finished_at=2e9, hashes=hashes)
    assert sorted(key for key in metadata if key.startswith("ss_")) == sorted(
        case["no_metadata"]["exactly_these_ss_keys"]
    )
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
