"""Peak memory of training does not grow with the data set or with the number of steps."""
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY_LDM, TINY_VAE, run
from PIL import Image

pytestmark = pytest.mark.slow

# VmHWM starts at zero with the new program; ru_maxrss of a child starts at what its parent held.
MEASURED = """
import re, runpy, sys
sys.path.insert(0, sys.argv[1])
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
status = open("/proc/self/status").read()
print("PEAK", re.search("VmHWM:\\\\s*(\\\\d+) kB", status).group(1))
"""

SIDE, SMALL, LARGE = 32, 200, 20_000
PIXELS = LARGE * SIDE * SIDE * 2 / 1e6  # MB of the large set as uint16
LATENTS = LARGE * 2 * 2 * (SIDE // 4) ** 2 * 4 / 1e6  # MB of its means and log-variances


@pytest.fixture(scope="module")
def image_sets(tmp_path_factory):
    """Data roots of SMALL distinct images and of LARGE names for them, half in either class."""
    root = tmp_path_factory.mktemp("memory")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("normal", "tb"):
            for count in (SMALL, LARGE):
                (root / f"{count}/TB/{split}/{name}").mkdir(parents=True)
            for i in range(SMALL // 2 if split == "train" else 4):
                pixels = rng.integers(0, 256, (SIDE // 2, SIDE // 2), dtype=np.uint8)
                first = root / f"{SMALL}/TB/{split}/{name}/{i:03d}.png"
                Image.fromarray(pixels).resize((SIDE, SIDE)).save(first)
                for k in range(LARGE // SMALL if split == "train" else 1):
                    os.link(first, root / f"{LARGE}/TB/{split}/{name}/{i:03d}_{k:03d}.png")
    (root / "vae.py").write_text(TINY_VAE)
    (root / "ldm.py").write_text(TINY_LDM)
    common = [f"--data_root={root / str(SMALL)}", f"--output_root={root / 'runs'}"]
    run("train_vae.py", *common, f"--config={root / 'vae.py'}", "--run_name=v", "--max_steps=5")
    run("find_latent_scale.py", *common, f"--ae_ckpt_path={root / 'runs/v/ckpts/last.pt'}")
    return root


def peak(root, out, script, count, steps):
    """Peak resident memory in MB of a whole run with its own output folder, and so caches."""
    own = {"train_vae.py": [f"--config={root / 'vae.py'}", f"--disc_start={steps - 10}"],
           "train_ldm.py": [f"--config={root / 'ldm.py'}", "--sample_every=1000000",
                            f"--ae_ckpt_path={root / 'runs/v/ckpts/last.pt'}"]}[script]
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, str(ROOT), str(ROOT / script),
         f"--data_root={root / str(count)}", f"--output_root={out}", *own,
         f"--max_steps={steps}", "--batch_per_device=2", "--log_every=50"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
        timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    assert f"step {steps} " in result.stdout and (out / "cache").exists()
    return int(re.search(r"^PEAK (\d+)$", result.stdout, re.M).group(1)) / 1024


@pytest.mark.parametrize("script", ["train_vae.py", "train_ldm.py"])
def test_peak_memory_depends_neither_on_images_nor_on_steps(image_sets, tmp_path, script):
    cases = [(SMALL, 100), (LARGE, 100), (SMALL, 2000)]
    base, many_images, many_steps = (
        peak(image_sets, tmp_path / f"{count}_{steps}", script, count, steps)
        for count, steps in cases)
    print(f"\n{script}: peak memory {base:.0f} MB with {SMALL} images and 100 steps, "
          f"{many_images:.0f} MB with {LARGE} images, {many_steps:.0f} MB with 2000 steps; "
          f"the large set holds {PIXELS:.0f} MB of pixels, {LATENTS:.0f} MB of latents")
    assert many_images - base < 0.3 * PIXELS
    assert many_steps - base < 20
