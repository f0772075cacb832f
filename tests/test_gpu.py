"""The stages on a GPU, compiled and in bf16. Without a GPU these tests skip.

    python -m pytest tests/test_gpu.py -s
"""
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY_LDM, TINY_VAE
from test_stages import assert_same_run

import experiment

# Asked of a child process: this one must not hold the GPU.
QUESTION = "import torch; raise SystemExit(not torch.cuda.is_available())"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(subprocess.run([sys.executable, "-c", QUESTION], check=False).returncode,
                       reason="no GPU here")]


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    """gpu(SCRIPT, ARGS...) -> standard output; the runs `v` (autoencoder) and `l` are there."""
    root = tmp_path_factory.mktemp("gpu")
    (root / "vae.py").write_text(TINY_VAE + "compile = 'on'\n")
    (root / "ldm.py").write_text(TINY_LDM + "compile = 'on'\n")

    def call(script, *argv):
        common = [] if script == "sample.py" else [f"--output_root={root / 'runs'}"]
        done = subprocess.run([sys.executable, str(ROOT / script), *common, *map(str, argv)],
                              cwd=root, text=True, capture_output=True, timeout=600, check=False)
        assert done.returncode == 0, f"{argv}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    call.root, call.runs = root, root / "runs"
    call.vae = [f"--config={root / 'vae.py'}", "--max_steps=40", "--disc_start=20"]
    call.ldm = [f"--config={root / 'ldm.py'}", "--max_steps=40",
                f"--ae_ckpt_path={root / 'runs/v/ckpts/last.pt'}"]
    call("train_vae.py", *call.vae, "--run_name=v")
    call("find_latent_scale.py", f"--ae_ckpt_path={call.runs / 'v/ckpts/last.pt'}")
    call("train_ldm.py", *call.ldm, "--run_name=l")
    return call


def test_the_stages_run_in_bf16_and_compiled(gpu):
    for name in ("v", "l"):
        meta = experiment.read_meta(gpu.runs / name)
        assert (meta["device"], meta["dtype"]) == ("cuda:0", "bfloat16")
        assert (gpu.runs / name / "summary.json").exists()


@pytest.mark.parametrize("stage, name", [("vae", "v"), ("ldm", "l")])
def test_a_run_in_two_parts_ends_like_one_in_one(gpu, stage, name):
    argv = [*getattr(gpu, stage), f"--run_name=parts_{name}"]
    gpu(f"train_{stage}.py", *argv, "--max_steps=23")
    gpu(f"train_{stage}.py", *argv)
    assert_same_run(gpu.runs / name, gpu.runs / f"parts_{name}", stage)


def test_samples_are_those_of_the_cpu_within_rounding(gpu):
    images = {}
    for device in ("cuda", "cpu"):
        gpu("sample.py", f"--ckpt={gpu.runs / 'l/ckpts/last.pt'}", "--num_samples=4",
            "--num_sampling_steps=20", f"--device={device}", "--dtype=fp32",
            f"--out_dir={gpu.root / device}")
        paths = sorted((gpu.root / device).glob("*_0*.png"))
        images[device] = torch.stack([experiment.load_image(path) for path in paths])
    difference = (images["cuda"] - images["cpu"]).abs()
    print(f"\nCPU and GPU differ by {difference.max():.4f} at most, {difference.mean():.5f} mean")
    assert len(images["cuda"]) == 8 and difference.mean() < 0.01
