"""The pages that hold measured numbers: how a table is spelled, and the marked places in which it is written.

Such a place is what stands between ``<!-- name -->`` and ``<!-- /name -->``.
"""

import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
README, GUIDE = ROOT / "README.md", ROOT / "grpo_fast" / "README.md"
BENCH, TESTS = ROOT / "bench" / "README.md", ROOT / "tests" / "README.md"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """The lines of a Markdown table."""
    head = list(head)
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def prose(text: str) -> Iterator[str]:
    """The lines of a paragraph."""
    yield from textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)
    yield ""


def places(text: str) -> dict[str, str]:
    """What stands in each marked place of a page; a ValueError if a marker has no other, or its name is there twice."""
    names = re.findall(r"<!-- ([\w-]+) -->", text)
    if (closed := re.findall(r"<!-- /([\w-]+) -->", text)) != names or len({*names}) < len(names):
        raise ValueError(f"markers open {', '.join(names)} and close {', '.join(closed)}")
    return {name: text.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0].strip() for name in names}


def write_between(page: Path, name: str, lines: Iterable[str]) -> None:
    """Replace what stands in a marked place of a page; a ValueError if the page has none, or nothing is to stand there.

    Blank lines are kept around it: inside ``<details>`` a table is one only after a blank line.
    """
    text = page.read_text(encoding="utf-8")
    if name not in places(text):
        raise ValueError(f"{page} has no <!-- {name} --> … <!-- /{name} --> to write between")
    written = "\n".join(lines).strip()
    if not written:
        raise ValueError(f"nothing to write between the markers {name} of {page}")
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, after = text.split(begin)[0], text.split(end)[1]
    page.write_text(f"{before}{begin}\n\n{written}\n\n{end}{after}", encoding="utf-8")


def write_section(page: Path, name: str, heading: str, lines: Iterable[str]) -> None:
    """`write_between`, into a new section with this heading, at the end of the page, if there is no such place yet."""
    text = page.read_text(encoding="utf-8")
    if name not in places(text):
        section = f"\n## {heading}\n\n<!-- {name} -->\n<!-- /{name} -->\n"
        page.write_text(text.rstrip("\n") + "\n" + section, encoding="utf-8")
    write_between(page, name, lines)
