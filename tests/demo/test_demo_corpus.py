import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from efficientllm.demo.corpus import (
    END_OF_TEXT,
    CorpusFacts,
    documents,
    is_held_out,
    is_table,
    train_tokenizer,
    write_corpus,
)
from efficientllm.errors import UsageError

pytestmark = pytest.mark.slow
PROGRAM = 'def area(radius):\n    """Return the area."""\n    return 3.14159 * radius**2\n'


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CorpusFacts]:
    folder = tmp_path_factory.mktemp("corpus")
    return folder, write_corpus(folder)


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_corpus_of_this_python(corpus: tuple[Path, CorpusFacts]) -> None:
    folder, facts = corpus
    train, validation = rows(folder / "train.jsonl"), rows(folder / "validation.jsonl")
    paths = [row["path"] for row in (*train, *validation)]
    assert facts == CorpusFacts(
        len(paths), sum(len(row["text"]) for row in (*train, *validation)), held_out_files=len(validation)
    )
    assert facts.characters > 3_000_000
    assert 0.02 < len(validation) / len(paths) < 0.09
    assert len(set(paths)) == len(paths)
    assert all(is_held_out(row["path"]) for row in validation)
    assert not any(is_held_out(row["path"]) for row in train)
    assert {"argparse.py", "json/decoder.py", "asyncio/base_events.py"} <= set(paths)
    # tables and tests are not language
    parts = {part for path in paths for part in path.split("/")[:-1]}
    assert not parts & {"test", "tests", "site-packages", "pydoc_data"}
    assert not {"encodings/cp437.py", "encodings/iso8859_2.py", "html/entities.py"} & set(paths)


def test_writing_twice_gives_the_same_bytes(corpus: tuple[Path, CorpusFacts], tmp_path: Path) -> None:
    folder, facts = corpus
    assert write_corpus(tmp_path) == facts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.jsonl", "validation.jsonl"]
    for name in ("train.jsonl", "validation.jsonl"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_rules_of_what_is_a_document(tmp_path: Path) -> None:
    def put(path: str, content: str | bytes) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content.encode() if isinstance(content, str) else content)

    put("b/module.py", PROGRAM)
    put("a.py", PROGRAM.replace("area", "room").replace("\n", "\r\n"))
    put("copy_of_b.py", PROGRAM)
    put("latin.py", "name = 'M\u00fcller'\n".encode("latin-1"))
    put("unicode.py", "# Gr\u00f6\u00dfe\n" + PROGRAM)
    put("empty.py", "\n")
    put("table.py", "codes = {\n" + "".join(f"    {n}: 'x{n}',\n" for n in range(40)) + "}\n")
    put("long.py", "data = b'" + "0" * 500 + "'\n")
    put("_sysconfigdata__linux.py", PROGRAM + "# 1\n")
    for folder in ("test", "lib/tests", "idlelib/idle_test", "site-packages/x", "__pycache__"):
        put(f"{folder}/skipped.py", PROGRAM + f"# {folder}\n")
    put("notes.txt", PROGRAM)
    found = dict(documents(tmp_path))
    assert list(found) == ["a.py", "b/module.py", "unicode.py"]
    assert "\r" not in found["a.py"]


def test_programs_are_no_tables() -> None:
    assert not is_table(PROGRAM)
    assert not is_table('"""Docstring."""\n\nx = [\n    1,\n]\nprint(x)\n')
    assert is_table('"key": 1,\n"other": 2,\nx = 3\n')


def test_too_little_text_is_said(tmp_path: Path) -> None:
    (tmp_path / "only.py").write_text(PROGRAM)
    for library in (tmp_path, tmp_path / "python311.zip"):
        with pytest.raises(UsageError, match="demo needs 1,000,000"):
            write_corpus(tmp_path / "out", library=library)
    assert not (tmp_path / "out").exists()


def test_tokenizer_is_lossless_deterministic_and_loads_with_transformers(
    corpus: tuple[Path, CorpusFacts], tmp_path: Path
) -> None:
    files = [corpus[0] / "validation.jsonl"]  # the small split, for time
    first = tmp_path / "first"
    train_tokenizer(files, 1000, first)
    train_tokenizer(files, 1000, tmp_path / "second")
    train_tokenizer(files, 1000, first)  # replaces what is there
    assert (first / "tokenizer.json").read_bytes() == (tmp_path / "second" / "tokenizer.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]
    tokenizer = AutoTokenizer.from_pretrained(first)
    assert len(tokenizer) == 1000
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == END_OF_TEXT
    for text in (PROGRAM, " leading , 'm not' . spaces", "\tGr\u00f6\u00dfe \U0001f600\r\n\0", ""):
        tokens = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(tokens) == text
        assert tokenizer.encode(text) == tokens  # documents are joined by the data, not by the tokenizer
    assert len(tokenizer.encode(PROGRAM)) < len(PROGRAM) / 2
    assert tokenizer.encode(END_OF_TEXT) == [tokenizer.eos_token_id]


def test_vocabulary_without_room_for_the_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 257"):
        train_tokenizer([], 256, tmp_path / "tokenizer")
