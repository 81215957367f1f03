"""The plots of `docs/benchmarks.md`: what is shown is what its script draws, and predictions say that they are."""

import importlib.util
from functools import partial

import pytest
from matplotlib.figure import Figure

from bench.counting.gpus import by_bytes_and_flops
from bench.installation import ROOT

DOCS = ROOT / "docs"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("draw_plots", DOCS / "draw_plots.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_plot_is_shown_and_small(script):
    page = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    files = {path.stem: path for path in script.FOLDER.iterdir()}
    assert files.keys() == script.PLOTS.keys()
    for name, path in files.items():
        assert f"](plots/{name}.png)" in page and path.stat().st_size < 60_000, name


@pytest.mark.parametrize("name", ["layer", "rank", "roofline", "memory", "losses"])
def test_a_plot_is_drawn_and_says_what_it_is(script, name, tmp_path, monkeypatch):
    """In small: by bytes and FLOPs alone, without compiling."""
    said, savefig = [], Figure.savefig

    def noted(figure, *args, **kwargs):
        said.append(figure.get_suptitle() or figure.axes[0].get_title())
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", noted)
    monkeypatch.setattr(script, "predict", partial(script.predict, limit=by_bytes_and_flops))
    monkeypatch.setattr(script.kernels, "predict", partial(script.kernels.predict, limit=by_bytes_and_flops))
    monkeypatch.setattr(script, "LAYERS", ("q,o_proj",))
    monkeypatch.setattr(script, "TOKENS", (64, 512))
    monkeypatch.setattr(script, "RANKS", (8, 16))
    # Counting a whole model takes a minute.
    step = {"peak_bytes": 3 << 30, "frozen_bytes": 5 << 30}
    monkeypatch.setattr(script, "predict_model", lambda *args: dict.fromkeys(script.SHOWN, step))
    drawn = script.draw(name, tmp_path)
    script.shrink(drawn)
    assert drawn == tmp_path / f"{name}.png" and 8_000 < drawn.stat().st_size < 60_000
    (title,) = said
    assert title.startswith("measured on a CPU" if name == "losses" else "PREDICTION for H200, nothing was measured")
