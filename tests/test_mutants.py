"""A sample of mutants is the same again, spread over the files as the mutants are, and what was tried is not again."""

import json
import sys
from collections import Counter
from pathlib import Path

import mutants
import pytest
from killers import KILLERS
from mutants import sample

EVERY = {file: list(mutants.mutants(file)) for file in KILLERS}
ALL = [mutant for found in EVERY.values() for mutant in found]


def test_no_two_mutants_have_one_name():
    assert len({str(mutant) for mutant in ALL}) == len(ALL) > 1000


def test_a_mutant_is_one_change_where_it_says():
    for mutant in ALL[::97]:
        text = (mutants.PACKAGE / mutant.file).read_bytes()
        assert text[mutant.start : mutant.stop].decode() == mutant.before != mutant.after
        line = text.splitlines()[mutant.line - 1]
        assert line[mutant.column :].startswith(mutant.before.encode().splitlines()[0])


@pytest.mark.parametrize("size", [1, 2, 23, 200, 1001])
def test_a_sample_is_spread_in_proportion(size):
    chosen = sample(EVERY, size, 0)
    assert len(set(chosen)) == len(chosen) == size
    counts = Counter(mutant.file for mutant in chosen)
    assert all(abs(counts[file] - size * len(found) / len(ALL)) < 1 for file, found in EVERY.items())


def test_a_sample_is_fixed_by_its_seed():
    assert sample(EVERY, 200, 0) == sample(EVERY, 200, 0)
    # 16 of the 200 are in both of two independent samples on average; a third of them never.
    assert len(set(sample(EVERY, 200, 0)) & set(sample(EVERY, 200, 1))) < 67
    assert sorted(sample(EVERY, 10**6, 0)) == sorted(ALL)


def test_what_is_drawn_of_a_file_does_not_depend_on_others():
    file = "_kernels/elementary.py"
    of_it = [mutant for mutant in sample(EVERY, 200, 0) if mutant.file == file]
    assert of_it == sample({file: EVERY[file]}, len(of_it), 0)


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs the script, with a log of its own; what is tried, is killed by the word "test"."""
    tried = []

    def try_all(chosen, jobs, log):
        tried.append(list(chosen))
        with log.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps((str(mutant), "test")) + "\n" for mutant in chosen)

    page = tmp_path / "README.md"
    page.write_text("# What was tried\n", encoding="utf-8")
    monkeypatch.setattr(mutants, "try_all", try_all)
    monkeypatch.setattr(mutants, "TESTS", page)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mutants.py", "--log", str(tmp_path / "log"), *arguments])
        mutants.main()
        return tried, page

    return run


def test_what_was_tried_is_not_tried_again(command, tmp_path):
    tried, _ = command("--sample", "30", "--print")
    chosen = sample(EVERY, 30, 0)
    assert tried == [chosen]
    log = tmp_path / "log"
    log.write_text("".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[:20]), encoding="utf-8")
    tried, _ = command("--sample", "30", "--print")  # as after it was stopped
    assert tried == [chosen, chosen[20:]]
    tried, _ = command("--sample", "30", "--print")
    assert len(tried) == 2


def test_the_page_gets_a_section_once_they_are_tried(command, capsys):
    _, page = command("--sample", "30", "--print")
    assert page.read_text(encoding="utf-8") == "# What was tried\n"
    assert f"| all | {len(ALL)} | 30 | 30 | 0 | 0 |" in capsys.readouterr().out
    for seed in ("0", "1"):
        _, page = command("--sample", "30", "--seed", seed)
        text = page.read_text(encoding="utf-8")
        assert text.count("## Mutants") == 1
        assert f"\n`python bench/mutants.py --sample 30 --seed {seed}`:\n" in text  # without the path of the log
        assert f"| all | {len(ALL)} | 30 | 30 | 0 | 0 |" in text  # of this sample alone


@pytest.mark.parametrize("wrong", [["--sample", "0"], ["no_such.py"]])
def test_bad_arguments_are_refused(command, wrong):
    with pytest.raises(SystemExit) as raised:
        command(*wrong)
    assert raised.value.code == 2


def test_all_files_are_there():
    assert [file for file in KILLERS if not (mutants.PACKAGE / file).exists()] == []
    tests = {test for _, killers in KILLERS.values() for test in killers.split()}
    assert [test for test in tests if not Path(mutants.ROOT, "tests", f"{test}.py").exists()] == []
