"""The stages on a GPU, compiled and in bf16. Without a GPU these tests skip.

    python -m pytest tests/test_gpu.py -s
"""
import subprocess

import pytest
import torch
from conftest import ROOT, TINY_LDM, TINY_VAE, python
from test_stages import FINAL, same
from torch._dynamo.utils import counters

import sample
import train_ldm
from lib import dist
from lib.files import read_meta
from lib.run import load_checkpoint, load_image

GPUS = torch.cuda.device_count()  # this takes no GPU memory in pytest's workers
pytestmark = [pytest.mark.slow, pytest.mark.skipif(GPUS == 0, reason="no GPU here")]


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    """gpu(SCRIPT, ARGS...) runs a stage; the runs `v` (autoencoder) and `l` (LDM) are there."""
    root = tmp_path_factory.mktemp("gpu")
    (root / "vae.py").write_text(TINY_VAE + "compile = 'on'\n")
    (root / "ldm.py").write_text(TINY_LDM + "compile = 'on'\n")

    def call(script, *argv, processes=1):
        done = subprocess.run([*python(processes), str(ROOT / script), *map(str, argv)],
                              cwd=root, text=True, capture_output=True, timeout=600, check=False)
        assert done.returncode == 0, f"{argv}\n{done.stdout}\n{done.stderr}"

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
        meta = read_meta(gpu.runs / name)
        assert (meta["device"], meta["dtype"]) == ("cuda:0", "bfloat16")
        assert (gpu.runs / name / "summary.json").exists()


@pytest.mark.parametrize("stage, name", [("vae", "v"), ("ldm", "l")])
def test_a_resumed_run_ends_like_one_in_one_go(gpu, stage, name):
    argv = [*getattr(gpu, stage), f"--run_name=parts_{name}"]
    gpu(f"train_{stage}.py", *argv, "--max_steps=23")
    gpu(f"train_{stage}.py", *argv)
    one, two = (load_checkpoint(gpu.runs / folder / "ckpts/last.pt", stage)
                for folder in (name, f"parts_{name}"))
    for key in FINAL[:7]:  # the logs differ: the first part has an end of its own
        assert same(one.get(key), two.get(key)), key


def test_samples_equal_those_of_the_cpu_within_rounding(gpu):
    images = {}
    for device in ("cuda", "cpu"):
        gpu("sample.py", f"--ckpt={gpu.runs / 'l/ckpts/last.pt'}", "--num_samples=4",
            "--num_sampling_steps=20", f"--device={device}", "--dtype=fp32",
            f"--out_dir={gpu.root / device}")
        paths = sorted((gpu.root / device).glob("*_0*.png"))
        images[device] = torch.stack([load_image(path) for path in paths])
    difference = (images["cuda"] - images["cpu"]).abs()
    print(f"\nCPU and GPU differ by {difference.max():.4f} at most, {difference.mean():.5f} mean")
    assert len(images["cuda"]) == 8 and difference.mean() < 0.01


@pytest.mark.skipif(GPUS < 2, reason="one GPU")
def test_several_gpus_train_together(gpu):
    gpu("train_vae.py", *gpu.vae, "--run_name=several", processes=GPUS)
    assert (gpu.runs / "several/summary.json").exists()


@pytest.fixture
def small_ldm():
    """(args, DistContext, models, loss_fn, batch) of a small compiled UNet on the GPU."""
    args = train_ldm.parse_args(["--ldm_base_ch=32", "--ldm_num_res_blocks=1",
                                 "--sampler=dpmpp_2m_sde", "--num_sampling_steps=3"])
    ctx = dist.DistContext(0, 1, torch.device("cuda:0"), torch.bfloat16, True)
    shape = (4, 16, 16)
    models = train_ldm.build_models(args, ctx, shape, 2)
    mean = torch.randn(16, *shape, device=ctx.device)
    y = torch.arange(16, device=ctx.device) % 2
    batch = ((mean, mean - 6), y, None)
    return args, ctx, models, train_ldm.wrap(models[0], batch, args, ctx), batch


def test_a_step_waits_for_nothing_and_is_compiled_once(small_ldm):
    args, ctx, models, loss_fn, batch = small_ldm
    means = dist.RunningMeans(ctx, train_ldm.LOSSES)
    counters.clear()
    for step in range(10):
        warm = step >= 2
        torch.cuda.set_sync_debug_mode("error" if warm else "default")
        try:
            with torch._dynamo.config.patch(error_on_recompile=warm):
                means.add(*train_ldm.train_step(*models, loss_fn, batch, 1.0, step, args, ctx))
                ctx.to_device(torch.arange(16))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert not counters["graph_break"]
    assert means.read()["train/bad_steps"] == 0


def test_a_compiled_step_equals_an_eager_one_within_rounding(small_ldm):
    args, ctx, models, loss_fn, batch = small_ldm
    eager = ctx._replace(compile=False)
    other = train_ldm.build_models(args, eager, (4, 16, 16), 2)
    losses = []
    for step in range(30):
        rolled = (batch[0], batch[1].roll(step), None)
        compiled = train_ldm.train_step(*models, loss_fn, rolled, 1.0, step, args, ctx)[0]
        plain = train_ldm.train_step(*other, other[0], rolled, 1.0, step, args, eager)[0]
        losses.append((compiled.mean().item(), plain.mean().item()))
    torch.testing.assert_close(*torch.tensor(losses).T, rtol=0.02, atol=0.02)


def test_compiled_samples_follow_the_weights(small_ldm):
    """Drawn by the averaged network, which is compiled once, while its weights go on changing."""
    args, ctx, (denoiser, ema, _), _, _ = small_ldm
    plain = train_ldm.build_models(args, ctx._replace(compile=False), (4, 16, 16), 2)[1].module
    requests, drawn = [(i % 2, i) for i in range(16)], []
    for step in range(1, 6):
        with torch.no_grad():
            for p in denoiser.parameters():
                p += 0.02 * torch.randn_like(p)
        ema.update(denoiser, 1000 * step)
        plain.load_state_dict(ema.module.state_dict())
        for averaged in (ema.module, plain):
            drawn.append(sample.sample_latents(averaged, (4, 16, 16), requests, "ab", args, ctx))
    for compiled, eager, before in zip(drawn[2::2], drawn[3::2], drawn[::2], strict=False):
        assert (compiled - eager).abs().mean() < 0.1 * (compiled - before).abs().mean()
