"""dev/bench.py: it times in turn, counts the same work on both sides, and reports it."""
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

TINY = ("--latent_size=8", "--base_ch=8", "--batch=2", "--repeats=2", "--img_size=32",
        "--vae_base_ch=8", "--vae_batch=1", "--sampling_steps=3", "--device=cpu")
CTX = dist.DistContext(0, 1, torch.device("cpu"), torch.float32, False)


@pytest.fixture
def args(monkeypatch):
    """Settings of a tiny benchmark."""
    kept = []
    monkeypatch.setattr(bench, "candidates_of", lambda part, args, ctx: kept.append(args) or [])
    monkeypatch.setattr(bench, "measure", lambda *args: [])
    bench.main([*TINY, "--only=train", "--dtype=fp32"])
    monkeypatch.undo()
    return kept[0]


@pytest.fixture
def peer():
    if importlib.util.find_spec("diffusers") is None:
        pytest.skip("diffusers is not installed")


@pytest.fixture
def built(monkeypatch):
    """Networks that were built, in order: ours by the trainers, and those of the peer."""
    networks = []

    def keep(owner, name, network):
        original = getattr(owner, name)

        def build(*args):
            result = original(*args)
            networks.append(network(result))
            return result
        monkeypatch.setattr(owner, name, build)

    keep(train_ldm, "build_models", lambda models: models[0])
    keep(train_vae, "build_models", lambda models: models.vae)
    keep(bench, "place_peer", lambda net: net)
    return networks


# --- measuring ----------------------------------------------------------------------------------


def test_candidates_take_turns(monkeypatch):
    called = []
    monkeypatch.setattr(bench, "peak_rate", lambda *_: called.append("peak") or 1.0)
    monkeypatch.setattr(bench, "count_flops", lambda function: 1)
    candidates = [(name, torch.float32, lambda name=name: called.append(name)) for name in "ab"]
    bench.measure("part", 4, candidates, 3, CTX.device, warmup=1)
    assert called == ["peak", "a", "b"] * 4


def test_a_row_has_medians_ratios_and_the_best_peak(monkeypatch):
    """The warm-up does not count; ratios are taken within each round."""
    seconds = iter([99, 1, 1, 2, 10, 30, 2, 8])
    peaks = iter([1e9, 2e9, 0.5e9, 1e9])
    monkeypatch.setattr(bench, "clock", lambda function, device: next(seconds))
    monkeypatch.setattr(bench, "peak_rate", lambda *_: next(peaks))
    monkeypatch.setattr(bench, "count_flops", lambda function: 18e9)
    candidates = [(name, torch.float32, None) for name in "ab"]
    a, b = bench.measure("part", 4, candidates, 3, CTX.device, warmup=1)
    assert (a["part"], a["name"], b["name"]) == ("part", "a", "b")
    assert a["seconds"] == [1, 10, 2] and b["seconds"] == [2, 30, 8] and b["median"] == 8
    assert a["ratio"] == 1 and b["ratio"] == 3  # the median of 2, 3, 4; that of medians is 4
    assert b["images_per_second"] == 0.5 and b["gflop_per_image"] == 4.5
    assert b["peak_gflops"] == 2 and b["fraction_of_peak"] == 18 / 8 / 2


def test_flops_of_forward_and_backward_are_counted():
    conv = torch.nn.Conv2d(3, 5, 3, padding=1)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    forward = 2 * 2 * 8 * 8 * 5 * 3 * 9  # two per multiply-add
    assert bench.count_flops(lambda: conv(x)) == forward
    assert bench.count_flops(lambda: conv(x).sum().backward()) == 3 * forward
    q = torch.randn(2, 3, 16, 8)
    products = 2 * (2 * 2 * 3 * 16 * 16 * 8)  # q k^T and the sum over v
    assert bench.count_flops(lambda: F.scaled_dot_product_attention(q, q, q)) == products
    compiled = torch.compile(torch.nn.Linear(16, 16, bias=False), backend="eager")
    a = torch.randn(16, 16)
    compiled(a)
    with warnings.catch_warnings(action="error"):
        assert bench.count_flops(lambda: compiled(a)) == 2 * 16**3


# --- the work -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part, tuned", [
    ("train", None), ("train", False), ("train", True),
    ("vae", None), ("vae", False), ("vae", True)])
def test_each_step_trains_all_weights(args, built, request, part, tuned, dtype):
    ours, theirs = bench.PARTS[part]
    ctx = CTX._replace(dtype=dtype)
    if tuned is None:
        run = ours(args, ctx)
    else:
        request.getfixturevalue("peer")
        run = theirs(args, ctx, tuned)
    parameters = list(built[-1].parameters())
    before = [p.clone() for p in parameters]
    for _ in range(3):
        run()
    assert not any(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert all(p.grad is None and p.dtype == torch.float32 for p in parameters)


def test_sampling_evaluates_once_per_step(args, built):
    """Without guidance, which would double it."""
    run = bench.our_sampling(args, CTX)
    batch = bench.ldm_problem(args, CTX)[2]
    with torch.no_grad():
        forward = bench.count_flops(
            lambda: built[0].unet(batch.posterior[0], torch.zeros(2), batch.y))
    assert bench.count_flops(run) == 3 * forward > 0


def saved_by_upsampling(images, channels, size):
    """FLOPs that model.Upsample saves in a forward pass: 4 products per output instead of 9."""
    return 2 * images * channels**2 * (2 * size) ** 2 * (9 - 4)


@pytest.mark.parametrize("tuned", [False, True])
def test_the_peer_does_the_same_work(args, built, peer, tuned):
    args.latent_size = 16  # attention at the first level and in the middle
    work = {}
    for part, (ours, theirs) in bench.PARTS.items():
        runs = ours(args, CTX), theirs(args, CTX, tuned)
        sizes = [sum(p.numel() for p in net.parameters()) for net in built[-2:]]
        assert sizes[0] == sizes[1]
        our_flops, their_flops = map(bench.count_flops, runs)
        work[part] = their_flops - our_flops
    saved = saved_by_upsampling(2, 32, 4) + saved_by_upsampling(2, 16, 8)
    logged = 2 * 2 * 4  # LossMeans sorts two losses into four quarters by a product
    assert work["train"] == 3 * saved - logged  # backward is twice the forward
    assert work["sample"] == 3 * saved  # steps
    settings = bench.vae_problem(args, CTX)[0]
    size = settings.img_size // 2 ** (len(settings.ch_mults) - 1)
    widths = [settings.base_ch * mult for mult in reversed(settings.ch_mults)]
    assert work["vae"] == 3 * sum(saved_by_upsampling(1, width, size << i)
                                  for i, width in enumerate(widths[:-1]))


def test_the_peer_runs_as_its_script_and_tuned(args, monkeypatch):
    monkeypatch.setitem(bench.PARTS, "train", (lambda args, ctx: ctx.compile,
                                               lambda args, ctx, tuned: (ctx.compile, tuned)))
    ctx = CTX._replace(dtype=torch.bfloat16, compile=True)
    assert bench.candidates_of("train", args, ctx) == [("ours", torch.bfloat16, True)]
    args.peer = True
    assert bench.candidates_of("train", args, ctx)[1:] == [
        ("diffusers, script", torch.float32, (False, False)),
        ("diffusers, tuned", torch.bfloat16, (True, True))]


# --- the program --------------------------------------------------------------------------------


def test_report(capsys, tmp_path):
    path = tmp_path / "bench.json"
    bench.main([*TINY, "--dtype=bf16", "--threads=1", f"--json={path}"])
    report = json.loads(path.read_text())
    facts, rows = report["facts"], report["rows"]
    assert (facts["dtype"], facts["compile"], facts["threads"]) == ("torch.bfloat16", False, 1)
    assert [row["part"] for row in rows] == ["train", "vae", "sample"]
    lines = [line for line in capsys.readouterr().out.splitlines() if "images/s" in line]
    for line, row in zip(lines, rows, strict=True):
        assert line.startswith(row["part"]) and len(row["seconds"]) == 2 and row["ratio"] == 1
        assert row["fraction_of_peak"] == pytest.approx(
            row["gflop_per_image"] * row["images_per_second"] / row["peak_gflops"])


@pytest.mark.parametrize("flags, message", [
    (["--only=train,sapmle"], "sapmle"),
    (["--latent_size=0"], "at least 1"),
    (["--only=train", "--latent_size=6"], "cannot be halved"),
    (["--only=vae", "--img_size=33"], "multiple of 8"),
    (["--peer"], "pip install diffusers"),
])
def test_bad_arguments_are_refused(monkeypatch, flags, message):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit, match=message):
        bench.main([*TINY, *flags])
