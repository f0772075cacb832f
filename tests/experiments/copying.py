"""When does a model of N training images know them by heart? docs/log.md, "the law of copying".

    PYTHONPATH=. python tests/experiments/copying.py --data=CXR/PNEUMONIA --out=O \
        --ae=A/ckpts/last.pt --num 25 50 106 212 424 667
    PYTHONPATH=. python tests/experiments/copying.py --out=O --plot=docs/copying.svg

Trains a small UNet (config/cpu_ldm.py, 32 channels) on N films, half of each class, until its
samples hold more copies than chance allows, in two evaluations one after the other.
"""
import argparse
import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np

from lib import html

ROOT = pathlib.Path(__file__).resolve().parents[2]


def subset(source, target, num, seed):
    """Links to `num` training images, half of each class, and to all validation images."""
    rng = np.random.default_rng([num, seed])
    for folder in sorted(source.glob("*/*")):
        files = sorted(folder.iterdir())
        if folder.parent.name == "train" and num < 667:
            share = num // 2 + (num % 2) * (folder.name == "normal")
            files = rng.permutation(np.array(files, dtype=object))[:share]
        place = target / "PNEUMONIA" / folder.parent.name / folder.name
        place.mkdir(parents=True, exist_ok=True)
        for file in files:
            (place / file.name).symlink_to(file.resolve())


def evaluations(folder):
    """The evaluations in the log of a run."""
    log = folder / "metrics.jsonl"
    records = map(json.loads, log.read_text().splitlines()) if log.exists() else ()
    return [record for record in records if "val/loss" in record]


def copied(found):
    """Step at which copies are first above chance in this evaluation and the next, or None."""
    over = [record["copies/probability"] < 0.025 for record in found]
    return next((found[i]["step"] for i in range(len(over) - 1) if over[i] and over[i + 1]), None)


def train(args, num, seed, augment):
    """One run of train_ldm.py, ended once the answer is known."""
    name = f"n{num}_s{seed}_a{augment}"
    folder, films = args.out / name, args.out / "data" / f"n{num}_s{seed}"
    if not films.exists():
        subset(args.data, films, num, seed)
    epoch_steps = -(-num // 16)
    steps = max(3000, (400 + 400 * bool(augment)) * epoch_steps)
    command = [sys.executable, "train_ldm.py", "--config=config/cpu_ldm.py", "--ldm_base_ch=32",
               f"--ae_ckpt_path={args.ae}", f"--data_root={films}", "--task=PNEUMONIA",
               f"--max_steps={steps}", "--epochs=100000", "--patience=0", "--dtype=fp32",
               f"--sample_every={max(1, steps // 40 // epoch_steps)}", "--sample_batch_size=16",
               f"--output_root={args.out}", f"--run_name={name}", f"--seed={seed}",
               f"--augment={augment}"]
    with open(args.out / f"{name}.txt", "a") as log:
        run = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        while run.poll() is None:
            time.sleep(5)
            if copied(evaluations(folder)) is not None:
                run.send_signal(signal.SIGINT)
                run.wait()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--data", type=pathlib.Path)
    parser.add_argument("--ae", type=pathlib.Path)
    parser.add_argument("--num", type=int, nargs="*", default=[])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--augment", type=int, default=0)
    parser.add_argument("--plot", type=pathlib.Path, help="SVG file")
    args = parser.parse_args()
    for seed in args.seeds:
        for num in args.num:
            train(args, num, seed, args.augment)
    print("| images | seed | augment | lowest val/loss, passes | copies, passes |")
    print("|" + " --- |" * 5)
    curves = {}
    for folder in sorted(args.out.glob("n*_s*_a*/"), key=lambda p: int(p.name[1:].split("_")[0])):
        num, seed, augment = (int(part[1:]) for part in folder.name.split("_"))
        if found := evaluations(folder):
            best = min(found, key=lambda record: record["val/loss"])["step"] * 16 / num
            copies, last = copied(found), found[-1]["step"] * 16 / num
            passes = f"none until {last:.0f}" if copies is None else f"{copies * 16 / num:.0f}"
            print(f"| {num} | {seed} | {augment} | {best:.0f} | {passes} |")
            name = f", augment {augment}, seed {seed}"
            if copies:  # else the run has not ended yet
                curves.setdefault("val/loss is lowest" + name, []).append((num, best))
                curves.setdefault("copies" + name, []).append((num, copies * 16 / num))
    if args.plot:
        figure = html.draw("Passes over N training images", curves)
        svg = re.search("<svg.*</svg>", figure, re.DOTALL)[0]
        legend = "".join(f'<text x="60" y="{236 + 14 * i}" class="c{i % 8}">{name}</text>'
                         for i, name in enumerate(curves))
        args.plot.write_text(svg.replace(
            "<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ').replace(
            f"0 0 {html.WIDTH} {html.HEIGHT}",
            f"0 0 {html.WIDTH} {240 + 14 * len(curves)}").replace(
            "</svg>", f"<style>svg {{ background: white }} {html.STYLE}</style>{legend}</svg>"))


if __name__ == "__main__":
    main()
