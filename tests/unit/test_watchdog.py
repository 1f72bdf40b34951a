"""What an earlier hang left behind is not taken for this one's."""

from __future__ import annotations

from pathlib import Path

from titan_dp.faults.watchdog import Watchdog


def test_files_of_ranks_that_there_were_before_are_gone_when_a_run_starts_on_fewer(tmp_path: Path) -> None:
    for name in ("rank-0.txt", "rank-7.txt", "rank-7.json", "notes.txt"):
        (tmp_path / name).touch()
    with Watchdog(tmp_path, 1, 8, 60, "key"):
        assert (tmp_path / "rank-7.txt").exists(), "rank 0 does it for all"
    with Watchdog(tmp_path, 0, 8, 60, "key"):
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
