"""Model files: read as far as their headers, and refused in one sentence where they are damaged or hostile.

The fuzzer prints its worst case: ``pytest tests/planning/test_files.py -k fuzz -s``.
"""

import json
import os
import random
import struct
import time
import tracemalloc

import pytest
from architectures import PUBLIC, llama_7b, write_header

from adafactor import plan
from adafactor.core.errors import Refused
from adafactor.planning import Parameter
from adafactor.planning.files import read

SENTENCE = r"^[^\n]{1,1200}\.$"


def refused(path, words=""):
    with pytest.raises(Refused, match=SENTENCE) as caught:
        read(path)
    assert words in str(caught.value)


def safetensors(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape=(2, 3), dtype="F32", start=0, stop=24):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


GOOD = {"__metadata__": {"format": "pt"}, "b": entry((4,), "BF16", 24, 32), "a": entry()}


def test_a_header_is_read_in_the_order_of_its_bytes(tmp_path):
    path = safetensors(tmp_path / "m.safetensors", GOOD, bytes(32))
    assert read(path) == [Parameter("a", (2, 3)), Parameter("b", (4,), "bfloat16")]


def test_llama_7b_is_planned_from_a_file_of_headers_in_under_a_second(tmp_path):
    path = write_header(tmp_path / "llama-2-7b.safetensors", llama_7b())
    assert path.stat().st_size > 13e9
    began = time.perf_counter()
    found = plan(path)
    seconds = time.perf_counter() - began
    assert found.size == PUBLIC["Llama 2 7B"][1]
    states = {usage.optimizer.label: usage.state for usage in found.usages}
    assert states["adafactor, last_two"] < 11.4e6
    assert states["torch.optim.AdamW(fused=True)"] > 26.9e9
    assert seconds < 1.0


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"", "a JSON object"),
        (b"[]", "a JSON object"),
        (b'{"a": ', "an object of dtype"),
        (b'{"a": "\xff\xfe"}', "UTF-8"),
        (b'{"a":' * 60_000, "an object of dtype"),
        (b'{"a": {"shape": [1' + b"0" * 4050 + b"]}}", "an object of dtype"),
        (b'{"a": {"shape": [NaN]}}', "finite"),
        (b'{"a": {"dtype": 1, "dtype": 2}}', "unique"),
        (b'{"a": {"shape": [' + b"[" * 2000 + b"}}", "JSON"),
        (b'{"a": {]}}', "JSON"),
        (b'{"a\n": {}}', "JSON"),
        (b'{"a": {}', "dtype, shape and data_offsets"),
        (b'{"__metadata__": {"a": "b"}, "__metadata__": 5}', "{ at character"),
        (b'{"__metadata__": {"a": 5}}', '" at character'),
        (json.dumps({"a": entry(), "b": entry()}).replace("b", "a", 1).encode(), "unique"),
        (json.dumps({"a": entry()}).encode() + b" x", "no more"),
        (json.dumps({"a": entry()})[:-1].encode(), ", or } at character"),
        ({"a": 5}, "dtype, shape and data_offsets"),
        ({"a": {**entry(), "more": 1}}, "dtype, shape and data_offsets"),
        ({"a": entry(dtype="F33")}, "one of BOOL"),
        ({"a": entry(dtype=["F32"])}, "one of BOOL"),
        ({"a": entry((2, -3))}, "integers >= 0"),
        ({"a": entry((-2, -3))}, "integers >= 0"),
        ({"a": entry((2, 3.0))}, "a list of integers"),
        ({"a": entry((True, 6))}, "a list of integers"),
        ({"a": {**entry(), "shape": "23"}}, "a list of integers"),
        ({"a": entry((2**62, 2**62), stop=2**126)}, "fewer than 2**63 bytes"),
        ({"a": entry((2**32, 2**32), stop=0)}, "fewer than 2**63 bytes"),
        ({"a": entry((10**30,))}, "2**63"),
        ({"a": entry((1,) * 70, stop=4)}, "rank <= 64"),
        ({"a": entry(stop=25)}, "24 bytes apart"),
        ({"a": entry(start=24, stop=0)}, "24 bytes apart"),
        ({"a": entry(start=-24, stop=0)}, "24 bytes apart"),
        ({"a": {**entry(), "data_offsets": [0]}}, "two integers"),
        ({"a": {**entry(), "data_offsets": [0, 24.0]}}, "two integers"),
        ({"a": entry(), "b": entry()}, "where the tensor before it ends"),
        ({"a": entry(), "b": entry(start=30, stop=54)}, "where the tensor before it ends"),
        ({"a": entry(start=8, stop=32)}, "where the tensor before it ends"),
        ({"a": entry(), "b": entry(start=24, stop=48)}, "48 bytes after its header"),
        ({"__metadata__": {}}, "0 bytes after its header"),
        ({("n" * 100_000): entry(dtype="?")}, "…"),
    ],
)
def test_damaged_headers(tmp_path, header, words):
    refused(safetensors(tmp_path / "m.safetensors", header, bytes(24)), words)


def test_lengths_that_lie(tmp_path):
    path = tmp_path / "m.safetensors"
    for length in (2**60, 2**64 - 1, 10_000):
        refused(safetensors(path, {"a": entry()}, bytes(24), length), "inside the file")
    for content in (b"", b"\0" * 7):
        path.write_bytes(content)
        refused(path, "inside the file")
    with path.open("wb") as file:  # a header of 2 GB of zeros, which takes no room on disk
        file.write(struct.pack("<Q", 2 << 30))
        file.truncate(3 << 30)
    refused(path, "at most 100,000,000 bytes")
    path.write_bytes(safetensors(path, GOOD, bytes(32)).read_bytes()[:-1])
    refused(path, "32 bytes after its header")


def test_what_is_no_file(tmp_path):
    refused(tmp_path / "absent.safetensors", "No such file")
    refused(tmp_path / "model.onnx", ".safetensors")
    refused(tmp_path, "model.safetensors")
    refused("bad\0name.safetensors", "null")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.safetensors")
        refused(tmp_path / "pipe.safetensors", "a regular file")
    for name in ("pointer.safetensors", "pointer.bin", "pointer.keras"):
        (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        with pytest.raises(Refused, match="Fetch it with git lfs pull"):
            read(tmp_path / name)
    safetensors(tmp_path / "empty.safetensors", {})
    refused(tmp_path / "empty.safetensors", "a file with tensors")
    (tmp_path / "folder").mkdir()
    safetensors(tmp_path / "folder" / "model.safetensors", {})
    refused(tmp_path / "folder", "a file with tensors")


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    safetensors(folder / "1.safetensors", {"a": entry()}, bytes(24))
    safetensors(folder / "2.safetensors", {"b": entry((3, 2)), "c": entry((2,), "F32", 24, 32)}, bytes(32))
    return folder


def index(folder, weights):
    text = weights if isinstance(weights, str) else json.dumps({"metadata": {}, "weight_map": weights})
    (folder / "model.safetensors.index.json").write_text(text)


def test_an_index_of_several_files(folder):
    index(folder, {"a": "1.safetensors", "b": "2.safetensors"})
    assert [p.name for p in read(folder)] == ["a", "b"]
    assert read(folder / "model.safetensors.index.json") == read(folder)


def test_a_folder_of_one_file(tmp_path):
    safetensors(tmp_path / "model.safetensors", {"a": entry()}, bytes(24))
    assert [p.name for p in read(tmp_path)] == ["a"]


@pytest.mark.parametrize(
    "name",
    ["../1.safetensors", "/etc/passwd", "..", ".", "", "sub/1.safetensors", "..\\1.safetensors", "C:1", "a\0b", 5],
)
def test_an_index_that_leaves_the_folder(folder, name):
    safetensors(folder.parent / "1.safetensors", {"a": entry()}, bytes(24))
    index(folder, {"a": name})
    refused(folder, "the name of a file beside it")


def test_links(folder):
    outside = safetensors(folder.parent / "outside.safetensors", {"a": entry()}, bytes(24))
    (folder / "link.safetensors").symlink_to(outside)
    index(folder, {"a": "link.safetensors"})
    refused(folder, "inside its folder")
    (folder / "here.safetensors").symlink_to(folder / "1.safetensors")
    index(folder, {"a": "here.safetensors"})
    assert len(read(folder)) == 1


def test_hugging_faces_cache_links_to_blobs(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    safetensors(blobs / "0123", {"a": entry()}, bytes(24))
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert [p.name for p in read(snapshot)] == ["a"]


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("[]", "weight_map"),
        ('{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}', "unique"),
        ({}, "weight_map"),
        ({"a": "3.safetensors"}, "No such file"),
        ({"absent": "1.safetensors"}, "in 1.safetensors"),
        ({"a": "model.safetensors.index.json"}, ".safetensors, .bin"),
    ],
)
def test_an_index_that_lies(folder, weights, words):
    index(folder, weights)
    refused(folder, words)


# -- shapes by hand ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("s.txt", "4096x16*2 # two kernels\n\n5 scalar"),
        ("s.json", '["4096x16*2", "5", "scalar"]'),
        ("s.json", "[[4096, 16], [4096, 16], [5], []]"),
        ("s.json", '{"k": [4096, 16], "l": [4096, 16], "b": [5], "s": []}'),
    ],
)
def test_shapes_in_files(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert [p.shape for p in read(tmp_path / name)] == [(4096, 16), (4096, 16), (5,), ()]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("s.txt", "4096xx2"),
        ("s.txt", "-4"),
        ("s.txt", "4*9999999"),
        ("s.txt", "4*0"),
        ("s.txt", f"{10**18}x{10**18}"),
        ("s.txt", "5*100000000000000000000"),
        ("s.txt", "x" * 10**6),
        ("s.txt", ""),
        ("s.json", "5"),
        ("s.json", '{"a": [1e3]}'),
        ("s.json", '[[1], "2"]'),
        ("s.json", "{"),
    ],
)
def test_shapes_that_are_none(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=SENTENCE):
        read(tmp_path / name)


# -- fuzzing -----------------------------------------------------------------------------------------------------------


def mutated(rng, seed):
    """A file that was good until a few bytes or words of it were changed."""
    data = bytearray(seed)
    for _ in range(rng.choice((1, 1, 2, 5, 40))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(7):
            case 0 if at < len(data):
                data[at] = rng.randrange(256)
            case 1:
                del data[at : at + rng.choice((1, 8, 100))]
            case 2:
                data[at:at] = rng.randbytes(rng.choice((1, 8, 100)))
            case 3:
                data[at:at] = rng.choice(
                    (b"-", b"9" * 30, b"1e9", b"null", b"[" * 500, b'"a":', b"{}", b"NaN", b"\xff")
                )
            case 4:
                length = rng.choice((0, 1, 2**20, 2**31, 2**60, 2**64 - 1, len(data), max(0, len(data) - 8)))
                data[:8] = struct.pack("<Q", length)
            case 5:
                start = rng.randrange(len(data) + 1)
                data[at:at] = data[start : start + rng.randrange(200)]
            case _:
                word = rng.choice((b"F32", b"BF16", b"24", b"2", b"shape", b"[", b"}", b","))
                data = bytearray(bytes(data).replace(word, rng.choice((b"", b"0", b"F64", b"[", b"3", word * 2)), 1))
    return bytes(data)


def test_fuzz(tmp_path):
    rng = random.Random(1804_04235)
    seeds = {
        "m.safetensors": safetensors(tmp_path / "m.safetensors", GOOD, bytes(32)).read_bytes(),
        "m.index.json": json.dumps({"weight_map": {"a": "good.safetensors"}}).encode(),
        "m.json": b'{"a": [24, 2], "b": ["2x3"], "c": []}',
        "m.txt": b"24x2*3 5 scalar # words",
    }
    safetensors(tmp_path / "good.safetensors", {"a": entry()}, bytes(24))
    worst_seconds = worst_bytes = survived = 0
    tracemalloc.start()
    try:
        for number in range(1500):
            name = list(seeds)[0 if number % 2 else number // 2 % 4]
            path = tmp_path / name
            path.write_bytes(mutated(rng, seeds[name]))
            tracemalloc.reset_peak()
            before, began = tracemalloc.get_traced_memory()[0], time.perf_counter()
            try:
                survived += len(plan(path).parameters) > 0
            except ValueError as error:
                sentence = str(error)
                assert sentence.endswith(".")
                assert "\n" not in sentence
                assert len(sentence) < 1200
            worst_seconds = max(worst_seconds, time.perf_counter() - began)
            worst_bytes = max(worst_bytes, tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    print(f"1,500 files: worst {worst_seconds * 1e3:.1f} ms and {worst_bytes / 1e3:.0f} kB; {survived} were still good")
    assert 20 < survived < 1480  # both outcomes are exercised
    assert worst_bytes < 20e6
