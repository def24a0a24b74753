"""Files that a manifest lists: names that stay below their folder, and bytes that are those that were written."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from calibcast.calib.errors import ArtifactError, ChangedFileError
from calibcast.calib.sealed_files import check_plain, check_plain_part, check_sealed, files_under, followed, sha256


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "/a",
        "a/",
        "a//b",
        "a/./b",
        "a/../b",
        "../a",
        "a\\b",
        "a\0b",
        "c:a",
        "a\nb",
        "a\x1bb",
        5,
        None,
        ["a"],
    ],
)
def test_names_that_could_lead_out_are_refused(name: Any) -> None:
    for check in (check_plain, check_plain_part):
        with pytest.raises(ArtifactError, match="only plain names"):
            check(name, "manifest")


@pytest.mark.parametrize("name", ["a", "a.engine", ".hidden", "größe", "a b", "...", "a-1_2"])
def test_plain_names_are_given_back(name: str) -> None:
    assert check_plain(name, "manifest") == check_plain_part(name, "manifest") == name
    assert check_plain(f"folder/{name}", "manifest") == f"folder/{name}"
    with pytest.raises(ArtifactError, match="manifest names the file 'folder/"):
        check_plain_part(f"folder/{name}", "manifest")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files, one of them two folders down."""
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "a.bin").write_bytes(b"one")
    (tmp_path / "sub" / "deep" / "b.bin").write_bytes(b"two")
    return tmp_path


def test_hashes_are_those_of_the_files_below(folder: Path) -> None:
    one, two = hashlib.sha256(b"one").hexdigest(), hashlib.sha256(b"two").hexdigest()
    assert sha256(folder / "a.bin") == one
    assert files_under(folder, folder) == {"a.bin": one, "sub/deep/b.bin": two}
    assert files_under(folder / "sub", folder) == {"sub/deep/b.bin": two}
    assert files_under(folder / "a.bin", folder) == {"a.bin": one}
    assert files_under(folder / "none", folder) == {}


def test_files_that_are_as_written_pass(folder: Path) -> None:
    files = files_under(folder, folder)
    (folder / "extra").write_bytes(b"not listed, so nobody reads it")
    check_sealed(folder, files, folder / "manifest.json")
    check_sealed(folder, files, folder / "manifest.json", only="a.bin")


def test_a_changed_file_is_told_apart_from_a_missing_one(folder: Path) -> None:
    files, manifest = files_under(folder, folder), folder / "manifest.json"
    (folder / "sub" / "deep" / "b.bin").write_bytes(b"twO")
    with pytest.raises(ChangedFileError, match=r"b\.bin is not the b that manifest\.json was written for") as error:
        check_sealed(folder, files, manifest)
    assert hashlib.sha256(b"twO").hexdigest()[:12] in str(error.value)
    assert files["sub/deep/b.bin"][:12] in str(error.value)
    check_sealed(folder, files, manifest, only="a.bin")
    (folder / "a.bin").unlink()
    with pytest.raises(ArtifactError, match=r"is missing: no such file, and manifest\.json lists it"):
        check_sealed(folder, files, manifest)
    (folder / "a.bin").mkdir()
    with pytest.raises(ArtifactError, match="cannot be read"):
        check_sealed(folder, files, manifest)


def test_a_manifest_must_list_its_files(folder: Path) -> None:
    for files in (None, ["a.bin"], "a.bin"):
        with pytest.raises(ArtifactError, match="lists no hashes"):
            check_sealed(folder, files, folder / "manifest.json")
    with pytest.raises(ArtifactError, match=r"does not list c\.bin"):
        check_sealed(folder, files_under(folder, folder), folder / "manifest.json", only="c.bin")
    with pytest.raises(ArtifactError, match="only plain names"):
        check_sealed(folder, {"../x": "0"}, folder / "manifest.json")


def test_links_are_not_followed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Neither a file that is a link, nor one in a folder that is."""
    files = files_under(folder, folder)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "a.bin").write_bytes(b"one")
    (elsewhere / "b.bin").write_bytes(b"two")
    (folder / "a.bin").unlink()
    (folder / "a.bin").symlink_to(elsewhere / "a.bin")
    with pytest.raises(ArtifactError, match="is a symbolic link"):
        check_sealed(folder, files, folder / "manifest.json", only="a.bin")
    (folder / "sub" / "deep" / "b.bin").unlink()
    (folder / "sub" / "deep").rmdir()
    (folder / "sub" / "deep").symlink_to(elsewhere)
    with pytest.raises(ArtifactError, match="is a symbolic link"):
        check_sealed(folder, files, folder / "manifest.json", only="sub/deep/b.bin")
    # The folder itself may be one: the user chose it.
    (elsewhere / "link").symlink_to(folder)
    (folder / "c.bin").write_bytes(b"one")
    check_sealed(elsewhere / "link", {"c.bin": hashlib.sha256(b"one").hexdigest()}, folder / "manifest.json")


def test_writing_to_a_link_goes_to_its_target(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    assert followed(link) == target.resolve()
    assert followed(str(target)) == target
