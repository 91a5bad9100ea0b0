"""Documents from the user's own files, good and bad."""

import csv
import gzip
import json
import tracemalloc
import unicodedata

import pyarrow as pa
import pytest
from pyarrow import parquet

from undo.config.mistakes import ConfigError
from undo.config.schema import StageConfig, validate
from undo.data.files import read_texts
from undo.prepare_data.text import Source

TEXTS = ["first document\nwith two lines", "zweites, mit Umlaut: ü", "세 번째"]


def write(folder, suffix, texts=TEXTS, column="text"):
    file = folder / f"corpus{suffix}"
    match suffix:
        case ".jsonl":
            file.write_text("".join(json.dumps({column: t, "id": i}) + "\n\n" for i, t in enumerate(texts)))
        case ".json":
            file.write_text(json.dumps([{column: t} for t in texts], indent=1))
        case ".txt":
            file.write_text("\n\n\n".join(texts) + "\n")
        case ".parquet":
            parquet.write_table(pa.table({column: texts}), file, row_group_size=2)
        case ".csv":
            with open(file, "w", newline="") as opened:
                csv.writer(opened).writerows([("id", column), *enumerate(texts)])
    return file


PACK = {"": bytes, ".gz": gzip.compress, ".zst": lambda content: pa.compress(content, "zstd", asbytes=True)}


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".txt", ".parquet", ".csv"])
def test_every_kind_of_file(tmp_path, suffix, packed):
    content = write(tmp_path, suffix).read_bytes()
    file = tmp_path / f"packed{suffix}{packed}"
    file.write_bytes(PACK[packed](content))
    assert [text.strip() for text in Source(path=str(file)).texts()] == TEXTS
    if packed:
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(ConfigError, match=rf"packed{suffix}{packed}: cannot be read"):
            list(Source(path=str(file)).texts())


def test_a_path_that_exists_is_literal_before_it_is_a_glob(tmp_path, monkeypatch):
    folder = tmp_path / "[v2] korpus {x}"
    folder.mkdir()
    for name in ("a*.jsonl", "ab.jsonl"):
        (folder / name).write_text(json.dumps({"text": name}) + "\n")
    assert list(Source(path=str(folder / "ab.jsonl")).texts()) == ["ab.jsonl"]
    assert list(Source(path=str(folder / "a*.jsonl")).texts()) == ["a*.jsonl"]  # not the glob's two
    assert list(Source(path=str(folder / "*b.jsonl")).texts()) == ["ab.jsonl"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(Source(path="~/[v2] korpus {x}/?b.jsonl").texts()) == ["ab.jsonl"]
    monkeypatch.chdir(folder)
    assert list(Source(path="ab.jsonl").texts()) == list(Source(path="./[a]b.jsonl").texts()) == ["ab.jsonl"]
    with pytest.raises(ConfigError, match=r"is a folder; give its files, as in .*korpus {x}/\*\.jsonl$"):
        Source(path=str(folder)).files()


def test_a_null_is_no_document_in_any_kind_of_file(tmp_path):
    rows = [{"q": "1?", "a": "one"}, {"q": "2?", "a": None}, {"q": None, "a": "three"}, {"q": "4?", "a": "four"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        path = str(tmp_path / name)
        assert list(Source(path=path, column=("q", "a")).texts()) == ["1?\n\none", "4?\n\nfour"]
        pairs = list(Source(path=path, column="q", paired_with="a").texts())  # still side by side
        assert [(pair, pair.other) for pair in pairs] == [("1?", "one"), ("4?", "four")]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".txt", ".parquet", ".csv"])
def test_lines_may_end_as_on_windows(tmp_path, suffix):
    unix, windows = (["one\ntwo\n\n", "three\nfour"], ["one\r\ntwo\r\n\r\n", "three\r\nfour"])
    there = list(Source(path=str(write(tmp_path, suffix, texts=unix))).texts())
    file = write(tmp_path, suffix, texts=windows)
    if suffix in (".txt", ".jsonl"):  # what stands between documents, too
        file.write_bytes(file.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    assert list(Source(path=str(file)).texts()) == there
    assert "\r" not in "".join(there)


def test_letters_that_were_taken_apart_are_put_together_on_request(tmp_path):
    apart = [unicodedata.normalize("NFD", text) for text in TEXTS]
    file = str(write(tmp_path, ".jsonl", texts=apart))
    assert list(Source(path=file).texts()) == apart != TEXTS
    assert list(Source(path=file, normalise="NFC").texts()) == TEXTS


def test_json_lines_in_a_json_file_and_a_byte_order_mark(tmp_path):
    file = tmp_path / "corpus.json"
    file.write_bytes(b"\xef\xbb\xbf" + b"".join(json.dumps({"text": t}).encode() + b"\n" for t in TEXTS))
    assert list(Source(path=str(file)).texts()) == TEXTS


def test_pairs_are_read_side_by_side(tmp_path):
    rows = [{"q": f"{i}?", "harm": f"yes {i}", "safe": "no"} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(path=str(tmp_path / "a.jsonl"), column=("q", "harm"), paired_with=("q", "safe"), documents=2)
    found = list(source.texts())
    assert [(text, text.other) for text in found] == [(f"{i}?\n\nyes {i}", f"{i}?\n\nno") for i in range(2)]
    with pytest.raises(ConfigError, match=r"has no columns, so no paired_with"):
        Source(path=str(write(tmp_path, ".txt")), paired_with="safe").files()
    with pytest.raises(ValueError, match="have no pair"):
        Source(path=str(tmp_path / "a.jsonl"), paired_with="safe", questions="definitions")
    with pytest.raises(ConfigError, match=r"line 1: has no column 'other'"):
        list(Source(path=str(tmp_path / "a.jsonl"), column="harm", paired_with="other").texts())


def test_a_glob_reads_all_files_in_order_and_stops_at_the_limit(tmp_path):
    for name in "ba":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"body": f"{name}{i}"}) + "\n" for i in range(3)))
    source = Source(path=str(tmp_path / "*.jsonl"), column="body", documents=4)
    assert list(source.texts()) == ["a0", "a1", "a2", "b0"]


def test_a_share_is_drawn_from_everywhere_and_is_the_same_each_time(tmp_path):
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(1000)))
    drawn = [int(text) for text in Source(path=str(file), share=0.2).texts()]
    assert drawn == [int(text) for text in Source(path=str(file), share=0.2).texts()]
    assert 150 < len(drawn) < 250
    assert all(any(start <= n < start + 100 for n in drawn) for start in range(0, 1000, 100))
    assert len(list(Source(path=str(file), share=0.2, documents=30).texts())) == 30


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl line 2: is not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', "a.jsonl line 1: has no column 'text'; it has body"),
        ("a.jsonl", b'{"text": 5}\n', "a.jsonl line 1: column 'text' holds int, not text"),
        ("a.jsonl", b"[1]\n", "a.jsonl line 1: is not an object"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xfcber"}\n', "a.jsonl line 2: is not UTF-8 (byte 0xfc)"),
        ("a.txt", "Grüße".encode("utf-16"), "a.txt line 1: is not UTF-8"),
        ("a.txt", b"\n \n", "holds no text"),
        ("a.json", b'[{"text": "x"},\n', "a.json: is not JSON"),
        ("a.json", b'[{"text": "x"}, {"t": 1}]', "a.json entry 1: has no column 'text'; it has t"),
        ("a.parquet", b"PAR1 or not", "a.parquet: is not a parquet file"),
        ("a.jsonl", b"", "a.jsonl: is empty"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "\\ud83d x"}\n',
            "a.jsonl line 2: column 'text' holds half a",
        ),
        ("a.json", b'[{"text": "\\udc00"}]', r"a.json entry 0: column 'text' holds half a surrogate pair (\udc00)"),
        ("a.jsonl", b'{"text": "x", "n": ' + b"[" * 100_000, "a.jsonl line 1: is not JSON"),
        ("a.csv", b'text,id\nx,1\n"two\nlines",2\ny\n', "a.csv line 5: has 1 fields, the first line has 2"),
        ("a.csv", b'text\n"x" y\n', "a.csv line 2: is not CSV"),
        ("a.csv", b'text\n"x\n', "a.csv line 2: is not CSV: unexpected end of data"),
        ("a.csv", b"body\nx\n", "a.csv line 2: has no column 'text'; it has body"),
        ("a.docx", b"x", "a.docx: unknown kind of file"),
    ],
)
def test_a_bad_file_is_named_with_the_place(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        list(Source(path=str(tmp_path / name)).texts())
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


def test_a_parquet_without_the_column_or_with_numbers(tmp_path):
    file = write(tmp_path, ".parquet", column="body")
    with pytest.raises(ConfigError, match=r"has no column 'text'; it has body"):
        list(read_texts(file, "text"))
    parquet.write_table(pa.table({"text": [1, 2]}), file)
    with pytest.raises(ConfigError, match="row 0: column 'text' holds int, not text"):
        list(read_texts(file, "text"))


class Holder(StageConfig):
    data: dict[str, Source]


def test_no_such_file_and_no_place():
    with pytest.raises(ConfigError, match="no such file"):
        list(Source(path="/nowhere/*.jsonl").texts())
    with pytest.raises(ConfigError, match="share: input should be greater than 0"):
        validate(Holder, {"name": "x", "data": {"retain": {"path": "x", "share": 0.0}}}, "test")
    with pytest.raises(ConfigError, match="give `path`"):
        validate(Holder, {"name": "x", "data": {"retain": {}}}, "test")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".txt"])
def test_a_large_file_is_read_in_bounded_memory(tmp_path, suffix):
    """64 MB of text, far more than is ever held."""
    file = write(tmp_path, suffix, texts=["word " * 3200] * 4000)
    tracemalloc.start()
    count = sum(1 for _ in read_texts(file, "text"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 4000
    assert peak < 24_000_000


def test_a_line_without_end_is_refused_by_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr("undo.data.files.LONGEST_LINE", 1 << 20)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + "y" * (1 << 20))
    with pytest.raises(ConfigError, match=r"a\.jsonl line 2: is longer than"):
        list(read_texts(tmp_path / "a.jsonl", "text"))


def test_a_parquet_file_is_read_in_batches_of_so_many_bytes(tmp_path):
    """100 documents of 2 MB, which are 2 MB on disk because they are the same: all of them in a batch of a thousand."""
    parquet.write_table(pa.table({"text": ["word " * 400_000] * 100}), tmp_path / "a.parquet")
    pool, most = pa.default_memory_pool(), 0
    for count, _ in enumerate(read_texts(tmp_path / "a.parquet", "text"), 1):
        most = max(most, pool.bytes_allocated()) if count % 10 == 0 else most
    assert count == 100
    assert most < 130e6


def test_a_text_without_blank_lines_is_cut_into_documents(tmp_path):
    (tmp_path / "a.txt").write_text("a line of text\n" * 200_000)
    texts = list(read_texts(tmp_path / "a.txt", "text"))
    assert [len(text) for text in texts] == [1_000_005, 1_000_005, 999_990]


def corpus(folder, name, size, count):
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"text": f"{name}{i:04d} ".ljust(size, name)}) + "\n" for i in range(count)))
    return str(file)


def test_parts_are_blended_by_their_proportion_of_characters(tmp_path):
    parts = {
        "a": {"path": corpus(tmp_path, "a", 100, 400), "proportion": 0.7},
        "b": {"path": corpus(tmp_path, "b", 30, 2000), "proportion": 0.25},
        "c": {"path": corpus(tmp_path, "c", 500, 30), "proportion": 0.05},
    }
    texts = list(validate(Source, {"parts": parts}, "made.yaml").texts())
    total = sum(map(len, texts))
    for name, part in parts.items():
        mine = [text for text in texts if text.startswith(name)]
        assert sum(map(len, mine)) / total == pytest.approx(part["proportion"], abs=0.01)
        assert mine == sorted(mine)  # in order, none twice: without a limit the blend ends where a part ends
        assert len(set(mine)) == len(mine)
    half = texts[: len(texts) // 2]  # the proportions hold everywhere, not only at the end
    assert sum(len(t) for t in half if t[0] == "a") / sum(map(len, half)) == pytest.approx(0.7, abs=0.03)


def test_a_part_that_is_exhausted_starts_over_where_there_is_a_limit(tmp_path, capsys):
    parts = {
        "a": {"path": corpus(tmp_path, "a", 10, 3), "proportion": 0.5},
        "b": {"path": corpus(tmp_path, "b", 10, 100), "proportion": 0.5},
    }
    texts = list(validate(Source, {"parts": parts, "documents": 20}, "made.yaml").texts())
    assert [t[:5] for t in texts if t[0] == "a"] == [f"a000{i % 3}" for i in range(10)]
    assert "a: all of it was read; it starts over" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"b": {"hub": "x/y", "proportion": 0.4}}, r"add up to 0\.9, not to 1; .* renormalise: true"),
        ({"b": {"proportion": 0.5}}, "give `path`, a file or a glob, or `hub`"),
        ({"b": {"hub": "x/y"}}, "proportion"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, words):
    parts = {"a": {"hub": "x/z", "proportion": 0.5}, **changes}
    with pytest.raises(ConfigError, match=words):
        validate(Source, {"parts": parts}, "made.yaml")


def test_a_missing_part_is_made_up_for_only_on_request(tmp_path):
    parts = {
        "a": {"path": corpus(tmp_path, "a", 10, 60), "proportion": 0.6},
        "b": {"path": corpus(tmp_path, "b", 10, 60), "proportion": 0.2},
        "gone": {"proportion": 0.0},
    }
    texts = list(validate(Source, {"parts": parts, "renormalise": True}, "made.yaml").texts())
    assert sum(t[0] == "a" for t in texts) / len(texts) == pytest.approx(0.75, abs=0.02)
    with pytest.raises(ConfigError, match="`path` and `hub` belong to each"):
        validate(Source, {"parts": parts, "renormalise": True, "hub": "x/y"}, "made.yaml")


def test_columns_are_joined(tmp_path):
    for suffix, write_it in ((".jsonl", None), (".parquet", parquet)):
        file = tmp_path / f"pairs{suffix}"
        rows = [{"instruction": "Say it.", "response": "It."}]
        if write_it is None:
            file.write_text(json.dumps(rows[0]) + "\n")
        else:
            parquet.write_table(pa.Table.from_pylist(rows), file)
        source = validate(Source, {"path": str(file), "column": ["instruction", "response"]}, "made.yaml")
        assert list(source.texts()) == ["Say it.\n\nIt."]
        with pytest.raises(ConfigError, match="has no column 'answer'"):
            list(validate(Source, {"path": str(file), "column": ["instruction", "answer"]}, "made.yaml").texts())


def test_questions_are_made_of_the_documents(tmp_path):
    file = tmp_path / "guide.txt"
    file.write_text("A packet firewall is a device that filters traffic by rules. It is old.\n")
    (text,) = Source(path=str(file), questions="definitions").texts()
    assert text.startswith("Question: What is a packet firewall?\nAnswer: A packet firewall is a device that filters")
