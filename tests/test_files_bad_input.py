"""What is bad in a file is refused, with file, row group, row and column; and arguments that do not fit, by name."""

import gzip
import io
import json
import pickle
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from interpreter import python

from grpo_fast import BLOCK, K1, K2, K3, _columns, evaluate
from grpo_fast.files import sweep

pa = pytest.importorskip("pyarrow", reason="files need pip install 'grpo_fast[data]'")
from rollout_files import FORMATS, GRID, OPTIONS, probabilities, refused, table, tokens, write  # noqa: E402

from grpo_fast import _formats  # noqa: E402 - needs pyarrow


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
    refused("a.parquet is named twice", [path, str(tmp_path / "*.parquet")])
    refused("paths must name at least one file", [])
    refused("columns must name arguments among rhos.*'what'", path, columns={"what": "A"})
    refused("columns must have either rhos.*got both", path, columns={"rhos": "rhos", "logps": "logps"})
    refused(r"columns\['rhos'\] must be the name of a column, got None", path, columns={"rhos": None}, error=TypeError)
    refused("columns must map", path, columns=["rhos"], error=TypeError)
    for batch_size in (0, 1.5, True):
        refused("batch_size must be an int of at least 1", path, batch_size=batch_size)
    for executor in (2, ThreadPoolExecutor):
        message = r"executor must be a concurrent.futures.Executor, got (2|<class .*ThreadPoolExecutor'>)$"
        refused(message, path, executor=executor, error=TypeError)
    allowed = "options of probability columns are epsilon, beta, importance_weighted; got kl"
    refused(allowed, path, kl=K3(0.1), error=TypeError)
    in_surrogate = r"got epsilon: it is a part of surrogate, as in surrogate=Clip\(epsilon=…\)"
    refused(in_surrogate, other, epsilon=0.1, error=TypeError)
    refused("importance_weighted must be True or False, got 0", path, importance_weighted=0, error=TypeError)
    refused("columns are .*; got importance_weighted", other, importance_weighted=False, error=TypeError)
    refused("options of log-probability columns are surrogate, .*; got epsilon", other, epsilon=0.1, error=TypeError)
    refused("epsilon must be", path, epsilon=-1)
    refused("beta must be", path, beta=-1)
    refused("^aggregation must be one of", other, aggregation="mean")
    refused("^epsilon must be", path, call=sweep, epsilons=-2, betas=0)
    refused("columns are importance_weighted; got kl", path, call=sweep, kl=K3, **GRID, error=TypeError)
    message = "^importance_weighted must be True or False, got 1"
    refused(message, path, call=sweep, importance_weighted=1, **GRID, error=TypeError)
    for weighted in (True, False):
        message = rf"part of kl: kl=functools.partial\(K3, importance_weighted={weighted}\)$"
        refused(message, other, call=sweep, importance_weighted=weighted, **GRID, error=TypeError)
        sweep(other, kl=partial(K3, importance_weighted=weighted), **GRID)
    for term, made in (
        (lambda beta: K3(2 * beta), r"K3\(beta=0.04\), got K3\(beta=0.08\)"),
        (lambda beta: K1(beta) if beta < 1 else K2(beta), r"K2\(beta=0.04\), got K1\(beta=0.04\)"),
        (lambda beta: K3(beta, beta > 0.5), r"K3\(beta=0.04\), got K3\(beta=0.04, importance_weighted=False\)"),
    ):
        message = "^kl must return the same KL term for every β, with that β: for 0.04 "
        refused(message + made, other, call=sweep, kl=term, **GRID)
    sweep(other, kl=lambda beta: K3(beta) if beta else None, **GRID)  # which is not asked for
    refused("delta must be a number above", other, call=sweep, delta=1.15, **GRID)
    refused("kl must be K1, K2, K3 or a function", other, call=sweep, kl=K3(0.1), **GRID, error=TypeError)


def test_what_a_kl_term_needs_cannot_be_left_out(tmp_path):
    of_tokens = write(tmp_path / "a.parquet", table(tokens(3)))
    of_samples = write(tmp_path / "b.parquet", table(probabilities(10)))
    for path, name, options in (
        (of_tokens, "ref_logps", OPTIONS),
        (of_samples, "pi_theta_ref", {}),
        (of_samples, "pi_theta_old", {"call": sweep, **GRID}),
    ):
        message = f"^columns={{'{name}': None}} leaves out what the KL term needs: name the column, or compute without"
        refused(message, path, columns={name: None, "A" if path is of_samples else "logps": "nothing"}, **options)
    assert evaluate(of_tokens, columns={"logps": "logps", "ref_logps": None}).sequences == 3
    assert evaluate(of_samples, columns={"rhos": "rhos", "pi_theta_ref": None}, beta=0).tokens == 10


def test_files_of_another_format(tmp_path):
    text, stream = tmp_path / "a.csv", tmp_path / "b.arrow"
    text.write_text("rhos,A\n1,1\n")
    refused(r"a.csv is text: convert it with pyarrow", text)
    whole = table(probabilities(10))
    with pa.ipc.new_stream(stream, whole.schema) as file:
        file.write_table(whole)
    with pytest.raises(ValueError, match=r"b.arrow is a stream of Arrow IPC, .*: write it again with ") as raised:
        evaluate(stream)
    run(str(raised.value).partition("again with ")[2], "pyarrow")
    assert evaluate(tmp_path / "b.parquet") == evaluate(write(tmp_path / "right.parquet", whole))


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


# --- what is no file of rollouts --------------------------------------------------------------------------------------
class DataFrame(dict):
    """Iterating one gives the names of columns, as of pandas'."""


class LazyFrame:
    pass


@pytest.mark.parametrize(
    ("package", "kind", "written"),
    [
        (
            "pandas",
            DataFrame,
            "a DataFrame of pandas: write it into a file, x.to_parquet('rollouts.parquet'), and name",
        ),
        (
            "polars",
            DataFrame,
            "a DataFrame of polars: write it into a file, x.write_parquet('rollouts.parquet'), and na",
        ),
        (
            "polars",
            LazyFrame,
            "a LazyFrame of polars: write it into a file, x.sink_parquet('rollouts.parquet'), and na",
        ),
        ("datasets", DataFrame, "a DataFrame of datasets: write it into a file, x.to_parquet('rollouts.parquet')"),
    ],
)
def test_frames_say_how_they_become_files(package, kind, written):
    class Frame(kind):
        pass

    Frame.__name__, Frame.__module__ = kind.__name__, f"{package}.core.frame"
    message = re.escape(f"paths must be a path or an iterable of them, got {written}")
    refused(message, Frame(), error=TypeError)
    refused(message, Frame(), error=TypeError, call=sweep, **GRID)
    refused(re.escape(written), [Frame()], error=TypeError)


def test_what_is_in_memory_says_how_it_becomes_a_file(tmp_path):
    arrays = probabilities(10)
    refused("got a dict: arrays in memory are for grpo_loss", arrays, error=TypeError)
    refused("got an ndarray: arrays in memory are for grpo_loss", arrays["A"], error=TypeError)
    path = write(tmp_path / "a.parquet", table(arrays))
    message = "got a BytesIO: write it into a file, pathlib.Path('rollouts.parquet').write_bytes(x.getvalue()), and na"
    refused(re.escape(message), io.BytesIO(path.read_bytes()), error=TypeError)
    with path.open("rb") as file:
        refused(re.escape(f"name the file instead, {str(path)!r}"), file, error=TypeError)
    refused("got None$", None, error=TypeError)
    refused("got 3 among them", [path, 3], error=TypeError)


class Series(list):
    """As of pandas or polars."""

    def __array__(self):
        raise AssertionError("nobody looks at the numbers")

    @property
    def shape(self):
        return (len(self),)


Series.__module__ = "pandas.core.series"


def test_arrays_and_series_of_paths_are_iterables_of_them(tmp_path):
    paths = [str(write(tmp_path / f"{name}.parquet", table(probabilities(10)))) for name in "ab"]
    expected = evaluate(paths)
    for kind in (np.array, Series, partial(np.array, dtype=object), lambda x: np.array([name.encode() for name in x])):
        assert evaluate(kind(paths)) == expected
    assert evaluate(Series(map(Path, paths))) == expected
    refused("got a Series: arrays in memory are for grpo_loss", Series([1.0]), error=TypeError)
    refused("got an ndarray: arrays in memory are for grpo_loss", np.array([paths]), error=TypeError)
    refused("got an ndarray: arrays in memory are for grpo_loss", np.array([]), error=TypeError)
    refused("got 3 among them", np.array([paths[0], 3], object), error=TypeError)


def test_what_is_advised_overwrites_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rollouts.parquet").touch()
    refused(r"Path\('rollouts-2.parquet'\)", io.BytesIO(), error=TypeError)


def run(code, imports):
    """What a message advises."""
    exec(f"import {imports}, pyarrow, pyarrow.parquet\n{code}", {})


def test_json_and_csv_say_what_converts_them_and_that_does(tmp_path):
    rows = rows_of(tokens(3, longest=5))
    expected = evaluate(write(tmp_path / "right.parquet", table(tokens(3, longest=5))), **OPTIONS)
    lines = [json.dumps({name: column[i] for name, column in rows.items()}) for i in range(3)]
    path = tmp_path / "b.json"
    path.write_text(f"[{','.join(lines)}]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"b.json is JSON, but not a line for each row: convert it with ") as raised:
        evaluate(path)
    run(str(raised.value).partition("convert it with ")[2], "json, pathlib")
    assert evaluate(path.with_suffix(".parquet"), **OPTIONS) == expected
    path = tmp_path / "d.csv"
    path.write_text("rhos,A,pi_theta_old,pi_theta_ref\n1.1,1,0.5,0.5\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"d\.csv is text: convert it with ") as raised:
        evaluate(path)
    run(str(raised.value).partition("convert it with ")[2], "pyarrow.csv")
    assert evaluate(tmp_path / "d.parquet").tokens == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x is empty"),
        (gzip.compress(b"PAR1", mtime=0), "x is compressed with gzip: gunzip < .*x > .*x-2 first"),
        (b"\x28\xb5\x2f\xfd0000", "x is compressed with zstd: zstd --decompress < .*x > .*x-2 first"),
        (b"BZh91AY", "x is compressed with bzip2: bunzip2 < .*x > .*x-2 first"),
        (b"PARE0000", r"x is encrypted Parquet: .*read_table\(.*, decryption_properties=…\), 'plain.parquet'\)"),
        (b"PK\x03\x0400", r"x is a zip archive, as .npz and .pt are: load it, and give its arrays to grpo_loss"),
        (b"\x93NUMPY\x01", r"x is a NumPy array: load it"),
        (b"FEA1\x00\x00", r"x is Feather of version 1: .*pyarrow.feather.read_table"),
        (
            b"\x00\x01\x02",
            r"x is neither a Parquet, .* nor a JSON Lines file: it begins with b'\\x00\\x01\\x02'",
        ),
    ],
)
def test_other_files_say_what_they_are(content, message, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(content)
    refused(message, path)


def test_encrypted_columns_say_so(tmp_path, monkeypatch):
    def raises(path):
        raise pa.ArrowInvalid("Cannot decrypt {ColumnMetadata}. FileDecryption is not setup correctly")

    monkeypatch.setattr(_formats, "ParquetFile", raises)
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"x.parquet: cannot be read: Cannot decrypt .*To write it in plain") as error:
        evaluate(path)
    assert "in plain: pyarrow.parquet.write_table(" in str(error.value)
    assert "in plain: python -c 'import pyarrow.parquet; pyarrow.parquet.write_table(" in error.value.in_shell()


def test_a_name_does_not_encrypt(tmp_path):
    path = tmp_path / "decrypted.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"decrypted\.parquet: cannot be read: ") as error:
        evaluate(path)
    assert "in plain" not in str(error.value)


def test_advice_overwrites_nothing(tmp_path):
    """What is advised writes where nothing is, whatever the file is called, also one that a shell would cut up."""
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    good = write(folder / "rollouts.parquet", table(tokens(3, longest=5)))
    expected, content = evaluate(good, **OPTIONS), good.read_bytes()
    rows = json.dumps(table(tokens(3, longest=5)).to_pylist())
    for name, written in (("rollouts.json", "rollouts-2.parquet"), ("b.parquet", "b-2.parquet")):
        path = folder / name
        path.write_text(rows, encoding="utf-8")
        with pytest.raises(ValueError, match="is JSON, but not a line for each row: convert it with ") as raised:
            evaluate(path)
        run(str(raised.value).partition("convert it with ")[2], "json, pathlib")
        assert path.read_text(encoding="utf-8") == rows
        assert evaluate(folder / written, **OPTIONS).loss == pytest.approx(expected.loss)
    for name, written in (("rollouts.parquet.gz", "rollouts-3.parquet"), ("c", "c-2"), ("d.parquet", "d-2.parquet")):
        path = folder / name
        path.write_bytes(gzip.compress(content))
        with pytest.raises(ValueError, match="is compressed with gzip: ") as raised:
            evaluate(path)
        line = str(raised.value).partition("with gzip: ")[2].removesuffix(" first")
        subprocess.run(line, shell=True, check=True)
        assert evaluate(folder / written, **OPTIONS) == expected
    assert good.read_bytes() == content


def test_errors_travel_from_workers():
    error = _columns.no_mask("why")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert "columns={'mask': None} ignores it" in str(again)
    assert "--columns mask= ignores it" in again.in_shell()
    assert repr(again) == f"AdvisedError({str(error)!r})"


def test_a_name_that_is_nearly_right_is_told(tmp_path):
    path = write(tmp_path / "rollouts.parquet", table(tokens(3)))
    with pytest.raises(FileNotFoundError, match=r"no such file: .*rolouts.parquet: did you mean 'rollouts.parquet'\?"):
        evaluate(tmp_path / "rolouts.parquet")
    with pytest.raises(FileNotFoundError, match=r"no such file: .*nope\.parquet$"):
        evaluate(tmp_path / "nope.parquet")
    with pytest.raises(FileNotFoundError, match=r"no such file: .*nowhere/rollouts.parquet$"):
        evaluate(tmp_path / "nowhere" / "rollouts.parquet")
    renamed = pa.table({"policy_logps": [[0.1]], "advantages": [1.0], "ref_logps": [[0.1]]})
    path = write(tmp_path / "a.parquet", renamed)
    message = r"'policy_logp' \(for logps\) is missing; .*; if it is this one, columns={'logps': 'policy_logps'}$"
    refused(message, path, columns={"logps": "policy_logp"})
    nested = pa.table({"r": pa.array([{"logps": [-1.0]}]), "advantages": [1.0]})
    path = write(tmp_path / "b.parquet", nested)
    message = r"'logp' \(for logps\) is missing; it has r, r.logps, advantages; if it is this one, .*'r.logps'}$"
    refused(message, path, columns={"logps": "logp"})
    assert evaluate(path, columns={"logps": "r.logps", "old_logps": None}).tokens == 1
    taken = write(tmp_path / "d.parquet", pa.table({"logps": [[0.1]], "old_logps": [[0.1]], "advantages": [1.0]}))
    refused("'ref_logps' is missing; it has logps, old_logps, advantages$", taken, kl=K3(0.04))
    renamed = write(tmp_path / "e.parquet", pa.table({"r_logps": [[0.1]], "ref_logp": [[0.1]], "advantages": [1.0]}))
    message = "'ref_logps' is missing; .*; if it is this one, columns={'ref_logps': 'ref_logp'}$"
    refused(message, renamed, columns={"logps": "r_logps", "old_logps": None}, kl=K3(0.04))
    flat = write(tmp_path / "c.parquet", nested.flatten())
    assert evaluate(flat, columns={"logps": "r.logps", "old_logps": None}).tokens == 1
