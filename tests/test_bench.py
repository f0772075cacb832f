"""dev/bench.py: that it times in turn, counts the right work on both sides, and reports it."""
import importlib.util
import json
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

import train_ldm
import train_vae
from dev import bench
from lib import dist
from lib.args import parse_settings

TINY = ("--latent_size=8", "--base_ch=8", "--batch=2", "--repeats=2", "--img_size=32",
        "--vae_base_ch=8", "--vae_batch=2", "--sampling_steps=3", "--device=cpu")
PROCS = dist.DistContext(0, 1, torch.device("cpu"), torch.float32, False)


@pytest.fixture
def args():
    return parse_settings(bench.build_parser(), [*TINY, "--peer"])


@pytest.fixture
def peer():
    if importlib.util.find_spec("diffusers") is None:
        pytest.skip("diffusers is not installed")


@pytest.fixture
def clock(monkeypatch):
    """clock([...]): what bench.clock says, in turn, of the candidate of 8e8 FLOPs and of tasks."""
    def clock(seconds):
        values = iter(seconds)
        monkeypatch.setattr(bench, "clock", lambda function, device: next(values))
    monkeypatch.setattr(bench, "peak_candidates", lambda *_: [(None, 8e8)])
    monkeypatch.setattr(bench, "count_flops", lambda function: 18e9)
    return clock


@pytest.fixture
def kept(monkeypatch):
    """Models that the trainers built, in order."""
    models = []
    for stage in (train_ldm, train_vae):
        def build(*args, original=stage.build_models):
            models.append(original(*args))
            return models[-1]
        monkeypatch.setattr(stage, "build_models", build)
    return models


def parameters(net):
    return sum(p.numel() for p in net.parameters())


# --- measuring ----------------------------------------------------------------------------------


def test_tasks_take_turns(monkeypatch):
    called = []
    product = torch.randn(8, 8)
    monkeypatch.setattr(bench, "peak_candidates", lambda *_: [
        (lambda: called.append("peak"), 2 * 8**3)])
    monkeypatch.setattr(bench, "count_flops", lambda function: 1)
    tasks = [(name, torch.float32, lambda name=name: called.append(name) or product @ product)
             for name in "ab"]
    bench.measure("part", 4, tasks, 3, PROCS.device, warmup=1)
    assert called == ["peak"] * 3 + ["a", "b"] + (["peak"] * 3 + ["a", "b"]) * 3


def test_numbers_of_a_row(clock):
    """Only timed rounds count, and ratios are taken in the round."""
    peak = [0.4] * 3
    clock([*peak, 99, 1, *peak, 1, 2, *peak, 10, 30, *peak, 2, 8])
    tasks = [("a", torch.float32, None), ("b", torch.float32, None)]
    a, b = bench.measure("part", 4, tasks, 3, PROCS.device, warmup=1)
    assert (a["part"], a["name"], b["name"]) == ("part", "a", "b")
    assert a["seconds"] == [1, 10, 2] and b["seconds"] == [2, 30, 8]
    assert (b["median"], b["min"], b["max"]) == (8, 2, 30)
    assert a["ratio"] == 1 and b["ratio"] == 3  # the median of 2, 3, 4; that of medians is 4
    assert b["images_per_second"] == 0.5 and b["gflop_per_image"] == 4.5
    assert b["peak_gflops"] == 2 and b["fraction_of_peak"] == 18 / 8 / 2


def test_peak_is_the_best_of_all_rounds_in_the_same_precision(clock):
    clock([0.4, 0.1, 0.4, *[0.8] * 3, 9, 9,  # float32 and bf16 before either task
           0.4, 0.4, 0.4, 0.8, 0.8, 0.2, 9, 9])
    tasks = [("a", torch.float32, None), ("b", torch.bfloat16, None)]
    a, b = bench.measure("part", 1, tasks, 1, PROCS.device, warmup=1)
    assert a["peak_gflops"] == 8 and a["fraction_of_peak"] == 0.25
    assert b["peak_gflops"] == 4 and b["fraction_of_peak"] == 0.5


def test_flops_of_the_peak_are_those_that_run():
    for function, flops in bench.peak_candidates(PROCS.device, torch.float32):
        assert bench.count_flops(function) == flops


def test_flops_of_a_convolution_and_its_backward():
    conv = torch.nn.Conv2d(3, 5, 3, padding=1)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    forward = 2 * 2 * 8 * 8 * 5 * 3 * 9  # two per multiply-add
    assert bench.count_flops(lambda: conv(x)) == forward
    assert bench.count_flops(lambda: conv(x).sum().backward()) == 3 * forward


def test_flops_of_attention_and_of_compiled_code_are_counted():
    q = torch.randn(2, 3, 16, 8)
    products = 2 * (2 * 2 * 3 * 16 * 16 * 8)  # q k^T and the sum over v
    assert bench.count_flops(lambda: F.scaled_dot_product_attention(q, q, q)) == products
    a = torch.randn(16, 16)
    compiled = torch.compile(torch.nn.Linear(16, 16, bias=False), backend="eager")
    compiled(a)
    with warnings.catch_warnings(action="error"):
        assert bench.count_flops(lambda: compiled(a)) == 2 * 16**3


# --- the work -----------------------------------------------------------------------------------


def test_steps_are_those_of_the_trainers(args, monkeypatch):
    """Numbered from 0, with the trainers' own settings."""
    called = []
    for stage in (train_ldm, train_vae):
        def step(*arguments, stage=stage, original=stage.train_step):
            called.append((stage, *arguments[-3:]))
            return original(*arguments)
        monkeypatch.setattr(stage, "train_step", step)
    for run in (bench.own_ldm_step(args, PROCS), bench.own_vae_step(args, PROCS)):
        run()
        run()
    assert [(stage, step) for stage, step, _, _ in called] == [
        (train_ldm, 0), (train_ldm, 1), (train_vae, 0), (train_vae, 1)]
    ldm, vae = called[0][2], called[2][2]
    assert (ldm.ldm_base_ch, ldm.batch_per_device) == (8, 2)
    assert (vae.base_ch, vae.batch_per_device, vae.img_size) == (8, 2, 32)


def forward_flops(args):
    """FLOPs of one evaluation of our UNet on a batch."""
    settings, shape = bench.ldm_settings(args)
    denoiser, _, _ = train_ldm.build_models(settings, PROCS, shape, 2)
    mean, _, y = bench.random_latents(args, PROCS.device)
    with torch.no_grad():
        return bench.count_flops(lambda: denoiser.unet(mean, torch.zeros(len(y)), y))


def test_sampling_evaluates_once_per_step(args):
    """No guidance, which would double it, and as many steps as --sampling_steps says."""
    forward = forward_flops(args)
    assert bench.count_flops(bench.own_sampling(args, PROCS)) == 3 * forward > 0


def saved_by_upsampling(channels, size):
    """FLOPs of 2 images that model.Upsample saves in a forward pass: 4 products per output
    instead of 9."""
    return 2 * 2 * channels**2 * (2 * size) ** 2 * (9 - 4)


@pytest.mark.parametrize("tuned", [False, True])
def test_peer_does_the_same_work(args, peer, kept, tuned):
    args.latent_size = 16  # attention at the first level and in the middle
    ours = bench.count_flops(bench.own_ldm_step(args, PROCS))
    assert parameters(bench.peer_unet(args, PROCS, tuned)) == parameters(kept[0][0])
    theirs = bench.count_flops(bench.peer_ldm_step(args, PROCS, tuned))
    saved = saved_by_upsampling(32, 4) + saved_by_upsampling(16, 8)
    logged = 2 * 2 * 4  # LossMeans sorts two losses into four quarters by a product
    assert theirs - ours == 3 * saved - logged  # backward is twice the forward
    ours = bench.count_flops(bench.own_sampling(args, PROCS))
    assert bench.count_flops(bench.peer_sampling(args, PROCS, tuned)) - ours == 3 * saved


@pytest.mark.parametrize("tuned", [False, True])
def test_peer_autoencoder_does_the_same_work(args, peer, kept, tuned, monkeypatch):
    ours = bench.count_flops(bench.own_vae_step(args, PROCS))
    nets = []

    def lay_out(*args, original=bench.lay_out):
        nets.append(original(*args))
        return nets[0]
    monkeypatch.setattr(bench, "lay_out", lay_out)
    run = bench.peer_vae_step(args, PROCS, tuned)
    assert parameters(nets[0]) == parameters(kept[0].vae)
    before = [p.clone() for p in nets[0].parameters()]
    theirs = bench.count_flops(run)
    vae = bench.vae_settings(args, PROCS)[0]
    size = vae.img_size // 2 ** (len(vae.ch_mults) - 1)
    widths = [vae.base_ch * mult for mult in reversed(vae.ch_mults)]
    saved = sum(saved_by_upsampling(ch, size << i) for i, ch in enumerate(widths[:-1]))
    assert theirs - ours == 3 * saved
    assert not any(torch.equal(a, b) for a, b in zip(before, nets[0].parameters(), strict=True))


# --- the program --------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "precision"), [
    ("fp32", "torch.float32"), ("auto", "torch.")])
def test_report(quick, tmp_path, dtype, precision):
    path = tmp_path / "bench.json"
    done = quick("dev/bench.py", *TINY, "--vae_batch=1", f"--dtype={dtype}", f"--json={path}")
    assert done.code == 0, done.err
    report = json.loads(path.read_text())
    facts, rows = report["facts"], report["rows"]
    assert facts["precision"].startswith(precision) and f"--dtype={dtype}" in facts["precision"]
    assert facts["compile"] is False and report["args"]["vae_base_ch"] == 8
    first, *lines = done.out.strip().splitlines()
    assert all(str(value) in first for value in facts.values())
    assert [r["part"] for r in rows] == ["train", "vae", "sample"] and len(lines) == 3
    for line, r in zip(lines, rows, strict=True):
        assert line.startswith(r["part"]) and r["name"] in line
        assert len(r["seconds"]) == 2 and min(r["seconds"]) > 0
        images = 1 if r["part"] == "vae" else 2
        assert r["images_per_second"] == pytest.approx(images / r["median"])
        assert r["fraction_of_peak"] == pytest.approx(
            r["gflop_per_image"] * r["images_per_second"] / r["peak_gflops"])
        assert r["ratio"] == 1 and 0 < r["fraction_of_peak"] < 1


def test_only_some_parts_and_threads(capsys):
    threads = torch.get_num_threads()
    try:
        bench.main([*TINY, "--only=sample,train", "--dtype=fp32", "--repeats=1", "--threads=2"])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    first, *lines = capsys.readouterr().out.splitlines()
    assert "2 threads" in first and [line.split()[0] for line in lines] == ["sample", "train"]


def test_peer_without_diffusers_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit, match="pip install diffusers"):
        bench.main([*TINY, "--peer"])


@pytest.mark.parametrize(("flags", "message"), [
    (["--only=train,sapmle"], "sapmle"),
    (["--only="], "give some of"),
    (["--sampling_steps=20,500"], "not an integer"),
    (["--latent_size=0"], "at least 1"),
    (["--only=train", "--latent_size=6"], "cannot be halved"),
    (["--only=vae", "--img_size=33"], "multiple of 8"),
])
def test_bad_arguments(flags, message):
    with pytest.raises(SystemExit, match=message):
        bench.main([*TINY, *flags])
