"""The store of a job: what it says may not write outside the job's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from calibcast.calib import ArtifactError
from calibcast.engines.job.folder import MANIFEST, Store


@pytest.mark.parametrize("name", ["../outside.txt", "a/../../outside.txt", "/outside.txt"])
def test_a_store_does_not_choose_where_its_files_go(tmp_path: Path, name: str) -> None:
    (tmp_path / "remote").mkdir()
    (tmp_path / "job").mkdir()
    (tmp_path / "outside.txt").write_text("mine")
    manifest = {"stages": {"plan": {"files": {name: "0"}}}}
    (tmp_path / "remote" / MANIFEST).write_text(json.dumps(manifest))
    store = Store(f"file://{tmp_path / 'remote'}", tmp_path / "job")
    with pytest.raises(ArtifactError, match="only plain names inside its folder"):
        store.pull()
    assert (tmp_path / "outside.txt").read_text() == "mine"
    assert list((tmp_path / "job").iterdir()) == []
