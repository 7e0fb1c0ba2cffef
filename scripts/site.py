"""What MkDocs asks of this project while it builds the site: mkdocs.yml names this file as its hook.

Anchors are GitHub's. Formulas become MathML, so that the site needs no JavaScript from elsewhere. A link that leaves
``docs/`` leads to the file in the repository if ``[project.urls]`` of pyproject.toml says where that is, and else
becomes the file's name.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

sys.path.insert(0, str(Path(__file__).parent))
import pages

URLS = tomllib.loads((pages.ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
REPOSITORY = next((url for label, url in URLS.items() if label.lower() in ("repository", "source")), None)


def on_config(config: Any) -> Any:
    config["mdx_configs"].setdefault("toc", {})["slugify"] = lambda heading, separator: pages.slug(heading)
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    def elsewhere(link: re.Match[str]) -> str:
        text, path = link[1], link[2].removeprefix("../")
        if REPOSITORY:
            return f"[{text}]({REPOSITORY.rstrip('/')}/blob/main/{path})"
        return text if Path(path).name in text else f"{text} (`{path}`)"

    def formula(found: re.Match[str]) -> str:
        number = re.search(r"\\tag\{(.*?)\}", found[1])
        mathml = convert(re.sub(r"\\tag\{.*?\}", "", found[1]), display="block")
        shown = f'<span class="tag">({number[1]})</span>' if number else ""
        return f'\n<div class="equation">{mathml}{shown}</div>\n'

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    for k in range(0, len(parts), 2):  # between the blocks of code
        parts[k] = re.sub(r"\$\$(.*?)\$\$", formula, parts[k], flags=re.DOTALL)
        parts[k] = re.sub(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\((\.\./[^)\s]+)\)", elsewhere, parts[k])
    return "".join(parts)
