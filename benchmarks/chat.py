"""Does an instruct model unlearn to chat when it is pruned on text alone? Conversations in the mixture, and not.

    python benchmarks/chat.py FOLDER --source MODEL --domains DIR [--target 80%] [--tokens 100K] [--seed 1]

MODEL is a transformers folder or GGUF file with a chat template, as for real.py; DIR holds the domains as JSON lines.
Conversations are made of stackexchange: a question and the first answer to it, where both fit in a row; every tenth is
held out. Arms: the mixture of real.py, and the same at half its weight beside as many rows of conversations; all else
is the loop of real.py. Measured on the same held-out conversations, loss on the answers alone, and on held-out text; of
each conversation or document its mean loss, differences to the source paired by these, with a percentile bootstrap at
95 %. Then each model answers two questions, greedily. Finished arms are not repeated, stopped ones go on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from real_text import LENGTH, SHARES, Losses, difference, pooled, rows_of, split_domains

from efficientllm.config import Recipe
from efficientllm.data.chat import ChatEncoder
from efficientllm.data.planes import Planes, with_planes
from efficientllm.files import atomic_path
from efficientllm.jobs.prune import run
from efficientllm.models.loading import load_model, load_tokenizer
from efficientllm.sizes import format_count, parse_count
from efficientllm.training.gradient import Precision, row_losses

HELD = 100  # conversations that losses are measured on
DOCUMENTS = 10  # held-out documents of each domain, a row of each
ARMS = {"text alone": 0.0, "text and conversations": 0.5}  # weight of the conversations
QUESTIONS = ("What is the capital of France, and what is it known for?", "Write three sentences about the sea.")
ANSWER_TOKENS = 60


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def make_chats(file: Path, folder: Path, encoder: ChatEncoder) -> None:
    """chats.jsonl to train on and chats.held.jsonl."""
    if folder.is_dir():
        return
    chats = []
    for line in file.open(encoding="utf-8"):
        question, *answers = json.loads(line)["text"].removeprefix("Q: ").split("\n\nA: ")
        if answers:
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answers[0]}]
            chats += [turns] if len(encoder(turns)[0]) else []
    with atomic_path(folder) as partial:
        for name, held in (("chats", False), ("chats.held", True)):
            chosen = [chat for at, chat in enumerate(chats) if (at % 10 == 9) == held]
            (partial / f"{name}.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in chosen))


def recipe(arguments: argparse.Namespace, arm: str) -> Recipe:
    folder, weight = arguments.folder, ARMS[arm]
    train = [
        {"path": str(folder / "text" / f"{name}.jsonl"), "weight": share * (1 - weight)}
        for name, share in SHARES.items()
    ]
    held = [str(folder / "text" / f"{name}.held.jsonl") for name in SHARES]
    if weight:
        train.append({"path": str(folder / "chats" / "chats.jsonl"), "weight": weight})
    return Recipe.model_validate(
        {
            "source": arguments.source,
            "data": {"train": train, "validation": held, "sequence_length": LENGTH, "cache_dir": str(folder / "cache")},
            "train": {"tokens": parse_count(arguments.tokens), "batch_tokens": 4096, "micro_batch": 2, "lr": 3e-4}
            | {"warmup": "8%", "decay": "30%", "seed": arguments.seed},
            "prune": {"target": arguments.target},
            "run": {"dir": str(run_folder(arguments, arm)), "validate_every": "100%", "validation_tokens": 4096}
            | {"checkpoint_every": "20%", "keep": 1, "trackers": []},
        }
    )


def run_folder(arguments: argparse.Namespace, arm: str) -> Path:
    setting = f"{arguments.target.rstrip('%')}-{arguments.tokens}-{arguments.seed}"
    folder: Path = arguments.folder / f"{arm.replace(' ', '-')}-{setting}"
    return folder


@torch.no_grad()
def measured(path: str, folder: Path, encoder: ChatEncoder, tokenizer: Any) -> tuple[Losses, list[str], int]:
    """Losses of a model on what is held out, its answers, and its parameters."""
    model, precision = load_model(path, use="evaluated").eval(), Precision("cpu", bf16=False)
    losses: Losses = {"conversations": {}, "text": {}}
    lines = (folder / "chats" / "chats.held.jsonl").read_text().splitlines()[:HELD]
    for at, line in enumerate(lines):
        ids, marks = encoder(json.loads(line)["messages"])
        rows = with_planes(ids[None].astype("int64"), marks[None], Planes.LABELS, tokenizer.eos_token_id)
        losses["conversations"][str(at)] = row_losses(model, torch.from_numpy(rows), precision).tolist()
    for name in SHARES:
        for at, line in enumerate((folder / "text" / f"{name}.held.jsonl").read_text().splitlines()[:DOCUMENTS]):
            rows = rows_of(tokenizer, json.loads(line)["text"], 1)
            losses["text"][f"{name} {at}"] = row_losses(model, rows, precision).tolist()
    answers = [answer(model, tokenizer, question) for question in QUESTIONS]
    return losses, answers, sum(weight.numel() for weight in model.parameters())


def answer(model: Any, tokenizer: Any, question: str) -> str:
    turns = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    settings = {"do_sample": False, "max_new_tokens": ANSWER_TOKENS, "use_cache": True}
    made = model.generate(**prompt, **settings, pad_token_id=tokenizer.eos_token_id)[0]
    said = tokenizer.decode(made[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(said.split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", required=True)
    parser.add_argument("--domains", type=Path, required=True)
    parser.add_argument("--target", default="80%")
    parser.add_argument("--tokens", default="100K")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.source)
    encoder = ChatEncoder(tokenizer, LENGTH, "stackexchange")
    split_domains(arguments.domains, arguments.folder / "text")
    make_chats(arguments.domains / "stackexchange.jsonl", arguments.folder / "chats", encoder)
    found = {"the source": measured(arguments.source, arguments.folder, encoder, tokenizer)}
    for arm in ARMS:
        run(recipe(arguments, arm), say)
        found[arm] = measured(str(run_folder(arguments, arm) / "model"), arguments.folder, encoder, tokenizer)
    base = found["the source"][0]
    print("| model | parameters | conversations | to the source | text | to the source |\n|" + " --- |" * 6)
    for name, (losses, _, parameters) in found.items():
        cells = [name, format_count(parameters)]
        for kind, own in losses.items():
            cells += [f"{pooled(own, sorted(own)):.3f}", "" if own is base[kind] else difference(own, base[kind])]
        print("| " + " | ".join(cells) + " |")
    for at, question in enumerate(QUESTIONS):
        print(f"\n{question}\n")
        for name, (_, answers, _) in found.items():
            print(f"* {name}: {answers[at]}")


if __name__ == "__main__":
    main()
