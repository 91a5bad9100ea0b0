"""The user's files, row by row: .jsonl, .json, .parquet, .csv and plain text, each also packed as .gz or .zst.

Everything is read in bounded memory, and every mistake in a file is named with its place. A plain text holds one
document a paragraph: blank lines separate them, and a paragraph of a million characters ends there.
"""

import csv
import glob
import io
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Final

from undo.config.mistakes import ConfigError

PLAIN: Final = (".txt", ".tokens")  # no columns; .tokens: WikiText's
KINDS: Final = (".jsonl", ".json", ".parquet", ".csv", *PLAIN)
PACKED: Final = {".gz": "gzip", ".zst": "zstd"}
LONGEST_LINE: Final = 1 << 28  # bytes, and characters of a field of .csv
LONGEST_ARRAY: Final = 1 << 30  # bytes of a .json that is one array
PARAGRAPH: Final = 1_000_000  # characters
ROWS_AT_ONCE, BYTES_AT_ONCE = 32, 1 << 23  # of a parquet file

Row = dict[str, Any]


def find_files(path: str, kinds: Sequence[str] = KINDS) -> list[Path]:
    """The files that a path or a glob means, in order; `~` is the home folder. What exists is taken as it is written.

    Raises ConfigError if there is none, or one that is empty or of another kind.
    """
    literal = Path(os.path.expanduser(path))
    if literal.is_dir():
        raise ConfigError(f"{path}: is a folder; give its files, as in {literal / _most_common(literal, kinds)!s}")
    begin, rest = literal, list[str]()
    while not os.path.exists(begin):
        begin, rest = begin.parent, [begin.name, *rest]
    names = glob.glob(os.path.join(glob.escape(str(begin)), *rest), recursive=True)
    found = [Path(name) for name in sorted(names) if os.path.isfile(name)]
    if not found:
        raise ConfigError(f"{path}: there is no such file")
    for file in found:
        if kind_of(file) not in kinds:
            raise ConfigError(
                f"{file}: unknown kind of file; give one of {', '.join(kinds)}, each also {' or '.join(PACKED)}"
            )
        if file.stat().st_size == 0:
            raise ConfigError(f"{file}: is empty")
    return found


def _most_common(folder: Path, kinds: Sequence[str]) -> str:
    """A glob for the files of a folder."""
    endings = Counter("".join(_suffixes(file)) for file in folder.iterdir() if kind_of(file) in kinds)
    return "*" + max(endings, key=lambda ending: endings[ending], default=kinds[0])


def _suffixes(file: Path) -> tuple[str, str]:
    """Of a.jsonl.gz: .jsonl and .gz."""
    packed = file.suffix if file.suffix in PACKED else ""
    return Path(file.name.removesuffix(packed)).suffix, packed


def kind_of(file: Path) -> str:
    """The suffix that says how a file is read, without .gz or .zst."""
    return _suffixes(file)[0]


def read_texts(file: Path, column: str | Sequence[str]) -> Iterator[str]:
    """One text a row; several columns are joined by a blank line. A null gives "", CRLF gives LF.

    Raises ConfigError that names file and place.
    """
    if kind_of(file) in PLAIN:
        return _guarded(file, paragraphs(file))
    columns = [column] if isinstance(column, str) else column
    return (text_of(row, columns, where) for where, row in read_rows(file, columns))


def read_rows(file: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[str, Any]]:
    """Each row of a file that has columns, with its place in words. Of a parquet file only `columns` are read.

    Raises ConfigError that names file and place.
    """
    match kind_of(file):
        case ".parquet":
            return _guarded(file, _parquet(file, columns))
        case ".csv":
            return _guarded(file, _csv(file))
        case _:
            return _guarded(file, _json(file))


def text_of(row: object, column: str | Sequence[str], where: str) -> str:
    """The text of a row, or "" if one of the columns is null. Raises ConfigError for what is no text."""
    columns = [column] if isinstance(column, str) else column
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: is not an object with a column {columns[0]!r}")
    for name in columns:
        if name not in row:
            raise ConfigError(f"{where}: has no column {name!r}; it has {', '.join(sorted(map(str, row)))}")
        if not isinstance(row[name], str | None):
            raise ConfigError(f"{where}: column {name!r} holds {type(row[name]).__name__}, not text")
        check_surrogates(row[name] or "", f"{where}: column {name!r}")
    parts = [row[name] for name in columns]
    return "" if None in parts else "\n\n".join(parts).replace("\r\n", "\n")


def check_surrogates(text: str, where: str) -> None:
    r"""Raises ConfigError for half a surrogate pair, which JSON can hold as \ud83d and no encoding can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ConfigError(f"{where} holds half a surrogate pair ({half}), which is no character") from None


def _guarded(file: Path, items: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from items
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror or error})") from None


# --- reading ---------------------------------------------------------------------------------------------------------


def _open(file: Path) -> IO[bytes]:
    packed = _suffixes(file)[1]
    if not packed:
        return open(file, "rb")
    import pyarrow  # reads both, and comes with `datasets`

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), PACKED[packed]))  # pyright: ignore[reportArgumentType]


def lines(file: Path) -> Iterator[tuple[int, str]]:
    """Number (the first is 1) and text of each line."""
    with _open(file) as binary:
        for number, line in enumerate(iter(lambda: binary.readline(LONGEST_LINE), b""), 1):
            if len(line) == LONGEST_LINE:
                raise ConfigError(f"{file} line {number}: is longer than {LONGEST_LINE >> 20} MiB; cut it into several")
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ConfigError(
                    f"{file} line {number}: is not UTF-8 (byte {line[error.start]:#x})\n"
                    f"convert it, for example with: iconv -f <its encoding> -t UTF-8"
                ) from None


def paragraphs(file: Path) -> Iterator[str]:
    paragraph: list[str] = []
    size = 0
    for _, line in lines(file):
        if line.strip():
            paragraph.append(line.replace("\r\n", "\n"))
            size += len(line)
        if paragraph and (not line.strip() or size >= PARAGRAPH):
            yield "".join(paragraph)
            paragraph, size = [], 0
    if paragraph:
        yield "".join(paragraph)


def _json(file: Path) -> Iterator[tuple[str, Any]]:
    """One value a line, or, in a .json file, one array of them."""
    for number, line in lines(file):
        if not line.strip():
            continue
        if kind_of(file) == ".json" and number == 1 and line.lstrip().startswith("["):
            yield from _array(file)
            return
        where = f"{file} line {number}"
        yield where, _parsed(line, where)


def _array(file: Path) -> Iterator[tuple[str, Any]]:
    whole, size = [], 0
    for _, line in lines(file):
        whole.append(line)
        size += len(line)
        if size > LONGEST_ARRAY:
            raise ConfigError(f"{file}: an array of more than 1 GiB would not fit the memory; write one object a line")
    for index, row in enumerate(_parsed("".join(whole), str(file))):
        yield f"{file} entry {index}", row


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: is not JSON: {error}") from None


def _csv(file: Path) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(LONGEST_LINE)
    reader = csv.reader((line for _, line in lines(file)), strict=True)
    try:
        header = next(reader, [])
        for fields in reader:
            where = f"{file} line {reader.line_num}"
            if len(fields) == len(header):
                yield where, dict(zip(header, fields, strict=True))
            elif fields:  # a blank line has none
                raise ConfigError(f"{where}: has {len(fields)} fields, the first line has {len(header)}")
    except csv.Error as error:
        raise ConfigError(f"{file} line {reader.line_num}: is not CSV: {error}") from None


def _parquet(file: Path, columns: Sequence[str] | None) -> Iterator[tuple[str, Row]]:
    import pyarrow
    from pyarrow import parquet

    with ExitStack() as stack:
        source: Any = file
        if _suffixes(file)[1]:  # a parquet file is read from its end
            source = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(stack.enter_context(_open(file)), source)
        try:
            table = parquet.ParquetFile(source, buffer_size=1 << 20)
            there = table.schema_arrow.names
            for name in columns or ():
                if name not in there:
                    raise ConfigError(f"{file}: has no column {name!r}; it has {', '.join(there)}")
            number = 0
            for group in range(table.num_row_groups):
                facts = table.metadata.row_group(group)
                # what a dictionary holds once may be in every row: few rows at a time, however small the file is
                at_once = min(ROWS_AT_ONCE, BYTES_AT_ONCE * facts.num_rows // max(facts.total_byte_size, 1))
                for batch in table.iter_batches(max(at_once, 1), row_groups=[group], columns=columns):
                    parts = {name: batch.column(name) for name in columns or there}
                    for index in range(len(batch)):
                        yield f"{file} row {number}", {name: part[index].as_py() for name, part in parts.items()}
                        number += 1
        except pyarrow.ArrowInvalid as error:
            raise ConfigError(f"{file}: is not a parquet file, or is damaged: {str(error).splitlines()[0]}") from None
