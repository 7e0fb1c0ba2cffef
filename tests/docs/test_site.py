"""`make docs` builds without a warning, and its pages stand on their own."""

import re
import subprocess
import sys

import pages
import pytest


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    done = subprocess.run(command, cwd=pages.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_there(site):
    assert {page.stem for page in pages.DOCS} <= {page.stem for page in site.glob("*.html")}


def test_no_link_leaves_the_site_but_to_the_web(site):
    for page in site.glob("*.html"):
        if page.name in ("404.html", "search.html"):
            continue
        for link in re.findall(r"(?:href|src)=\"([^\"]+)\"", page.read_text()):
            if pages.is_external(link):
                continue
            path, _, anchor = link.partition("#")
            target = site / path if path not in ("", ".") else page
            assert target.exists(), (page.name, link)
            if anchor:
                assert f'id="{anchor}"' in target.read_text(), (page.name, link)


def test_formulas_are_mathml(site):
    text = (site / "algorithm.html").read_text()
    assert text.count("<math") == (pages.ROOT / "docs/algorithm.md").read_text().count("$$") // 2
    assert "$$" not in text
