"""A new pruning type is a row of the table of dimensions, and weights that carry its label: nothing else."""

from __future__ import annotations

import pytest
import torch

from efficientllm.pruning.dimensions import DIMENSIONS, Dimension, add_dimension
from efficientllm.pruning.groups import ParamSpec, Removal, Space
from efficientllm.pruning.live import Live
from efficientllm.pruning.saliency import AxisSums
from efficientllm.pruning.slices import group_slices
from efficientllm.pruning.surgery import choose_kept, cut_live, cut_scores, cut_state
from efficientllm.pruning.widths import Widths

WIDTHS = Widths(2, 6, 4, 2, 5, lanes=3, cells=4)
SPACE = Space(
    (
        ParamSpec("embed", (7, "hidden")),
        ParamSpec("layers.0.reader", ("cell", "hidden"), 0),
        ParamSpec("layers.1.reader", ("cell", "hidden"), 1),
        ParamSpec("layers.0.gate", ("lane",), 0),
        ParamSpec("layers.1.gate", ("lane",), 1),
    ),
    WIDTHS,
    head_dim=2,
)


@pytest.fixture(autouse=True)
def toy_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane lies within a layer, a cell within a lane; a weight's axis runs over all cells of all lanes."""
    for name in ("lane", "cell"):
        monkeypatch.setitem(DIMENSIONS, name, None)  # so that both are gone after the test
        del DIMENSIONS[name]
    add_dimension(Dimension("lane", "lane", "lanes", "lanes", within="layers"))
    add_dimension(Dimension("cell", "cell", "cells", "cells", within="lane"))


def weights() -> dict[str, torch.Tensor]:
    return {spec.name: torch.rand(SPACE.shape(spec, WIDTHS)) + 0.5 for spec in SPACE.params}


def test_a_unit_falls_with_what_lies_within_it() -> None:
    cut = Removal("lane", torch.tensor([1, 2]))
    fallen = {(part.name, part.dim): part.indices.tolist() for part in group_slices(SPACE, [cut])}
    assert fallen == {
        ("layers.0.reader", 0): [4, 5, 6, 7],
        ("layers.1.reader", 0): [8, 9, 10, 11],
        ("layers.0.gate", 0): [1],
        ("layers.1.gate", 0): [2],
    }
    live = Live.full(WIDTHS)
    live.remove(cut)
    assert live.widths() == WIDTHS.after("lane")
    assert not live["cell"][0, 1].any()
    assert SPACE.num_params(WIDTHS) - SPACE.num_params(live.widths()) == 2 * (4 * 6 + 1)


def test_cutting_keeps_the_live_entries_in_order() -> None:
    live, before = Live.full(WIDTHS), weights()
    for cut in (
        Removal("lane", torch.tensor([1, 2])),
        Removal("cell", torch.tensor([0, -1, 3, 1, 2, -1])),
        stem_cut(4),
    ):
        live.remove(cut)
    kept = choose_kept(live, live.widths())
    after, _ = cut_state(SPACE, kept, dict(before), {})
    rows = [1, 2, 3, 8, 9, 10]  # of layer 0: lane 0 without cell 0, lane 2 without cell 3
    columns = [0, 1, 2, 3, 5]
    scale = (6 / 5) ** 0.5 if "layers.0.reader" in SPACE.scaling else 1.0
    assert torch.equal(after["layers.0.reader"], before["layers.0.reader"][rows][:, columns] * scale)
    assert torch.equal(after["layers.1.gate"], before["layers.1.gate"][[0, 1]])
    assert all(map(torch.all, cut_live(live, kept).values()))


def stem_cut(channel: int) -> Removal:
    return Removal("stem", torch.tensor([channel]))


def test_scores_are_summed_over_all_that_falls_and_cut_alike() -> None:
    sums, values = AxisSums(SPACE, torch.device("cpu")), weights()
    for spec in SPACE.params:
        sums.add(spec, values[spec.name])
    scores = sums.units()
    cells = torch.stack([values[f"layers.{layer}.reader"].sum(1).view(3, 4) for layer in (0, 1)])
    gates = torch.stack([values[f"layers.{layer}.gate"] for layer in (0, 1)])
    torch.testing.assert_close(scores["cell"], cells.flatten(0, 1))
    torch.testing.assert_close(scores["lane"], gates + cells.sum(2))
    live = Live.full(WIDTHS)
    live.remove(Removal("lane", torch.tensor([0, 2])))
    cut = cut_scores(scores, choose_kept(live, live.widths()), WIDTHS)
    torch.testing.assert_close(cut["lane"], torch.stack([scores["lane"][0, 1:], scores["lane"][1, :2]]))
    torch.testing.assert_close(cut["cell"], torch.cat([cells[0, 1:], cells[1, :2]]))


def test_a_row_is_checked() -> None:
    with pytest.raises(ValueError, match="the type 'ffn' is another dimension's already"):
        add_dimension(Dimension("mlp", "ffn", "mlps", "channels"))
    with pytest.raises(ValueError, match="lies within 'attic'"):
        add_dimension(Dimension("mlp", "mlp", "mlps", "channels", within="attic"))
