"""Writing files: whole, or not at all."""

import pytest

from entrenar.files import new_folder, write_file


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    write_file(tmp_path / "a", "old")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "b") as temporary:
        (temporary / "x").write_text("half")
        raise RuntimeError
    with pytest.raises(TypeError):
        write_file(tmp_path / "a", 3)  # type: ignore[arg-type]
    assert (tmp_path / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_new_folder_never_replaces_one_that_holds_something(tmp_path):
    for content in ("first", "second"):
        try:
            with new_folder(tmp_path / "a") as temporary:
                (temporary / "x").write_text(content)
        except FileExistsError:
            assert content == "second"
    assert (tmp_path / "a" / "x").read_text() == "first"
