"""`adafactor plan` from the outside: a table, a JSON file, a picture, one sentence for what cannot be planned."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from architectures import llama_7b, write_header

from adafactor import plan
from adafactor.cli import main
from adafactor.cli.plan import memory, report


def run(capsys, *arguments):
    code = main(["plan", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def row(out, label):
    return next(line for line in out.splitlines() if line.startswith(label))


def test_the_table_of_a_headers_only_llama(capsys, tmp_path):
    file = write_header(tmp_path / "llama-2-7b.safetensors", llama_7b())
    code, out, _ = run(capsys, file, "--gpu-memory", "24GB", "--top", 2)
    assert code == 0
    assert out.startswith("llama-2-7b.safetensors: 6,738,415,616 parameters in 291 tensors, bfloat16\n")
    assert row(out, "torch.optim.AdamW(fused=True)").split()[-4:] == ["29.9", "GB", "too", "much"]
    assert row(out, "adafactor, last_two, gradient release").split()[-3:] == ["10.2", "GB", "left"]
    assert "11.4 MB" in row(out, "adafactor, last_two ")
    assert "32000 x 4096" in row(out, "lm_head.weight")
    assert "Activations are not included" in out
    _, out, _ = run(capsys, file, "--no-triton")
    assert "67.7 MB" in row(out, "adafactor, last_two ")


def test_shapes_on_the_command_line_and_json(capsys, tmp_path):
    out_file = tmp_path / "plan.json"
    code, out, _ = run(capsys, "4096x4096*2", "4096", "--json", out_file, "--gpu-memory", "1GiB")
    assert code == 0
    assert "33,558,528 parameters in 3 tensors, float32" in out
    data = json.loads(out_file.read_text())
    expected = plan([(4096, 4096), (4096, 4096), (4096,)])
    assert [one["state"] for one in data["optimizers"]] == [usage.state for usage in expected.usages]
    assert [one["fits"] for one in data["optimizers"]] == [usage.total <= 1 << 30 for usage in expected.usages]
    assert data["activations"] == "not included"
    assert run(capsys, "4096x4096*2", "4096", "--json", "-", "--gpu-memory", "1GiB")[1] == out_file.read_text()


def test_shards_and_frozen(capsys, tmp_path):
    (tmp_path / "shapes.json").write_text('{"encoder.w": [100, 10], "decoder.w": [10, 10]}')
    _, out, _ = run(capsys, tmp_path / "shapes.json", "--shards", 4, "--frozen", "encoder.*", "--dtype", "bfloat16")
    assert "100 parameters in 1 tensors, bfloat16, FSDP2 over 4 ranks" in out
    assert "1 tensors of 500 B are not trained" in out
    assert "FSDP2 gathers" in out


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture(capsys, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    file = tmp_path / f"plan.{suffix}"
    assert run(capsys, "512x512*8", "--plot", file, "--gpu-memory", "10MB", "--shards", 2)[0] == 0
    assert file.stat().st_size > 10_000
    assert file.read_bytes()[:4] in (b"\x89PNG", b"<?xm")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent.safetensors"], "No such file"),
        (["4096x4096", "model.safetensors"], "one file, one folder or shapes only"),
        (["99999999999999999999x2"], "a folder, or a file that ends in"),
        (["9999999999999999999x2"], "2**63"),
        (["8x8", "--gpu-memory", "24"], "--gpu-memory"),
        (["8x8", "--gpu-memory", "0GB"], "--gpu-memory"),
        (["8x8", "--shards", "0"], "--shards"),
        (["8x8", "--dtype", "int8"], "--dtype"),
        (["8x8", "--json", "no/such/folder/x.json"], "--json"),
        (["shapes.json", "--json", "./shapes.json"], "a file of its own"),
        (["8x8", "--json", "x.svg", "--plot", "x.svg"], "a file of its own"),
        (["8x8", "--plot", "x.gif2"], "--plot"),
        ([], "MODEL"),
    ],
)
def test_refusals_are_one_sentence(capsys, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert words in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("model", [".", "model.safetensors.index.json"])
@pytest.mark.parametrize("file", ["part.safetensors", "model.safetensors.index.json"])
def test_what_a_folder_or_an_index_names_is_not_replaced(capsys, monkeypatch, tmp_path, model, file):
    monkeypatch.chdir(tmp_path)
    header = b'{"x":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'
    Path("part.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    Path("model.safetensors.index.json").write_text('{"weight_map": {"x": "part.safetensors"}}')
    before = Path(file).read_bytes()
    code, _, err = run(capsys, model, "--json", file)
    assert (code, Path(file).read_bytes()) == (2, before)
    assert "a file of its own" in err
    for _ in range(2):  # what is none of the model's files may be written again
        assert run(capsys, model, "--json", "plan.json")[0] == 0


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (9994, "9.99 kB"), (9996, "10.0 kB"), (99_960, "100 kB"),
        (999_600, "1.00 MB"), (13.5e9, "13.5 GB"), (999e9, "999 GB"), (1e12, "1.00 TB"), (5e16, "50,000 TB"),
    ],
)  # fmt: skip
def test_three_digits(count, text):
    assert report.size(count) == text


def test_units_of_a_card():
    assert memory("24GB") == 24 * 10**9
    assert memory("80 GiB") == 80 << 30
    assert memory("1.5TB") == 1_500_000_000_000


def test_planning_a_safetensors_file_imports_no_framework(tmp_path):
    file = write_header(tmp_path / "m.safetensors", {"w": (8, 8)})
    code = f"""
import sys
from adafactor.cli import main
assert main(["plan", {str(file)!r}]) == 0
print(*sorted({{name.split('.')[0] for name in sys.modules}} & {{'torch', 'jax', 'keras', 'tensorflow', 'h5py'}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""
