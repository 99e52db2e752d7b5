"""The lesson: what a picture says is in its lines, bars and marks, and those can be checked like any number."""
import copy
import io
import json
import math
import shutil
import struct
import sys

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import ROOT, error_of, random_model, random_tokens, run
from extras import open_original, plot, read_report
from runtime import cli
from runtime.cli import TINY

SETTINGS = {"ckpt": "there", "score": "taylor", "dtype": "torch.float32"}
MATRIX = "layers.2.feed_forward.w2"  # of random_model: (16, 24), so its 16 components are a group of 10 and one of 6


def marks(axes, marker):
    """[(x, y) ...] of the one line of the axes that is drawn with this marker."""
    line, = (line for line in axes.lines if line.get_marker() == marker)
    return [(x, pytest.approx(y)) for x, y in zip(line.get_xdata(), line.get_ydata())]


def labels(axes):
    return [text.get_text() for text in axes.texts]


def test_every_layer_has_its_cosine_and_the_redundant_ones_are_marked():
    cosines = [-0.2, 0.8, 0.97, 1.0, 0.95]  # a layer may turn its input around, or do nothing at all
    figure = plot.plot_cosines(cosines, [2, 3], "a model")
    axes, = figure.axes
    assert marks(axes, "o") == list(enumerate(cosines))
    assert marks(axes, "s") == [(2, 0.97), (3, 1.0)] and labels(axes) == ["2", "3"]
    figure.savefig(io.BytesIO())
    low, high = axes.get_ylim()
    assert low < -0.2 and high > 0.97 and all(math.isfinite(y) for y in (low, high))
    heights = [axes.transData.transform((0, y))[1] for y in (0.0, 0.9, 0.99)]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1])  # a tenth of 1 - cosine is one step


def test_the_kept_components_are_on_the_spectrum_and_plain_svd_ends_at_the_rank():
    W = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    S = torch.linalg.eigvalsh(W @ W.T).flip(0).sqrt()
    record = {"name": "layers.4.attention.wq", "shape": [6, 9], "rank": 3, "kept": [0, 2, 5]}
    dense = {"name": "layers.4.attention.wk", "shape": [6, 9], "rank": None, "kept": None}
    model = random_model(dim=9, hidden_dim=6)
    model.get_submodule("layers.2.feed_forward.w1").weight.copy_(W)
    assert torch.allclose(plot.singular_values(model, "layers.2.feed_forward.w1"), S)

    figure = plot.plot_spectra(4, [dense, record], {r["name"]: S for r in (record, dense)}, "a model", "taylor")
    first, second, *empty = figure.axes
    assert "stays dense" in first.get_title() and len(first.lines) == 1
    curve, _, cut = second.lines
    assert curve.get_ydata().tolist() == S.tolist() and second.get_yscale() == "log"
    assert marks(second, "o") == [(0, S[0]), (2, S[2]), (5, S[5])]
    assert set(cut.get_xdata()) == {2.5}  # between the third largest and the fourth
    assert second.get_title() == "attention.wq  6 x 9, rank 3\n2 of 3 kept are among the 3 largest"
    assert "a model, layer 4" in figure.get_suptitle() and not any(axes.axison for axes in empty)
    assert [text.get_text() for text in empty[-1].get_legend().get_texts()][1].startswith("kept")


def test_the_overview_is_the_cosines_beside_one_spectrum():
    record = {"name": "layers.1.feed_forward.w2", "shape": [4, 9], "rank": 2, "kept": [0, 3]}
    cosines, S = [0.2, 0.97, 0.9], torch.tensor([9.0, 5.0, 2.0, 1.0])
    figure = plot.plot_overview(cosines, [1], S, record, "a model")
    left, right = figure.axes
    assert marks(left, "o") == list(enumerate(cosines))
    assert marks(left, "s") == [(1, 0.97)] and labels(left) == ["1"]
    assert marks(right, "o") == [(0, 9.0), (3, 1.0)] and set(right.lines[2].get_xdata()) == {1.5}
    assert left.get_title().startswith("a model: ")
    assert right.get_title() == "layers.1.feed_forward.w2:\n1 of 2 kept are among the 2 largest"
    assert all(axes.get_xlabel() and axes.get_ylabel() and axes.get_legend() for axes in figure.axes)
    assert [*figure.get_size_inches() * figure.dpi] == [900, 408]  # the width of a README


def perplexity(model, tokens):
    """By its definition: no chunks, no sweeps."""
    return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).exp().item()


def test_zeroed_groups_against_rebuilt_matrices_and_small_steps():
    """With W(t) = U diag(S - t e_k S) Vh, the change of perplexity is that of W(1); the slope at t = 0 predicts it."""
    model, tokens = random_model(), random_tokens(random_model(), 3, 12)
    linear = model.get_submodule(MATRIX)
    W, before = linear.weight, linear.weight.clone()
    result = plot.zero_groups(model, MATRIX, tokens, 2)
    assert linear.weight is W and torch.equal(W, before) and not W.requires_grad
    assert result["groups"] == [[0, 9], [10, 15]]

    U, S, Vh = torch.linalg.svd(before, full_matrices=False)

    def perplexity_without(group, t=1.0):
        part = S.clone()
        part[group] *= 1 - t
        other = copy.deepcopy(model)
        other.get_submodule(MATRIX).weight.copy_(U @ part.diag() @ Vh)
        return perplexity(other, tokens)

    dense, groups, step = perplexity(model, tokens), [slice(0, 10), slice(10, 16)], 1e-5
    assert result["perplexity"] == pytest.approx(dense, rel=1e-12)
    assert result["change"] == pytest.approx([perplexity_without(g) - dense for g in groups], rel=1e-9)
    slopes = torch.tensor([(perplexity_without(k, step) - perplexity_without(k, -step)) / (2 * step)
                           for k in range(len(S))])
    assert result["predicted"] == pytest.approx([slopes[g].sum().item() for g in groups], rel=1e-4)
    assert result["score"] == pytest.approx([slopes[g].abs().sum().item() / dense for g in groups], rel=1e-4)
    assert result["sigma"] == pytest.approx([S[g].sum().item() for g in groups])


def test_an_interrupted_experiment_puts_the_matrix_back(monkeypatch):
    model = random_model()
    W = model.get_submodule(MATRIX).weight
    answers = iter([7.0] * 4)  # three to time, and the dense model's; then somebody presses Ctrl-C

    def measured(model, batches):
        for answer in answers:
            return answer
        assert model.get_submodule(MATRIX).weight is not W
        raise KeyboardInterrupt

    monkeypatch.setattr(plot, "perplexity", measured)
    with pytest.raises(KeyboardInterrupt):
        plot.zero_groups(model, MATRIX, random_tokens(model, 2, 8), 2)
    assert model.get_submodule(MATRIX).weight is W


def test_the_experiment_says_before_its_first_pass_how_long_it_will_take(monkeypatch, capsys):
    clock, passes, said = iter([0, 9, 10, 16, 20, 30]), [], []

    def measured(model, batches):
        passes.append(sum(map(len, batches)))
        said.append(capsys.readouterr().out)
        return 7.0

    model = random_model()
    monkeypatch.setattr(plot, "perplexity", measured)
    monkeypatch.setattr(plot, "time", type("Clock", (), {"monotonic": lambda: next(clock)}))
    plot.zero_groups(model, MATRIX, random_tokens(model, 5, 8), 2)
    assert passes == [2, 2, 2, 5, 5, 5]  # a micro-batch three times, then all windows: dense, and two groups
    minutes = (2 + 1 + 3) * 6 * 5 / 2 / 60  # the fastest took 6 s for 2 of 5 windows; the gradient is three
    assert said[3] == f"{MATRIX}  2 groups of 10, each a pass over the text; about {minutes:.1f} min\n"
    assert not any(said[:3])


def test_half_precision_weights_are_taken_apart_in_fp32():
    model = random_model(torch.bfloat16)
    result = plot.zero_groups(model, MATRIX, random_tokens(model, 2, 8), 2)
    assert len(result["change"]) == 2 and model.get_submodule(MATRIX).weight.dtype == torch.bfloat16


def test_rank_correlation_is_spearmans():
    x, y = [0.1, 5.0, 2.0, 3.0, -9.0], [1.0, 40.0, 3.0, 2.0, 0.0]  # ranks 1 4 2 3 0 and 1 4 3 2 0
    assert plot.rank_correlation(x, y) == pytest.approx(1 - 6 * (1 + 1) / (5 * (25 - 1)))  # 1 - 6 sum d^2 / n (n^2 - 1)
    assert plot.rank_correlation(x, [-v for v in x]) == pytest.approx(-1)
    assert plot.rank_correlation([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1)
    assert plot.rank_correlation([1, 2, 3, 4], [1, 1, 2, 2]) == pytest.approx(2 / 5 ** 0.5)  # ranks 1.5 1.5 3.5 3.5
    assert plot.rank_correlation([3, 2, 1], [0, 0, 0]) is plot.rank_correlation([1], [2]) is None


def test_a_bar_for_each_group_and_a_mark_for_its_prediction():
    result = {"matrix": MATRIX, "perplexity": 20.5, "groups": [[0, 9], [10, 19], [20, 25]], "change": [3.0, -1.0, 0.5],
              "predicted": [2.0, -0.5, -1.0]}
    axes, = plot.plot_groups(result, "a model", "some text").axes
    assert [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in axes.patches] == [
        (4.5, 3.0), (14.5, -1.0), (22.5, 0.5)]
    assert marks(axes, "D") == [(4.5, 2.0), (14.5, -0.5), (22.5, -1.0)]
    assert "0.50" in axes.get_legend().get_texts()[1].get_text()  # ranks 2 0 1 and 2 1 0


def test_the_colours_survive_grey_print():
    from matplotlib.colors import to_rgb
    colours = map(to_rgb, (plot.DARK, plot.GREY, plot.LIGHT))
    dark, grey, light = (0.299 * red + 0.587 * green + 0.114 * blue for red, green, blue in colours)
    assert light - dark > 0.4 and grey - dark > 0.2 and 1 - light > 0.2  # and from white paper


# ---------------------------------------------------------------------------------------------- the command

@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """A folder that grasp.py wrote from the embedded model."""
    folder = tmp_path_factory.mktemp("plot") / "small"
    done = run("grasp.py", "--layers", 2, "--samples", 6, "--seq-len", 64, "--eval", "none", "--out", folder, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_command_draws_what_the_report_says(compressed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "layers.7.attention.wk"  # (32, 96): any matrix will do, of a redundant layer or not
    (tmp_path / "small-plots").mkdir()
    (tmp_path / "small-plots/cosines.png").write_text("an older picture, to be replaced")
    monkeypatch.setattr(sys, "argv", ["plot", str(compressed), "--matrix", name, "--windows", "2"])
    cli.command(plot.main)
    out = capsys.readouterr().out
    report = json.loads((compressed / "report.json").read_text())
    pictures = ["cosines.png", f"groups-{name}.png", "overview.png",
                *(f"spectra-{layer}.png" for layer in report["redundant"])]
    assert sorted(f.name for f in (tmp_path / "small-plots").iterdir()) == sorted([*pictures, f"groups-{name}.json"])
    for file, size in zip(pictures, [(960, 480), (960, 504), (900, 408), (1440, 720), (1440, 720)]):
        png = (tmp_path / "small-plots" / file).read_bytes()
        assert png[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", png[16:24]) == size and len(png) < 80_000
        assert f"written: small-plots/{file}" in out
    result = json.loads((tmp_path / f"small-plots/groups-{name}.json").read_text())
    assert result["groups"] == [[0, 9], [10, 19], [20, 29], [30, 31]] and len(result["change"]) == 4
    assert result["protocol"]["windows"] == 2
    assert f"predicted {result['rank_correlation']['predicted']:.2f}" in out


def test_layers_and_dense_weights_by_hand(compressed, tmp_path, monkeypatch, capsys):
    """The report's dense folder is gone, but lies elsewhere."""
    folder, out = tmp_path / "small", tmp_path / "pictures"
    shutil.copytree(compressed, folder)
    report = json.loads((folder / "report.json").read_text())
    report["settings"]["ckpt"] = "/no/such/folder"
    (folder / "report.json").write_text(json.dumps(report))
    monkeypatch.chdir(tmp_path)
    assert "/no/such/folder: no such folder, but the report was made from it; pass --dense FOLDER" in error_of(
        plot.main, "small", monkeypatch, capsys)
    layer = report["redundant"][1]
    monkeypatch.setattr(sys, "argv", ["plot", "small", "--layer-ids", str(layer), "--dense", str(ROOT / "data/tiny"),
                                      "--out", str(out)])
    cli.command(plot.main)
    assert sorted(f.name for f in out.iterdir()) == ["cosines.png", "overview.png", f"spectra-{layer}.png"]


@pytest.mark.parametrize("words, matrix", [
    ([], "layers.{}.feed_forward.w2"), (["--overview", "layers.{}.attention.wk"], "layers.{}.attention.wk")])
def test_the_matrix_on_the_overview(words, matrix, compressed, tmp_path, monkeypatch):
    report, drawn = read_report(compressed), []
    monkeypatch.setattr(plot, "write", lambda file, figure: drawn.append((file.name, figure)))
    words = [word.format(report["redundant"][-1]) for word in words]
    monkeypatch.setattr(sys, "argv", ["plot", str(compressed), "--out", str(tmp_path), *words])
    cli.command(plot.main)
    (file, figure), *_ = drawn
    assert file == "overview.png" and len(drawn) == 4
    assert figure.axes[1].get_title().startswith(matrix.format(report["redundant"][-1]))


@pytest.mark.parametrize("dtype, expected", [
    ("auto", torch.float32), ("bfloat16", torch.float32), ("float64", torch.float64)])
def test_the_experiment_is_in_float32_at_least(dtype, expected, compressed, tmp_path, monkeypatch, capsys):
    """Whatever the folder was made in: half precision rounds small changes away."""
    report, seen = json.loads((compressed / "report.json").read_text()), []
    report["settings"]["dtype"] = "torch.bfloat16"
    (tmp_path / "report.json").write_text(json.dumps(report))

    def stop(model, *words):
        seen.append(model.dtype)
        raise KeyboardInterrupt

    monkeypatch.setattr(plot, "zero_groups", stop)
    words = ["--matrix", MATRIX, "--dtype", dtype, "--windows", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["plot", str(tmp_path), *words])
    with pytest.raises(SystemExit):
        cli.command(plot.main)
    line = f"{MATRIX}  in {str(expected)[6:]}: half precision would round small changes away\n"
    assert seen == [expected] and line in capsys.readouterr().out


def test_a_folder_made_with_layer_ids_has_no_picture_of_cosines(compressed, tmp_path, monkeypatch, capsys):
    report = json.loads((compressed / "report.json").read_text())
    (tmp_path / "small").mkdir()
    (tmp_path / "small/report.json").write_text(json.dumps({**report, "cosines": None}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plot", "small"])
    cli.command(plot.main)
    line = "no overview.png, no cosines.png: small was made with --layer-ids and has no cosines\n"
    assert line in capsys.readouterr().out
    pictures = sorted(f"spectra-{layer}.png" for layer in report["redundant"])
    assert sorted(f.name for f in (tmp_path / "small-plots").iterdir()) == pictures


@pytest.mark.parametrize("words, message", [
    ("", "give one FOLDER, that grasp.py wrote"),
    ("small --ckpt small", "give one FOLDER, that grasp.py wrote"),
    ("nowhere", "nowhere: no report.json; expected a folder written by grasp.py"),
    ("small --layer-ids 0", "--layer-ids [0]: small has compressed layers ["),
    ("small --overview layers.0.attention.wq",
     "--overview layers.0.attention.wq: expected a matrix of the compressed layers ["),
    ("small --matrix layers.8.attention.wq", "layers.8.attention.wq: expected a name like layers.7.attention.wq"),
    ("small --matrix wq", "this model has 8 layers, 0 to 7"),
    ("small --windows 2", "--windows, --batch-size: these need --matrix NAME"),
    ("small --matrix layers.0.attention.wq --seq-len 999", "--seq-len 999: expected 2 to 256"),
    ("small --matrix layers.0.attention.wq --data nothing", "no text 'nothing'"),
    ("small --out file", "--out file: file is not a folder or read-only"),
    ("small --out no/such", "no is not a folder or read-only"),
    ("--ckpt small --dense small", "is low-rank, expected a dense matrix of shape ["),
])
def test_mistakes_are_one_line_and_draw_nothing(words, message, compressed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").symlink_to(compressed)
    (tmp_path / "file").touch()
    assert message in error_of(plot.main, words, monkeypatch, capsys)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "small"]


@pytest.mark.parametrize("report, writer", [
    ({"settings": {}, "layers": [3], "kept": {}}, "fisher"), ({"control": "svd", "of": "there"}, "controls")])
def test_a_report_of_another_command_is_told_by_its_content(report, writer, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match=f"written by extras.{writer}; expected a folder that grasp.py"):
        read_report(tmp_path)


def test_another_models_weights_are_refused():
    good = {"settings": {"ckpt": str(TINY), "dtype": "torch.bfloat16"}, "cosines": [0.5] * 8,
            "matrices": [{"name": MATRIX, "shape": [96, 256]}]}
    folder, model, _ = open_original(good, None, "cpu", "auto")
    assert folder == TINY and model.dtype == torch.bfloat16  # that the compressed folder was made in
    assert open_original(good, None, "cpu", "float32")[1].dtype == torch.float32
    with pytest.raises(ValueError, match="tiny: a model of 8 layers, but the report is of 5"):
        open_original({**good, "cosines": [0.5] * 5}, TINY, "cpu", "auto")
    with pytest.raises(ValueError, match=r"tiny: a model of 8 layers, but the report is of layers \[3, 8\]"):
        open_original({**good, "cosines": None, "redundant": [3, 8]}, TINY, "cpu", "auto")
    with pytest.raises(ValueError, match=r"w2 is \[96, 256\], expected a dense matrix of shape \[16, 32\]"):
        open_original({**good, "matrices": [{"name": MATRIX, "shape": [16, 32]}]}, None, "cpu", "auto")


@pytest.mark.parametrize("field, value", [
    *(("settings", value) for value in (None, {}, {**SETTINGS, "ckpt": 3}, {**SETTINGS, "dtype": None})),
    *(("cosines", value) for value in (1, [], ["0.9"], [math.nan])),
    *(("redundant", value) for value in ([], [8], [-1], [True], [5, 3])),
    *(("matrices", value) for value in ({}, [{}], [None])),
    *(("matrices", [{"name": "layers.3.attention.wq", "shape": [9, 6], "rank": 2, "kept": [0, 5], **wrong}])
      for wrong in ({"name": "layers.0.attention.wq"}, {"name": ["wq"]}, {"shape": [9]}, {"shape": 9}, {"rank": 3},
                    {"rank": None}, {"kept": None}, {"kept": [0, 6]}, {"kept": [5, 0]}, {"kept": [0.0, 5]})),
])
def test_a_report_that_grasp_did_not_write_is_refused(field, value, tmp_path):
    sound = {"settings": SETTINGS, "cosines": [0.5] * 8, "redundant": [3], "matrices": [
        {"name": "layers.3.attention.wq", "shape": [9, 6], "rank": 2, "kept": [0, 5]},
        {"name": "layers.3.attention.wk", "shape": [9, 6], "rank": None, "kept": None}]}
    file = tmp_path / "report.json"
    file.write_text(json.dumps(sound))
    assert read_report(tmp_path) == sound
    file.write_text(json.dumps({**sound, "cosines": None}))  # made with --layer-ids
    assert read_report(tmp_path)["cosines"] is None
    file.write_text(json.dumps({**sound, field: value}))
    with pytest.raises(ValueError, match=f"report.json: {field}.* is missing or not as grasp.py writes it"):
        read_report(tmp_path)
