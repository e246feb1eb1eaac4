"""What a runtime computes with a model: a script for the interpreter that has the runtime, so it imports none of ours.

stdin: one JSON object, `runtime` (a key of RUNTIMES), `models` (paths), `texts` (rows of token ids of one length),
`start` (so many of each row's tokens are a prompt) and `new` (tokens to write after it).
stdout: one JSON object, `version` of the runtime and `answers`, one a model, or `error`, the runtime's own sentence. An
answer has `logprobs`, natural logarithms of the probability of each row's tokens but the first; `top`, the most likely
token at each of these positions; `greedy`, the tokens written.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

Rows = list[list[int]]

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # vLLM would compile its sampler, for minutes of a slow core
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # its errors are then ours to catch
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # this process may be bound already
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def in_transformers(path: str, texts: Rows, start: int, new: int) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True).eval()
    rows = torch.tensor(texts)
    with torch.inference_mode():
        scores = model(rows).logits[:, :-1].float().log_softmax(-1)
        step, cache, greedy = rows[:, :start], None, []
        for _ in range(new):
            out = model(step, past_key_values=cache, use_cache=True)
            step, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            greedy.append(step)
    return {
        "logprobs": scores.gather(-1, rows[:, 1:, None])[..., 0].tolist(),
        "top": scores.argmax(-1).tolist(),
        "greedy": torch.cat(greedy, 1).tolist(),
    }


def in_vllm(path: str, texts: Rows, start: int, new: int) -> dict[str, Any]:
    """In float32 whatever the folder holds; nothing compiled, no tokenizer. min_tokens would forbid the last token."""
    from vllm import LLM, SamplingParams

    model = LLM(
        model=path,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=len(texts[0]) + 1,
        max_num_seqs=len(texts),
    )

    def run(rows: Rows, **options: Any) -> list[Any]:
        settings = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, **options)
        found: list[Any] = model.generate([{"prompt_token_ids": row} for row in rows], settings, use_tqdm=False)
        return found

    scored = [
        [(at[token].logprob, next(each for each, found in at.items() if found.rank == 1)) for token, at in pairs]
        for pairs in (
            zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:], strict=True)
            for out in run(texts, max_tokens=1, prompt_logprobs=1)
        )
    ]
    written = run([row[:start] for row in texts], max_tokens=new)
    return {
        "logprobs": [[logprob for logprob, _ in row] for row in scored],
        "top": [[token for _, token in row] for row in scored],
        "greedy": [list(out.outputs[0].token_ids) for out in written],
    }


def in_llamacpp(path: str, texts: Rows, start: int, new: int) -> dict[str, Any]:
    """Keys and values are kept in f32, so that what differs is the weights' types alone."""
    import llama_cpp
    import numpy as np

    model = llama_cpp.Llama(path, n_ctx=len(texts[0]) + 1, logits_all=True, type_k=0, type_v=0, verbose=False)
    answer: dict[str, Any] = {"logprobs": [], "top": [], "greedy": []}
    for row in texts:
        model.reset()
        model.eval(row)
        scores = np.array(model.scores[: len(row) - 1], dtype=np.float64)
        peak = scores.max(1, keepdims=True)
        scores -= peak + np.log(np.exp(scores - peak).sum(1, keepdims=True))
        answer["logprobs"].append(scores[range(len(row) - 1), row[1:]].tolist())
        answer["top"].append(scores.argmax(1).tolist())
        model.reset()
        written, tokens = [], row[:start]
        for _ in range(new):
            model.eval(tokens)
            tokens = [int(model.scores[model.n_tokens - 1].argmax())]
            written += tokens
        answer["greedy"].append(written)
    return answer


RUNTIMES = {"transformers": in_transformers, "vllm": in_vllm, "llama_cpp": in_llamacpp}


def main() -> None:
    asked = json.load(sys.stdin)
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        answers = [
            RUNTIMES[asked["runtime"]](model, asked["texts"], asked["start"], asked["new"]) for model in asked["models"]
        ]
        reply = {"version": sys.modules[asked["runtime"]].__version__, "answers": answers}
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        reply = {"error": f"{type(error).__name__}: {first}"}
    assert "efficientllm" not in sys.modules
    with os.fdopen(out, "w") as file:
        json.dump(reply, file)


if __name__ == "__main__":
    main()
