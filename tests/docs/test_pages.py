"""Every page runs as it stands, and every link of it leads somewhere."""

import re

import pages
import pytest

each = pytest.mark.parametrize("page", pages.CHECKED, ids=pages.name)


@pytest.mark.parametrize("page", pages.RUN, ids=pages.name)
def test_every_block_runs(page, ran):
    ran(page)


@each
def test_every_link_leads_somewhere(page):
    assert pages.broken(page) == []


@each
def test_blocks_that_do_not_run_are_few(page):
    languages = [block.language for block in pages.split(page)[1]]
    assert set(languages) <= {"python", "py", "sh", "json", "toml", ""}
    assert languages.count("py") <= 2


def test_the_index_lists_every_page_once():
    index = pages.ROOT / "docs" / "index.md"
    listed = re.findall(r"^- \[[^\]]+\]\(([\w-]+\.md)\): ", index.read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in pages.DOCS if page != index)


PAGE = """# A heading, `code()` and a [link](#twice)

[good](#a-heading-code-and-a-link) and `[not a link](nowhere.md)` and [elsewhere](https://arxiv.org/abs/1804.04235)

```python
[also](not-a-link.md)
```

See [this](nowhere.md), [that](#no-heading), ![an image](images/none.png) and tests/docs/test_nothing.py.

## Twice
## Twice
"""


def test_what_is_broken_is_said(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert pages.broken(page) == [
        "page.md: nowhere.md leads nowhere.",
        "page.md: #no-heading names no heading of page.md.",
        "page.md: images/none.png leads nowhere.",
        "page.md: two headings are called #twice.",
        "page.md: there is no file tests/docs/test_nothing.py.",
    ]


def test_a_block_that_fails_says_where(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nx = 1\n```\n\ntext\n\n```python\nassert x == 2\n```\n\n```py\n...\n```\n")
    with pytest.raises(AssertionError) as failure:
        pages.run(page, tmp_path)
    assert failure.traceback[-1].lineno + 1 == 10
    page.write_text("```python\n")
    with pytest.raises(ValueError, match=r"page\.md, line 1: a block of code must be closed"):
        pages.split(page)
