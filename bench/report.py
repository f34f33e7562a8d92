"""Measure everything, and write the tables and pictures of bench/README.md and README.md.

``python bench/report.py`` runs the suites, which takes half an hour, more where other programs disturb it, and some GB
of memory, and writes; ``--quick`` (some minutes) measures small sizes, and prints. ``python bench/report.py
results.json …`` writes from what pytest-benchmark saved before, in seconds. At the end it says which peers did not take
part, and why.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import speed_tables
from pages import BENCH, README, write_between
from pictures import draw_bars, draw_sizes
from results import Results
from targets import targets

HERE = Path(__file__).parent
PLACES: dict[Path, dict[str, Callable[[Results], Iterator[str]]]] = {
    BENCH: {
        "machine": speed_tables.about,
        "objective": speed_tables.objective,
        "loss": speed_tables.loss,
        "torch": speed_tables.torch,
        "correction": speed_tables.correction,
        "files": speed_tables.files,
        "threads": speed_tables.threads,
        "floor": speed_tables.floor,
        "targets": targets,
    },
    README: {"speed": speed_tables.summary},
}
PICTURES = {HERE / "speed.svg": draw_bars, HERE / "sizes.svg": draw_sizes}


def measure(quick: bool, folder: Path) -> list[Path]:
    """Run the suites, each in a process of its own: what one leaves in memory does not slow the next."""
    options = ["--benchmark-columns=median,iqr,rounds", "-q", "-rs", "-p", "no:cacheprovider"]
    options += ["--quick", "--seconds=0.5"] if quick else []
    suites, saved = sorted(HERE.glob("bench_*.py")), []
    for number, suite in enumerate(suites, start=1):
        print(f"suite {number} of {len(suites)}: {suite.stem}", flush=True)
        saved.append(folder / f"{suite.stem}.json")
        command = [sys.executable, "-m", "pytest", str(suite), f"--benchmark-json={saved[-1]}", *options]
        subprocess.run(command, cwd=HERE.parent, check=True)
    return [path for path in saved if path.exists()]


def write(results: Results) -> None:
    """Write all tables and pictures of which something was measured, and tell of the others."""
    for page, places in PLACES.items():
        for name, lines_of in places.items():
            if lines := list(lines_of(results)):
                write_between(page, name, lines)
            else:
                print(f"{name} in {page.relative_to(HERE.parent)} stays as it is: nothing of it was measured")
    for path, draw in PICTURES.items():
        if not draw(results, path):
            print(f"{path.relative_to(HERE.parent)} stays as it is: nothing of it was measured")


def main() -> None:
    """Measure unless told where the results are; write, or print; say who did not take part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*", help="what pytest --benchmark-json saved")
    parser.add_argument("--quick", action="store_true", help="small sizes only, and print instead of writing")
    parser.add_argument("--keep", type=Path, help="a folder for what pytest-benchmark saves")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        results = Results(arguments.results or measure(arguments.quick, folder))
    if arguments.quick:
        for places in PLACES.values():
            for name, lines_of in places.items():
                print(f"\n{name}\n", *lines_of(results), sep="\n")
    else:
        write(results)
    print(*speed_tables.missing(results), sep="\n")


if __name__ == "__main__":
    main()
