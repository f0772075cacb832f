"""What a start opens with 20,000 and 200,000 images, on one process and on two, and how memory
grows with images and with steps."""
import json
import os
import re
import subprocess

import numpy as np
import pytest
from conftest import ROOT, TINY_LDM, TINY_VAE, python, run
from PIL import Image

pytestmark = pytest.mark.slow

SIDE, SMALL, LARGE = 16, 20_000, 200_000
FILES = 100  # that all names are links to

# Runs a stage and writes what it opened below the data root and in the cache, and its peak memory:
# VmHWM starts at zero with the new program, ru_maxrss of a child at what its parent held.
WATCHED = """
import atexit, json, os, re, runpy, sys
root, out = sys.argv[1:3]
sys.argv = sys.argv[3:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
opened = {"images": [], "pixels": []}  # appending is safe in threads, += is not
def watch(event, args):
    if event == "open" and isinstance(args[0], str):
        if args[0].startswith(root) and args[0].endswith(".png"):
            opened["images"].append(1)
        if "/cache/images_" in args[0] and args[0].endswith(".npy"):
            opened["pixels"].append(1)
sys.addaudithook(watch)
runpy.run_path(sys.argv[0], run_name="__main__")
peak = re.search("VmHWM:\\\\s*(\\\\d+) kB", open("/proc/self/status").read()).group(1)
with open(out + os.environ.get("RANK", "0"), "w") as f:
    counts = {what: len(times) for what, times in opened.items()}
    json.dump(counts | {"peak_mb": int(peak) / 1024}, f)
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """Data roots of SMALL and of LARGE images in two classes, and a run `v` of an autoencoder."""
    root = tmp_path_factory.mktemp("big")
    rng = np.random.default_rng(0)
    (root / "files").mkdir()
    for i in range(FILES):
        pixels = rng.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"files/{i}.png")
    for count in (SMALL, LARGE):
        for name in ("normal", "tb"):
            folder = root / str(count) / "TB/train" / name
            folder.mkdir(parents=True)
            for i in range(count // 2):
                os.link(root / f"files/{i % FILES}.png", folder / f"{i:06d}.png")
    (root / "watched.py").write_text(WATCHED)
    (root / "vae.py").write_text(
        TINY_VAE.replace("img_size = 32", f"img_size = {SIDE}") + "disc_weight = 0.0\n")
    (root / "ldm.py").write_text(TINY_LDM + "sample_batch_size = 2\nnum_sampling_steps = 1\n")
    run("train_vae.py", f"--output_root={root / 'runs'}", f"--data_root={root / str(SMALL)}",
        f"--config={root / 'vae.py'}", "--run_name=v", "--max_steps=2")
    (root / "runs/v/latent_scale.json").unlink(missing_ok=True)
    return root


def start(big, out, kind, count, *more, processes=1):
    """[what each rank opened, and its peak memory] of a run with its caches below `out`."""
    data_root, seen = big / str(count), out / f"seen_{len(list(out.glob('seen_*')))}_"
    ae = [f"--ae_ckpt_path={big / 'runs/v/ckpts/last.pt'}", "--latent_scale_factor=1.0"]
    done = subprocess.run(
        [*python(processes), str(big / "watched.py"), str(data_root), str(seen),
         str(ROOT / f"train_{kind}.py"), f"--data_root={data_root}", f"--output_root={out}",
         f"--config={big / kind}.py", *(ae if kind == "ldm" else []), "--device=cpu", *more],
        cwd=out, text=True, capture_output=True, timeout=1500, check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert re.search(rf"images\s+{count}\n", done.stdout)
    return [json.loads(path.read_text()) for path in sorted(out.glob(f"{seen.name}*"))]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_start_costs_little_per_image(big, tmp_path, processes):
    peaks = {}
    for count in (SMALL, LARGE):
        out = tmp_path / str(count)
        out.mkdir()
        built, found = (start(big, out, "ldm", count, "--max_steps=1", processes=processes)
                        for _ in range(2))
        # All are decoded once, by all processes together. The second start opens none of them; of
        # their pixels it reads the header, and the 32 that samples are compared with; rank 0 shows
        # eight of each class in the end. NumPy opens a file twice for each map.
        assert sum(rank["images"] for rank in built) == count
        assert min(rank["images"] for rank in built) > 0.4 * count / processes
        assert all(rank["images"] == 0 for rank in found)
        assert all(rank["pixels"] <= 8 for rank in found)
        peaks[count] = [max(rank["peak_mb"] for rank in ranks) for ranks in (built, found)]
    # What grows is the list of names, whatever the size of the images.
    for small, large in zip(peaks[SMALL], peaks[LARGE], strict=True):
        assert large - small < 1000 * (LARGE - SMALL) / 2**20


@pytest.mark.parametrize("kind", ["vae", "ldm"])
def test_memory_does_not_grow_with_steps(big, tmp_path, kind):
    few, many = (
        start(big, tmp_path, kind, SMALL, f"--max_steps={steps}", "--batch_per_device=2",
              "--sample_every=1000000", "--log_every=50")[0]["peak_mb"] for steps in (100, 2000))
    assert many - few < 20
