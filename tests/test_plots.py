"""Pictures of the loss: there, not blank, with what a reader needs written in them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from support.runs import slope, trained

from slope_cli.report import plots

Record = dict[str, Any]
ADAPTERS: Record = {"kind": "adapters", "parameters": 1}


def written_run(folder: Path, losses: list[float], *changes: tuple[int, Record], val: float | None = None) -> Path:
    """A folder with the log of a run of 100 tokens a step; changes: other records, each with its step."""
    folder.mkdir(parents=True)
    records: list[Record] = []
    for step, loss in enumerate(losses, 1):
        records += [{"step": at, **record} for at, record in changes if at == step]
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


def drawn_axes(*runs: Path, out: Path, **how: Any) -> Any:
    """The axes of the picture of runs, which is written too."""
    figures, savefig = [], Figure.savefig

    def noting(figure: Figure, *args: Any, **how: Any) -> None:
        figures.append(figure)
        savefig(figure, *args, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", noting)
        plots.draw_loss(runs, out, **how)
    (axes,) = figures[0].axes
    return axes


def test_a_run_draws_itself() -> None:
    run = trained("gpt2-nano", "log.plot=true")
    svg = drawn(run / "loss")
    for text in ("training", "validation", "adapters join", "tokens", "loss (nats per token)", run.name):
        assert f">{text}</text>" in svg


def test_one_run(tmp_path: Path) -> None:
    result = slope("plot", trained(), "--out", tmp_path / "new" / "picture")
    assert (result.code, result.err) == (0, "")
    assert result.out.split() == [f"{tmp_path}/new/picture.png", f"{tmp_path}/new/picture.svg"]
    assert "adapters join" in drawn(tmp_path / "new" / "picture")


@pytest.mark.parametrize("name", ["x.png", "x.svg", "x"])
def test_an_ending_is_not_written_twice(name: str, tmp_path: Path) -> None:
    assert [path.name for path in plots.draw_loss([trained()], tmp_path / name)] == ["x.png", "x.svg"]


def test_a_pdf_is_written_where_one_is_asked_for(tmp_path: Path) -> None:
    assert slope("plot", trained(), "--out", tmp_path / "x.pdf").out == f"{tmp_path}/x.pdf\n"
    assert (tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pdf"]


def test_a_legend_hides_no_curve(tmp_path: Path) -> None:
    rising = written_run(tmp_path / "run", [2.0 + step / 10 for step in range(10)], val=3.0)
    axes = drawn_axes(rising, out=tmp_path / "loss")
    axes.figure.draw_without_rendering()
    assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1


def test_runs_of_two_tokenizers_are_drawn_in_bits_per_byte(tmp_path: Path) -> None:
    (word_piece, byte) = runs = [written_run(tmp_path / name, [4.0, 3.0]) for name in ("pieces", "bytes")]
    for run, bits in ((word_piece, 1.5), (byte, 4.0)):
        (run / "tokenizer").mkdir()
        (run / "tokenizer" / "tokenizer.json").write_text(run.name)
        with open(run / "metrics.jsonl", "a") as log:
            log.write(json.dumps({"kind": "val", "step": 2, "loss": 3.0, "bits_per_byte": bits}) + "\n")
    axes = drawn_axes(*runs, out=tmp_path / "both")
    assert axes.get_ylabel() == "loss (bits per byte)"
    assert [list(axes.lines[at].get_ydata()) for at in (0, 2, 3, 5)] == [[2.0, 1.5], [1.5], [16 / 3, 4.0], [4.0]]
    (byte / "tokenizer" / "tokenizer.json").write_text(word_piece.name)
    assert drawn_axes(*runs, out=tmp_path / "both").get_ylabel() == "loss (nats per token)"
    older = written_run(tmp_path / "older", [4.0], val=3.0)
    message = f"error: {older}: records no bits per byte, and the runs have different tokenizers; draw it alone\n"
    assert slope("plot", byte, older, "--out", tmp_path / "x") == (2, "", message)


def test_a_name_with_a_dot_is_kept(tmp_path: Path) -> None:
    assert [path.name for path in plots.draw_loss([trained()], tmp_path / "v1.5")] == ["v1.5.png", "v1.5.svg"]


def test_several_runs_are_told_apart(tmp_path: Path) -> None:
    a = written_run(tmp_path / "a" / "run", [4.0, 3.0, 2.0], (3, ADAPTERS), val=2.1)
    b = written_run(tmp_path / "b" / "run", [5.0, 4.0], val=4.1)
    assert slope("plot", a, b, "--out", tmp_path / "both").code == 0
    svg = drawn(tmp_path / "both")
    for text in (str(a), str(b), "training", "validation", "adapters join"):
        assert svg.count(f">{text}</text>") == 1
    for color in ("#1f77b4", "#ff7f0e"):
        assert color in svg


def phase(layers: str, adapters: bool) -> Record:
    counts = {"trained_parameters": 2, "adapter_parameters": int(adapters)}
    return {"kind": "phase", "name": layers, "layers": layers, "linearized": False, "adapters": adapters, **counts}


def old_layers(layers: str, adapters: bool) -> Record:
    return {"kind": "layers", "layers": layers, "adapters": adapters}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "joined"),
    [
        ([(4, phase("sparse", True))], [300]),
        ([(2, phase("sparse", False)), (4, phase("sparse", True))], [300]),
        ([(3, phase("sparse", True)), (4, phase("unmasked", True))], [200]),  # they join once
        ([(4, phase("sparse", False))], []),
        ([(4, ADAPTERS)], [300]),
        ([(2, old_layers("sparse", False)), (4, ADAPTERS)], [300]),
        ([(4, old_layers("sparse", True))], [300]),  # both in one step
        ([(3, ADAPTERS), (4, old_layers("sparse", True))], [200]),
        ([], []),
    ],
)
def test_the_line_is_where_adapters_join(
    changes: Sequence[tuple[int, Record]], joined: list[int], tmp_path: Path
) -> None:
    """Between the step before and their first one, whether the log is of this version or of the one before."""
    run = written_run(tmp_path / "run", [3.0, 2.5, 2.2, 2.0], *changes, val=2.1)
    axes = drawn_axes(run, out=tmp_path / "loss")
    marks = [line for line in axes.lines if line.get_linestyle() == ":" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in marks] == [[at, at] for at in joined]
    assert axes.lines[2].get_xdata()[0] == 400
    assert ("adapters join" in drawn(tmp_path / "loss")) == bool(joined)


def test_a_steep_start_does_not_flatten_the_rest(tmp_path: Path) -> None:
    """A loss that falls from 11 to 2 in the first steps of many: the picture shows where it goes from there."""
    losses = [2 + 9 * 0.7**step for step in range(500)]
    low, high = drawn_axes(written_run(tmp_path / "run", losses), out=tmp_path / "loss").get_ylim()
    assert low == pytest.approx(2.0 - 0.06 * (high - low) / 1.12, abs=0.01)  # less the margin
    assert 2.0 < high < 5.0


def test_a_single_step_and_a_constant_loss_have_a_picture(tmp_path: Path) -> None:
    for name, losses in (("one", [3.0]), ("flat", [2.0] * 10)):
        plots.draw_loss([written_run(tmp_path / name, losses)], tmp_path / f"{name}-loss")
        drawn(tmp_path / f"{name}-loss")


def test_the_smooth_line_follows_at_once_and_evens_out_later(tmp_path: Path) -> None:
    def smooth(name: str, losses: list[float]) -> list[float]:
        axes = drawn_axes(written_run(tmp_path / name, losses), out=tmp_path / f"{name}-loss")
        assert list(axes.lines[0].get_ydata()) == losses
        return list(axes.lines[1].get_ydata())

    assert smooth("short", [5.0, 4.0, 3.0]) == [5.0, 4.0, 3.0]
    late = smooth("long", [2.0, 4.0] * 500)[-50:]
    assert max(late) - min(late) < 0.15
    assert np.mean(late) == pytest.approx(3.0, abs=0.05)


def test_the_same_log_gives_the_same_svg(tmp_path: Path) -> None:
    for name in ("a", "b"):
        plots.draw_loss([trained()], tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_what_cannot_be_drawn_is_left_out_unless_nothing_is_left(tmp_path: Path) -> None:
    empty, no_run = written_run(tmp_path / "empty", []), f"{tmp_path}: is not the folder of a run (no metrics.jsonl)"
    no_step = f"{empty}: has no finished step to draw"
    assert slope("plot", tmp_path, "--out", tmp_path / "x") == (2, "", f"error: {no_run}\n")
    assert slope("plot", empty, tmp_path, "--out", tmp_path / "x") == (2, "", f"error: {no_step}; {no_run}\n")
    missing = f"error: {tmp_path / 'typo'}: does not exist\n"
    assert slope("plot", trained(), tmp_path / "typo", "--out", tmp_path / "x") == (2, "", missing)
    assert not (tmp_path / "x.png").exists()
    drawn_with = slope("plot", empty, trained(), tmp_path, "--out", tmp_path / "x")
    assert (drawn_with.code, drawn_with.err) == (0, f"left out: {no_step}\nleft out: {no_run}\n")
    assert (tmp_path / "x.png").exists()


def test_without_out_a_picture_lies_in_its_run_or_has_the_names_of_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("a", "b", "c", "d", "e")
    for name in names:
        written_run(tmp_path / "runs" / name, [3.0, 2.0])
    (tmp_path / "loss.png").write_text("another picture")
    assert slope("plot", "runs/a").out == "runs/a/loss.png\nruns/a/loss.svg\n"
    assert slope("plot", "runs/a", "runs/b").out == "loss-a-b.png\nloss-a-b.svg\n"
    assert slope("plot", *(f"runs/{name}" for name in names)).out.splitlines()[0] == "loss-a-b-c-2-more.png"
    long = [run.rename(run.with_name(run.name + 100 * "ä")) for run in map(Path, ("runs/a", "runs/b", "runs/c"))]
    files = slope("plot", *long).out.splitlines()
    assert files[0].startswith("loss-aä")
    assert all(Path(file).is_file() for file in files)
    assert (tmp_path / "loss.png").read_text() == "another picture"


def test_a_branch_is_drawn_from_where_its_run_stood(tmp_path: Path) -> None:
    parent = written_run(tmp_path / "parent", [4.0, 3.0, 2.0], val=2.1)
    began = {"kind": "init", "source": "gone", "source_step": 2, "source_tokens": 200, "optimizer": False}
    branch = written_run(tmp_path / "branch", [3.0, 2.5], (1, began), (2, ADAPTERS), val=2.4)
    axes = drawn_axes(parent, branch, out=tmp_path / "both")
    assert [list(axes.lines[at].get_xdata()) for at in (0, 2, 3, 5, 6)] == [
        [100, 200, 300],
        [300],
        [300, 400],
        [400],
        [300, 300],
    ]
    assert "of the run before" in axes.get_xlabel()
    assert list(drawn_axes(branch, out=tmp_path / "alone").lines[0].get_xdata()) == [300, 400]
    assert list(drawn_axes(branch, out=tmp_path / "zero", from_zero=True).lines[0].get_xdata()) == [100, 200]
    assert slope("plot", branch, "--from-zero", "--out", tmp_path / "zero").code == 0
    assert "of the run before" not in drawn(tmp_path / "zero")


def test_all_points_of_the_validation_are_seen_and_a_divergence_is_cut_with_a_word(tmp_path: Path) -> None:
    losses = [2 + 9 * 0.7**step for step in range(500)]
    early: Record = {"kind": "val", "loss": 9.5}
    axes = drawn_axes(written_run(tmp_path / "steep", losses, (2, early), val=2.1), out=tmp_path / "loss")
    assert 9.5 < axes.get_ylim()[1] < 12
    assert len(axes.texts) == 0
    late: Record = {"kind": "val", "loss": 60.0}
    axes = drawn_axes(written_run(tmp_path / "lost", losses, (2, early), (400, late), val=2.1), out=tmp_path / "loss")
    assert 20 < axes.get_ylim()[1] < 25  # twice the first loss
    assert [text.get_text() for text in axes.texts] == ["cut off: a divergence, up to 60"]


@pytest.mark.parametrize("count", [10, plots.MOST_ROWS + 1, 2 * plots.MOST_ROWS + 1])
def test_a_comparison_of_many_variants_has_all_names_and_room_for_the_curves(count: int, tmp_path: Path) -> None:
    curves = {f"variant {n}": {key: [3.0, 2.0 + n / count] for key in ("mean", "low", "high")} for n in range(count)}
    png, svg = plots.draw_curves({name: {"tokens": [1e6, 2e6], **c} for name, c in curves.items()}, tmp_path / "many")
    texts = svg.read_text()
    assert all(f">{name}<" in texts for name in curves)
    coloured = (imread(png)[..., :3].max(-1) - imread(png)[..., :3].min(-1)) > 0.2
    assert np.ptp(np.nonzero(coloured[:, : 8 * 150 // 2])[1]) > 2 * 150  # curves run over most of the axes' left half


def test_a_million_steps_are_drawn_quickly_with_their_extremes(tmp_path: Path) -> None:
    count, spike = 1_000_000, 700_001
    losses = [3.0 + (number % 7) / 100 for number in range(count)]
    losses[spike] = 9.0
    tokens = list(range(count))
    x, y = plots._thinned(tokens, losses)
    assert len(x) == len(y) <= plots.SHOWN + 2
    assert (x[0], x[-1], y[x.index(spike)]) == (0, count - 1, 9.0)
    assert x == sorted(x)
    assert (min(y), all(losses[at] == value for at, value in zip(x, y, strict=True))) == (min(losses), True)
    assert plots._thinned(tokens[:500], losses[:500]) == (tokens[:500], losses[:500])
    run = written_run(tmp_path / "run", losses[:50_000], val=3.0)
    assert len(drawn_axes(run, out=tmp_path / "loss").lines[0].get_xdata()) <= plots.SHOWN + 2
    assert (tmp_path / "loss.svg").stat().st_size < 300_000


@pytest.mark.parametrize("name", ["a$x_1$", "$", "run\x1b[31m", "a & <b>"])
def test_a_name_is_drawn_as_it_is_and_not_as_a_formula(name: str, tmp_path: Path) -> None:
    """A file name may hold what matplotlib reads as a formula, and what XML and terminals forbid."""
    runs = [written_run(tmp_path / f"{name}{number}", [3.0, 2.0]) for number in range(2)]
    for drawn_runs in (runs[:1], runs):
        plots.draw_loss(drawn_runs, tmp_path / "loss")
        ElementTree.parse(tmp_path / "loss.svg")
    plots.draw_curves({name: {"tokens": [1, 2], "mean": [2, 1], "low": [2, 1], "high": [2, 1]}}, tmp_path / "curves")
    ElementTree.parse(tmp_path / "curves.svg")
