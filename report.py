"""One page about a run: verdicts, curves, samples, evaluation, settings.

    python report.py runs/ldm_tb                 # writes runs/ldm_tb/report.html
    python report.py runs/ldm_tb runs/ldm_tb2    # compares them: runs/ldm_tb/comparison.html

The page embeds its pictures and needs neither a network nor a script, so it can be sent as it is.
It can be made during a run, and of a run with missing or damaged files: what is left is shown.
"""
import datetime
import math
import pathlib
import re
import shlex

from lib import metrics, verdicts
from lib.args import Parser, file_path, parse_settings
from lib.files import fail, read_json, write_atomic
from lib.html import draw, image, leaves, page, show, table, tag, verdict_list
from lib.run import read_records

REAL = "sample_diversity/real_pairwise_mse_mean"
CHARTS = {  # {title: metrics}
    "Loss": (verdicts.LOSS, "train/rec", verdicts.VAL, verdicts.VAL_TRAIN),
    "Loss by noise level, t0 is detail, t3 layout": [f"train/loss_t{q}" for q in range(4)],
    "Adversarial losses": ("train/g_loss", "train/d_loss"),
    "KL divergence": ("train/kl",),
    "PSNR of reconstructions, of a linear code": (verdicts.PSNR, verdicts.PSNR_LINEAR),
    "SSIM and sharpness": ("val/ssim", "val/detail", "val/power_fine", "val/power_finest"),
    "Norm of the gradient": (verdicts.GRAD,),
    "Diversity of samples and of real images": (f"{metrics.MSE_MEAN}_raw", REAL),
    "Round trip of samples and of real latents": (metrics.ROUND_TRIP, metrics.REAL_ROUND_TRIP),
    "Power of the octave least like real images": (metrics.POWER,),
    "Lattice of dots or squares": (metrics.LATTICE, "val/lattice"),
    "Standard deviation of the latents": (metrics.Z_STD, metrics.TARGET_STD),
    "Copies, measured and by chance": (verdicts.COPIES, verdicts.COPIES_EXPECTED),
    "Speed": ("train/images_per_second",)}
CHARTED = [name for names in CHARTS.values() for name in names]

# --- a run folder -------------------------------------------------------------------------------


class LoggedRun:
    """What a run folder holds; a file that is missing or damaged counts as empty."""

    def __init__(self, path):
        self.folder = pathlib.Path(path)
        names = ("run_meta.json", "summary.json", "evaluation.json")
        self.meta, self.summary, self.evaluation = (read_json(self.folder / n) for n in names)
        self.settings = self.meta.get("args", {})
        self.records = read_records(self.folder / "metrics.jsonl")
        if not self.meta and not self.records:
            fail(f"{path} is not a run folder: give one such as runs/ldm_tb")
        # The last number of each metric, and the record with the lowest val/loss.
        self.latest = {name: value for record in self.records for name, value in record.items()}
        validated = [r for r in self.records if math.isfinite(r.get(verdicts.VAL, math.nan))]
        self.best = min(validated, key=lambda record: record[verdicts.VAL], default={})
        if self.summary.get("step", -1) < self.latest.get("step", 0):
            self.summary = {}  # the run has gone on since
        self.verdicts = [verdicts.Verdict(**v) for v in self.summary.get("verdicts", ())]

    def points(self, name):
        """[(step, value)] of a metric; NaN if it was not finite."""
        return [(record["step"], record[name]) for record in self.records if name in record]

    def grids(self):
        """{kind: {epoch: path}} of samples/: up to six grids of each class, or reconstructions."""
        grids = {}
        for path in (self.folder / "samples").glob("*_ep*.png"):
            if match := re.fullmatch(r"(?:recon|sample)_ep(\d+)_?(.*)\.png", path.name, re.DOTALL):
                names = grids.setdefault(match[2] or "reconstructions", {})
                names[int(match[1])] = path
        for kind, names in grids.items():
            epochs = sorted(names)
            chosen = {epochs[i * (len(epochs) - 1) // 4] for i in range(5)}
            grids[kind] = {e: names[e] for e in epochs if e in chosen | {self.best.get("epoch")}}
        return dict(sorted(grids.items()))


# --- one run ------------------------------------------------------------------------------------


def facts(run):
    """{name: value} of what a reader asks first, then all else that the run says of itself."""
    meta, best, summary, seconds = run.meta, run.best, run.summary, run.summary.get("wall_seconds")
    state = "diverged" if summary.get("diverged") else "finished" if summary else "not finished"
    found = {
        "state": f"{state}, step {show(run.latest.get('step'))}",
        "wall time": seconds and str(datetime.timedelta(seconds=int(seconds))),
        "lowest val/loss": best and f"{show(best[verdicts.VAL])}, epoch {best.get('epoch')}",
        "images": [f"{name} {count}" for name, count, *_ in meta.get("data", ())],
        "command": shlex.join(["python", *meta.get("command", ())]),
        "not the defaults": {name: run.settings.get(name) for name in meta.get("changed", ())}}
    return found | {n: v for n, v in meta.items() if n not in ("args", "data", "changed", *found)}


def samples(run):
    """Grids over the epochs; real images above those of a class."""
    parts = []
    for kind, names in run.grids().items():
        parts.append(image(run.folder / f"samples/real_{kind}.png", f"{kind}, real"))
        parts += [image(path, f"{kind} epoch {epoch}") for epoch, path in names.items()]
    return tag("div", *parts)


def evaluation(run):
    """All that evaluate.py measured."""
    if not run.evaluation:
        return tag("p", "Not measured: run evaluate.py with an LDM.")
    numbers = {name: value for name, value in run.evaluation.items() if name != "verdicts"}
    found = [verdicts.Verdict(**v) for v in run.evaluation.get("verdicts", ())]
    by_size = {row: [(int(size), area) for size, (area, _, _) in sizes.items()]
               for row, sizes in numbers.get("c2st_by_size", {}).items()}
    return tag("div", verdict_list(found), table(leaves(numbers)),
               draw("C2ST by size in pixels; 0.5: like real images", by_size),
               image(run.folder / "evaluation_pairs.png", "the ten closest pairs"))


def report(run):
    """The page of one run."""
    curves = [draw(title, {name: run.points(name) for name in names})
              for title, names in CHARTS.items()]
    return page(run.folder.resolve().name, {
        "Verdicts": verdict_list(run.verdicts), "Run": table(facts(run).items()),
        "Curves": tag("div", *curves, class_="grid"), "Samples": samples(run),
        "Evaluation": evaluation(run), "Settings": table(run.settings.items())})


# --- several runs -------------------------------------------------------------------------------


def differences(runs):
    """Table of facts, settings, verdicts and last numbers: a column for each of {path: run}, a row
    for each name whose value differs."""
    columns = [facts(run) | run.settings | {name: run.latest.get(name) for name in CHARTED}
               | {f"verdict on {v.metric}": f"{v.value} {v.level}" for v in run.verdicts}
               for run in runs.values()]
    rows = [[name, *(show(column.get(name)) for column in columns)]
            for name in dict.fromkeys(name for column in columns for name in column)]
    return table([row for row in rows if len(set(row[1:])) > 1], ["", *runs])


def comparison(runs):
    """The page of several runs, {path: LoggedRun}."""
    curves = [draw(name, {path: run.points(name) for path, run in runs.items()})
              for name in CHARTED]
    last = [image(names[max(names)], f"{path}: {kind} epoch {max(names)}")
            for path, run in runs.items() for kind, names in run.grids().items()]
    return page(f"{len(runs)} runs", {
        "Differences": differences(runs), "Curves": tag("div", *curves, class_="grid"),
        "Last samples": tag("div", *last)})


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=file_path, help="run folder")
    parser.add_argument("--out", type=file_path, help="HTML file; None: in the first run's folder")
    args = parse_settings(parser, argv)
    runs = {path: LoggedRun(path) for path in args.runs}
    if len(runs) == 1:
        name, html = "report.html", report(*runs.values())
    else:
        name, html = "comparison.html", comparison(runs)
    path = pathlib.Path(args.out or pathlib.Path(args.runs[0], name))
    write_atomic(path, lambda f: f.write(html))
    print(f"report: {path}")


if __name__ == "__main__":
    main()
