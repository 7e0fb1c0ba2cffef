"""The project's Markdown as data: blocks of code, links, anchors; and the one way in which all of it is checked.

``python scripts/pages.py`` runs every ``python`` block and follows every relative link, and prints what it found;
``tests/docs`` does the same by name. A block that cannot run says ``py`` instead.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
RUN = [ROOT / "README.md", *DOCS]
CHECKED = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]

#: What somebody who reads a page has already done.
BEFORE = {
    "docs/keras.md": """
import keras
old = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32, activation="relu"), keras.layers.Dense(1)])
old.compile(keras.optimizers.Adafactor(), "mse")
old.optimizer.build(old.trainable_variables)
old.save("old.keras")
"""
}


class Block(NamedTuple):
    """Fenced code: its info string, the number of lines before it, its text."""

    language: str
    line: int
    source: str


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name


def split(page: Path) -> tuple[str, list[Block]]:
    """The prose, with as many lines as the page, and the blocks of code."""
    prose: list[str] = []
    blocks: list[Block] = []
    code: list[str] = []
    fence = language = ""
    begin = 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        opening = re.match(r"\s*(```+)\s*(\S*)", line)
        if fence and line.strip() == fence:
            blocks.append(Block(language, begin, "\n".join(code) + "\n"))
            fence, code = "", []
        elif fence:
            code.append(line)
        elif opening:
            fence, language, begin = opening[1], opening[2], number
        else:
            prose.append(line)
            continue
        prose.append("")
    if fence:
        raise ValueError(f"{name(page)}, line {begin}: a block of code must be closed, got no {fence}. Add it.")
    return "\n".join(prose), blocks


def run(page: Path, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Runs the page's ``python`` blocks one after the other in ``folder``; returns the names they define."""
    names: dict[str, Any] = {"__name__": "docs"}
    with contextlib.chdir(folder):
        exec(BEFORE.get(name(page), ""), {})
        for block in split(page)[1]:
            if block.language == "python":  # as many lines before it as on the page: a traceback points there
                exec(compile("\n" * block.line + block.source, str(page), "exec"), names)
    return names


def triton_first() -> None:
    """Call before anything imports TensorFlow: once that is loaded, importing Triton ends the process.

    It is a segmentation fault (tensorflow-cpu 2.21, triton 3.7.1), and PyTorch imports Triton by itself. The other way
    round both work.
    """
    with contextlib.suppress(ImportError):
        import triton  # noqa: F401


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading; the built site uses the same."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: Path) -> list[str]:
    prose, _ = split(page)
    headings = re.findall(r"^#{1,6} +(.+?) *#*$", prose, re.MULTILINE)
    return [slug(heading) for heading in headings] + re.findall(r"<a id=\"([^\"]+)\"", prose)


def links(page: Path) -> list[str]:
    """The targets of all links and images, in the order of the page."""
    prose = re.sub(r"(`+)[^`]+\1", lambda code: "x" * len(code[0]), split(page)[0])
    return re.findall(r"\]\(\s*<?([^()<>\s]+(?:\([^()\s]*\))?)>?(?:\s+\"[^\"]*\")?\s*\)", prose)


def is_external(link: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*:", link) is not None


def broken(page: Path) -> list[str]:
    """What is wrong with the page's relative links, anchors and named files, a sentence each."""
    wrong = []
    for link in links(page):
        if is_external(link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            wrong.append(f"{name(page)}: {link} leads nowhere.")
        elif not target.is_relative_to(ROOT) and page.is_relative_to(ROOT):
            wrong.append(f"{name(page)}: {link} leaves the repository.")
        elif anchor and (target.suffix != ".md" or anchor not in anchors(target)):
            wrong.append(f"{name(page)}: {link} names no heading of {target.name}.")
    twice = {anchor for anchor in anchors(page) if anchors(page).count(anchor) > 1}
    wrong += [f"{name(page)}: two headings are called #{anchor}." for anchor in sorted(twice)]
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/.-])(?:benchmarks|examples|native|scripts|src|tests)/[\w/.-]+\.\w+", text))
    wrong += [f"{name(page)}: there is no file {file}." for file in sorted(named) if not (ROOT / file).exists()]
    return wrong


def main() -> int:
    triton_first()
    os.environ.setdefault("KERAS_BACKEND", "jax")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    failures, ran, waived = [], 0, 0
    for page in RUN:
        languages = [block.language for block in split(page)[1]]
        ran, waived = ran + languages.count("python"), waived + languages.count("py")
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            try:
                run(page, folder)
            except Exception as error:
                failures.append(f"{name(page)}: a block failed. {type(error).__name__}: {error}")
        print(f"{name(page):24} {languages.count('python'):3} blocks  {time.perf_counter() - began:6.1f} s")
    found = [link for page in CHECKED for link in links(page)]
    failures += [sentence for page in CHECKED for sentence in broken(page)]
    inside = sum(not is_external(link) for link in found)
    print(f"{len(CHECKED)} pages, {ran} blocks run, {waived} that cannot, {inside} links checked, ", end="")
    print(f"{len(found) - inside} lead elsewhere, {len(failures)} broken")
    print(*failures, sep="\n", end="\n" if failures else "")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
