"""Files that are of no format that is read here: what they are, and the one line that makes one that is."""

import os
import shlex

from ._advice import AdvisedError, Code
from ._paths import free_name
from ._sources import printable

#: The suffixes that compressed files have behind their own.
_PACKED = (".gz", ".zst", ".zstd", ".bz2")
_STREAM = (
    "a stream of Arrow IPC, as the files of a datasets folder are, which is refused since one that was cut off looks "
    "complete: write it again with {stream}"
)
#: What begins with these bytes, and what to do, with the names of `refusal`'s values in it.
_KINDS = (
    (b"PARE", "encrypted Parquet: write it in plain first, {decrypt}"),
    (b"\x1f\x8b", "compressed with gzip: gunzip {unpacked} first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: zstd --decompress {unpacked} first"),
    (b"BZh", "compressed with bzip2: bunzip2 {unpacked} first"),
    (b"\xff\xff\xff\xff", _STREAM),
    (b"FEA1", "Feather of version 1: write it again with {feather}"),
    (b"PK\x03\x04", "a zip archive, as .npz and .pt are: load it, and give its arrays to grpo_loss(**arrays).stats"),
    (b"\x93NUMPY", "a NumPy array: load it, and give the arrays to grpo_loss(**arrays).stats"),
    (b"[", "JSON, but not a line for each row: convert it with {json_array}"),
)


def refusal(path: str, magic: bytes) -> AdvisedError:
    """The error for a file that begins with these bytes, which are those of no format that is read."""
    name = printable(path)
    start = magic.removeprefix(b"\xef\xbb\xbf").lstrip()
    kind = next((kind for prefix, kind in _KINDS if start.startswith(prefix)), None)
    if not magic:
        kind = "empty"
    elif kind is None and name.lower().endswith((".csv", ".tsv", ".txt")):
        kind = "text: convert it with {csv}"
    elif kind is None:
        kind = "neither a Parquet, an Arrow IPC nor a JSON Lines file: it begins with {magic}"
    stem, suffix = os.path.splitext(path)
    target = printable(free_name(f"{stem}.parquet"))
    unpacked = free_name(stem if suffix.lower() in _PACKED else path)
    write, imports = "pyarrow.parquet.write_table({}, {!r})", "pyarrow.{}, pyarrow.parquet"
    values = {
        "name": name,
        "stream": Code(
            write.format(f"pyarrow.ipc.open_stream(pyarrow.OSFile({name!r})).read_all()", target),
            "pyarrow.parquet",
        ),
        "unpacked": f"< {shlex.quote(name)} > {shlex.quote(printable(unpacked))}",
        "magic": repr(magic),
        "decrypt": encrypted_as_plain(name),
        "feather": Code(write.format(f"pyarrow.feather.read_table({name!r})", target), imports.format("feather")),
        "json_array": Code(
            write.format(f"pyarrow.Table.from_pylist(json.loads(pathlib.Path({name!r}).read_text()))", target),
            "json, pathlib, pyarrow.parquet",
        ),
        "csv": Code(write.format(f"pyarrow.csv.read_csv({name!r})", target), imports.format("csv")),
    }
    return AdvisedError("{name} is " + kind, values)


def encrypted_as_plain(name: str) -> Code:
    """The call that reads an encrypted Parquet file and writes it in plain."""
    read = f"pyarrow.parquet.read_table({name!r}, decryption_properties=…)"
    return Code(f"pyarrow.parquet.write_table({read}, {free_name('plain.parquet')!r})", "pyarrow.parquet")
