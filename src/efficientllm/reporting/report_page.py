"""The report as one HTML page that needs nothing beside itself: no script, no font, no request."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from efficientllm.reporting.bench_table import bench_parts
from efficientllm.reporting.evaluation_table import evaluation_rows, evaluation_way
from efficientllm.reporting.run_forms import is_number
from efficientllm.reporting.run_record import RunRecord
from efficientllm.reporting.tables import flops_sentence
from efficientllm.sizes import format_count

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #ffffff; --soft: #f4f4f2; --line: #d8d8d4; --link: #0072B2 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e6e3; --paper: #16181a; --soft: #202326; --line: #3a3f44; --link: #56B4E9 }
  figure:not(#units) svg { filter: invert(0.91) hue-rotate(180deg) }
  /* The map's colours mean something and stay; its paper, text and lines are the page's. */
  #units svg text { fill: var(--ink) !important }
  #units svg [style*="fill: #ffffff"] { fill: none !important }
  #units svg [style*="stroke: #000000"] { stroke: var(--ink) !important }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.2rem; max-width: 62rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper) }
h1 { font-size: 1.5rem; margin: 0 0 .3rem } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
figure { margin: 1.2rem 0 } figcaption { font-size: .9rem; opacity: .85; margin-bottom: .3rem }
/* On a phone a plot scrolls sideways in its own box: shrunk to the screen its text would be 6 px high. */
figure svg { width: 100%; min-width: 38rem; height: auto; display: block }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }
th:first-child, td:first-child, .left th { text-align: left }
td.text { text-align: left; white-space: pre-wrap; min-width: 15rem; font-variant-numeric: normal }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; font-size: .82rem }
.note { border-left: 4px solid #E69F00; padding: .3rem .8rem; background: var(--soft) }
summary { cursor: pointer; color: var(--link) }
"""


def page(runs: Sequence[RunRecord], figures: Mapping[str, tuple[str, str]], notes: Sequence[str] = ()) -> str:
    """HTML of one or several runs. figures: id -> (caption, inline SVG). notes: sentences about none of them alone."""
    title = " and ".join(run.name for run in runs)
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',  # or the browser would ask for one
            f"<title>{html.escape(title)}: efficientllm</title><style>{STYLE}</style></head><body>",
            f"<h1>{html.escape(title)}</h1>",
            *_body(runs, figures, notes),
            "</body></html>",
            "",
        ]
    )


def _body(runs: Sequence[RunRecord], figures: Mapping[str, tuple[str, str]], notes: Sequence[str]) -> Iterator[str]:
    for run in runs:
        yield from (_note(f"{run.name}: {note}") for note in run.notes)
    yield from map(_note, notes)
    yield "<h2>Source and result</h2>"
    yield from _models(runs)
    yield from _costs(runs)
    for name, (caption, drawn) in figures.items():
        yield f'<figure id="{name}"><figcaption>{html.escape(caption)}</figcaption>'
        yield f'<div class="wide">{drawn}</div></figure>'
    for run in runs:
        yield from _evaluation(run)
        yield from _bench(run)
        yield from _samples(run)
    for run in runs:
        if run.recipe:
            label = f"Recipe of {run.name}" if len(runs) > 1 else "Recipe"
            yield f"<h2>{html.escape(label)}</h2><details open><summary>config.yaml</summary>"
            yield f"<pre>{html.escape(run.recipe)}</pre></details>"


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _models(runs: Sequence[RunRecord]) -> Iterator[str]:
    head = ["model", "parameters", "hidden", "heads", "KV heads", "FFN", "layers", "validation loss", "tokens", "FLOPs"]
    yield '<div class="wide"><table><thead><tr>' + "".join(f"<th>{name}</th>" for name in [*head, "hours"])
    yield "</tr></thead><tbody>"
    for run in runs:
        if run.source:
            yield _row([f"{run.name}: source", *_shape(run.source), "-", "-", "-"])
        yield _row([f"{run.name}: {'result' if run.summary else 'so far'}", *_outcome(run)])
    yield "</tbody></table></div>"


def _costs(runs: Sequence[RunRecord]) -> Iterator[str]:
    """What the operations of each run were for, where it has counted that."""
    counted = {run.name: (run.metrics[-1].get("flops_by_part") if run.metrics else None) for run in runs}
    known = {name: parts for name, parts in counted.items() if parts and all(map(is_number, parts.values()))}
    if not known:
        return
    yield "<h2>What it cost</h2>"
    yield from (f"<p>{html.escape(f'{name}: {flops_sentence(parts)}')}</p>" for name, parts in known.items())


def _shape(facts: Mapping[str, Any]) -> list[str]:
    widths = facts["widths"]
    names = ("hidden", "heads", "kv_heads", "intermediate", "layers")
    loss = facts.get("validation_loss")
    shape = [str(widths[name]) for name in names]
    parameters = facts["parameters"]
    return ["-" if parameters is None else format_count(parameters), *shape, "-" if loss is None else f"{loss:.4f}"]


def _outcome(run: RunRecord) -> list[str]:
    last = run.metrics[-1] if run.metrics else {}
    seen = [line["validation_loss"] for line in run.metrics if line.get("validation_loss") is not None]
    facts = (run.summary or {}).get("result")
    if facts is None and "widths" in last:
        facts = {"parameters": last.get("live_parameters"), "widths": last["widths"]}
        facts["validation_loss"] = seen[-1] if seen else None
    shape = _shape(facts) if facts else ["-"] * 7
    flops = last.get("flops")
    seconds = sum(line["seconds"] for line in run.metrics if line.get("seconds"))
    tokens = format_count(last["tokens"]) if last else "-"
    return [*shape, tokens, "-" if flops is None else f"{flops:.3g}", f"{seconds / 3600:.2f}"]


def _row(cells: Sequence[str], *, text: bool = False) -> str:
    kind = ' class="text"' if text else ""
    return "<tr>" + "".join(f"<td{kind}>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def _evaluation(run: RunRecord) -> Iterator[str]:
    rows = evaluation_rows(run.evaluation)
    if not rows:
        return
    yield f"<h2>{html.escape(run.name)}: zero-shot tasks</h2>"
    yield f"<p>{html.escape(evaluation_way(run.evaluation))}</p>"
    yield '<div class="wide"><table><thead>'
    yield "<tr><th>task</th><th>metric</th><th>value</th><th>standard error</th></tr></thead><tbody>"
    yield from map(_row, rows)
    yield "</tbody></table></div>"


def _bench(run: RunRecord) -> Iterator[str]:
    """What `efficientllm bench` has measured with this run's model, backend by backend."""
    for result in run.bench:
        backend = html.escape(str(result["settings"]["backend"]))
        yield f"<h2>{html.escape(run.name)}: what it costs to run, in {backend}</h2>"
        try:
            *tables, notes = bench_parts(result)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:  # a file of another version
            yield _note(f"this result of bench is not of the form that efficientllm writes and is left out ({error!r})")
            continue
        for head, *rows in tables:
            yield '<div class="wide"><table><thead><tr>' + "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
            yield "</tr></thead><tbody>"
            yield from map(_row, rows)
            yield "</tbody></table></div>"
        yield from (f"<p>{html.escape(note)}</p>" for (note,) in notes)


def _samples(run: RunRecord) -> Iterator[str]:
    if not run.samples:
        return
    yield f"<h2>{html.escape(run.name)}: how they write</h2><p>The most likely continuation of held-out text.</p>"
    yield '<div class="wide"><table><thead><tr class="left"><th>prompt</th><th>source</th><th>result</th></tr></thead>'
    yield "<tbody>"
    for sample in run.samples:
        yield _row([str(sample[name] or "(not at hand)") for name in ("prompt", "source", "result")], text=True)
    yield "</tbody></table></div>"


def svg(figure: Figure, name: str) -> str:
    """Inline SVG; ids carry the figure's name, so that figures of one page do not take each other's shapes."""
    content = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(content, format="svg", metadata={"Date": None}, transparent=False)
    text = content.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", text, count=0).replace("xlink:href", "href")
