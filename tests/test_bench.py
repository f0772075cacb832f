"""bench.py: that it times in turn, counts the right work on both sides, and reports it."""
import importlib.util
import json
import sys
import time

import pytest
import torch
import torch.nn.functional as F

import bench
import experiment
import train_ldm
import train_vae
from args import parse_settings

TINY = ("--latent_size=8", "--base_ch=8", "--batch=2", "--repeats=2", "--img_size=32",
        "--vae_base_ch=8", "--vae_batch=2", "--sampling_steps=2,5", "--device=cpu")
PROCS = experiment.Processes(0, 1, torch.device("cpu"), torch.float32, False)


@pytest.fixture
def args():
    return parse_settings(bench.build_parser(), [*TINY, "--peer"])


@pytest.fixture
def peer():
    if importlib.util.find_spec("diffusers") is None:
        pytest.skip("diffusers is not installed")
    return bench.PeerVariant("peer", PROCS, torch.contiguous_format)


@pytest.fixture
def small_peak(monkeypatch):
    """The peak of a small product, so that a round takes no time."""
    a = torch.randn(8, 8)
    monkeypatch.setattr(bench, "peak_candidates", lambda *_: [(lambda: a @ a, 2 * 8**3)])


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


def test_tasks_take_turns_and_only_timed_rounds_count(small_peak):
    called = []

    def run(name):
        called.append(name)
        time.sleep(0.01 if name == "b" else 0)
    tasks = [bench.Task(name, torch.float32, 4, lambda name=name: run(name), flops=100)
             for name in "ab"]
    a, b = bench.measure("part", tasks, repeats=3, device=PROCS.device, warmup=1)
    assert called == ["a", "b"] * 4
    assert (a.part, a.name, b.name) == ("part", "a", "b")
    assert len(a.seconds) == len(b.seconds) == 3 and min(b.seconds) >= 0.01
    assert a.ratio == 1 and b.ratio > 1


def test_numbers_of_a_row():
    task = bench.Task("b", torch.float32, images=4, run=None, flops=8 * 10**9)
    row = bench.make_row("part", task, [2.0, 30.0, 8.0], [1.0, 10.0, 2.0], peak=4e9)
    assert row.ratio == 3.0  # the median of 2, 3, 4; the medians' ratio is 4
    assert row.median == 8.0 and row.images_per_second == 0.5 and row.gflop_per_image == 2.0
    assert row.peak_gflops == 4.0 and row.fraction_of_peak == 0.25


def test_peak_is_the_best_of_all_rounds(monkeypatch):
    seconds = iter([0.4, 0.4, 9.0, 0.4, 0.1, 9.0, 0.4, 0.4, 9.0])
    monkeypatch.setattr(bench, "peak_candidates", lambda *_: [(None, 8e8)])
    monkeypatch.setattr(bench, "clock", lambda function, device: next(seconds))
    task = bench.Task("a", torch.float32, images=1, run=None, flops=18e9)
    row, = bench.measure("part", [task], repeats=2, device=PROCS.device, warmup=1)
    assert row.peak_gflops == 8.0 and row.seconds == [9.0, 9.0] and row.fraction_of_peak == 0.25


def test_peak_does_not_wait_for_emulated_products(monkeypatch):
    called = []

    def clock(function, device):
        called.append(function)
        return 0.5
    monkeypatch.setattr(bench, "clock", clock)
    assert bench.update_peak(0.0, [("small", 1e6), ("large", 1e9)], PROCS.device) == 2e6
    assert called == ["small", "small"]


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
    compiled = torch.compile(lambda x: x @ x, backend="eager")
    compiled(a)
    assert bench.count_flops(lambda: compiled(a)) == 2 * 16**3


# --- the work -----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["train", "vae"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_step_trains(args, kept, part, dtype):
    procs = PROCS._replace(dtype=dtype)
    if part == "train":
        task = bench.own_ldm_step(args, procs, 8)
        net = kept[0][0]
    else:
        task = bench.own_vae_step(args, procs)
        net = kept[0].vae
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for _ in range(3):
        task.run()
    still = [k for k, v in net.state_dict().items() if torch.equal(v, before[k])]
    assert not still and all(p.grad is None for p in net.parameters())
    assert task.dtype == dtype and task.images == 2


def test_steps_are_those_of_the_trainers(args, monkeypatch):
    """Numbered from 0 (counting FLOPs is the first), with the trainers' own settings."""
    called = []
    for stage in (train_ldm, train_vae):
        def step(*arguments, stage=stage, original=stage.train_step):
            called.append((stage, *arguments[-3:]))
            return original(*arguments)
        monkeypatch.setattr(stage, "train_step", step)
    bench.own_ldm_step(args, PROCS, 8).run()
    bench.own_vae_step(args, PROCS).run()
    assert [(stage, step) for stage, step, _, _ in called] == [
        (train_ldm, 0), (train_ldm, 1), (train_vae, 0), (train_vae, 1)]
    ldm, vae = called[0][2], called[2][2]
    assert (ldm.ldm_base_ch, ldm.batch_per_device) == (8, 2)
    assert (vae.base_ch, vae.batch_per_device, vae.img_size) == (8, 2, 32)


def test_variants_of_ours():
    compiled = PROCS._replace(compile=True)
    assert bench.own_variants(PROCS) == [PROCS]
    assert bench.own_variants(compiled) == [compiled, PROCS]
    assert [bench.own_name(p) for p in (compiled, PROCS)] == ["ours, compiled", "ours, eager"]


def test_sampling_counts_all_evaluations(args, peer):
    tasks = [bench.own_sampling(args, PROCS, 8, 5, sampler) for sampler in ("dpmpp", "ancestral")]
    tasks.append(bench.peer_sampling(args, peer, 8, 5))
    for task in tasks:
        assert bench.count_flops(task.run) == task.flops > 0
    assert tasks[0].flops == tasks[1].flops


def saved_by_upsampling(channels, size):
    """FLOPs of 2 images that model.Upsample saves in a forward pass: 4 products per output
    instead of 9."""
    return 2 * 2 * channels**2 * (2 * size) ** 2 * (9 - 4)


def test_peer_does_the_same_work_as_the_unet(args, peer, kept):
    ours = bench.own_ldm_step(args, PROCS, 16)  # attention at the first level and in the middle
    assert parameters(bench.peer_unet(args, peer, 16)) == parameters(kept[0][0])
    theirs = bench.peer_ldm_step(args, peer, 16)
    saved = saved_by_upsampling(32, 4) + saved_by_upsampling(16, 8)
    logged = 2 * 2 * 4  # LossMeans sorts two losses into four quarters by a product
    assert theirs.flops - ours.flops == 3 * saved - logged  # backward is twice the forward
    ours = bench.own_sampling(args, PROCS, 16, 2)
    assert bench.peer_sampling(args, peer, 16, 2).flops - ours.flops == 2 * saved


def test_peer_does_the_same_work_as_the_autoencoder(args, peer):
    ours, theirs = bench.own_vae_step(args, PROCS), bench.peer_vae_step(args, peer)
    quant = 2 * 2 * 4 * 4 * (8 * 8 + 4 * 4)  # its two 1x1 convolutions on the latent
    saved = sum(saved_by_upsampling(c, s) for c, s in ((32, 4), (32, 8), (16, 16)))
    assert theirs.flops - ours.flops == 3 * (quant + saved)


def test_peer_trains(args, peer, monkeypatch):
    nets = []

    def step(net, *rest, original=bench.peer_step):
        nets.append(net)
        return original(net, *rest)
    monkeypatch.setattr(bench, "peer_step", step)
    for task in (bench.peer_ldm_step(args, peer, 8), bench.peer_vae_step(args, peer)):
        net = nets.pop(0)
        before = [p.clone() for p in net.parameters()]
        task.run()
        assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_peer_variants(args):
    bf16 = PROCS._replace(dtype=torch.bfloat16, compile=True)
    found = bench.peer_variants(args, bf16)
    assert len({v.name for v in found}) == len(found) == 6
    assert [v.tuned for v in found] == [False] + [True] * 5
    assert [v.procs.compile for v in found] == [False] * 5 + [True]
    assert found[0].procs.dtype == torch.float32 and found[5].procs.dtype == torch.bfloat16
    layouts = (torch.contiguous_format, torch.channels_last)
    assert {(v.procs.dtype, v.layout) for v in found[1:5]} == {
        (dtype, layout) for dtype in (torch.float32, torch.bfloat16) for layout in layouts}
    assert len(bench.peer_variants(args, PROCS)) == 3  # float32 once
    args.peer = False
    assert bench.peer_variants(args, bf16) == []


# --- the program --------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "precision"), [("fp32", "torch.float32 (--dtype)"),
                                                  ("bf16", "torch.bfloat16 (--dtype)")])
def test_report(quick, dtype, precision):
    done = quick("bench.py", *TINY, f"--dtype={dtype}", "--json=-")
    assert done.code == 0, done.err
    report = json.loads(done.out)  # nothing but JSON on standard output
    assert report["facts"]["precision"] == precision and report["facts"]["compile"] is False
    assert report["args"]["vae_base_ch"] == 8
    rows = {r["part"]: r for r in report["rows"]}
    assert list(rows) == ["train 8x8", "vae 32 px", "dpmpp, 2 steps", "ancestral, 5 steps"]
    for part, r in rows.items():
        assert part in done.err and r["name"] in done.err  # the table
        assert len(r["seconds"]) == (1 if part == "ancestral, 5 steps" else 2)
        assert r["images_per_second"] == pytest.approx(2 / r["median"])
        assert r["fraction_of_peak"] == pytest.approx(
            r["gflop_per_image"] * r["images_per_second"] / r["peak_gflops"])
        assert r["ratio"] == 1 and 0 < r["fraction_of_peak"] < 1
    few, many = rows["dpmpp, 2 steps"], rows["ancestral, 5 steps"]
    assert many["gflop_per_image"] == pytest.approx(2.5 * few["gflop_per_image"])


def test_automatic_precision_and_json_file(quick, tmp_path):
    path = tmp_path / "bench.json"
    done = quick("bench.py", *TINY, "--only=train", "--latent_size=8,16", f"--json={path}")
    assert done.code == 0, done.err
    report = json.loads(path.read_text())
    assert [r["part"] for r in report["rows"]] == ["train 8x8", "train 16x16"]
    assert report["facts"]["precision"] in (
        "torch.float32 (bf16 is not fast here)", "torch.bfloat16 (bf16 is fast here)")
    assert report["facts"]["precision"] in done.out


def test_peer_without_diffusers_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit, match="pip install diffusers"):
        bench.main([*TINY, "--peer"])


@pytest.mark.parametrize(("flags", "message"), [
    (["--only=train,sapmle"], "sapmle"),
    (["--sampling_steps=20"], "two numbers"),
    (["--latent_size="], "at least one"),
    (["--only=train", "--latent_size=6"], "cannot be halved"),
    (["--only=vae", "--img_size=33"], "multiple of 8"),
])
def test_bad_arguments(flags, message):
    with pytest.raises(SystemExit, match=message):
        bench.main([*TINY, *flags])
