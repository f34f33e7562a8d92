"""A file that is cut off or has flipped bits gives a clear error or the right answer, never a crash or another number.

Checksums cover a Parquet file's pages; what a flip elsewhere (footer, page headers) does, pyarrow or a check of ours
must notice. Arrow IPC has no checksums: there a flip may change a number, and all that is promised is no crash.
"""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import samples

from grpo_fast import evaluate

pa = pytest.importorskip("pyarrow", reason="files need pip install 'grpo_fast[data]'")
from rollout_files import PROBABILITIES, table, tokens, write  # noqa: E402

pytestmark = pytest.mark.slow

NAMES = ["samples.parquet", "tokens.parquet", "samples.arrow", "tokens.arrow"]
settings.register_profile("files", settings(derandomize=True, suppress_health_check=[HealthCheck.too_slow]))


class Files(dict):
    def __repr__(self):  # which Hypothesis prints with a failure
        return "files"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """By name: a small file, its bytes, and the right answer."""
    folder = tmp_path_factory.mktemp("corrupt")
    result = Files()
    for name in NAMES:
        rows = dict(zip(PROBABILITIES, samples(90), strict=True)) if "samples" in name else tokens(30, longest=9)
        whole = table(rows, pa.list_)
        path = write(folder / name, whole.slice(0, 20), whole.slice(20))
        result[name] = path, path.read_bytes(), evaluate(path)
    return result


def check(files, name, content):
    """Evaluate one of the files with other content, and restore it."""
    path, original, right = files[name]
    path.write_bytes(content)
    try:
        stats = evaluate(path)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017 - or no error at all
        return
    finally:
        path.write_bytes(original)
    assert stats == right or path.suffix == ".arrow"


@pytest.mark.parametrize("name", NAMES)
@settings(settings.get_profile("files"), max_examples=40)
@given(share=st.floats(0, 1, exclude_max=True))
def test_cut_off(files, name, share):
    _, original, _ = files[name]
    cut = original[: int(share * len(original))]
    path = files[name][0]
    path.write_bytes(cut)
    try:
        with pytest.raises(ValueError, match=name):
            evaluate(path)
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize("name", NAMES)
@settings(settings.get_profile("files"), max_examples=150)
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=3))
def test_flipped_bits(files, name, flips):
    content = bytearray(files[name][1])
    for share, bits in flips:
        content[int(share * len(content))] ^= bits
    check(files, name, content)


@pytest.mark.parametrize("name", NAMES)
@settings(settings.get_profile("files"), max_examples=40)
@given(a=st.floats(0, 1), b=st.floats(0, 1), value=st.sampled_from([0, 255]))
def test_a_hole(files, name, a, b, value):
    original = files[name][1]
    low, high = sorted(int(share * len(original)) for share in (a, b))
    check(files, name, original[:low] + bytes([value]) * (high - low) + original[high:])


def test_a_row_group_that_the_footer_makes_shorter(files):
    # No checksum covers the footer, and pyarrow would silently leave out the rows beyond.
    path, original, _ = files["samples.parquet"]
    footer = len(original) - 8 - int.from_bytes(original[-8:-4], "little")
    tried = 0
    for at in range(footer, len(original) - 8):
        content = bytearray(original)
        content[at] ^= 8  # makes 16 of 20
        try:
            metadata = pa.parquet.ParquetFile(pa.BufferReader(content)).metadata
            footer_rows = metadata.row_group(0).num_rows
        except (pa.ArrowException, OSError, IndexError):
            continue
        if footer_rows == 16:
            tried += 1
            path.write_bytes(content)
            try:
                with pytest.raises(ValueError, match="rows in all row groups where the footer says 90"):
                    evaluate(path)
            finally:
                path.write_bytes(original)
    assert tried == 1


def test_the_page_that_is_damaged_is_named(tmp_path):
    whole = table(tokens(30))
    path = write(tmp_path / "rollouts.parquet", whole.slice(0, 10), whole.slice(10))
    column = pa.parquet.ParquetFile(path).metadata.row_group(1).column(1)
    assert column.path_in_schema.startswith("old_logps")
    content = bytearray(path.read_bytes())
    content[column.data_page_offset - 1] ^= 1  # the last byte of its dictionary
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"rollouts.parquet, row group 1, column 'old_logps': cannot be read: .*(CRC|checksum)"
    ):
        evaluate(path)
