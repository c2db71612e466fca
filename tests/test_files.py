"""Files written whole or not at all."""

from __future__ import annotations

import pytest

from rwn_ext.files import replacing


def test_the_new_file_takes_the_place_of_the_old(tmp_path):
    target = tmp_path / "log"
    target.write_text("old")
    with replacing(target) as part:
        part.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_is_interrupted_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "log"
    target.write_text("old")
    with pytest.raises(error), replacing(target) as part:
        part.write_text("hal")
        raise error
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_a_block_that_wrote_nothing_is_an_error_and_the_old_file_stays(tmp_path):
    target = tmp_path / "log"
    target.write_text("old")
    with pytest.raises(FileNotFoundError), replacing(target):
        pass
    assert target.read_text() == "old"
