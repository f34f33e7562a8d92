"""Does a test notice? Every operator, bound and number of the files in `KILLERS` is changed, one at a time, and tested.

``python bench/mutants.py [FILE…]`` works through the files of the package, in copies of the repository, prints the
mutants that no test killed, and counts all in tests/README.md. A mutant takes from some seconds to some minutes, all of
them take days: ``--sample N --seed S`` tries N, always the same ones, of each file in proportion to how many it has.
What was tried is kept in ``--log`` and not tried again, so that it may be stopped at any time; ``--list`` only counts.
Each is given to the tests of its file, fast ones first: the recorded bits, then those that `KILLERS` names.
"""

import argparse
import ast
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

from killers import HARMLESS, KILLERS, PACKAGE
from pages import TESTS, table, write_section

ROOT = Path(__file__).parent.parent
TIMEOUT = 600  # seconds; a mutant that takes longer hangs


class Mutant(NamedTuple):
    """One change: what stands from ``start`` to ``stop`` in a file, and what stands there then."""

    file: str
    line: int
    column: int
    start: int
    stop: int
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.before} → {self.after}"


# --- what is changed --------------------------------------------------------------------------------------------------
OPERATORS = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "*",
    ast.Pow: "*",
    ast.LShift: ">>",
    ast.RShift: "<<",
    ast.BitAnd: "|",
    ast.BitOr: "&",
    ast.BitXor: "&",
}
COMPARISONS = {
    ast.Lt: ["<=", ">"],
    ast.LtE: ["<", ">"],
    ast.Gt: [">=", "<"],
    ast.GtE: [">", "<"],
    ast.Eq: ["!="],
    ast.NotEq: ["=="],
    ast.Is: ["is not"],
    ast.IsNot: ["is"],
    ast.In: ["not in"],
    ast.NotIn: ["in"],
}
SWAPPED = {"min": "max", "max": "min", "lane_min": "lane_max", "lane_max": "lane_min"}


def mutants(file: str) -> Iterator[Mutant]:
    """All changes to a file, in the order of its lines."""
    text = (PACKAGE / file).read_text(encoding="utf-8")
    tree = ast.parse(text)
    lines = [0]
    for line in text.encode().splitlines(keepends=True):
        lines.append(lines[-1] + len(line))

    def span(node: Any) -> tuple[int, int]:
        return lines[node.lineno - 1] + node.col_offset, lines[node.end_lineno - 1] + node.end_col_offset

    def source(start: int, stop: int) -> str:
        return text.encode()[start:stop].decode()

    def change(node: Any, after: str, where: tuple[int, int] | None = None) -> Mutant:
        start, stop = where or span(node)
        line = bisect_right(lines, start)
        return Mutant(file, line, start - lines[line - 1], start, stop, source(start, stop), after)

    def between(left: Any, right: Any) -> tuple[int, int]:
        """Where the operator stands, parentheses left out."""
        start, stop = span(left)[1], span(right)[0]
        middle = source(start, stop)
        first = len(middle) - len(middle.lstrip(" )\n"))
        last = len(middle.rstrip(" (\n"))
        return start + len(middle[:first].encode()), start + len(middle[:last].encode())

    def visit(node: Any) -> Iterator[Mutant]:
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            yield change(node, OPERATORS[type(node.op)], between(node.left, node.right))
        elif isinstance(node, ast.AugAssign) and type(node.op) in OPERATORS:
            yield change(node, OPERATORS[type(node.op)] + "=", between(node.target, node.value))
            yield change(node, "pass")
        elif isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            for op, left, right in zip(node.ops, operands, operands[1:], strict=False):
                for after in COMPARISONS[type(op)]:
                    yield change(node, after, between(left, right))
        elif isinstance(node, ast.BoolOp):
            after = "or" if isinstance(node.op, ast.And) else "and"
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield change(node, after, between(left, right))
        elif isinstance(node, ast.UnaryOp):
            yield change(node, source(*span(node.operand)))
        elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
            if type(node.value) is bool:
                yield change(node, str(not node.value))
            elif type(node.value) is int:
                yield change(node, str(node.value + 1))
            else:
                yield change(node, repr(node.value * (1 + 2.0**-20) if node.value else 1.0))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name, arguments = node.func.id, node.args
            if name in SWAPPED:
                yield change(node.func, SWAPPED[name])
            if name == "where" and len(arguments) == 3:
                (a, b), (c, d) = span(arguments[1]), span(arguments[2])
                yield change(node, source(c, d) + source(b, c) + source(a, b), (a, d))
        elif isinstance(node, (ast.If, ast.While, ast.IfExp)) and not isinstance(node.test, (ast.Compare, ast.BoolOp)):
            yield change(node.test, f"not ({source(*span(node.test))})")
        elif isinstance(node, ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
            yield change(node, "pass")
        yield from inside(node)

    def inside(node: Any) -> Iterator[Mutant]:
        for field, value in ast.iter_fields(node):
            if field == "args" and is_flattening(node):
                continue
            if field in ("decorator_list", "annotation", "returns", "type_comment"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not is_for_the_reader(child):
                    yield from visit(child)

    yield from inside(tree)


def is_for_the_reader(node: ast.AST) -> bool:
    """Whether nothing depends on it: texts, ``zip(strict=True)``."""
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.keyword) and node.arg == "strict")


def is_flattening(node: ast.AST) -> bool:
    """Whether it is ``….reshape(-1)``, where any negative number will do."""
    return isinstance(node, ast.Call) and ast.unparse(node).endswith(".reshape(-1)")


# --- who kills --------------------------------------------------------------------------------------------------------
#: The smaller or larger of two, which may as well be equal; and from where on the more careful of two ways is taken.
SMALLER = re.compile(r"where\((.+?) [<>] (.+?), \1, \2\)|if careful or i \+ step > stop|[<>] (1\.0 / )?least")


def harmless(mutant: Mutant) -> bool:
    """Whether a mutant need not be killed."""
    line = (PACKAGE / mutant.file).read_text(encoding="utf-8").splitlines()[mutant.line - 1].strip()
    if mutant.after == f"{mutant.before}=" and SMALLER.search(line):
        return True
    return any(line.startswith(begin) and what in ("", mutant.before) for begin, what in HARMLESS)


def commands(file: str) -> Iterator[tuple[str, list[str]]]:
    """What is run for a file, by name, in this order."""
    cases, tests = KILLERS[file]
    if cases:
        yield "recorded bits", ["tests/recorded.py", "--first", *cases]
    options = ["-x", "-q", "-m", "not exhaustive", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    for test in tests.split():
        yield test, ["-m", "pytest", *options, f"tests/{test}.py"]


class Worker:
    """A copy of the repository in which one file at a time is changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name in listed.splitlines():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)

    def killer(self, todo: Iterable[tuple[str, list[str]]]) -> str | None:
        """The first command that fails; None if all is well."""
        environment = os.environ | {"PYTHONPATH": str(self.folder)}
        for name, command in todo:
            streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            with subprocess.Popen(
                [sys.executable, *command], cwd=self.folder, env=environment, start_new_session=True, **streams
            ) as process:
                try:
                    if process.wait(TIMEOUT):
                        return name
                except subprocess.TimeoutExpired:
                    return f"{name}, which hangs"
                finally:
                    with suppress(ProcessLookupError):  # all that it started
                        os.killpg(process.pid, signal.SIGKILL)
        return None

    def try_out(self, mutant: Mutant) -> str | None:
        """Who kills a mutant."""
        path = self.folder / "grpo_fast" / mutant.file
        text = path.read_bytes()
        try:
            path.write_bytes(text[: mutant.start] + mutant.after.encode() + text[mutant.stop :])
            return self.killer(commands(mutant.file))
        finally:
            path.write_bytes(text)


# --- which of them ----------------------------------------------------------------------------------------------------
def sample(by_file: Mapping[str, list[Mutant]], size: int, seed: int) -> list[Mutant]:
    """So many mutants, of each file in proportion to how many it has; the same ones for the same seed.

    The proportions are rounded so that they add up, by largest remainders. Of each file it is the beginning of one
    order drawn at random, by the seed and its name: what is drawn of it does not depend on the other files.
    """
    total = sum(map(len, by_file.values()))
    size = min(size, total)
    exact = {file: size * len(found) / total for file, found in by_file.items()}
    counts = {file: int(share) for file, share in exact.items()}
    by_remainder = sorted(exact, key=lambda file: (counts[file] - exact[file], file))
    for file in by_remainder[: size - sum(counts.values())]:
        counts[file] += 1
    drawn = {file: random.Random(f"{seed} {file}").sample(found, len(found)) for file, found in by_file.items()}
    return [mutant for file, count in counts.items() for mutant in sorted(drawn[file][:count])]


# --- trying them ------------------------------------------------------------------------------------------------------
def try_all(chosen: list[Mutant], jobs: int, log: Path) -> None:
    """Try mutants, if all is well without them; log, and print, who killed each."""
    with tempfile.TemporaryDirectory() as temporary, log.open("a", encoding="utf-8") as out:
        free: Queue[Worker] = Queue()
        for k in range(jobs):
            free.put(Worker(Path(temporary) / str(k)))
        done = itertools.count(1)

        @contextmanager
        def a_worker() -> Iterator[Worker]:
            worker = free.get()
            try:
                yield worker
            finally:
                free.put(worker)

        every_command = dict.fromkeys((name, *command) for m in chosen for name, command in commands(m.file))

        def unchanged(command: tuple[str, ...]) -> str | None:
            with a_worker() as worker:
                return worker.killer([(command[0], list(command[1:]))])

        def work(mutant: Mutant) -> None:
            with a_worker() as worker:
                killer = worker.try_out(mutant)
            print(json.dumps((str(mutant), killer)), file=out, flush=True)
            print(f"{next(done)}/{len(chosen)} {mutant}: {killer or 'SURVIVED'}", flush=True)

        with ThreadPoolExecutor(jobs) as pool:
            print("all tests of these files, without a mutant", flush=True)
            if failing := list(filter(None, pool.map(unchanged, every_command))):
                raise SystemExit(f"{', '.join(failing)} fails without a mutant")
            list(pool.map(work, chosen))


def logged(log: Path) -> dict[str, str | None]:
    """Who killed what was tried."""
    return dict(json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()) if log.exists() else {}


# --- what came of it --------------------------------------------------------------------------------------------------
def survivors(chosen: Iterable[Mutant], tried: Mapping[str, str | None]) -> list[Mutant]:
    """Those that no test killed, though they make something wrong."""
    return [m for m in chosen if str(m) in tried and tried[str(m)] is None and not harmless(m)]


def counts(by_file: Mapping[str, list[Mutant]], tried: Mapping[str, str | None]) -> Iterator[str]:
    """The table: of each file, and of all, how many there are, were tried, killed, are harmless, and survived."""
    rows = []
    for file, every in by_file.items():
        known = [m for m in every if str(m) in tried]
        killed = sum(tried[str(m)] is not None for m in known)
        survived = len(survivors(known, tried))
        rows.append([f"`{file}`", len(every), len(known), killed, len(known) - killed - survived, survived])
    rows.append(["all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])])
    yield from table(["file", "mutants", "tried", "killed", "harmless", "survived"], (map(str, row) for row in rows))


def main() -> None:
    """Try mutants of some files that were not tried before; print the survivors, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"of grpo_fast; all of {', '.join(KILLERS)} if none")
    parser.add_argument("--sample", type=int, metavar="N", help="try N of them (all)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="which sample that is (%(default)s)")
    parser.add_argument("--list", action="store_true", help="count the mutants of each file, and try none")
    parser.add_argument("--print", action="store_true", help="print the table instead of writing it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="copies to work in (%(default)s)")
    parser.add_argument("--log", type=Path, default=Path("mutants.jsonl"), help="what was tried, and who killed it")
    arguments = parser.parse_args()
    if unknown := [file for file in arguments.files if file not in KILLERS]:
        parser.error(f"no tests are named for {', '.join(unknown)}")
    if arguments.sample is not None and arguments.sample < 1:
        parser.error(f"--sample must be at least 1, got {arguments.sample}")
    by_file = {file: list(mutants(file)) for file in KILLERS}
    of_files = {file: by_file[file] for file in arguments.files or KILLERS}
    chosen = [mutant for found in of_files.values() for mutant in found]
    if arguments.sample:
        chosen = sample(of_files, arguments.sample, arguments.seed)
    if arguments.list:
        print(*(f"{count:5} {file}" for file, count in Counter(m.file for m in chosen).items()), sep="\n")
        return
    tried = logged(arguments.log)
    if todo := [m for m in chosen if str(m) not in tried]:
        try_all(todo, arguments.jobs, arguments.log)
    tried = logged(arguments.log)
    print("survived:", *survivors(chosen, tried), sep="\n")
    if arguments.sample:
        tried = {str(mutant): tried[str(mutant)] for mutant in chosen}
    of_sample = ["--sample", str(arguments.sample), "--seed", str(arguments.seed)] if arguments.sample else []
    command = " ".join(["python", "bench/mutants.py", *arguments.files, *of_sample])
    lines = [f"`{command}`:", "", *counts(by_file, tried)]
    if arguments.print:
        print(*lines, sep="\n")
    else:
        write_section(TESTS, "mutants", "Mutants", lines)


if __name__ == "__main__":
    main()
