"""The measurement of the audit's near copies, on generated images."""

from PIL import Image

from benchmarks import near_duplicates
from tests.helpers.audits import picture, put


def test_recall_and_pairs_are_counted(tmp_path, capsys):
    for number in range(8):
        split, name = ("train", "test")[number // 4], "ab"[number % 2]
        put(tmp_path / "data" / split / name / f"{number}.png", picture(number, 96, 80))
    put(tmp_path / "data" / "test" / "b" / "copy.jpg", picture(0, 96, 80), quality=90)  # of train/a/0.png
    put(tmp_path / "data" / "train" / "a" / "copy.png", picture(2, 96, 80))  # of train/a/2.png
    put(tmp_path / "data" / "train" / "a" / "blank.png", Image.new("L", (96, 80)))
    words = [tmp_path / "data", "--images-per-class", 3, "--search", 2500, "--sheet", tmp_path / "sheet.png"]
    near_duplicates.main([*map(str, words)])
    lines = capsys.readouterr().out.splitlines()
    assert "Copies found at a correlation of 0.98 or more, of 6 images" in lines
    not_all = {name for name in near_duplicates.ALTERATIONS if f"| {name} | 6 | 100 |" not in lines}
    assert not_all <= {"text in a corner", "cropped by 2 %", "cropped by 5 %", "mirrored"}
    assert "| mirrored | 0 | 0 |" in lines
    assert f"Pairs among the 11 images of {tmp_path / 'data'}" in lines
    assert "| 0.98 | 2 | 1 | 1 |" in lines
    assert any(line.startswith("2500 descriptors: 25 of 25 pairs found in ") for line in lines)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (6 * 340, 180)
