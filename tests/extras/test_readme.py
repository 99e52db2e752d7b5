"""The lesson: what the documentation says can be run, and what it points to is there."""
import contextlib
import io
import platform
import re

import pytest
from tests.conftest import ROOT

PAGES = [ROOT / name for name in ("README.md", "extras/README.md", "CONTRIBUTING.md", "docs/memory.md", "docs/numerics.md",
                                  "docs/robustness.md")]


def anchors(page):
    """The names under which a page's headings can be linked to."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """A file is there, a heading too, and a line is the first one of the function that the link names."""
    links = re.findall(r"\[([^\]]*)\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text())
    assert links or page.name != "README.md"
    for words, file, place in links:
        target = page.parent / file if file else page
        assert target.exists(), file
        if line := re.fullmatch(r"L(\d+)", place):
            assert f"def {words.strip('`')}(" in target.read_text().splitlines()[int(line[1]) - 1], words
        elif place:
            assert place in anchors(target), f"{file}#{place}"


def test_the_python_of_the_readme_does_what_the_command_does(nowhere, monkeypatch):
    """Its lines as they stand: the same layers, and the perplexities of the table and of the comments beside them."""
    readme = (ROOT / "README.md").read_text()
    code, = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    (nowhere / "data").symlink_to(ROOT / "data")
    names, out = {}, io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, names)
    printed = [float(line) for line in out.getvalue().splitlines()]
    said = re.findall(r"# (\d\d\.\d\d)", code)
    table = re.findall(r"\| (?:dense|GRASP) \|.*\| +(\d\d\.\d\d) \|", readme)
    assert said == table[:2] and len(said) == 2
    version = re.search(r"Python ([\d.]+)'s language reference", readme)[1]
    near = printed == pytest.approx([float(figure) for figure in said], rel=2e-3)  # the processor decides on more digits
    assert near or platform.python_version() != version  # the embedded text is that of each Python
    assert names["redundant"] == [3, 5] and len(names["records"]) == 14 and (nowhere / "tiny-grasp/report.json").is_file()
