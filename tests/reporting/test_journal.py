import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efficientllm.errors import UsageError
from efficientllm.files import write_atomically
from efficientllm.reporting.journal import Journal, read_journal


def record(step: int) -> dict[str, object]:
    return {"step": step, "tokens": step * 4096, "loss": 3.25 - step / 64, "saliency": {"ffn": 1e-9}, "type": "ffn\n"}


def test_appended_records_come_back_and_nonfinite_numbers_are_null(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "new" / "metrics.jsonl")
    journal.append(record(1))
    journal.append({"step": 2, "loss": float("nan"), "saliency": {"ffn": float("inf")}, "units": [(1, 2), [3]]})
    assert read_journal(journal.path) == [
        record(1),
        {"step": 2, "loss": None, "saliency": {"ffn": None}, "units": [[1, 2], [3]]},
    ]
    # strict JSON: no reader in another language may meet NaN
    for line in journal.path.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_missing_file_has_no_records(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "none.jsonl") == []
    Journal(tmp_path / "none.jsonl").rewind(3)
    assert not (tmp_path / "none.jsonl").exists()


@given(data=st.data(), total=st.integers(1, 9), per_step=st.integers(1, 3))
def test_killed_at_any_byte_and_resumed_equals_uninterrupted(
    data: st.DataObject, total: int, per_step: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The promise: kill while any byte is written, rewind to the last checkpoint, go on, and no byte differs."""
    folder = tmp_path_factory.mktemp("journal")
    records = [record(step) for step in range(1, total + 1) for _ in range(per_step)]
    whole = Journal(folder / "whole.jsonl")
    for item in records:
        whole.append(item)
    content = whole.path.read_bytes()

    torn = folder / "torn.jsonl"
    killed_at = data.draw(st.integers(0, len(content)))
    garbage = data.draw(st.sampled_from([b"", b"\0" * 17, b"\xff\xfe", b"\0\0\n"]))
    keep = content[:killed_at]
    # zeroed blocks replace the tail of a line only after a power cut, never the newline before it
    torn.write_bytes(keep + (garbage if keep and not keep.endswith(b"\n") else b""))
    written = read_journal(torn)
    assert written == records[: len(written)]

    checkpoint = data.draw(st.integers(0, written[-1]["step"] - 1 if written else 0))
    resumed = Journal(torn)
    resumed.rewind(checkpoint)
    assert [item["step"] for item in read_journal(torn)] == [r["step"] for r in records if r["step"] <= checkpoint]
    for item in records:
        if item["step"] > checkpoint:
            resumed.append(item)
    assert torn.read_bytes() == content
    assert sorted(path.name for path in folder.iterdir()) == ["torn.jsonl", "whole.jsonl"]


@given(cut=st.integers(1, 60))
def test_appending_to_a_torn_file_without_rewind_keeps_it_readable(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("journal") / "metrics.jsonl"
    for step in (1, 2):
        Journal(path).append(record(step))
    path.write_bytes(path.read_bytes()[:-cut])
    Journal(path).append(record(3))
    # a cut of the newline alone tears nothing
    assert [item["step"] for item in read_journal(path)] == ([1, 2, 3] if cut == 1 else [1, 3])


def test_damage_before_the_last_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"step":1}\n{"step":\n{"step":3}\n')
    for attempt in (lambda: read_journal(path), lambda: Journal(path).rewind(1)):
        with pytest.raises(UsageError, match=r"events\.jsonl, line 2"):
            attempt()
    path.write_text('{"step":1}\n{"loss":2.0}\n')
    with pytest.raises(UsageError, match=r'line 2.*"step"'):
        Journal(path).rewind(1)
    assert path.read_text() == '{"step":1}\n{"loss":2.0}\n'


def test_a_refused_write_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        Journal(tmp_path / "file" / "metrics.jsonl").append(record(1))


def test_a_failed_replacement_leaves_the_old_content_and_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept.txt"
    write_atomically(path, b"old")

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(UsageError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
