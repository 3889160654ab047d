"""Names on the hub, and uploads that never stop a training."""

import logging
import threading
import time

import pytest

from library.core.errors import CheckpointError, ConfigError
from library.huggingface_util import HubFolder, HubTarget, Uploader, is_hub_reachable, parse_hub_folder, upload


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("me/repo/states/run-state", HubFolder("me/repo", "states/run-state", None, None)),
        ("me/repo/run-state:v2", HubFolder("me/repo", "run-state", "v2", "model")),
        ("me/repo/run-state:v2:dataset", HubFolder("me/repo", "run-state", "v2", "dataset")),
        ("me/repo/run-state::dataset", HubFolder("me/repo", "run-state", None, "dataset")),
    ],
)
def test_folders_on_the_hub(text, folder):
    assert parse_hub_folder(text) == folder


@pytest.mark.parametrize("text", ["me/repo", "run-state", "me/repo/a:b:c:d", "me/repo/a:v1:box"])
def test_other_forms_are_errors(text):
    with pytest.raises(ConfigError):
        parse_hub_folder(text)


def test_only_public_is_public():
    assert not HubTarget("me/repo", visibility="public").is_private
    assert HubTarget("me/repo").is_private and HubTarget("me/repo", visibility="open").is_private


def test_a_failing_upload_is_logged_and_training_goes_on(tmp_path, caplog):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"x")
    assert upload(HubTarget("not a repository name"), path) is False
    assert "a.safetensors" in caplog.text and "failed" in caplog.text


class Record:
    """Stands at the place of the network: notes what would be sent, slowly."""

    def __init__(self) -> None:
        self.sent, self.threads = [], set()

    def __call__(self, target, source, name="") -> bool:
        time.sleep(0.02)
        self.sent.append(source)
        self.threads.add(threading.current_thread().name)
        return True


def test_background_uploads_keep_their_order_and_are_waited_for():
    record = Record()
    send = Uploader(HubTarget("me/repo"), in_background=True, send=record)
    for name in ("a", "b", "c"):
        send(name)
    send.finish()
    assert record.sent == ["a", "b", "c"] and threading.current_thread().name not in record.threads


def test_the_last_upload_waits():
    record = Record()
    Uploader(HubTarget("me/repo"), in_background=True, send=record)("final", wait=True)
    assert record.sent == ["final"] and record.threads == {threading.current_thread().name}


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, caplog):
    from huggingface_hub import constants

    from tools.caption_tools.captioning import load_model

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # no program listens there
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    is_hub_reachable.cache_clear()
    try:
        with caplog.at_level(logging.DEBUG):
            for _ in range(2):
                with pytest.raises(
                    CheckpointError, match="--model_id is nobody/nothing-of-this-name, which cannot be loaded"
                ):
                    load_model("GitForCausalLM", "nobody/nothing-of-this-name", "model_id")
        told = [record.getMessage() for record in caplog.records]
        assert sum("the hub does not answer" in line for line in told) == 1 and not any(
            "Retry" in line for line in told
        )
    finally:
        is_hub_reachable.cache_clear()
