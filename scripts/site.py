"""The one thing that MkDocs cannot do for this project: a link that leaves ``docs/`` becomes the file's name.

``mkdocs.yml`` names this file as its hook.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    def named(link: re.Match[str]) -> str:
        text, path = link.groups()
        return text if Path(path).name in text else f"{text} (`{path}`)"

    return re.sub(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(\.\./([^)\s]+)\)", named, markdown)
