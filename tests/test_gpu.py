"""The stages on a GPU, compiled, with CUDA graphs and in bf16.

    python -m pytest tests/test_gpu.py -s

Without a GPU the tests of the stages skip. Those of single steps run on the CPU then, where the
mode that makes CUDA graphs compiles and makes none: all but the graphs themselves.
"""
import subprocess

import pytest
import torch
from conftest import ROOT, TINY_LDM, TINY_VAE, python
from test_stages import FINAL, same
from torch._dynamo.utils import counters

import data
import sample
import train_ldm
from lib import cpu_ops, dist
from lib.files import read_meta
from lib.run import load_checkpoint

GPUS = torch.cuda.device_count()  # this takes no GPU memory in pytest's workers
SHAPE = (4, 16, 16)  # of a latent
DEVICE, DTYPE = ("cuda:0", torch.bfloat16) if GPUS else ("cpu", torch.float32)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    """gpu(SCRIPT, ARGS...) runs a stage; the runs `v` (autoencoder) and `l` (LDM) are there."""
    if not GPUS:
        pytest.skip("no GPU here")
    root = tmp_path_factory.mktemp("gpu")
    (root / "vae.py").write_text(TINY_VAE + "compile = 'graphs'\n")
    (root / "ldm.py").write_text(TINY_LDM + "compile = 'graphs'\n")

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
        images[device] = torch.cat([data.read_image(path) for path in paths])
    difference = (images["cuda"] - images["cpu"]).abs()
    print(f"\nCPU and GPU differ by {difference.max():.4f} at most, {difference.mean():.5f} mean")
    assert len(images["cuda"]) == 8 and difference.mean() < 0.01


@pytest.mark.skipif(GPUS < 2, reason="one GPU")
def test_several_gpus_train_together(gpu):
    gpu("train_vae.py", *gpu.vae, "--run_name=several", processes=GPUS)
    assert (gpu.runs / "several/summary.json").exists()


@pytest.fixture(params=["default", "reduce-overhead"] if GPUS else ["reduce-overhead"])
def small_ldm(request):
    """make(grad_accum=1): (args, DistContext, models, loss_fn, batch) of a small compiled UNet."""
    if not cpu_ops.can_compile():
        pytest.skip("no C++ compiler")

    def make(grad_accum=1):
        args = train_ldm.parse_args([
            "--ldm_base_ch=16", "--ldm_ch_mults=1,2", "--ldm_num_res_blocks=1",
            "--sampler=dpmpp_2m_sde", "--num_sampling_steps=3",
            f"--batch_per_device={16 // grad_accum}", f"--grad_accum={grad_accum}"])
        ctx = dist.DistContext(0, 1, torch.device(DEVICE), DTYPE, request.param)
        models = train_ldm.build_models(args, ctx, SHAPE, 2)
        mean = torch.randn(16, *SHAPE, device=ctx.device)
        batch = ((mean, mean - 6), torch.arange(16, device=ctx.device) % 2, None)
        return args, ctx, models, train_ldm.wrap(models[0], batch, args, ctx), batch
    yield make
    torch.compiler.reset()


def test_a_step_waits_for_nothing_and_is_compiled_once(small_ldm):
    args, ctx, models, loss_fn, batch = small_ldm()
    means = dist.RunningMeans(ctx, train_ldm.LOSSES)
    counters.clear()
    for step in range(10):
        warm = step >= 3  # a graph is recorded by the second step
        if GPUS:
            torch.cuda.set_sync_debug_mode("error" if warm else "default")
        try:
            with torch._dynamo.config.patch(error_on_recompile=warm):
                means.add(*train_ldm.train_step(*models, loss_fn, batch, 1.0, step, args, ctx))
                ctx.to_device(torch.arange(16))
        finally:
            if GPUS:
                torch.cuda.set_sync_debug_mode("default")
    assert not counters["graph_break"]
    assert means.read()["train/bad_steps"] == 0


@pytest.mark.parametrize("grad_accum", [1, 2])
def test_compiled_steps_end_like_eager_ones_within_rounding(small_ldm, grad_accum):
    """Losses, and the weights, which gradients that a graph wrote over would spoil."""
    args, ctx, models, loss_fn, batch = small_ldm(grad_accum)
    eager = ctx._replace(compile="")
    others = train_ldm.build_models(args, eager, SHAPE, 2)
    start = torch.nn.utils.parameters_to_vector(models[0].parameters()).detach()
    for step in range(20):
        rolled = (batch[0], batch[1].roll(step), None)
        got, _ = train_ldm.train_step(*models, loss_fn, rolled, 1.0, step, args, ctx)
        wanted, _ = train_ldm.train_step(*others, others[0], rolled, 1.0, step, args, eager)
        torch.testing.assert_close(torch.stack(got), torch.stack(wanted), rtol=0.02, atol=0.02)
    averaged, wanted = (torch.nn.utils.parameters_to_vector(of[1].module.parameters())
                        for of in (models, others))
    # 1.2 if a micro-batch writes over the gradients of the one before; 0.05 between bf16 and fp32.
    assert (averaged - wanted).norm() < 0.3 * (wanted - start).norm()


def test_compiled_samples_follow_the_weights(small_ldm):
    """Drawn by the averaged network, which is compiled once, while its weights go on changing."""
    args, ctx, (denoiser, ema, _), _, _ = small_ldm()
    plain = train_ldm.build_models(args, ctx._replace(compile=""), SHAPE, 2)[1].module
    if not GPUS:  # build_models compiles it on GPUs alone
        ema.module.unet.compile(mode=ctx.compile)
    requests, drawn = [(i % 2, i) for i in range(16)], []
    for step in range(1, 6):
        with torch.no_grad():
            for p in denoiser.parameters():
                p += 0.02 * torch.randn_like(p)
        ema.update(denoiser, 1000 * step)
        plain.load_state_dict(ema.module.state_dict())
        for averaged in (ema.module, plain):
            drawn.append(sample.sample_latents(averaged, SHAPE, requests, "ab", args, ctx))
    for compiled, eager, before in zip(drawn[2::2], drawn[3::2], drawn[::2], strict=False):
        assert (compiled - eager).abs().mean() < 0.1 * (compiled - before).abs().mean()
