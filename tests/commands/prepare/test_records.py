"""Tables that users write: columns, labels as folder names, names of files, and one sentence for each mistake."""

import pytest

from tests.helpers.tables import HEAD, fails, placed, prepare, read_rows, write_source, write_table
from utils.data.tables import Table
from utils.prepare.records import LABEL_COLUMNS, Record, name_files, read_records
from utils.runtime.errors import UserError


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


def names_of(images, kind="8 bits"):
    records = [Record(0, image, f"/{image}", "a", "", "", kind=kind) for image in images]
    name_files(records)
    return [record.name for record in records]


@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        ("path,class\nx y.png,a\n", "t.csv", [["x y.png", "a"]]),
        ("path,class\nx.png,a,,\n\n,\ny.png,b\n", "t.csv", [["x.png", "a"], ["y.png", "b"]]),
        ("\ufeffpath;class\r\nx.png;a,b\r\n", "t.csv", [["x.png", "a,b"]]),
        ("path\tclass\nx,1.png\ta\n", "t.tsv", [["x,1.png", "a"]]),
        ("path\tclass\nx.png\ta\n", "t.txt", [["x.png", "a"]]),
        ("path;class;age, years\nx,1.png;a;3\n", "t.csv", [["x,1.png", "a"]]),
        ('class,path\n"a ""b"", c","x\n.png"\n', "t.csv", [["x\n.png", 'a "b", c']]),
    ],
)
def test_separators_quotes_and_marks_are_understood(tmp_path, content, name, expected):
    (tmp_path / name).write_text(content)
    assert [cells for _, cells in Table(tmp_path / name).cells(["path", "class"])] == expected


def test_obvious_columns_are_found_and_others_are_asked_for(tmp_path):
    def label_of(*columns):
        table = Table(write_table(tmp_path / "t.csv", [], columns))
        return table.column(None, "--label", LABEL_COLUMNS, "the label")

    assert label_of("Image Path", "Class_Name", "age") == "Class_Name"
    with pytest.raises(UserError, match=r"no column has a usual name for the label; give --label COLUMN; its columns "
                                        r"are x, age\."):  # fmt: skip
        label_of("x", "age")
    with pytest.raises(UserError, match=r"several columns may hold the label \(label, class\); give --label"):
        label_of("label", "class")


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (b"", [], "is empty; expected a first line with the names of the columns"),
        (b"\nfile,label\n0.png,a\n", [], "its first line is empty; expected a first line with the names"),
        (b"PK\3\4\0", [], "is a workbook, not a CSV or TSV file; save its sheet as CSV UTF-8"),
        (
            b"file|label\n",
            [],
            "its only column is file|label; expected columns separated by commas, semicolons or tabs",
        ),
        (b"file,label\n", [], "lists no image"),
        (b"p\0a\0", [], "it holds zero bytes, as UTF-16 does"),
        (b"file,label\n0.png,a\n", ["--group", "patients"], "has no column 'patients' (--group); its columns are"),
        (b"file,label\n0.png,a\n", ["--label", "labels"], "did you mean label? its columns are file, label"),
        (b"file,label,label\n0.png,a,b\n", ["--label", "label"], "has 2 columns 'label' (--label)"),
        (b"file,label\n0.png,a\n1.png\n", [], "line 3: has 1 cells, where the header has 2"),
        (b'file,label\n0.png,"a\n', [], "line 2: cannot be read (unexpected end of data); save it as CSV"),
        (b"file,label\n0.png,a,b\n", [], "line 2: has 3 cells, where the header has 2"),
        (b"file,label\n0.png,\n1.png,a\n2.png, \n", [], "'label' is empty in 2 rows (line 2, 4); fill it in"),
        (b"file,label,g\n0.png,a,\n", ["--group", "g"], "give each image without a group a value of its own"),
        (
            b"file,label,s\n0.png,a,trian\n",
            ["--split", "s"],
            "'s' holds 'trian'; expected train, val, test, or training",
        ),
        (b"file,label\n0.png,a\n./0.png,b\n", [], "lines 2 and 3 give '0.png' different values in the column 'label'"),
        (b"file,label\n0.png,a\n1.png,a\n", [], "all images have the label 'a'; training needs at least two classes"),
        (
            b"file,label\n0.png,Mass\n1.png,mass\n",
            [],
            "'Mass' and 'mass' would become the same folder, or",
        ),
        (b"file,label\n0.png,a/b\n1.png,a\\b\n", [], "'a/b' and 'a\\\\b' would become the same folder"),
        (b"file,label\n0.png,a\n1.png,b\n", [], "2 classes with fewer than 2 images: a (1), b (1)"),
    ],
)
def test_a_bad_table_is_one_sentence(tmp_path, data, content, flags, message):
    (tmp_path / "t.csv").write_bytes(content)
    assert message in fails(tmp_path / "t.csv", data, *flags)
    assert not data.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--val", ".6", "--test", ".4"], "--val and --test: 1 together leave nothing for train"),
        (["--split", "fold", "--seed", "1"], "--split fold: takes the split from the table; leave out --seed"),
        (["--folds", "3", "--val", ".1"], "--val: the folds are the val splits"),
        (["--folds", "1"], "--folds 1: expected 2 to 100"),
        (["--folds", "11", "--test", "0", "--group", "patient"], "give at most --folds 10"),
        (["--seed", str(2**32)], "expected at most 4294967295"),
        (["--window", "9", "3"], "--window 9 3: expected auto, or LOW HIGH with LOW below HIGH"),
        (["--window", "soft"], "--window soft: expected auto"),
        (["--root", "/nowhere"], "--root /nowhere: no such folder"),
    ],
)
def test_a_bad_flag_is_one_sentence(tmp_path, data, flags, message):
    assert message in fails(write_source(tmp_path), data, *flags)
    assert not data.exists()


def test_splits_of_the_table_that_share_groups_or_lack_classes_are_refused(tmp_path, data):
    table = write_source(tmp_path)
    rows = [list(row.values()) for row in read_rows(table)]
    rows[0][3], rows[5][3] = "val", "test"
    write_table(table, rows)
    message = fails(table, data, "--split", "fold", "--group", "patient")
    assert "--split: 2 groups of 20 are in several splits: p0, p1." in message
    assert message.endswith("To keep this split, leave --group out.")
    prepare(table, data, "--split", "fold")
    write_table(table, [row for row in rows if row[1] == "a" or row[3] != "valid"])
    assert "--split: 1 class without images in val: b" in fails(table, tmp_path / "other", "--split", "fold")


def test_an_image_listed_twice_is_used_once(tmp_path):
    table = write_table(
        tmp_path / "t.csv", [("x.png", "a", "1", ""), ("y.png", "b", "2", ""), ("d/../x.png", "a", "1", "")]
    )
    columns = dict(zip(("image", "label", "group"), HEAD, strict=False))
    records, repeated = read_records(Table(table), columns, str(tmp_path), "")
    assert [(record.image, record.label, record.group) for record in records] == [
        ("x.png", "a", "1"),
        ("y.png", "b", "2"),
    ]
    assert repeated == 1


def test_labels_that_no_folder_can_have_are_changed_and_printed(tmp_path, data, capsys):
    rows = [(*row.values(),) for row in read_rows(write_source(tmp_path))]
    table = write_table(tmp_path / "table.csv", [(row[0], {"a": "n/a", "b": ".b\n"}[row[1]], *row[2:]) for row in rows])
    prepare(table, data)
    assert {name.split("/")[1] for name in placed(data)} == {"n_a", "_.b"}  # the line break at the end is stripped
    assert "Labels that cannot be names of folders: '.b' becomes '_.b', 'n/a' becomes 'n_a'." in capsys.readouterr().out


def test_equal_file_names_get_their_paths_and_hashes_where_these_are_equal_too():
    assert names_of(["p1/x.png", "p2/x.png", "p2/y.jpg"]) == ["p1__x.png", "p2__x.png", "y.jpg"]
    assert names_of(["p1/x.png", "p2/X.PNG"]) == ["p1__x.png", "p2__X.PNG"]
    assert names_of(["x.png", "x.jpg"])[0][:2] == "x-"
    first, second, third = names_of(["a/b__x.png", "a__b/x.png", "c/x.png"])
    assert (first, third) == ("b__x.png", "c__x.png")
    assert second == "a__b__x.png"
    long = [f"{n}{'d' * 250}/x.png" for n in range(2)]
    assert [len(name) for name in names_of(long)] == [len("x-") + 16 + 4] * 2


def test_converted_files_become_png_and_numbers_with_dots_stay_whole():
    names = names_of(["a/1.2.840.1", "1.2.840.2", "scan.dcm", "x.tif"], "DICOM")
    assert names == ["1.2.840.1.png", "1.2.840.2.png", "scan.png", "x.png"]


def test_a_hidden_name_is_refused():
    with pytest.raises(UserError, match="training skips files of this name as hidden"):
        names_of(["._x.png"])
