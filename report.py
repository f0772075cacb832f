"""One page about a run: verdicts, settings, curves, samples, evaluation.

    python report.py runs/ldm_tb                 # writes runs/ldm_tb/report.html
    python report.py runs/ldm_tb runs/ldm_tb2    # compares them: runs/ldm_tb/comparison.html

The page embeds its pictures and needs neither a network nor a script, so it can be sent as it is.
It can be made during a run, and of a run with missing or damaged files: what is left is shown.
"""
import math
import pathlib
import re
import shlex

from lib import metrics, verdicts
from lib.args import Parser, file_path, parse_settings
from lib.files import fail, read_json, write_atomic
from lib.html import Html, draw, image, leaves, page, show, table, tag
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
    "Copies, measured and by chance": (verdicts.COPIES, verdicts.COPIES_EXPECTED)}

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

    def points(self, name):
        """[(step, value)] of a metric; NaN if it was not finite."""
        return [(record["step"], record[name]) for record in self.records if name in record]


# --- the page -----------------------------------------------------------------------------------


def facts(run):
    """{name: value} of what a reader asks first, then all else that the run says of itself."""
    meta, best, summary = run.meta, run.best, run.summary
    state = "diverged" if summary.get("diverged") else "finished" if summary else "not finished"
    found = {
        "state": f"{state}, step {show(run.latest.get('step'))}",
        "lowest val/loss": best and f"{show(best[verdicts.VAL])}, epoch {best.get('epoch')}",
        "images": [f"{name} {count}" for name, count, *_ in meta.get("data", ())],
        "command": shlex.join(["python", *meta.get("command", ())]),
        "not the defaults": {name: run.settings.get(name) for name in meta.get("changed", ())}}
    return found | {n: v for n, v in meta.items() if n not in ("args", "data", "changed", *found)}


def run_table(runs):
    """Facts, settings and last numbers: a column for each of {path: run}, and of several runs only
    the rows whose values differ."""
    columns = [facts(run) | run.settings | run.latest for run in runs.values()]
    rows = [[name, *(show(column.get(name)) for column in columns)]
            for name in dict.fromkeys(name for column in columns for name in column)]
    return table([row for row in rows if len(runs) == 1 or len(set(row[1:])) > 1], ["", *runs])


def curves(runs):
    """A figure for each chart of one run; of several, for each metric, a curve for each run."""
    several = len(runs) > 1
    charts = {n: [n] for names in CHARTS.values() for n in names} if several else CHARTS
    figures = [draw(title, {path if several else name: run.points(name)
                            for path, run in runs.items() for name in names})
               for title, names in charts.items()]
    return tag("div", *figures, class_="grid")


def judged(measured):
    """Table of the verdicts in a summary.json or evaluation.json: bad ones first, with advice."""
    found = sorted((verdicts.Verdict(**v) for v in measured.get("verdicts", ())),
                   key=lambda v: ("bad", "watch", "ok").index(v.level))
    return table([tag("b", v.level.upper(), class_=v.level), v.metric, v.value,
                  v.meaning if v.level == "ok" else f"{v.meaning} {v.advice}"] for v in found)


def samples(run):
    """The grids in samples/, by class: real images, then those of up to six epochs, the one with
    the lowest val/loss among them."""
    found = []
    for path in (run.folder / "samples").glob("*.png"):
        if match := re.fullmatch(r"(?:real|[a-z]+_ep(\d+))_?(.*)", path.stem, re.DOTALL):
            found.append((match[2] or "reconstructions", int(match[1] or -1), path))
    epochs = sorted({epoch for _, epoch, _ in found if epoch >= 0})
    chosen = {epochs[i * (len(epochs) - 1) // 4] for i in range(5) if epochs}
    chosen |= {-1, run.best.get("epoch")}
    return tag("div", *(image(path, f"{name} epoch {epoch}" if epoch >= 0 else f"{name}, real")
                        for name, epoch, path in sorted(found) if epoch in chosen))


def evaluation(run):
    """All that evaluate.py measured."""
    if not run.evaluation:
        return tag("p", "Not measured: run evaluate.py with an LDM.")
    numbers = {name: value for name, value in run.evaluation.items() if name != "verdicts"}
    by_size = {row: [(int(size), area) for size, (area, _, _) in sizes.items()]
               for row, sizes in numbers.get("c2st_by_size", {}).items()}
    return tag("div", judged(run.evaluation), table(leaves(numbers)),
               draw("C2ST by size in pixels; 0.5: like real images", by_size),
               image(run.folder / "evaluation_pairs.png", "the ten closest pairs"))


def report(runs):
    """The page of {path: LoggedRun}; its sections have a part for each run."""
    def each(part):
        return tag("div", *(Html(tag("h3", path) + part(run)) for path, run in runs.items()))

    return page(" and ".join(run.folder.resolve().name for run in runs.values()), {
        "Verdicts": each(lambda run: judged(run.summary)), "Run": run_table(runs),
        "Curves": curves(runs), "Samples": each(samples), "Evaluation": each(evaluation)})


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=file_path, help="run folder")
    parser.add_argument("--out", type=file_path, help="HTML file; None: in the first run's folder")
    args = parse_settings(parser, argv)
    runs = {path: LoggedRun(path) for path in args.runs}
    name = "report.html" if len(runs) == 1 else "comparison.html"
    path = pathlib.Path(args.out or pathlib.Path(args.runs[0], name))
    html = report(runs)
    write_atomic(path, lambda f: f.write(html))
    print(f"report: {path}")


if __name__ == "__main__":
    main()
