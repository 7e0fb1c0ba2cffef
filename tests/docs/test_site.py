"""`make docs` builds without a warning, its pages stand on their own, and what is wrong with a page stops it."""

import re
import shutil
import subprocess
import sys

import pages
import pytest


def build(root, folder):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(pages.ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_there(site):
    assert {page.stem for page in pages.DOCS} <= {page.stem for page in site.glob("*.html")}


def test_formulas_are_mathml(site):
    text = (site / "algorithm.html").read_text()
    source = (pages.ROOT / "docs/algorithm.md").read_text()
    assert text.count("<math") == source.count("$$") // 2 > 10
    numbers = re.findall(r"\\tag\{(\d+)\}", source)
    assert re.findall(r"<mtext>\((\d+)\)</mtext>", text) == numbers
    assert "$$" not in text


def test_a_link_that_leaves_the_pages_becomes_a_name(site):
    text = (site / "algorithm.html").read_text()
    assert "reference.py" in text
    assert not [page.name for page in site.glob("*.html") if re.search(r'href="\.\./(?!\.)', page.read_text())]


@pytest.mark.parametrize(
    ("page", "text", "said"),
    [
        ("faq.md", "[broken](nowhere.md)", "'nowhere.md'"),
        ("faq.md", "[broken](torch.md#nothing-of-this-name)", "#nothing-of-this-name"),
        ("unlisted.md", "# Unlisted", "unlisted.md"),
    ],
)
def test_what_is_wrong_stops_the_build(tmp_path, page, text, said):
    for name in ("docs", "scripts"):
        shutil.copytree(pages.ROOT / name, tmp_path / name)
    shutil.copy(pages.ROOT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs" / page).open("a") as file:
        file.write(f"\n{text}\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert said in done.stderr
