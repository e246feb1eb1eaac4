import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from efficientllm.errors import UsageError
from efficientllm.pruning.dimensions import EXPERT_TYPES
from efficientllm.reporting import plots
from efficientllm.reporting.journal import Journal
from efficientllm.reporting.plot_style import (
    LOSS_COLOUR,
    PHASE_COLOUR,
    RUN_COLOURS,
    SIZE_COLOUR,
    TYPE_STYLES,
    VALIDATION_COLOUR,
    save_figure,
)
from efficientllm.reporting.plots import figures, plot_run
from efficientllm.reporting.run_record import read_run

SOURCE = {"layers": 4, "hidden": 192, "heads": 8, "kv_heads": 4, "intermediate": 512}


def write_run(folder: Path, *, pruned: bool = True, steps: int = 60, prune_until: int = 15, worse: float = 0.0) -> Path:
    """Records of a run that halves every width while it prunes, one type after the other."""
    metrics, events, compactions = (Journal(folder / f"{name}.jsonl") for name in ("metrics", "events", "compactions"))
    (folder / "source.json").parent.mkdir(parents=True)
    (folder / "source.json").write_text(json.dumps({"parameters": 2_000_000, "widths": SOURCE}))
    order = [("ffn", "intermediate", 16), ("stem", "hidden", 6), ("attention", "kv_heads", 1)]
    widths = dict(SOURCE)
    for step in range(1, steps + 1):
        at = {"step": step, "tokens": step * 4096}
        if pruned and step <= prune_until:
            name, key, less = order[step % 3]
            if widths[key] > SOURCE[key] // 2:
                widths[key] -= less
            widths["heads"] = widths["kv_heads"] * (2 if step < 8 else 1)
            events.append({**at, "type": name, "damage_per_parameter": 1e-8, "widths": widths})
        record = {**at, "loss": worse + 3.0 + math.exp(-step / 20) + 0.05 * (-1) ** step, "widths": dict(widths)}
        record |= {"live_parameters": 2_000_000 - 10_000 * step, "allocated_parameters": 2_100_000 - 10_000 * step}
        if pruned and step <= prune_until:
            record["saliency"] = {t: 1e-8 * (n + 1) * 1.05**step for n, t in enumerate(TYPE_STYLES)}
        if step % 20 == 0:
            record["validation_loss"] = worse + 3.0 + math.exp(-step / 20)
            compactions.append({**at, "allocated_before": 2_100_000, "allocated_after": 2_100_000 - 10_000 * step})
        metrics.append(record)
    return folder


def pixels_of(image: np.ndarray, colour: str) -> int:
    """How many pixels have exactly this colour; antialiased edges do not count."""
    return int((np.abs(image[..., :3] - to_rgb(colour)) < 1 / 255).all(axis=-1).sum())


def test_run_picture_shows_every_series(tmp_path: Path) -> None:
    out = plot_run(write_run(tmp_path / "run"), tmp_path / "new" / "run.png")
    assert out == tmp_path / "new" / "run.png"
    image = imread(out)
    height = image.shape[0]
    upper, middle, lower = image[: height // 3], image[height // 3 : 3 * height // 5], image[3 * height // 5 :]
    for name, (colour, _, _) in TYPE_STYLES.items():
        if name in ("depth", *EXPERT_TYPES):  # no layer falls in this run, and it has no experts
            assert not pixels_of(middle, colour)
            continue
        assert pixels_of(upper, colour) > 100
        assert pixels_of(middle, colour) > 100
    for colour in (LOSS_COLOUR, VALIDATION_COLOUR, SIZE_COLOUR):
        assert pixels_of(lower, colour) > 50
    # pruning is a quarter of the run: the upper panels show it large, the lower one as a band
    assert pixels_of(upper, PHASE_COLOUR) > 2 * pixels_of(lower, PHASE_COLOUR) > 0


def test_a_legend_of_every_type_stays_within_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, out: drawn.append(figure))
    plot_run(write_run(tmp_path / "run"), tmp_path / "run.png")
    (figure,) = drawn
    figure.savefig(io.BytesIO())  # lays it out
    legends = [legend for axes in figure.axes if (legend := axes.get_legend())]
    assert [len(legend.get_texts()) for legend in legends] == [len(TYPE_STYLES), 4, 4]
    assert all(legend.get_window_extent().x1 < figure.bbox.x1 for legend in legends)


def test_same_records_same_bytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    first = plot_run(run, tmp_path / "a.svg").read_bytes()
    assert first.startswith(b"<?xml")
    assert first == plot_run(run, tmp_path / "b.svg").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_run_without_events_shows_loss_and_size_only(tmp_path: Path) -> None:
    image = imread(plot_run(write_run(tmp_path / "run", pruned=False), tmp_path / "run.png"))
    assert pixels_of(image, LOSS_COLOUR) > 100
    assert pixels_of(image, SIZE_COLOUR) > 100
    assert not any(pixels_of(image, colour) for colour, _, _ in TYPE_STYLES.values())


def test_a_run_whose_first_record_is_pruned_still_has_the_source_as_its_zero(tmp_path: Path) -> None:
    run = tmp_path / "run"
    half = SOURCE | {"intermediate": 256}
    Journal(run / "metrics.jsonl").append(
        {"step": 9, "tokens": 9, "loss": 3.0, "widths": half, "saliency": {"ffn": 1.0}}
    )
    (run / "source.json").write_text(json.dumps({"parameters": 9, "widths": SOURCE}))
    assert "<!-- 50% -->" in plot_run(run, tmp_path / "run.svg").read_text()


@pytest.mark.parametrize("steps", [1, 4])
def test_short_diverged_and_sparse_runs_are_drawn(tmp_path: Path, steps: int) -> None:
    journal = Journal(tmp_path / "run" / "metrics.jsonl")
    for step in range(1, steps + 1):
        journal.append(
            {"step": step, "tokens": step * 10, "loss": math.nan if step % 2 else 3.0, "saliency": {"ffn": 0.0}}
        )
    assert plot_run(tmp_path / "run", tmp_path / "run.png").stat().st_size > 1000
    assert overlaid({"run": tmp_path / "run"}, tmp_path / "loss.png").stat().st_size > 1000


def overlaid(runs: dict[str, Path], out: Path) -> Path:
    """The losses of these runs in one picture, as a report has them."""
    records = [read_run(folder, name) for name, folder in runs.items()]
    figure = next(make for name, _, make in figures(records) if name == "loss")()
    assert figure is not None
    return save_figure(figure, out)


def test_learning_curves_are_overlaid_and_name_their_validation_loss(tmp_path: Path) -> None:
    runs = {
        "compact": write_run(tmp_path / "one"),
        "from scratch": write_run(tmp_path / "two", pruned=False, steps=90, worse=0.3),
    }
    image = imread(overlaid(runs, tmp_path / "loss.png"))
    assert all(pixels_of(image, colour) > 100 for colour in RUN_COLOURS[:2])
    assert not any(pixels_of(image, colour) for colour in RUN_COLOURS[2:6])
    text = overlaid(runs, tmp_path / "loss.svg").read_text()
    assert "compact: validation loss, 3.050" in text
    assert "from scratch: validation loss, 3.318" in text


def test_of_several_runs_one_whose_tokens_fell_names_no_loss(tmp_path: Path) -> None:
    runs = {"other": write_run(tmp_path / "one", pruned=False), "cut": write_run(tmp_path / "two")}
    fall = {"step": 9, "tokens": 9000, "vocabulary": [512, 384], "after": SOURCE}
    Journal(runs["cut"] / "compactions.jsonl").append(fall)
    text = overlaid(runs, tmp_path / "loss.svg").read_text()
    assert "cut: loss of other tokens after the dotted line" in text
    assert "other: validation loss" in text


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(UsageError, match="is no run folder"):
        plot_run(tmp_path / "run", tmp_path / "run.png")
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(UsageError, match=r"no metrics\.jsonl"):
        plot_run(tmp_path / "run", tmp_path / "run.png")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
