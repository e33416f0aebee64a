"""summary.json is always valid JSON, and is written through a link."""
import json
import math

from report.compare import write_json


def test_numbers_that_are_not_finite_become_null(tmp_path):
    write_json(tmp_path / "new/summary.json", {"ar": {"val_nats": math.nan, "tok_s": 2.5}, "after": [math.inf]})
    text = (tmp_path / "new/summary.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text) == {"ar": {"val_nats": None, "tok_s": 2.5}, "after": [None]}


def test_a_linked_file_is_written_on_its_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "summary.json"
    link.symlink_to(tmp_path / "disk/target.json")
    for value in (1, 2):
        write_json(link, value)
        assert link.is_symlink() and json.loads((tmp_path / "disk/target.json").read_text()) == value
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["target.json"]
