"""What a run folder holds, read back to be shown. What is missing is left out, as are files and
lines that are no JSON: a report is wanted most of a run that went wrong."""
import contextlib
import math
import pathlib
import re
from typing import NamedTuple

import torch

import experiment
import metrics

MEASURED = f"{metrics.MSE_MEAN}_raw"  # which a sweep may see as -1


class Run(NamedTuple):
    """What a run folder holds."""

    folder: pathlib.Path
    meta: dict  # run_meta.json
    records: list  # of metrics.jsonl, those with a step
    latest: dict  # the last number of each metric; NaN where it was not finite
    summary: dict  # {} where the run goes on, or was stopped
    evaluation: dict  # {} where evaluate.py has not measured it

    @property
    def overfit(self):
        """Whether it was to memorise some images."""
        return bool(self.meta["args"].get("overfit_k") or self.meta["args"].get("overfit_one"))

    def points(self, name):
        """[(step, value)] of a metric; NaN where it was not finite."""
        values = ((r["step"], r[name]) for r in self.records if name in r)
        return [(step, v if isinstance(v, (int, float)) else math.nan) for step, v in values]

    def best(self):
        """The record with the lowest val/loss, {} without any."""
        found = [r for r in self.records if isinstance(r.get(metrics.VAL), float)]
        return min(found, key=lambda r: r[metrics.VAL], default={})

    def seconds(self):
        """How long it has trained; NaN where that is not known."""
        if "wall_seconds" in self.summary:
            return self.summary["wall_seconds"] or math.nan
        with contextlib.suppress(Exception):  # missing or damaged: a report is wanted all the more
            last = self.folder / "ckpts" / "last.pt"
            return torch.load(last, mmap=True, weights_only=True)["seconds"]
        return math.nan

    def verdicts(self):
        """[metrics.Verdict]: its own at the end, until then on the last numbers."""
        if self.summary:
            return [metrics.Verdict(**v) for v in self.summary.get("verdicts", ())]
        val, val_train, rec, loss = ([y for _, y in self.points(name)] for name in (
            metrics.VAL, metrics.VAL_TRAIN, "train/rec", metrics.LOSS))
        values = dict(self.latest)
        if MEASURED in values:  # the other is -1 for a sweep's sake where samples are noise
            values[metrics.MSE_MEAN] = values[MEASURED]
        return metrics.health(values, rec or loss, overfit=self.overfit,
                              val_history=(val[:-1], val_train[:-1]),
                              best_epoch=self.best().get("epoch", 0))

    def evaluated(self):
        """[metrics.Verdict] of evaluate.py."""
        return [metrics.Verdict(**v) for v in self.evaluation.get("verdicts", ())]


def open_run(path):
    """Run of a folder; ends the program where it is none. A file in it that is missing or damaged
    is left out, as is a damaged line of metrics.jsonl."""
    folder = pathlib.Path(path)
    if not experiment.holds_run(folder):
        near = [p for p in folder.absolute().parents if (p / "run_meta.json").is_file()]
        hint = f"give {near[0]}" if near else "give a folder with a run_meta.json, as runs/ldm_tb"
        experiment.fail(f"{path} is no run folder: {hint}")

    def read(name):
        with contextlib.suppress(OSError, ValueError):
            return experiment.parse_json(folder / name)
        return {}

    lines = []
    with contextlib.suppress(OSError):
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    records = [r for r in map(experiment.parse_record, lines) if isinstance(r.get("step"), int)]
    latest = {name: math.nan if v is None else v for r in records for name, v in r.items()}
    summary = read("summary.json")
    ended = summary.get("step")
    if not isinstance(ended, int) or ended < latest.get("step", 0):  # it has gone on since
        summary = {}
    return Run(folder, experiment.read_run(folder), records, latest, summary,
               read("evaluation.json"))


def grids(run, most=6):
    """The pictures in samples/, {class, or "" of an autoencoder: {epoch: path}}; of each at most so
    many: the first, the last, that of the lowest val/loss, and others evenly between."""
    found, best = {}, run.best().get("epoch")
    for path in (run.folder / "samples").glob("*_ep*.png"):
        if match := re.fullmatch(r"(?:recon|sample)_ep(\d+)(?:_(.*))?\.png", path.name, re.DOTALL):
            found.setdefault(match[2] or "", {})[int(match[1])] = path
    for name, paths in found.items():
        epochs = sorted(paths)
        chosen = {epochs[round(i * (len(epochs) - 1) / (most - 1))] for i in range(most)}
        if best in epochs and best not in chosen:
            chosen.remove(min(sorted(chosen)[1:-1], key=lambda epoch: abs(epoch - best)))
            chosen.add(best)
        found[name] = {epoch: paths[epoch] for epoch in sorted(chosen)}
    return dict(sorted(found.items()))
