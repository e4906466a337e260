"""Every kind of source gives the rows that were written, with a place for each, and malformed ones are named."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsevlm.data.opened import OpenSource
from sparsevlm.data.rows import RowContext
from sparsevlm.data.sample import BadSampleError, Media, Sample
from sparsevlm.data.skips import Skip
from sparsevlm.data.sources import open_rows
from sparsevlm.recipe.schema import Source
from sparsevlm.vision.tokens import MediaKind
from tests.data.media_files import encoded, picture


def source(path, format="caption", **fields) -> Source:
    return Source(path=[str(p) for p in path] if isinstance(path, list) else str(path), format=format, **fields)


def rows_of(path, **fields):
    return open_rows(source(path, **fields))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


# --- JSON -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.lists(json_values, max_size=6), st.booleans(), st.sampled_from([None, 2]), st.booleans())
def test_json_lists_are_read_row_by_row_as_json_reads_them(tmp_path_factory, values, ascii_only, indent, mark):
    path = tmp_path_factory.mktemp("json") / "a.json"
    text = json.dumps(values, ensure_ascii=ascii_only, indent=indent)
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + text.encode("utf-8", "surrogatepass").replace(b"\xed", b"?"))
    expected = json.loads(path.read_text(encoding="utf-8-sig"))
    assert list(rows_of(path)) == expected


@settings(deadline=None, max_examples=60)
@given(st.lists(json_values, min_size=1, max_size=6), st.sampled_from(["\n", "\r\n", "\n\n  \n"]), st.booleans())
def test_json_lines_are_read_row_by_row(tmp_path_factory, values, end, mark):
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    lines = end.join(json.dumps(value) for value in values)
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + lines.encode())
    if not lines.startswith("["):  # a first line that is a list makes the file one
        assert list(rows_of(path)) == values
        streamed = open_rows(source(path, streaming=True)).read(0, 0, 0, 1)
        assert [row for _, _, row in streamed] == values


def test_a_malformed_line_is_one_bad_row_with_its_number(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": \n\xff\xfe\n{"a": 2}')
    rows = rows_of(path)
    assert len(rows) == 4
    assert (rows[0], rows[3]) == ({"a": 1}, {"a": 2})
    assert [rows.where(i) for i in range(4)] == [f"a.jsonl:line {n}" for n in (1, 3, 4, 5)]
    for i in (1, 2):
        with pytest.raises(BadSampleError, match="malformed row"):
            rows[i]
    with pytest.raises(BadSampleError, match="malformed row"):
        raise next(r for _, _, r in open_rows(source(path, streaming=True)).read(0, 0, 0, 1) if not isinstance(r, dict))


def test_a_broken_json_list_says_where(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1},\n {"a": 2} {"a": 3}]')
    with pytest.raises(ValueError, match=r"a\.json:2:11: not a JSON list"):
        rows_of(path)
    path.write_text('[{"a": 1},\n {"a"')
    with pytest.raises(ValueError, match=r"a\.json:2:\d+: not a JSON list"):
        rows_of(path)
    path.write_text('{\n "a": [1, 2]\n}')
    with pytest.raises(ValueError, match="neither a JSON list nor JSON lines"):
        rows_of(path)


def test_rows_of_files_survive_pickling_and_are_not_held(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"a": "x" * 1000, "n": i}) for i in range(100)))
    rows = rows_of(path)
    assert rows[5]["n"] == 5
    copy = pickle.dumps(rows)
    assert len(copy) < 10_000
    assert pickle.loads(copy)[99]["n"] == 99


def test_several_files_follow_one_another(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.jsonl").write_text('{"n": 0}\n{"n": 1}')
    (tmp_path / "sub" / "b.json").write_text('[{"n": 2}]')
    (tmp_path / "sub" / "c.jsonl").write_text('{"n": 3}')
    rows = rows_of([tmp_path / "a.jsonl", tmp_path / "sub" / "b.json", tmp_path / "sub" / "c.jsonl"])
    assert [row["n"] for row in rows] == [0, 1, 2, 3]
    assert [rows.where(i) for i in (1, 2, 3)] == ["a.jsonl:line 2", "b.json:row 0", "c.jsonl:line 1"]
    assert [rows.folder(i).name for i in (1, 2)] == [tmp_path.name, "sub"]
    found = open_rows(Source(path="sub/*.json*", format="caption"), tmp_path)
    assert [row["n"] for row in found] == [2, 3]


@pytest.mark.parametrize(("path", "reason"), [("gone.json", "no file"), ("a b/c", "no file"), ("*.json", "no file")])
def test_what_is_nowhere(path, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        open_rows(Source(path=path, format="caption"), tmp_path)
    (tmp_path / "a.xml").write_text("<a/>")
    with pytest.raises(ValueError, match=r"a\.xml: files of records end in"):
        open_rows(Source(path="a.xml", format="caption"), tmp_path)


# --- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_with_texts_beside_the_pictures_and_folders_as_labels(tmp_path):
    for name in ("a.png", "cats/b.jpg", "cats/c.PNG", "dogs/e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(picture()))
    (tmp_path / "a.txt").write_text(" A red square.\n")
    (tmp_path / "cats" / "b.txt").write_text("A tabby.")
    (tmp_path / "cats" / "c.txt").write_bytes(b"\xff\xfe")
    rows = rows_of(tmp_path)
    assert rows[0] == {"id": "a.png", "image": "a.png", "text": "A red square."}
    assert rows[1] == {"id": "cats/b.jpg", "image": "cats/b.jpg", "text": "A tabby.", "label": "cats"}
    assert rows[3] == {"id": "dogs/e.png", "image": "dogs/e.png", "text": "dogs", "label": "dogs"}
    with pytest.raises(BadSampleError, match=r"c\.txt cannot be read"):
        rows[2]
    opened = OpenSource("pets", source(tmp_path))
    assert [type(opened.read(i)) for i in range(4)] == [Sample, Sample, Skip, Sample]
    assert next(opened.read(1).media()).source == tmp_path / "cats" / "b.jpg"
    assert opened.read(1).messages[1].text == "A tabby."


def test_a_folder_with_metadata(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(picture()))
    lines = [{"file_name": "a.png", "caption": "A."}, {"file_name": "../b.png", "caption": "B."}, {"caption": "C."}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    opened = OpenSource("pets", source(tmp_path))
    assert opened.read(0).messages[1].text == "A."
    assert "leaves the media root" in opened.read(1).reason
    assert "file_name" in opened.read(2).reason
    assert opened.read(2).where == f"{tmp_path.name}/metadata.jsonl:line 3"


def test_a_folder_of_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"no pictures, videos or metadata\.jsonl"):
        rows_of(tmp_path)


# --- tables ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def table():
    from datasets import ClassLabel, Dataset, Features, Image, List, Value

    features = Features(
        {
            "image": Image(),
            "views": List(Image()),
            "caption": Value("string"),
            "label": ClassLabel(names=["cat", "dog"]),
        }
    )
    files = [encoded(picture(i)) for i in range(3)]
    files[1] = files[1][:-200]  # cut off: the library itself must not stumble over it
    stored = [{"bytes": file, "path": None} for file in files]
    columns = {"image": stored, "views": [stored, [], stored[:1]], "caption": list("abc"), "label": [0, 1, 1]}
    return Dataset.from_dict(columns, features=features), files


@pytest.mark.parametrize("how", ["parquet", "saved", "folder", "parquet stream", "folder stream"])
def test_tables_keep_their_pictures_encoded(how, table, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    dataset, files = table
    path = tmp_path / "data"
    if how == "saved":
        dataset.save_to_disk(path)
    else:
        path.mkdir()
        path = path / "train.parquet"
        dataset.to_parquet(path)
        path = path.parent if how.startswith("folder") else path
    opened = OpenSource("t", source(path, streaming=how.endswith("stream")))
    samples = list(opened.stream(0, 0, 0, 1)) if opened.streams else [opened.read(i) for i in range(len(opened))]
    assert [next(sample.media()).source for sample in samples] == files
    assert [sample.messages[1].text for sample in samples] == ["a", "b", "c"]
    assert len({sample.where for sample in samples}) == 3
    labels = OpenSource("t", source(path, streaming=opened.streams, options={"text": "label", "image": "views"}))
    samples = list(labels.stream(0, 0, 0, 1)) if opened.streams else [labels.read(i) for i in range(3)]
    assert [media.source for media in samples[0].media()] == files
    assert samples[2].messages[1].text == "dog"
    assert isinstance(samples[1], Skip)  # no views at all


def test_csv(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "a.png").write_bytes(encoded(picture()))
    (tmp_path / "a.tsv").write_text("image\ttext\na.png\tA, b.\n")
    opened = OpenSource("t", source(tmp_path / "a.tsv"))
    assert opened.read(0).messages[1].text == "A, b."
    assert next(opened.read(0).media()).source == tmp_path / "a.png"


def test_an_unreadable_table(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"data\.t: data set 'a\.parquet' cannot be loaded"):
        OpenSource("t", source(tmp_path / "a.parquet"))


def test_data_sets_of_the_hub(table, monkeypatch, tmp_path):
    import datasets

    dataset, files = table
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        if path == "some/where":
            return dataset.to_iterable_dataset() if options["streaming"] else dataset
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    fields = {"name": "small", "split": "validation", "revision": "v1"}
    opened = OpenSource("h", source("some/where", **fields), tmp_path)
    assert asked == [("some/where", {**fields, "streaming": False})]
    assert opened.read(2).where == "some/where[validation]:row 2"
    assert next(opened.read(0).media()).source == files[0]
    streamed = OpenSource("h", source("some/where", streaming=True), tmp_path)
    assert [next(sample.media()).source for sample in streamed.stream(0, 0, 0, 1)] == files
    with pytest.raises(ValueError, match=r"data\.h: data set 'no/where' cannot be loaded: DatasetNotFoundError"):
        OpenSource("h", source("no/where"), tmp_path)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_a_stream_without_loss(kind, world, tmp_path):
    from datasets import Dataset

    paths = []
    for part in range(2):
        values = [{"n": 10 * part + i} for i in range(10)]
        paths.append(tmp_path / f"{part}.{kind}")
        if kind == "jsonl":
            paths[-1].write_text("\n".join(map(json.dumps, values)))
        else:
            Dataset.from_list(values).to_parquet(paths[-1])
    stream = open_rows(source(paths, streaming=True))
    for epoch in range(2):
        read = [[row["n"] for _, _, row in stream.read(epoch, 7, rank, world)] for rank in range(world)]
        assert sorted(n for part in read for n in part) == list(range(20))
        assert max(map(len, read)) - min(map(len, read)) <= 1
        assert read == [[row["n"] for _, _, row in stream.read(epoch, 7, rank, world)] for rank in range(world)]
    limited = [[row["n"] for _, _, row in stream.read(0, 7, rank, world, limit=7)] for rank in range(world)]
    assert sorted(n for part in limited for n in part) == list(range(7))


def test_streams_refuse_what_cannot_be_streamed(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(picture()))
    with pytest.raises(ValueError, match="can be streamed"):
        rows_of(tmp_path, streaming=True)


# --- opened sources -------------------------------------------------------------------------------------------------


def test_identity_limit_and_media_root(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(encoded(picture()))
    rows = [{"id": 7, "image": "a.png", "text": "A."}, {"image": "a.png", "text": "B."}, {"image": "gone.png"}, 3]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    given = Source(path="a.json", format="caption", media_root="pictures")
    opened = OpenSource("mine", given, tmp_path)
    assert len(opened) == 4
    first, second = opened.read(0), opened.read(1)
    assert (first.source, first.id, first.where) == ("mine", "7", "a.json:row 0")
    assert second.id == "1"
    assert next(first.media()) == Media(MediaKind.IMAGE, tmp_path / "pictures" / "a.png")
    assert opened.read(2) == Skip("mine", "2", "a.json:row 2", f"missing file 'gone.png' in {tmp_path / 'pictures'}")
    assert "not an object" in opened.read(3).reason
    assert len(OpenSource("mine", given.model_copy(update={"limit": 2}), tmp_path)) == 2
    with pytest.raises(ValueError, match=r"data\.mine: media_root 'gone' is no folder"):
        OpenSource("mine", given.model_copy(update={"media_root": "gone"}), tmp_path)
    with pytest.raises(
        ValueError, match=r"data\.mine: .*unknown option 'txt', did you mean 'text'\? \(known: .*prompt"
    ):
        OpenSource("mine", given.model_copy(update={"options": {"txt": "a"}}), tmp_path)
    with pytest.raises(ValueError, match=r"data\.mine: unknown data format 'captoin', did you mean 'caption'"):
        OpenSource("mine", given.model_copy(update={"format": "captoin"}), tmp_path)


# --- media paths ----------------------------------------------------------------------------------------------------


@pytest.fixture
def context(tmp_path):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.png").write_bytes(b"a")
    (root / "link.png").symlink_to(root / "sub" / "a.png")
    (root / "loop").symlink_to(root / "loop")
    (tmp_path / "secret.png").write_bytes(b"s")
    (tmp_path / "root-2").mkdir()
    (tmp_path / "root-2" / "b.png").write_bytes(b"b")
    (root / "escape.png").symlink_to(tmp_path / "secret.png")
    (root / "out").symlink_to(tmp_path)
    return RowContext("s", 0, media_root=root)


@pytest.mark.parametrize("path", ["sub/a.png", "link.png", "sub/../sub/a.png", "./sub/a.png"])
def test_paths_within_the_root(path, context):
    assert context.resolve(path) == (context.media_root / "sub" / "a.png").resolve()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../secret.png", "leaves"),
        ("sub/../../secret.png", "leaves"),
        ("../root-2/b.png", "leaves"),
        ("escape.png", "leaves"),
        ("out/secret.png", "leaves"),
        ("{root}/sub/a.png", "not relative"),
        ("/etc/hostname", "not relative"),
        ("", "not relative"),
        ("a\0.png", "not relative"),
        ("loop", "cannot be resolved|missing"),
        ("x" * 5000, "cannot be resolved"),
        ("\ud800.png", "cannot be resolved|missing"),
        ("gone.png", "missing file"),
        ("sub", "missing file"),
    ],
)
def test_paths_that_are_refused(path, reason, context):
    with pytest.raises(BadSampleError, match=reason):
        context.resolve(path.replace("{root}", str(context.media_root)))


def test_media_of_rows(context):
    import base64

    from PIL import Image

    def made(value):
        return context.media(MediaKind.IMAGE, value).source

    image = Image.new("RGB", (1, 1))
    assert made("sub/a.png") == made("file://sub/a.png") == made({"path": "sub/a.png", "bytes": None})
    assert made(b"x") == made({"bytes": b"x", "path": "/etc/hostname"}) == b"x"
    assert made(image) is image
    assert made("data:image/png;base64," + base64.b64encode(b"png").decode()) == b"png"
    for value, reason in [
        ("https://example.com/a.png", "nothing is downloaded"),
        ("data:image/png,abc", "not base64"),
        ("data:image/png;base64,???", "is broken"),
        ({"path": "/etc/hostname", "bytes": None}, "not relative"),
        ({"path": None, "bytes": None}, "image is None"),
        ({"other": 1}, "not a path"),
        (3.5, "image is 3.5"),
    ]:
        with pytest.raises(BadSampleError, match=reason):
            made(value)
    cached = RowContext("s", 0, caches=(context.media_root,))
    stored = {"bytes": None, "path": str(context.media_root / "sub" / "a.png")}
    assert cached.media(MediaKind.IMAGE, stored).source.name == "a.png"
    for path in (str(context.media_root / "escape.png"), str(context.media_root / ".." / "secret.png")):
        with pytest.raises(BadSampleError, match="leaves"):
            cached.media(MediaKind.IMAGE, {"bytes": None, "path": path})
