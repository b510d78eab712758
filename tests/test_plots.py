"""Pictures of the loss: there, not blank, with what a reader needs written in them."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from trained import slope, trained

from slope_cli.report import plots

pytestmark = pytest.mark.usefixtures("one_thread")


def written_run(folder: Path, losses: list[float], *, adapters: int | None = None, val: float | None = None) -> Path:
    """A folder with the log of a run of 100 tokens a step."""
    folder.mkdir(parents=True)
    records: list[dict[str, object]] = []
    for step, loss in enumerate(losses, 1):
        if step - 1 == adapters:
            records.append({"kind": "adapters", "step": adapters, "parameters": 1})
        records.append({"kind": "train", "step": step, "loss": loss, "tokens": 100 * step})
    if val is not None:
        records.append({"kind": "val", "step": len(losses), "loss": val})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def drawn(out: Path) -> str:
    """The SVG's text, after a look at the PNG: large, and with more than one colour besides white."""
    pixels = imread(out.with_suffix(".png"))
    assert pixels.shape[0] >= 600
    assert pixels.shape[1] >= 1000
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 20
    return out.with_suffix(".svg").read_text()


def test_a_run_draws_itself() -> None:
    svg = drawn(trained() / "loss")
    for text in ("training", "validation", "adapters join", "tokens", "loss (nats per token)", trained().name):
        assert f">{text}</text>" in svg


def test_one_run(tmp_path: Path) -> None:
    result = slope("plot", trained(), "--out", tmp_path / "new" / "picture")
    assert (result.code, result.err) == (0, "")
    assert result.out.split() == [f"{tmp_path}/new/picture.png", f"{tmp_path}/new/picture.svg"]
    assert "adapters join" in drawn(tmp_path / "new" / "picture")


@pytest.mark.parametrize("name", ["x.png", "x.svg", "x"])
def test_an_ending_is_not_written_twice(name: str, tmp_path: Path) -> None:
    assert [path.name for path in plots.draw_loss([trained()], tmp_path / name)] == ["x.png", "x.svg"]


def test_a_name_with_a_dot_is_kept(tmp_path: Path) -> None:
    assert [path.name for path in plots.draw_loss([trained()], tmp_path / "v1.5")] == ["v1.5.png", "v1.5.svg"]


def test_several_runs_are_told_apart(tmp_path: Path) -> None:
    a = written_run(tmp_path / "a" / "run", [4.0, 3.0, 2.0], adapters=2, val=2.1)
    b = written_run(tmp_path / "b" / "run", [5.0, 4.0], val=4.1)
    assert slope("plot", a, b, "--out", tmp_path / "both").code == 0
    svg = drawn(tmp_path / "both")
    for text in (str(a), str(b), "training", "validation", "adapters join"):
        assert svg.count(f">{text}</text>") == 1
    for color in ("#1f77b4", "#ff7f0e"):
        assert color in svg


def test_without_adapters_nothing_speaks_of_them(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run", [3.0, 2.0])
    plots.draw_loss([run], tmp_path / "loss")
    assert "adapters" not in drawn(tmp_path / "loss")


def test_the_switch_is_where_it_happened(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    run = written_run(tmp_path / "run", [3.0, 2.5, 2.2, 2.0], adapters=3, val=2.1)
    axes = Figure().subplots()
    plots._draw_run(axes, plots._records(run), "C0")
    marks = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert [list(line.get_xdata()) for line in marks] == [[300, 300]]
    assert axes.lines[2].get_xdata()[0] == 400


def test_a_steep_start_does_not_flatten_the_rest(tmp_path: Path) -> None:
    """A loss that falls from 11 to 2 in the first steps of many: the picture shows where it goes from there."""
    from matplotlib.figure import Figure

    losses = [2 + 9 * 0.7**step for step in range(500)]
    low, high = plots._draw_run(Figure().subplots(), plots._records(written_run(tmp_path / "run", losses)), "C0")
    assert low == pytest.approx(2.0, abs=0.01)
    assert 2.0 < high < 5.0


def test_a_single_step_and_a_constant_loss_have_a_picture(tmp_path: Path) -> None:
    for name, losses in (("one", [3.0]), ("flat", [2.0] * 10)):
        plots.draw_loss([written_run(tmp_path / name, losses)], tmp_path / f"{name}-loss")
        drawn(tmp_path / f"{name}-loss")


def test_the_smooth_line_follows_at_once_and_evens_out_later() -> None:
    assert plots._smooth([5.0, 4.0, 3.0]) == [5.0, 4.0, 3.0]
    late = plots._smooth([2.0, 4.0] * 500)[-50:]
    assert max(late) - min(late) < 0.15
    assert np.mean(late) == pytest.approx(3.0, abs=0.05)


def test_the_same_log_gives_the_same_svg(tmp_path: Path) -> None:
    for name in ("a", "b"):
        plots.draw_loss([trained()], tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    message = f"error: {tmp_path}: is not the folder of a run (no metrics.jsonl)\n"
    assert slope("plot", trained(), tmp_path, "--out", tmp_path / "x") == (2, "", message)
    empty = written_run(tmp_path / "empty", [])
    message = f"error: {empty}: has no finished step to draw\n"
    assert slope("plot", empty, "--out", tmp_path / "x") == (1, "", message)
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("count", [plots.MANY, plots.MANY + 1, 2 * plots.MOST_ROWS + 1])
def test_a_comparison_of_many_variants_has_all_names_and_room_for_the_curves(count: int, tmp_path: Path) -> None:
    curves = {f"variant {n}": {key: [3.0, 2.0 + n / count] for key in ("mean", "low", "high")} for n in range(count)}
    png, svg = plots.draw_curves({name: {"tokens": [1e6, 2e6], **c} for name, c in curves.items()}, tmp_path / "many")
    texts = svg.read_text()
    assert all(f">{name}<" in texts for name in curves)
    coloured = (imread(png)[..., :3].max(-1) - imread(png)[..., :3].min(-1)) > 0.2
    assert np.ptp(np.nonzero(coloured[:, : 8 * 150 // 2])[1]) > 2 * 150  # curves run over most of the axes' left half
