"""report.py: the page of a run as a parser sees it."""
import base64
import html.parser
import json
import math
import pathlib
import re
import shlex
import shutil

import numpy as np
import pytest
from conftest import error_of
from PIL import Image

import report
from lib import verdicts
from lib.files import read_meta
from lib.html import VOID

NASTY = "<img src=x onerror=alert(1)>"


class Seen(html.parser.HTMLParser):
    """What is on a page; every element is closed, and nothing leads out of the page."""

    def __init__(self, path):
        super().__init__()
        self.open, self.words = [], []
        self.curves = {}  # {title of a figure: {curve: its path}}
        self.pictures = []  # [(text, bytes)]
        self.text = path.read_text()
        self.feed(self.text)
        assert not self.open, self.open
        self.words = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.attrs = dict(attributes)
        assert tag not in ("script", "link", "iframe", "object", "a", "base"), tag
        for name, value in attributes:
            assert not name.startswith("on") and name not in ("href", "style", "srcset"), name
            assert not re.match("https?:|//", value or ""), value
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            kind, data = self.attrs["src"].split(",", 1)
            assert kind == "data:image/png;base64"
            self.pictures.append((self.attrs["alt"], base64.b64decode(data, validate=True)))
        elif tag == "svg":
            self.figure = self.curves.setdefault(self.attrs["aria-label"], {})
        elif tag == "path":
            self.path = self.attrs["d"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-2:] == ["path", "title"]:
            self.figure[data] = self.path
        elif self.open[-1:] != ["style"]:
            self.words.append(data)


def heights(path):
    """y of each point of a curve, 0 at the top."""
    return [float(y) for y in re.findall(r"[ML]\S+ ([\d.]+)", path)]


@pytest.fixture
def make_run(tmp_path):
    """make_run(NAME, records, ...) -> a run folder made by hand; summary None: it goes on."""
    def make(name, records, summary=None, kind="ldm", classes=(), epochs=(1,), **args):
        folder = tmp_path / name
        (folder / "samples").mkdir(parents=True)
        meta = {"kind": kind, "args": {"lr": 1e-3, **args}, "changed": ["lr"],
                "git_commit": "abc123", "packages": {"torch": "2.0"}, "command": ["train_ldm.py"],
                "data": [[c, 5, "0"] for c in classes]}
        (folder / "run_meta.json").write_text(json.dumps(meta))
        lines = [json.dumps(r) if isinstance(r, dict) else r for r in records]
        (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
        if summary is not None:
            (folder / "summary.json").write_text(json.dumps(summary))
        for c in classes:
            for kind in ("real", *(f"sample_ep{epoch:04d}" for epoch in epochs)):
                Image.new("L", (8, 8), len(kind)).save(folder / f"samples/{kind}_{c}.png")
        return folder
    return make


def made(capsys, *argv):
    """What is on the page that report.py says it has written."""
    report.main([*map(str, argv)])
    word, path = capsys.readouterr().out.strip().split(": ", 1)
    assert word == "report"
    return Seen(pathlib.Path(path))


def logged(count, name="train/loss", value=lambda i: 1 / (i + 1)):
    return [{"step": 10 * i, "epoch": i, name: value(i)} for i in range(1, count + 1)]


# --- real runs ---


def test_ldm_page_shows_curves_samples_and_verdicts(stages, workspace, quick):
    command = re.search("^report: python (.*)$", stages.stdout["train_ldm"], re.M).group(1)
    folder = workspace.out / "l"
    words = shlex.split(command.replace(str(stages.out), str(workspace.out)))
    assert words == ["report.py", str(folder)]
    result = quick(*words)
    assert result.code == 0 and result.out == f"report: {folder}/report.html\n", result.err
    seen = Seen(folder / "report.html")
    assert {name for curves in seen.curves.values() for name in curves} == {
        "train/loss", "val/loss", "val/train_loss", *(f"train/loss_t{q}" for q in range(4)),
        "train/grad_norm", "sample_diversity/pairwise_mse_mean_raw",
        "sample_diversity/real_pairwise_mse_mean", "final_latent_stats/std",
        "final_latent_stats/target_std", "copies/share", "copies/expected",
        *(f"sample_quality/{name}"
          for name in ("power", "lattice", "round_trip", "real_round_trip"))}
    assert [data for _, data in seen.pictures] == [
        (folder / f"samples/{kind}_{c}.png").read_bytes() for c in ("normal", "tb")
        for kind in ("real", "sample_ep0005", "sample_ep0010")]
    summary = json.loads((folder / "summary.json").read_text())
    for v in summary["verdicts"]:
        assert f"{v['level'].upper()} {v['metric']} {v['value']} {v['meaning']}" in seen.words
        assert v["level"] == "ok" or v["advice"] in seen.words
    for text in (read_meta(folder)["git_commit"], "finished, step 20", "normal 8, tb 8",
                 "Not measured"):
        assert text in seen.words
    changed = seen.words.split("not the defaults")[1].split(" kind ldm ")[0]
    assert "lr 0.001" in changed and "seed" not in changed


def test_autoencoder_page_shows_its_reconstructions(stages, workspace, capsys):
    assert f"report: python report.py {stages.out / 'v'}\n" in stages.stdout["train_vae"]
    pictures = workspace.out / "v/samples"
    shutil.copy(pictures / "recon_ep0050.png", pictures / "recon_ep0000.png")  # of a short run
    seen = made(capsys, workspace.out / "v")
    assert {"train/rec", "train/kl", "train/g_loss", "val/psnr", "val/power_fine"} <= {
        name for curves in seen.curves.values() for name in curves}
    image = (pictures / "recon_ep0050.png").read_bytes()
    assert seen.pictures[0] == ("reconstructions epoch 0", image) and seen.pictures[-1][1] == image


def test_page_shows_all_that_evaluate_measured(workspace, quick, capsys):
    result = quick("evaluate.py", *workspace.common, f"--ckpt={workspace.ldm_ckpt}",
                   "--num_samples=6", "--num_sampling_steps=2", "--classifier_steps=2")
    assert result.code == 0, result.err
    found = json.loads((workspace.out / "l/evaluation.json").read_text())
    seen = made(capsys, workspace.out / "l")
    for v in found["verdicts"]:
        assert f"{v['metric']} {v['value']} {v['meaning']}" in seen.words
    for name in found:
        assert name == "verdicts" or name in seen.words
    for space, groups in found["groups"].items():
        assert f"groups, {space}, all " in seen.words
        assert f"fid {groups['all']['fid']:.4g}" in seen.words
    curves = seen.curves["C2ST by size in pixels; 0.5: like real images"]
    assert {row: len(re.findall("[ML]", path)) for row, path in curves.items()} == {
        "samples": 2, "decoded": 2, "baseline": 1}  # at 16 and 32 px
    if "copies" in found:
        assert seen.pictures[-1][1] == (workspace.out / "l/evaluation_pairs.png").read_bytes()


# --- curves ---


def test_gaps_and_single_points_are_drawn(make_run, capsys):
    values = [1, None, 2, 3, math.nan, None]
    records = [{"step": i, "epoch": 0, "train/loss": v} for i, v in enumerate(values)]
    seen = made(capsys, make_run("r", [*records, '{"step": 7, "train']))
    path = seen.curves["Loss"]["train/loss"]
    assert re.findall("[ML]", path) == ["M", "M", "L"] and path.count("h0") == 2
    # Nothing to draw in a figure with nothing but NaN.
    assert not made(capsys, make_run("n", logged(3, "val/psnr", lambda i: None))).curves


def test_samples_at_the_lowest_val_loss_are_shown(make_run, capsys):
    losses = [5, 4, 3, 2, 2.5, 3, 3.5, 4, 4.5, 5.0]
    records = [{"step": 10 * e, "epoch": e, verdicts.VAL: float(losses[e - 1]),
                verdicts.VAL_TRAIN: 5.0 - 0.1 * e} for e in range(1, 11)]
    folder = make_run("r", records, classes=["tb"], epochs=range(1, 11))
    seen = made(capsys, folder)
    assert "lowest val/loss 2, epoch 4" in seen.words
    shown = [int(text.rsplit(" ", 1)[1]) for text, _ in seen.pictures if "epoch" in text]
    assert 5 <= len(shown) <= 6 and shown == sorted(shown)
    assert {1, 4, 10} <= set(shown)


# --- names, and what is missing ---


def test_names_are_escaped(make_run, capsys):
    records = [*logged(3), {"step": 40, "epoch": 4, f"{NASTY}": 1.0}]
    verdict = verdicts.Verdict(NASTY, "bad", "1", NASTY, NASTY)._asdict()
    folder = make_run(f"run {NASTY}", records, {"step": 40, "verdicts": [verdict]},
                      classes=[NASTY], note=NASTY)
    (folder / "evaluation.json").write_text(json.dumps({
        "verdicts": [verdict], "features": {"f": NASTY}, "copies": {NASTY: NASTY},
        "groups": {"f": {NASTY: {NASTY: {NASTY: 1.0}}}}, "auroc": {NASTY: [1, 0, 1]}}))
    other = make_run(f"other {NASTY}", records, classes=[NASTY])
    seen = made(capsys, folder)  # Seen refuses what is not a data URI, and attributes like onerror
    assert seen.words.count(NASTY) > 10
    assert NASTY not in seen.text
    assert made(capsys, folder, other).words.count(NASTY) > 5


@pytest.mark.parametrize("name, content, shown", [
    ("metrics.jsonl", "", "not finished, step –"), ("summary.json", '{"step": 9', "step 20"),
    ("summary.json", '{"step": 10, "verdicts": []}', "not finished, step 20"),  # it went on
    ("evaluation.json", "[1]", "Not measured"), ("run_meta.json", "", "step 20")])
def test_what_is_left_of_a_run_is_shown(make_run, capsys, name, content, shown):
    folder = make_run("r", logged(2), classes=["tb"], epochs=(1, 2))
    (folder / name).write_text(content)
    (folder / "samples/real_tb.png").unlink()
    seen = made(capsys, folder)
    assert shown in seen.words and bool(seen.curves) == (name != "metrics.jsonl")
    assert [text for text, _ in seen.pictures] == ["tb epoch 1", "tb epoch 2"]
    assert made(capsys, folder, make_run("other", logged(2))).curves


def test_what_is_no_run_is_one_line(make_run, tmp_path, capsys):
    folder = make_run("r", logged(2))
    for path in ("nowhere", tmp_path, folder / "metrics.jsonl"):
        message = error_of(capsys, report.main, [str(path)])
        assert "not a run folder: give one such as runs/ldm_tb" in message
    assert not list(tmp_path.rglob("*.html"))


# --- several runs ---


def test_a_comparison_shows_what_differs(make_run, capsys, tmp_path):
    runs = [make_run(f"{name}/x", logged(4, value=lambda i, lr=lr: lr / i), lr=lr, epochs=(1, 2),
                     classes=["tb"], same=77) for name, lr in (("a", 0.5), ("b", 0.25))]
    runs.append(make_run("v/ae", logged(2, "val/psnr", lambda i: 20.0 + i), kind="vae", lr=0.5))
    seen = made(capsys, *runs)
    assert (runs[0] / "comparison.html").exists() and not (runs[0] / "report.html").exists()
    assert "lr 0.5 0.25 0.5" in seen.words and "same 77 77 –" in seen.words
    assert "train/loss 0.125 0.0625 –" in seen.words and "val/psnr – – 22" in seen.words
    assert set(seen.curves["train/loss"]) == {str(run) for run in runs[:2]}
    assert set(seen.curves["val/psnr"]) == {str(runs[2])}
    assert [png for _, png in seen.pictures] == [
        (run / f"samples/{name}_tb.png").read_bytes() for run in runs[:2]
        for name in ("real", "sample_ep0001", "sample_ep0002")]
    seen = made(capsys, *runs[:2], f"--out={tmp_path}/c.html")
    assert "same" not in seen.words and (tmp_path / "c.html").exists()  # the same in both


# --- what training writes for it ---


def test_real_images_are_written_as_training_sees_them(stages):
    grid = np.asarray(Image.open(stages.out / "l/samples/real_tb.png"))
    films = sorted((stages.data / "TB/train/tb").glob("*.png"))
    assert grid.shape == (32 + 16, 8 * 34 + 2) and len(films) == 8
    for i, film in enumerate(films):
        shown = grid[14:46, 2 + 34 * i:34 + 34 * i].astype(int)
        assert abs(shown - np.asarray(Image.open(film).convert("L"))).max() <= 1
