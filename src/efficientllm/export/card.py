"""What an export says about its model: the README.md beside it and the descriptive metadata of a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import PretrainedConfig

from efficientllm import __version__
from efficientllm.export.subject import Subject
from efficientllm.models.space import head_dim_of
from efficientllm.reporting.card_metadata import hub_id, kind_of, license_of, metadata, title_of
from efficientllm.reporting.journal import write_atomically
from efficientllm.reporting.model_card import TRANSFORMERS_USAGE, card_title, model_card
from efficientllm.sizes import format_count

README = "README.md"
MARK = "efficientllm"  # the tag by which a README.md of ours is known
_GGUF_USAGE = """\
```
llama-cli -m {file} -p "Once upon a time"
```

or from Python, with `pip install llama-cpp-python`:

```python
from llama_cpp import Llama

model = Llama("{file}")
print(model("Once upon a time", max_tokens=50)["choices"][0]["text"])
```

The file is in llama.cpp's format GGUF, type {kind}, architecture `{architecture}`."""
_PLAIN = """\
---
{front}---

# {title}

{count} parameters: {widths}. Exported with efficientllm {version} from the model folder `{name}`; nothing else is known
of it here.

## How to load it

{usage}
"""


@dataclass(frozen=True)
class Card:
    """Facts of an exported model of `parameters` weights; `stated_licence` is the user's, an identifier of the hub."""

    subject: Subject
    config: PretrainedConfig
    parameters: int
    stated_licence: str | None = None

    @property
    def facts(self) -> dict[str, Any] | None:
        """The run's facts with the versions, the licence and the evaluation; None for a model of no run."""
        facts = self.subject.facts
        if facts is None:
            return None
        versions = {"efficientllm": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
        return versions | facts | {"license": self.licence, "evaluation": self.subject.results}

    @property
    def licence(self) -> str | None:
        """As the user states it, else as the model's or its source's own card does; None where nobody does."""
        if self.stated_licence:
            return self.stated_licence
        source = (self.subject.facts or {}).get("source", {}).get("path")
        return license_of(self.subject.folder) or (license_of(source) if source else None)

    @property
    def size(self) -> str:
        return format_count(self.parameters)

    @property
    def title(self) -> str:
        return card_title(self.facts) if self.facts else self.subject.name

    @property
    def source_name(self) -> str | None:
        """Hub id of the model that this one was made from, or its name."""
        return (self.base_model or title_of(self.facts["source"])) if self.facts else None

    @property
    def base_model(self) -> str | None:
        return hub_id(str(self.facts["source"]["path"])) if self.facts else None

    @property
    def tags(self) -> list[str]:
        tags: list[str] = metadata(self.facts)["tags"] if self.facts else [MARK]
        return tags

    @property
    def summary(self) -> str:
        """One sentence: what it is and where it comes from."""
        if not self.facts:
            return f"{self.size} parameters, exported with efficientllm {__version__}"
        made = {
            "pruned": "pruned while it kept training, from",
            "trained": "trained on from",
            "random": "trained from random weights in the shape of",
        }[kind_of(self.facts)]
        source = format_count(self.facts["source"]["parameters"])
        tokens = format_count(self.facts["tokens"])
        return f"{self.size} parameters, {made} {self.source_name} ({source}) over {tokens} tokens with efficientllm"

    def text(self, usage: str = TRANSFORMERS_USAGE, **extra: Any) -> str:
        """The whole README.md; `extra` goes over its metadata. A model of no run keeps the card that it has."""
        if self.facts:
            return model_card(self.facts, usage=usage, extra=extra)
        own = self.subject.folder / README
        if own.is_file() and not extra:
            return _content(own)
        front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": self.tags}
        front |= {"license": self.licence} if self.licence else {}
        return _PLAIN.format(
            front=yaml.safe_dump(front | extra, sort_keys=False),
            title=self.title,
            count=f"{self.parameters:,}",
            widths=_widths(self.config),
            version=__version__,
            name=self.subject.name,
            usage=usage,
        )

    def write_beside(self, file: Path, kind: str, architecture: str, say: Callable[[str], None]) -> None:
        """NAME.md beside NAME.gguf, unless one lies there that no export has written.

        Not README.md: several files, of several types or models, lie in one folder.
        """
        path = file.with_name(f"{file.name.removesuffix('.gguf')}.md")
        if path.exists() and not re.search(rf"\A---\n.*?^- {MARK}$.*?^---$", _content(path), re.DOTALL | re.MULTILINE):
            say(f"{path} is left as it is, since no export has written it; the file's own metadata says what it is")
            return
        usage = _GGUF_USAGE.format(file=file.name, kind=kind, architecture=architecture)
        write_atomically(path, self.text(usage, library_name="gguf", tags=[*self.tags, "gguf"]).encode())


def _widths(config: PretrainedConfig) -> str:
    heads = (
        f"{config.num_attention_heads} query and {config.num_key_value_heads} key/value heads of {head_dim_of(config)}"
    )
    return (
        f"a {config.model_type} of {config.num_hidden_layers} layers, hidden size {config.hidden_size}, {heads}, "
        f"{config.intermediate_size} FFN channels, a vocabulary of {config.vocab_size:,}"
    )


def _content(path: Path) -> str:
    """A file that somebody else may have written, in whatever encoding."""
    return path.read_text(encoding="utf-8", errors="replace")
