"""Files that are whole or not there, and that say when they were damaged."""

import json
import resource
import zipfile
from contextlib import contextmanager

import pytest
import torch
from conftest import refused
from safetensors import SafetensorError
from safetensors.torch import load, save

from files import (
    NO_DIGEST,
    check_digest,
    load_sealed,
    replacing,
    save_sealed,
    seal_tensors,
    write_atomic,
)


@contextmanager
def small_disk(size):
    """No file may grow beyond `size` bytes within."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_text_bytes_and_what_a_function_writes(tmp_path):
    path = tmp_path / "file"
    for content in ("täxt", b"bytes", lambda to: to.write_text("written")):
        write_atomic(path, content)
        told = path.read_bytes()
        assert told == {str: "täxt".encode(), bytes: b"bytes"}.get(type(content), b"written")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, RuntimeError])
def test_what_is_given_up_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(error), replacing(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_a_flipped_bit_of_a_torch_file_is_always_seen(tmp_path):
    path = tmp_path / "ckpt.pt"
    state = {"a": torch.randn(10, 7), "step": 3}
    save_sealed(state, path)
    assert load_sealed(path)["a"].equal(state["a"])
    assert torch.load(path, weights_only=True)["a"].equal(state["a"])  # any torch reads it
    whole = path.read_bytes()
    for place in [*range(0, len(whole), 7), *range(len(whole) - 100, len(whole))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(Exception):  # noqa: B017, any: `run.read_checkpoint` makes it a sentence
            load_sealed(path)
    torch.save(state, path)  # without a digest, as others write it
    assert load_sealed(path)["step"] == 3


def test_a_flipped_bit_of_a_safetensors_file_is_always_seen(tmp_path):
    path = tmp_path / "shard.safetensors"
    facts = {"sha256": NO_DIGEST, "facts": json.dumps({"sha256": "f" * 64}, separators=(",", ":"))}
    whole = seal_tensors(save({"a": torch.arange(20)}, metadata=facts))
    path.write_bytes(whole)
    check_digest(path)
    assert load(whole)["a"].equal(torch.arange(20))
    for place in range(8, len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises((ValueError, SafetensorError)):
            check_digest(path)
            load(path.read_bytes())  # sees a key that is no JSON any more
    path.write_bytes(save({"a": torch.arange(20)}))  # of others
    check_digest(path)


def test_a_file_cannot_claim_to_be_larger_than_it_is(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10**7))
    with refused(ValueError, path, "10000000"):
        load_sealed(path)


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path):
    path, text = tmp_path / "ckpt.pt", tmp_path / "text"
    save_sealed({"step": 1}, path)
    with small_disk(50_000):
        with refused(OSError, path, "File too large", "stays"):
            save_sealed({"a": torch.zeros(100_000)}, path)
        with refused(OSError, text, "File too large"):
            write_atomic(text, "x" * 100_000)
    assert load_sealed(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


def test_a_link_at_a_temporary_name_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("keep")
    (tmp_path / "out.partial").symlink_to(tmp_path / "mine")
    write_atomic(tmp_path / "out", "new")
    assert (tmp_path / "mine").read_text() == "keep" and (tmp_path / "out").read_text() == "new"
