"""What --help shows."""

from __future__ import annotations

import pytest

from efficientllm.cli import PANELS, app, main


def test_commands_are_listed_by_use(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    page = capsys.readouterr().out
    assert len(app.registered_commands) == sum(map(len, PANELS.values()))
    places = [page.index(panel) for panel in PANELS]
    assert places == sorted(places)
    assert page.index("│ plan") < page.index("│ prune") < page.index("│ compare")
    assert "Exit codes" in page
