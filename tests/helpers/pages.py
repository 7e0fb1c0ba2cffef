"""The project's Markdown: sybil runs its blocks, and links are read as the site's generator reads them.

sybil is imported by what runs blocks alone, so that a test that reads a page's table does without.
"""

from __future__ import annotations

import contextlib
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from markdown import Markdown
from markdown.extensions.toc import slugify_unicode

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
RUN = [ROOT / "README.md", *DOCS]
CHECKED = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name


def run(page: Path, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Runs the page's ``python`` blocks one after the other in ``folder``; returns the names they define."""
    from sybil import Document
    from sybil.parsers.markdown import PythonCodeBlockParser

    document = Document.parse(str(page), PythonCodeBlockParser())
    document.namespace["__name__"] = "docs"
    with contextlib.chdir(folder):
        for block in document.examples():
            block.evaluate()
    return document.namespace


def blocks(page: Path, language: str) -> list[str]:
    """The sources of the page's blocks in a language, in order."""
    from sybil import Document
    from sybil.parsers.markdown import CodeBlockParser

    parser = CodeBlockParser(language, evaluator=lambda block: None)
    return [block.parsed for block in Document.parse(str(page), parser).examples()]


@cache
def html(page: Path) -> str:
    options = {"toc": {"slugify": slugify_unicode}}  # GitHub's anchors, as in mkdocs.yml
    extensions = ["tables", "fenced_code", "sane_lists", "toc"]
    return Markdown(extensions=extensions, extension_configs=options).convert(page.read_text(encoding="utf-8"))


def broken(page: Path) -> list[str]:
    """What is wrong with the page's relative links, their anchors and the files it names, a sentence each."""
    wrong = []
    for link in re.findall(r'(?:href|src)="([^"]+)"', html(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        if not target.exists():
            wrong.append(f"{name(page)}: {link} leads nowhere.")
        elif anchor and (target.suffix != ".md" or f'id="{anchor}"' not in html(target)):
            wrong.append(f"{name(page)}: {link} names no heading of {target.name}.")
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/.-])(?:benchmarks|examples|native|scripts|src|tests)/[\w/.-]+\.\w+", text)
    return wrong + [
        f"{name(page)}: there is no file {file}." for file in sorted(set(named)) if not (ROOT / file).exists()
    ]
