"""Metadata tables as people have them."""

import pytest

from splitlab.core.errors import InputError
from splitlab.data.metadata import read_csv, read_jsonl, read_text

WANTED = ("file_name", "image")


def rows(text: str) -> list[dict]:
    return [row for _, row in read_csv(text, WANTED)]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_separators_and_line_ends_are_told_from_the_header(separator: str, end: str):
    lines = [["file_name", "text"], ["a.png", "a red kite"], ["b.png", f'"one{separator} two"']]
    text = end.join(separator.join(line) for line in lines) + end
    assert rows(text) == [
        {"file_name": "a.png", "text": "a red kite"},
        {"file_name": "b.png", "text": f"one{separator} two"},
    ]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_what_only_looks_like_a_line_end_stays_in_the_caption(character: str):
    caption = f"one{character}two"
    assert rows(f"file_name,text\na.png,{caption}\n") == [{"file_name": "a.png", "text": caption}]
    assert read_jsonl(f'{{"text": "{caption}"}}\n' if character > "\x1f" else '{"text": "x"}')[0][0] == 1
    assert [row for _, row in read_jsonl('{"text": "a\u2028b"}\r\n\r\n{"text": "c"}')] == [
        {"text": "a\u2028b"},
        {"text": "c"},
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("file_name,text\n\n,\na.png,b\n\n", {"file_name": "a.png", "text": "b"}),  # empty lines
        ("file_name, text\na.png, b\n", {"file_name": "a.png", "text": "b"}),  # spaces behind the separators
        ('file_name, text\na.png, "b, c"\n', {"file_name": "a.png", "text": "b, c"}),
        ("file_name,text,,\na.png,b,,\n", {"file_name": "a.png", "text": "b"}),  # a spreadsheet's empty columns
        ("file_name,text,,\na.png,b\n", {"file_name": "a.png", "text": "b"}),
        (",file_name,text\n0,a.png,b\n", {"": "0", "file_name": "a.png", "text": "b"}),  # pandas' index
        ('file_name,text\na.png,"two\nlines"\n', {"file_name": "a.png", "text": "two\nlines"}),
        ('file_name,text\na.png,"say ""b"""\n', {"file_name": "a.png", "text": 'say "b"'}),
        ("file_name;text\na.png;b, c\n", {"file_name": "a.png", "text": "b, c"}),
        ("file_name\na.png\n", {"file_name": "a.png"}),
    ],
)
def test_a_table_means_what_a_spreadsheet_shows(text: str, expected: dict):
    assert rows(text) == [expected]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "file_name,text\na.png,a red kite, high up\n",
            r"row 0 \(line 2\) has 3 fields, more than the header's 2; put text",
        ),
        ("file_name,text\na.png,b,\n", r"row 0 \(line 2\) has 3 fields, more"),
        ("file_name,text\na.png,b\nc.png\n", r"row 1 \(line 3\) has 1 fields, fewer than the header's 2"),
        ("file_name,text,\na.png,b,c\n", r"row 0 \(line 2\) has 3 fields, more"),
        ("file_name,text,text\na.png,b,c\n", "the header gives 'text' twice"),
        ("file_name,file_name\na.png,b\n", "the header gives 'file_name' twice"),
        (
            'file_name,text\na.png,"b\nc.png,d\n',
            "line 3: unexpected end of data; close each quote",
        ),
        ('file_name,text\na.png,"b" c\n', "line 2: ',' expected after '\"'"),
        ("name,text\na.png,b\n", "the first line, 'name,text', names no column file_name or image"),
        ("a.png,b\n", "names no column"),
        ("", "the first line, '', names no column"),
        ("sep=;\nfile_name;text\na.png;b\n", "the first line, 'sep=;', names no column"),
        ("file_name,text\na.png," + "x" * 200_000, "line 2: field larger than field limit"),
    ],
)
def test_a_table_that_would_be_read_otherwise_than_meant_is_refused(text: str, says: str):
    with pytest.raises(InputError, match=says):
        read_csv(text, WANTED)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1}\n{"a": 1, "a": 2}\n', "line 2 gives 'a' twice"),
        ('{"a": 1}\n{"a": ', "line 2 is no JSON"),
        ("[1]", "line 1 is no JSON object"),
        ('"x"', "line 1 is no JSON object"),
        ("{'a': 1}", "line 1 is no JSON"),
        ("[" * 100_000, "line 1 is no JSON"),
        ('{"a": ' + "9" * 5000 + "}", "line 1 is no JSON"),
    ],
)
def test_a_line_that_is_no_json_object_is_refused(text: str, says: str):
    with pytest.raises(InputError, match=says):
        read_jsonl(text)


def test_text_is_utf_8_with_or_without_a_mark():
    assert read_text("\ufefffile_name,é".encode()) == "file_name,é"
    assert read_text("é\u2028".encode()) == "é\u2028"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a".encode("utf-16"), "it is UTF-16 or UTF-32; save it as UTF-8"),
        (b"\xfe\xff\0a", "it is UTF-16"),
        ("file_name\nä".encode("latin-1"), "line 2: byte 0xe4 is no UTF-8"),
        ("abc".encode("utf-16-le"), "line 1: a NUL character"),
    ],
)
def test_other_encodings_are_named(content: bytes, says: str):
    with pytest.raises(InputError, match=says):
        read_text(content)
