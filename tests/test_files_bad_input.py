"""What is bad in a file is refused, with file, row group, row and column; and arguments that do not fit, by name."""

import numpy as np
import pytest
from interpreter import python

from grpo_fast import BLOCK, K3
from grpo_fast.files import sweep

pa = pytest.importorskip("pyarrow", reason="files need pip install 'grpo_fast[data]'")
from rollout_files import FORMATS, GRID, OPTIONS, probabilities, refused, table, tokens, write  # noqa: E402


def rows_of(arrays):
    """A table as lists of Python numbers, in which anything can be put."""
    return table(arrays).to_pydict()


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("batch_size", [1, 5, None])
def test_a_bad_number_is_found(suffix, batch_size, tmp_path):
    for bad, message in (
        (None, "column 'logps' has a null in a list"),
        (np.nan, r"logps must be finite where it is not masked, got logps\[2\] = nan"),
    ):
        rows = rows_of(tokens(20, longest=9))
        row = next(i for i, x in enumerate(rows["logps"]) if i > 12 and len(x) > 2)
        rows["logps"][row][2] = bad
        whole = pa.table(rows)
        path = write(tmp_path / f"rollouts.{suffix}", whole.slice(0, 8), whole.slice(8))
        unit = "row group" if suffix == "parquet" else "record batch"
        refused(rf"rollouts.{suffix}, {unit} 1, row {row - 8}: {message}", path, batch_size=batch_size, **OPTIONS)


def test_a_bad_row_is_found(tmp_path):
    rows = rows_of(tokens(20, longest=9))
    row = next(i for i, x in enumerate(rows["logps"]) if i > 12 and x)
    for name, bad, message in (
        ("advantages", None, "column 'advantages' has a null"),
        ("logps", None, "column 'logps' has a null"),
        ("advantages", np.inf, r"advantages must be finite where it is not masked, got advantages\[0\] = inf"),
        ("ref_logps", [0.0] * 20, r"lists must be of one length, got 20 in column 'ref_logps', \d in 'logps'"),
    ):
        changed = rows | {name: [*rows[name][:row], bad, *rows[name][row + 1 :]]}
        path = write(tmp_path / "rollouts.parquet", pa.table(changed))
        refused(f"row group 0, row {row}: {message}", path, **OPTIONS)
    rows = rows_of(probabilities(3 * BLOCK))
    rows["A"][2 * BLOCK + 5] = -np.inf
    path = write(tmp_path / "rollouts.parquet", pa.table({"ρ": rows.pop("rhos")} | rows))
    message = rf"row {2 * BLOCK + 5}: A must be finite, got A\[0\] = -inf \(rhos is column 'ρ'\)"
    refused(message, path, columns={"rhos": "ρ"}, batch_size=BLOCK)
    refused(message, path, columns={"rhos": "ρ"}, call=sweep, **GRID)


def test_columns_that_do_not_fit(tmp_path):
    def file(name, **columns):
        return write(tmp_path / f"{name}.parquet", pa.table(columns))

    x, many, text = [1.0, 2.0], [[1.0], [2.0]], ["a", "b"]
    refused("m.parquet: column 'pi_theta_ref' is missing; it has rhos, A, pi", file("m", rhos=x, A=x, pi_theta_old=x))
    refused(r"column 'z' \(for A\) is missing", file("z", rhos=x, A=x), columns={"A": "z"}, beta=0)
    refused(
        "'old_logps' is missing.*if there is none, columns={'old_logps': None}", file("o", logps=many, advantages=x)
    )
    refused("'ref_logps' is missing", file("r", logps=many, old_logps=many, advantages=x), **OPTIONS)
    refused(
        "t.parquet: column 'A' must hold real numbers, or lists of them, got string", file("t", rhos=x, A=text), beta=0
    )
    refused("must hold bools or 0/1", file("b", logps=x, old_logps=x, advantages=x, mask=text), aggregation="token-sum")
    refused("'old_logps' holds numbers, but column 'logps' lists", file("l", logps=many, old_logps=x, advantages=x))
    refused("'A' holds lists, but column 'rhos' numbers", file("n", rhos=x, A=many), beta=0)
    refused("must have either rhos.* or logps.*, got both in rhos, logps", file("2", rhos=x, logps=x))
    refused("must have either rhos.* or logps.*, got neither in A, mask", file("0", A=x, mask=x))
    one = file("1", logps=many, old_logps=many, advantages=x)
    refused("3.parquet differs from .*1.parquet", [one, file("3", logps=many, old_logps=many, advantages=x, mask=many)])
    refused("4.parquet: column 'logps' is missing", [one, file("4", old_logps=x, advantages=x)])
    refused("5.parquet: no rows", write(tmp_path / "5.parquet", pa.table({"rhos": x, "A": x}).slice(0, 0)), beta=0)
    table_of_two = pa.table([x, x, x], names=["rhos", "A", "A"])
    refused("column 'A' is there more than once", write(tmp_path / "6.parquet", table_of_two), beta=0)


def test_arguments_that_do_not_fit(tmp_path):
    path = write(tmp_path / "a.parquet", table(probabilities(10)))
    other = write(tmp_path / "b.parquet", table(tokens(3)))
    refused("no such file: .*nothing", tmp_path / "nothing.parquet", error=FileNotFoundError)
    refused(r"no such file: .*\*.csv", str(tmp_path / "*.csv"), error=FileNotFoundError)
    refused(r"is a directory; name its files, for example .*\*.parquet", tmp_path)
    refused("a.parquet is named twice", [path, str(tmp_path / "*.parquet")])
    refused("paths must name at least one file", [])
    refused("columns must name arguments among rhos.*'what'", path, columns={"what": "A"})
    refused("columns must have either rhos.*got both", path, columns={"rhos": "rhos", "logps": "logps"})
    refused(r"columns\['rhos'\] must be the name of a column, got None", path, columns={"rhos": None}, error=TypeError)
    refused("columns must map", path, columns=["rhos"], error=TypeError)
    for batch_size in (0, 1.5, True):
        refused("batch_size must be an int of at least 1", path, batch_size=batch_size)
    refused("executor must be", path, executor=2, error=TypeError)
    allowed = "options of probability columns are epsilon, beta, importance_weighted; got kl"
    refused(allowed, path, kl=K3(0.1), error=TypeError)
    refused("importance_weighted must be True or False, got 0", path, importance_weighted=0, error=TypeError)
    refused("columns are .*; got importance_weighted", other, importance_weighted=False, error=TypeError)
    refused("options of log-probability columns are surrogate, .*; got epsilon", other, epsilon=0.1, error=TypeError)
    refused("epsilon must be", path, epsilon=-1)
    refused("beta must be", path, beta=-1)
    refused("^aggregation must be one of", other, aggregation="mean")
    refused("^epsilon must be", path, call=sweep, epsilons=-2, betas=0)
    refused("columns are importance_weighted; got epsilon", path, call=sweep, epsilon=0.1, **GRID, error=TypeError)
    message = "^importance_weighted must be True or False, got None"
    refused(message, path, call=sweep, importance_weighted=None, **GRID, error=TypeError)
    refused("columns are kl, aggregation, normalizer; got sur", other, call=sweep, surrogate=1, **GRID, error=TypeError)
    refused("kl must be K1, K2, K3 or a function", other, call=sweep, kl=K3(0.1), **GRID, error=TypeError)


def test_files_of_another_format(tmp_path):
    text, stream = tmp_path / "a.csv", tmp_path / "b.arrow"
    text.write_text("rhos,A\n1,1\n")
    refused(r"a.csv: neither a Parquet nor an Arrow IPC file: it begins with b'rhos,A'", text)
    whole = table(probabilities(10))
    with pa.ipc.new_stream(stream, whole.schema) as file:
        file.write_table(whole)
    refused("b.arrow: neither .*stream of Arrow IPC is refused", stream)


def test_without_pyarrow():
    script = """
import sys
sys.modules["pyarrow"] = None
import grpo_fast
try:
    grpo_fast.evaluate("x.parquet")
except ImportError as error:
    print(error)
"""
    assert python(script) == "reading rollouts needs pyarrow: pip install 'grpo_fast[data]'\n"
