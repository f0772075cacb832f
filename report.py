"""A run on one page: verdicts, curves, samples, evaluation, settings.

    python report.py runs/ldm_tb                 # writes runs/ldm_tb/report.html
    python report.py runs/ldm_tb runs/ldm_tb2    # what differs: runs/ldm_tb/comparison.html

The page holds its pictures and needs neither a network nor a script, so that it can be sent as it
is. It can be made while a run goes on.
"""
import functools
import math
import pathlib
import shlex
from typing import NamedTuple

import experiment
import metrics
from args import bare_parser, file_path, parse_bare
from page import (badge, draw, nested_table, page, picture, show, side_by_side, table, tag,
                  verdict_list)
from run_files import MEASURED, grids, open_run

REAL = "sample_diversity/real_pairwise_mse_mean"
REFERENCES = (REAL, metrics.TARGET_STD, metrics.COPIES_EXPECTED)  # what another curve should be at


class Chart(NamedTuple):
    """Metrics that are drawn together."""

    title: str
    names: tuple
    zones: str = ""  # the metric whose verdict depends on the value alone
    log: bool = False


CHARTS = (
    Chart("Loss", (metrics.LOSS, "train/rec", metrics.VAL, metrics.VAL_TRAIN)),
    Chart("Loss by quarter of the noise range: t0 is detail, t3 layout",
          tuple(f"train/loss_t{q}" for q in range(4))),
    Chart("Adversarial losses", ("train/g_loss", "train/d_loss")),
    Chart("KL divergence", ("train/kl",)),
    Chart("PSNR of reconstructions, dB", ("val/psnr",)),
    Chart("SSIM, and sharpness as a share of the images' own",
          ("val/ssim", "val/detail", "val/power_fine", "val/power_finest")),
    Chart("Norm of the gradient", (metrics.GRAD,), metrics.GRAD, log=True),
    Chart("Diversity of the samples, beside that of real images", (MEASURED, REAL),
          metrics.MSE_MEAN),
    Chart("Standard deviation of the latents, beside its target",
          (metrics.Z_STD, metrics.TARGET_STD), metrics.Z_STD),
    Chart("Copies of training images, beside those expected by chance",
          (metrics.COPIES, metrics.COPIES_EXPECTED)),
    Chart("Images per second", ("train/images_per_second",)))

# --- one run -------------------------------------------------------------------------------------


def facts(run):
    """{name: value} of what a reader asks first."""
    meta, seconds, best = run.meta, run.seconds(), run.best()
    lowest = f"{show(best[metrics.VAL])}, epoch {best.get('epoch')}" if best else None
    step, epoch = run.latest.get("step"), run.latest.get("epoch")
    state = f"not finished; last logged: step {step}, epoch {epoch}"
    if run.summary:
        state = f"{'diverged' if run.summary.get('diverged') else 'finished'} at step {step}"
    elif step is None:
        state = "just begun: nothing logged yet"
    return {
        "state": state,
        "wall time": None if math.isnan(seconds) else experiment.time_text(seconds),
        "lowest val/loss": lowest,
        "images": ", ".join(f"{name} {count}" for name, count, _ in meta.get("data") or ()),
        "latent": meta.get("latent_shape"), "scale factor": meta.get("latent_scale_factor"),
        "device": f"{meta.get('device')} x {meta.get('world_size')}, {meta.get('dtype')}",
        "begun": meta.get("created"), "commit": meta.get("git_commit"),
        "versions": ", ".join(f"{k} {v}" for k, v in meta.get("packages", {}).items()),
        "command": shlex.join(["python", *map(str, meta.get("command", ()))])}


def level_at(metric, run, value):
    """The worst verdict on a metric at this value; None where there is none."""
    values = {metric: value, metrics.TARGET_STD: run.latest.get(metrics.TARGET_STD, math.nan)}
    real = run.latest.get(REAL, math.nan)
    if metric == metrics.MSE_MEAN and real > 0:
        values[metrics.RATIO] = value / real
    levels = [v.level for v in metrics.health(values, overfit=run.overfit)]
    return max(levels, key=("ok", "watch", "bad").index, default=None)


def curves(run):
    """All charts of a run."""
    best, figures = run.best(), []
    for chart in CHARTS:
        lines = {name: points for name in chart.names if (points := run.points(name))}
        shade = functools.partial(level_at, chart.zones, run) if chart.zones else None
        mark = None
        if best and metrics.VAL in lines:
            mark = best["step"], f"lowest val/loss: epoch {best.get('epoch')}"
        figures.append(draw(chart.title, lines, chart.log, shade, mark, REFERENCES))
    return tag("div", *figures, class_="grid")


def samples(run):
    """Pictures over the epochs; above those of a class, real images."""
    parts = []
    for name, paths in grids(run).items():
        parts.append(tag("h3", name or "Reconstructions, below their inputs"))
        real = run.folder / "samples" / f"real_{name}.png"
        if name and real.exists():
            parts.append(picture(real, f"{name}, real"))
        parts += [picture(path, f"{name} epoch {epoch}") for epoch, path in paths.items()]
    return tag("div", *(parts or ["No pictures yet."]))


def evaluation(run):
    """What evaluate.py found."""
    found = run.evaluation
    if not found:
        best, last = (run.folder / "ckpts" / name for name in ("best.pt", "last.pt"))
        command = experiment.command_line("evaluate.py", ckpt=best if best.exists() else last)
        return tag("p", "Not measured yet: ", tag("code", command))
    names = ("ckpt", "step", "split", *experiment.SAMPLING_SETTINGS)
    parts = [table([(name, found[name]) for name in names if name in found])]
    for space, groups in found.get("groups", {}).items():
        parts += [tag("h3", f"Distances to held-out images by {found['features'].get(space)}"),
                  nested_table(groups)]
    power = found.get("power", {"all": {}})
    lines = {row: list(enumerate(v for name, v in values.items() if name != "num"))
             for row, values in power["all"].items()}
    octaves = dict.fromkeys(name for values in power["all"].values() for name in values)
    octaves.pop("num", None)
    lines["held-out images"] = [(i, 1.0) for i in range(len(octaves))]
    intervals = {f"two-sample, {group}": rows
                 for group, rows in found.get("two_sample", {}).items()}
    intervals |= {name: found[name] for name in ("mirrored", "auroc", "gain")
                  if isinstance(found.get(name), dict)}
    parts += [tag("h3", "Power by cycles per image, relative to held-out images"),
              tag("div", draw("All classes", lines, dashed=("held-out images",),
                               x_names=octaves), class_="grid"),
              nested_table(power), tag("h3", "Looks"), nested_table(found.get("looks", {})),
              tag("h3", "Classifiers"),
              table([[name, row, *values] for name, rows in intervals.items()
                     for row, values in rows.items()], ["", "", "value", "95 % from", "to"]),
              tag("h3", "Copies of training images"), table(found.get("copies", {}).items()),
              picture(run.folder / "evaluation_pairs.png", "the ten closest pairs")]
    return tag("div", *parts)


def verdicts(run):
    """What the run, memorising and evaluate.py were found to be."""
    parts = [verdict_list(run.verdicts())]
    overfit = {k: v for k, v in run.latest.items() if k.startswith("overfit/")}
    if "overfit/passed" in overfit:
        passed, text = metrics.format_overfit(overfit).split(": ", 1)
        parts.append(tag("p", badge(passed.lower()), " memorising: ", text))
    if run.evaluation:
        parts += [tag("h3", "by evaluate.py"), verdict_list(run.evaluated())]
    return tag("div", *parts)


def settings(run):
    """Those that are not the defaults; all of them behind a click."""
    own = run.meta["args"]
    changed = [(name, own.get(name)) for name in run.meta.get("changed", ())]
    return tag("div", table(changed),
               tag("details", tag("summary", "all settings"), table(own.items())))


def shown(section, *what):
    """Html of a section; where a damaged file keeps it from being made, why."""
    try:
        return section(*what)
    except Exception as e:  # whatever JSON of another shape raises
        return tag("p", "Not shown, since a file in the run folder is damaged "
                   f"({type(e).__name__}: {experiment.first_line(e)}).")


def report(run):
    """The page of one run."""
    name = run.folder.resolve().name
    shades = ("Over the steps of the run. Where the verdict depends on the value alone: green is "
              "ok, amber to watch, red bad.")
    parts = [tag("h1", name), tag("h2", "Verdicts"), shown(verdicts, run),
             tag("h2", "Run"), shown(lambda: table(facts(run).items())),
             tag("h2", "Curves"), tag("p", shades), shown(curves, run),
             tag("h2", "Samples"), shown(samples, run)]
    if run.meta.get("kind") == "ldm":
        parts += [tag("h2", "Evaluation"), shown(evaluation, run)]
    parts += [tag("h2", "Settings that are not the defaults"), shown(settings, run)]
    return page(name, *parts)


# --- several runs -------------------------------------------------------------------------------


def numbers(run):
    """{name: td} of what runs are compared by, coloured by its verdict."""
    names = [name for chart in CHARTS for name in chart.names if name in run.latest]
    found = {name: tag("td", run.latest[name]) for name in names}
    for prefix, judged in (("", run.verdicts()), ("evaluate.py: ", run.evaluated())):
        found |= {prefix + v.metric: tag("td", v.value, class_=v.level) for v in judged}
    return found


def comparison(runs):
    """The page of several runs, {name: Run}."""
    figures, pictures = [], []
    for chart in CHARTS:
        for metric in (name for name in chart.names if name not in REFERENCES):
            lines = {name: run.points(metric) for name, run in runs.items()}
            figures.append(shown(draw, metric, lines, chart.log))
    for name, run in runs.items():
        for kind, paths in grids(run).items():
            epoch = max(paths)
            pictures += [tag("h3", f"{name}: {kind} epoch {epoch}"), picture(paths[epoch], kind)]
    return page(
        "comparison", tag("h1", f"{len(runs)} runs"),
        shown(lambda: side_by_side({name: facts(run) for name, run in runs.items()})),
        tag("h2", "Settings that differ"),
        side_by_side({name: run.meta["args"] for name, run in runs.items()}, only_different=True),
        tag("h2", "Numbers at the end"),
        shown(lambda: side_by_side({name: numbers(run) for name, run in runs.items()})),
        tag("h2", "Curves"), tag("div", *figures, class_="grid"), tag("h2", "Last samples"),
        *pictures)


def main(argv=None):
    parser = bare_parser(__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=file_path, help="run folder")
    parser.add_argument("--out", type=file_path, help="the page; None: in the first run's folder")
    args = parse_bare(parser, argv)
    args.runs = list(dict.fromkeys(args.runs))
    runs = [open_run(path) for path in args.runs]
    if len(runs) == 1:
        name, made = "report.html", report(runs[0])
    else:
        names = [run.folder.resolve().name for run in runs]
        unique = len(set(names)) == len(runs)
        by_name = dict(zip(names if unique else args.runs, runs, strict=True))
        name, made = "comparison.html", comparison(by_name)
    path = pathlib.Path(args.out or runs[0].folder / name)
    experiment.write_atomic(path, lambda f: f.write(made))
    print(f"report: {path}")


if __name__ == "__main__":
    main()
