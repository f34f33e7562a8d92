"""What the README's figures are written with: tables, and where they go."""

from collections.abc import Iterable, Iterator
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """The lines of a Markdown table."""
    head = list(head)
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def write_between(name: str, lines: Iterable[str]) -> None:
    """Replace what stands between two markers of the README."""
    text = README.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    README.write_text(before + begin + "\n" + "\n".join(lines).rstrip() + "\n" + end + after, encoding="utf-8")
