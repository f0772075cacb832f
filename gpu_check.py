"""Prove and measure what only a GPU can show, in about five minutes: `make gpu-check`.

    python gpu_check.py --json=gpu_check.json

The tests of tests/test_gpu.py (stages compiled and in bf16, exact resume, no recompilation, no
graph break, no wait in the hot loop), several processes with NCCL where there are several GPUs, and
bench.py in turn with diffusers. Each part runs in a process of its own, the JSON is written after
each, and what --minutes leaves no time for is left out: a run that is cut off loses nothing.
"""
import pathlib
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from typing import NamedTuple

import torch

import experiment
from args import at_least, bare_parser, parse_bare

HERE = pathlib.Path(__file__).resolve().parent


class Part(NamedTuple):
    """A command, python before it; what it measures or proves lies in the file {out} then."""

    name: str
    command: str
    least_gpus: int = 1


PARTS = (
    Part("tests", "-m pytest tests/test_gpu.py -q -p no:cacheprovider --junitxml={out}"),
    Part("batch 16", "bench.py --only=train,sample --peer --latent_size=32 --repeats=8 "
                     "--json={out}"),
    Part("batch 128", "bench.py --only=train --peer --latent_size=32 --batch=128 --repeats=5 "
                      "--json={out}"),
    Part("batch 16, eager", "bench.py --only=train,sample --peer --latent_size=32 --repeats=5 "
                            "--compile=off --json={out}"),
    Part("processes", "-m torch.distributed.run --standalone --nproc_per_node=gpu train_vae.py "
                      "--img_size=64 --max_steps=30 --disc_start=20 --output_root={out}", 2),
    Part("autoencoder", "bench.py --only=vae --img_size=256 --vae_base_ch=64 --vae_batch=8 "
                        "--repeats=5 --json={out}"))


def run(part, seconds):
    """What came of a part, {"status": ..., "seconds": ..., ...}, of its process after at most so
    many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder, "out")
        words = [word.format(out=out) for word in part.command.split()]
        start = time.perf_counter()
        try:
            done = subprocess.run([sys.executable, *words], cwd=HERE, text=True, timeout=seconds,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
            status, text = "ok" if done.returncode == 0 else "failed", done.stdout
        except subprocess.TimeoutExpired as e:
            status, text = "cut off", (e.stdout or b"").decode(errors="replace")
        found = {"status": status, "seconds": time.perf_counter() - start,
                 "end of its output": text[-3000:]}
        if out.is_file() and "--junitxml" in part.command:
            found["tests"] = test_results(out)
        elif out.is_file():
            found["bench"] = experiment.parse_json(out)
        return found


def test_results(path):
    """{test: passed, skipped, failed or error} of a pytest XML report."""
    results = {}
    for case in xml.etree.ElementTree.parse(path).iter("testcase"):
        kinds = {child.tag for child in case} & {"skipped", "failure", "error"}
        results[case.get("name")] = kinds.pop() if kinds else "passed"
    return results


def table(report):
    """The report as lines of text."""
    lines = [", ".join(f"{name} {report[name]}" for name in ("device", "gpus", "torch"))]
    for name, found in report["parts"].items():
        lines.append(f"{name:<16} {found['status']:<8} {found['seconds']:5.0f} s")
        for test, result in found.get("tests", {}).items():
            lines.append(f"    {result:<8} {test}")
        bench = found.get("bench", {})
        for row in bench.get("rows", ()):
            lines.append(f"    {row['part']:<6} {row['name']:<17} {row['images_per_second']:8.1f} "
                         f"images/s, {row['fraction_of_peak']:4.0%} of the peak, "
                         f"{row['ratio']:.2f} x, {row['call_gib']:.1f} GiB")
        for images, share in bench.get("sampling_shares", {}).items():
            lines.append(f"    sampling takes {share:.0%} of a full_train on {images} images")
    return "\n".join(lines)


def main(argv=None):
    parser = bare_parser(__doc__)
    parser.add_argument("--json", default="gpu_check.json", help="file for all that was found")
    parser.add_argument("--minutes", type=at_least(0, float), default=8.0,
                        help="begin no part after these, and cut one off then")
    args = parse_bare(parser, argv)
    gpus = torch.cuda.device_count()
    end = time.perf_counter() + 60 * args.minutes
    name = torch.cuda.get_device_name() if gpus else "no GPU: the tests skip, the rest is the CPU's"
    report = {"device": name, "gpus": gpus, "torch": torch.__version__, "parts": {}}
    for part in PARTS:
        left = end - time.perf_counter()
        if part.least_gpus <= max(1, gpus) and left > 0:
            print(f"{part.name}: {part.command}", flush=True)
            report["parts"][part.name] = run(part, left)
            experiment.write_json(args.json, report)
    print(table(report))
    print(f"written: {args.json}")
    if any(found["status"] != "ok" for found in report["parts"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
