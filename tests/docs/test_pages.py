"""Every page runs as it stands, and every link of it leads somewhere."""

import re

import pages
import pytest

import adafactor

each = pytest.mark.parametrize("page", pages.CHECKED, ids=pages.name)


@pytest.mark.parametrize("page", pages.RUN, ids=pages.name)
def test_every_block_runs(page, ran):
    ran(page)


@each
def test_every_link_leads_somewhere(page):
    assert pages.broken(page) == []


@each
def test_blocks_that_do_not_run_are_few(page):
    languages = re.findall(r"^```(\S*)\n.*?^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    assert set(languages) <= {"python", "py", "sh", "json", "toml", ""}
    assert languages.count("py") <= 2


def test_the_index_lists_every_page_once():
    index = pages.ROOT / "docs" / "index.md"
    listed = re.findall(r"^- \[[^\]]+\]\(([\w-]+\.md)\): ", index.read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in pages.DOCS if page != index)


def test_the_citation_is_of_this_version():
    assert f"\nversion: {adafactor.__version__}\n" in (pages.ROOT / "CITATION.cff").read_text()


PAGE = """# A heading, `code()` and a [link](#a-heading-code-and-a-link)

[good](#a-heading-code-and-a-link) and `[not a link](nowhere.md)` and [elsewhere](https://arxiv.org/abs/1804.04235)

```python
[also](not-a-link.md)
```

See [this](nowhere.md), [that](#no-heading), ![an image](images/none.png) and tests/docs/test_nothing.py.
"""


def test_what_is_broken_is_said(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert pages.broken(page) == [
        "page.md: nowhere.md leads nowhere.",
        "page.md: #no-heading names no heading of page.md.",
        "page.md: images/none.png leads nowhere.",
        "page.md: there is no file tests/docs/test_nothing.py.",
    ]


RUNS = """# Page

```python
x = 1
```

text

<!--- invisible-code-block: python
y = x
-->

```python
assert y == 2
```

```py
...
```
"""


def test_a_block_that_fails_says_where(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(RUNS)
    with pytest.raises(AssertionError) as failure:
        pages.run(page, tmp_path)
    assert failure.traceback[-1].path == page
    assert failure.traceback[-1].lineno + 1 == RUNS.splitlines().index("assert y == 2") + 1
    page.write_text(RUNS.replace("y == 2", "y == 1"))
    assert pages.run(page, tmp_path)["y"] == 1
    page.write_text("```python\nx = 1\n\nA block that nobody closed.\n")
    with pytest.raises(SyntaxError):
        pages.run(page, tmp_path)
