"""The documents in local files of text, jsonl and parquet, compressed or not; of a table only the text column is read.

Each document is {"text": ..., "error": ...}: a record that cannot be used has an error, which says where it is and what
is wrong with it, in place of a text. Whether that ends the preparation is for `read_texts` to decide.
"""

import codecs
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

from quack_lm.data.manifest import SPLITS
from quack_lm.errors import UserError

Format = Literal["text", "jsonl", "parquet"]
Row = dict[str, str | None]

ROWS_AT_ONCE = 1000  # of a parquet file: its row groups may be larger than memory
CHUNK_BYTES = 1 << 26  # of a text file, to split at once

FORMATS: dict[str, Format] = {
    **dict.fromkeys((".txt", ".text", ".md"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
}
PARQUET = b"PAR1\x15"  # its magic number, and the first byte of whatever follows, which is not of text
TABLES = (".csv", ".tsv")  # which are not read: a line of them is no document
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
BLANK_LINES, LINES = "blank_lines", "\n"


def read_files(paths: list[str], *, format: Format | None, text_field: str, separator: str | None) -> Iterator[Row]:
    """The documents of each file in turn; a `format` of None is taken from each file's name.

    Of a text file, documents end at `separator`; None: at the end of the file.
    """
    for path in paths:
        kind = format or format_of_name(path)
        if kind != "parquet" and _is_parquet(path):
            fix = "set data.format=parquet" if format else "give it a name that ends in .parquet"
            raise UserError(f"data.files: {path} is a parquet file: {fix}")
        if kind == "text":
            yield from _text_documents(path, separator)
        elif kind == "jsonl":
            yield from _jsonl_documents(path, text_field)
        else:
            yield from _parquet_documents(path, text_field)


def format_of_name(path: str | Path) -> Format | None:
    """The format that a file has by the last part of its name, None for any other than those of text and tables."""
    return FORMATS.get(_last_suffix(path))


def is_named_table(path: str | Path) -> bool:
    """Whether a file is by its name one of TABLES."""
    return _last_suffix(path) in TABLES


def _last_suffix(path: str | Path) -> str:
    suffixes = [suffix.lower() for suffix in Path(path).suffixes if suffix.lower() not in COMPRESSED]
    return suffixes[-1] if suffixes else ""


def format_note(path: str | Path, format: Format | None) -> str:
    """What a message about a file that cannot be read adds where its name says that it has another format."""
    named = format_of_name(path)
    is_other = format is not None and named is not None and named != format
    return f" (by its name it is {named}: set data.format={named})" if is_other else ""


def text_error(text: object) -> str | None:
    """What is wrong with a text; None for one that can be encoded, and for a missing one."""
    if text is None:
        return None
    if not isinstance(text, str):
        return f"expected text in data.text_field, found {type(text).__name__} {text!r:.60}"
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        return f"character {error.start + 1} is half of a surrogate pair, {text[error.start]!a}"
    return None


def _row(path: str, unit: str, number: int, text: Any) -> Row:
    error = text_error(text)
    return _bad(path, f"{unit} {number}", error) if error else {"text": text, "error": None}


def _bad(path: str, place: str, what: str) -> Row:
    return _error(f"{path} {place}: {what}")


def _error(what: str) -> Row:
    return {"text": None, "error": f"data.files: {what}"}


def _is_parquet(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(len(PARQUET)) == PARQUET


def _open(path: str | Path) -> Any:
    """A file's bytes, decompressed where they begin as a compressed file does, whatever its name is."""
    import bz2
    import gzip
    import io
    import lzma
    import zipfile

    import pyarrow

    with open(path, "rb") as file:
        start = file.read(10)
    if start.startswith(b"\x1f\x8b"):
        return gzip.open(path)
    if start.startswith(b"BZh") and start[4:] == b"1AY&SY":
        return bz2.open(path)
    if start.startswith(b"\xfd7zXZ\0"):
        return lzma.open(path)
    for magic, name in ((b"\x28\xb5\x2f\xfd", "zstd"), (b"\x04\x22\x4d\x18", "lz4")):
        if start.startswith(magic):
            return io.BufferedReader(pyarrow.input_stream(path, compression=name))
    if start.startswith(b"PK\x03\x04"):
        archive = zipfile.ZipFile(path)
        if len(archive.namelist()) != 1:
            raise UserError(f"data.files: {path} has {len(archive.namelist())} files in it: unpack it")
        return archive.open(archive.namelist()[0])
    return open(path, "rb")


# ------------------------------------------------------------------------------------------------ text


def _text_documents(path: str, separator: str | None) -> Iterator[Row]:
    start = read_start(path, 4)
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if start.startswith(mark)), None)
    if encoding:
        yield _error(f"{path} is not UTF-8 text but {encoding}: convert it with iconv -f {encoding} -t UTF-8")
        return
    with _open(path) as stream:
        for number, raw in enumerate(_split(stream, separator), start=1):
            try:
                text = raw.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode()
            except UnicodeDecodeError as error:
                place = f"document {number} of " if separator else ""
                note = format_note(path, "text")
                yield _error(f"{place}{path} is not UTF-8 text ({error.reason} at byte {error.start}){note}")
            else:
                yield {"text": text if separator is None else text.strip("\r\n"), "error": None}


# UTF-32's begin with those of UTF-16.
BYTE_ORDER_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


def read_start(path: str | Path, n_bytes: int) -> bytes:
    """The first bytes of a file, decompressed."""
    with _open(path) as stream:
        return stream.read(n_bytes)


def find_separator(starts: list[bytes], eot_token: str, *, are_documents: Callable[[], bool]) -> str | None:
    """What separates documents in text files, by their first bytes: eot_token, blank lines or lines; None: nothing.

    `are_documents`: whether each file can be a document, asked where eot_token ends none.
    """
    if _ends_documents(starts, eot_token.encode()):
        return eot_token
    if are_documents():
        return None
    is_blank_between = any(not line.strip() for start in starts for line in start.strip().split(b"\n"))
    return BLANK_LINES if is_blank_between else LINES


def _ends_documents(starts: list[bytes], eot_token: bytes) -> bool:
    """Whether text files have a token at the ends of documents, and do not just mention it.

    A mention follows a space, a quote or a bracket, and more text is on its line. There are as many ends as files, and
    enough for documents in each split.
    """
    total = sum(start.count(eot_token) for start in starts)
    if total < (enough := max(len(starts), len(SPLITS) - 1)):
        return False
    mention = re.compile(rb"[ \t\"'`(\[{=]" + re.escape(eot_token) + rb"(?![ \t]*[\r\n])")
    ends = total - sum(len(mention.findall(start)) for start in starts)
    return ends >= enough and ends > total / 2


def is_split_by(path: str | Path, separator: str) -> bool:
    """Whether a separator occurs in a text file, which is read as far as its first."""
    with _open(path) as stream:
        return len(list(itertools.islice(_split(stream, separator), 2))) > 1


def _split(stream: IO[bytes], separator: str | None) -> Iterator[bytes]:
    if separator is None:
        yield stream.read()
    elif separator == BLANK_LINES:
        for is_blank, lines in itertools.groupby(stream, key=bytes.isspace):
            if not is_blank:
                yield b"".join(lines)
    else:
        # A line of a file may end as those of Windows do.
        pattern = re.compile(rb"\r?\n".join(map(re.escape, separator.encode().split(b"\n"))))
        rest = b""
        while chunk := stream.read(CHUNK_BYTES):
            *pieces, rest = pattern.split(rest + chunk)
            yield from pieces
        yield rest


# ------------------------------------------------------------------------------------------------ jsonl


def _jsonl_documents(path: str, text_field: str) -> Iterator[Row]:
    for unit, number, raw in _json_records(path):
        try:
            record = json.loads(raw.decode()) if isinstance(raw, bytes) else raw
            text = field_of(record, text_field)
        except UnicodeDecodeError as error:
            note = format_note(path, "jsonl")
            yield _bad(path, f"{unit} {number}", f"not UTF-8 ({error.reason} at byte {error.start} of it){note}")
        except json.JSONDecodeError as error:
            note = format_note(path, "jsonl")
            yield _bad(path, f"{unit} {number}", f"not JSON ({error.msg} at character {error.pos + 1}){note}")
        # No such field, numbers of too many digits, and too many brackets.
        except (ValueError, RecursionError) as error:
            yield _bad(path, f"{unit} {number}", str(error))
        else:
            yield _row(path, unit, number, text)


def _json_records(path: str) -> Iterator[tuple[str, int, Any]]:
    """(what it is, its number, its bytes or what they say) of each record in a file of lines, or of one array."""
    with _open(path) as stream:
        is_first = True
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            if is_first and line.lstrip().startswith(b"["):
                array = line + stream.read()
                try:
                    records = json.loads(array)
                except (ValueError, RecursionError):
                    yield "line", number, array
                else:
                    yield from (("item", i, record) for i, record in enumerate(records, start=1))
                return
            is_first = False
            yield "line", number, line


def text_field_hint(record: Mapping[str, Any]) -> str:
    """What to say of the fields of a record that do not have the one that was asked for: which has the longest text."""
    fields = [("", record), *((f"{name}.", inner) for name, inner in record.items() if isinstance(inner, dict))]
    texts = {f"{outer}{name}": value for outer, own in fields for name, value in own.items() if isinstance(value, str)}
    longest = max(texts, key=lambda name: len(texts[name]), default=None)
    return f"; the longest text is in {longest:.200}: set data.text_field={longest:.200}" if longest else ""


def field_of(record: object, name: str) -> Any:
    """The value of a field: `a.b` is field b inside of a, where there is no `a.b` itself, and null where a is null.

    ValueError where the record has no such field.
    """
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, {{...}}, found {type(record).__name__} {record!r:.60}")
    value: Any = record
    for key in [name] if name in record else name.split("."):
        if value is None:
            return None
        if not isinstance(value, dict):
            found = f"inside of {type(value).__name__} {value!r:.60}"
        elif key not in value:
            hint = text_field_hint(value) if value is record else ""
            found = f"among the fields {', '.join(value) or '(none)':.200}{hint}"
        else:
            value = value[key]
            continue
        raise ValueError(f"no field data.text_field={name}: no {key!r} {found}")
    return value


# ------------------------------------------------------------------------------------------------ parquet


def _parquet_documents(path: str, text_field: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if not _is_parquet(path) and read_start(path, len(PARQUET)) == PARQUET:
        raise UserError(f"data.files: {path} is a parquet file that is compressed once more: unpack it")
    with pq.ParquetFile(path) as file:
        if not file.metadata.num_rows:
            return
        schema = file.schema_arrow
        root, *inner = [text_field] if text_field in schema.names else text_field.split(".")
        n_columns = schema.names.count(root)
        kind: Any = schema.field(root).type if n_columns == 1 else None
        for name in inner:
            has_it = kind is not None and pa.types.is_struct(kind) and kind.get_field_index(name) >= 0
            kind = kind.field(name).type if has_it else None
        if not _is_text(kind):
            columns = ", ".join(schema.names) or "none"
            has = f"has {n_columns} columns" if n_columns > 1 else "has no column"
            what = (
                f"{path} {has} data.text_field={text_field}: its columns are {columns}"
                if kind is None
                else f"{path}: column data.text_field={text_field} is {kind}, and not text"
            )
            # Each of the rows is a record that cannot be used.
            yield from itertools.repeat(_error(what + _hint_of_parquet(file)), file.metadata.num_rows)
            return
        number = 0
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=[text_field]):
            values = batch.column(root)  # one of two, where a column is named like a field of another
            for name in inner:
                values = pc.struct_field(values, name)
            for text in _python_values(values):
                number += 1
                yield _row(path, "row", number, text)


def _hint_of_parquet(file: Any) -> str:
    import pyarrow as pa

    try:
        return text_field_hint(next(file.iter_batches(batch_size=1)).to_pylist()[0])
    except (ValueError, pa.ArrowException):  # of a file that cannot be read, or text that is none
        return ""


def _is_text(kind: Any) -> bool:
    """Whether the values of an Arrow type are text, or null; None: of a column that does not exist."""
    import pyarrow as pa

    if kind is None:
        return False
    value_type = kind.value_type if pa.types.is_dictionary(kind) else kind
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(is_kind(value_type) for is_kind in kinds)


def _python_values(values: Any) -> list[Any]:
    try:
        return list(values.to_pylist())
    except UnicodeDecodeError:
        return [_python_value(value) for value in values]


def _python_value(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return error.object  # bytes, which are no text
