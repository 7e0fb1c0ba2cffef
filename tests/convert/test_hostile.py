"""Files that are damaged, or made to do harm: one sentence, at once, in little memory, and nothing is replaced."""

import json
import os
import pickle
import struct
import zipfile

import conversion_fuzz
import h5py
import keras
import msgpack
import numpy as np
import pytest
import torch

from adafactor import convert
from adafactor.core.errors import Refused

SECONDS, BYTES = 5.0, 16e6


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    found = conversion_fuzz.examples(tmp_path_factory.mktemp("good"))
    for path in found.values():
        assert conversion_fuzz.read(path)[-1] == "read"  # and what is imported on first use has been
    return found


def refused(path, text=""):
    seconds, peak, outcome = conversion_fuzz.read(path)
    assert outcome != "read"
    assert text in outcome
    assert outcome.endswith((".", ").")), outcome
    assert "\n" not in outcome
    assert seconds < SECONDS
    assert peak < BYTES
    return outcome


@pytest.mark.parametrize("kind", [".safetensors", ".pt", ".keras", ".weights.h5", ".msgpack"])
def test_damaged_files(good, kind):
    for seconds, peak, outcome in conversion_fuzz.fuzz(kind, good[kind], 60):
        assert "\n" not in outcome
        assert seconds < SECONDS
        assert peak < BYTES


@pytest.mark.parametrize("kind", [".safetensors", ".pt", ".keras", ".weights.h5", ".msgpack"])
def test_every_cut_is_refused(good, kind, tmp_path):
    data, path = good[kind].read_bytes(), tmp_path / f"cut{kind}"
    for end in np.linspace(0, len(data) - 1, 40).astype(int):
        path.write_bytes(data[:end])
        refused(path)


def test_every_bit_of_a_state_file_counts(good, tmp_path):
    data, path = good[".safetensors"].read_bytes(), tmp_path / "a.safetensors"
    rng = np.random.default_rng(0)
    for at in rng.choice(len(data), 150, replace=False):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :])
        seconds, _, outcome = conversion_fuzz.read(path)
        assert outcome != "read" or json.loads(header(path)) == json.loads(header(good[".safetensors"]))
        assert seconds < SECONDS


def header(path):
    data = path.read_bytes()
    return data[8 : 8 + struct.unpack("<Q", data[:8])[0]]


def safetensors(path, head, data=b"", length=None):
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


MARK = {"__metadata__": {"adafactor": "{}"}}


@pytest.mark.parametrize(
    ("head", "data", "length"),
    [
        (MARK, b"", 1 << 62),
        (b"[" * 100_000, b"", None),
        (MARK | {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}, b"", None),
        (MARK | {"a": {"dtype": "F32", "shape": [1 << 31, 1 << 31, 4], "data_offsets": [0, 0]}}, b"", None),
        (MARK | {"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, b"1234", None),
        (MARK | {k: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for k in "ab"}, b"12345678", None),
        (MARK | {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678", None),
        (MARK | {"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}, b"1234", None),
        (MARK | {"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, b"1234", None),
        (MARK | {"a": 1}, b"", None),
        ([], b"", None),
    ],
)
def test_headers_of_safetensors(head, data, length, tmp_path):
    refused(safetensors(tmp_path / "a.safetensors", head, data, length))


def test_a_later_schema_is_named(tmp_path):
    described = json.dumps({"schema": 2})
    path = safetensors(tmp_path / "a.safetensors", {"__metadata__": {"adafactor": described}})
    assert refused(path).endswith("must be 1, got 2. Read it with the release of adafactor that wrote it.")


def archive(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in entries:
            file.writestr(name, data)
    return path


def entries_of(path):
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


@pytest.mark.parametrize("kind", [".pt", ".keras"])
@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "c:\\evil", "..\\evil"])
def test_paths_in_archives(good, kind, name, tmp_path):
    path = archive(tmp_path / f"a{kind}", [*entries_of(good[kind]).items(), (name, b"x")])
    refused(path, "leads out of the archive")


@pytest.mark.parametrize("kind", [".pt", ".keras"])
def test_bombs_links_and_doubles_in_archives(good, kind, tmp_path):
    entries = entries_of(good[kind])
    refused(
        archive(tmp_path / f"bomb{kind}", [*entries.items(), ("b", b"0" * 10**7)], zipfile.ZIP_DEFLATED), "compressed"
    )
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    refused(archive(tmp_path / f"link{kind}", [*entries.items(), (link, b"/etc/passwd")]), "is a link")
    with pytest.warns(UserWarning, match="Duplicate"):
        path = archive(tmp_path / f"twice{kind}", [*entries.items(), *entries.items()])
    refused(path, "two entries of one name")


class Evil:
    def __reduce__(self):
        return exec, ("import test_hostile_evil",)


def test_a_pickle_runs_nothing(good, tmp_path):
    entries = entries_of(good[".pt"])
    name = next(name for name in entries if name.endswith("data.pkl"))
    refused(
        archive(tmp_path / "a.pt", (entries | {name: pickle.dumps(Evil(), 2)}).items()),
        "nothing in the file was executed",
    )
    (tmp_path / "b.pt").write_bytes(pickle.dumps({"state": {}, "param_groups": []}))
    refused(tmp_path / "b.pt")


def test_tensors_larger_than_their_storage(good, tmp_path):
    content = torch.load(good[".pt"])
    content["state"][0]["momentum"] = torch.zeros(1).expand(1 << 40)
    torch.save(content, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "as large as its storage")
    entries = entries_of(good[".pt"])
    name = next(name for name in entries if name.endswith("data.pkl"))
    larger = entries[name].replace(b"K\x06\x85", b"J\xff\xff\xff\x7f\x85")
    assert larger != entries[name]
    refused(archive(tmp_path / "b.pt", (entries | {name: larger}).items()))


def hostile_h5(path, change):
    with h5py.File(path, "r+") as file:
        change(file)
    return path


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda f: f.create_dataset("huge", (1 << 20, 1 << 20), "f4", chunks=(1, 1 << 10)), "no bytes of its own"),
        (lambda f: f.__setitem__("soft", h5py.SoftLink("/optimizer")), "is a link"),
        (lambda f: f.__setitem__("out", h5py.ExternalLink("/etc/hosts", "/x")), "is a link"),
        (lambda f: f.create_dataset("far", (4,), "f4", external=[("/etc/hosts", 0, 16)]), "not stored in the file"),
        (lambda f: f.create_group("/".join("g" * 100)), "nested too deeply"),
        (lambda f: f.__delitem__("optimizer"), "saved without its optimizer"),
        (lambda f: f["optimizer/vars"].__delitem__("3"), "must be numbered from 0"),
        (lambda f: f["optimizer/vars"].create_dataset("state_version", data=7), "version 7"),
    ],
)
def test_hdf5_that_leads_elsewhere(good, change, text, tmp_path):
    path = tmp_path / "a.weights.h5"
    path.write_bytes(good[".weights.h5"].read_bytes())
    refused(hostile_h5(path, change), text)


def test_a_keras_file_with_code_in_it_is_refused(tmp_path):
    """Its reader is Keras's own, in safe mode."""
    model = keras.Sequential([keras.Input((6,)), keras.layers.Lambda(lambda x: x + 1), keras.layers.Dense(2)])
    model.compile(keras.optimizers.Adafactor(0.1), "mse")
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "a.keras")
    refused(tmp_path / "a.keras")


@pytest.mark.parametrize(
    "data",
    [
        b"\xdf\xff\xff\xff\xff",  # a map of four billion entries
        b"\x81\xa1a\xdd\xff\xff\xff\xff",
        b"\x81\xa1a\xc6\xff\xff\xff\xff",  # four gigabytes of bytes
        b"\x81\xa1a" * 100_000,
        msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(([1 << 40], "float32", b"")))}),
        msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(([-1], "float32", b"1234")))}),
        msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(([1], "object", b"12345678")))}),
        msgpack.packb({"a": msgpack.ExtType(9, b"")}),
        msgpack.packb({"__msgpack_chunked_array__": True, "shape": {"0": 1 << 50}, "chunks": {}}),
        msgpack.packb({"params": {}}),
    ],
)
def test_msgpack_lengths(data, tmp_path):
    (tmp_path / "a.msgpack").write_bytes(data)
    refused(tmp_path / "a.msgpack")


def test_other_files(tmp_path):
    for name, data in {"a": b"", "b": b"hello", "c.safetensors": b"\0" * 100, "d.pt": b"PK\x03\x04"}.items():
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(Refused):
        convert.read(tmp_path / "folder")


def test_honest_files_of_another_kind_are_called_by_their_name(tmp_path):
    (tmp_path / "pointer.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused(tmp_path / "pointer.pt", "got 'a pointer of Git LFS'. Fetch it with git lfs pull")
    torch.save({"state": {}, "param_groups": []}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.pt", "PyTorch before 1.6")
    (tmp_path / "distributed").mkdir()
    (tmp_path / "distributed" / ".metadata").touch()
    refused(tmp_path / "distributed", "dcp_to_torch_save")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.pt")
        refused(tmp_path / "pipe.pt", "must be a regular file")


def test_a_failure_leaves_the_target_as_it_was(good, tmp_path):
    """Refused, or failing in the middle of writing."""
    target = tmp_path / "target.safetensors"
    target.write_bytes(b"precious")
    (tmp_path / "bad.pt").write_bytes(good[".pt"].read_bytes()[:-100])
    with pytest.raises(Refused):
        convert.convert(tmp_path / "bad.pt", target, "state")
    with pytest.raises(ValueError, match="Out of range float"):
        convert.convert(good[".pt"], target, "state", hyperparameters={"learning_rate": float("nan")})
    assert target.read_bytes() == b"precious"
    assert {path.name for path in tmp_path.iterdir()} == {"bad.pt", "target.safetensors"}
