"""bench.py: that it times in turn, counts the right work on both sides, and reports what it measured."""
import importlib.util
import json
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import run

import bench
import experiment

TINY = ("--latent_size=8", "--base_ch=8", "--batch=2", "--repeats=1", "--img_size=32", "--vae_base_ch=8",
        "--vae_batch=2", "--sampling_steps=2,5", "--epoch_images=4", "--device=cpu")
PROCS = experiment.Processes(0, 1, torch.device("cpu"), torch.float32, False)


@pytest.fixture
def args():
    return experiment.parse_args(bench.make_parser(), [*TINY, "--peer"])


@pytest.fixture
def peer():
    if importlib.util.find_spec("diffusers") is None:
        pytest.skip("diffusers is not installed")
    return bench.PeerSetting("peer", torch.float32, torch.contiguous_format)


# --- measuring ---------------------------------------------------------------------------------------------


def test_alternate_takes_turns_and_keeps_only_the_timed_rounds():
    called = []
    seconds = bench.alternate({"a": lambda: called.append("a"), "b": lambda: (called.append("b"), time.sleep(0.01))},
                              repeats=3, device=PROCS.device, warmup=1)
    assert called == ["a", "b"] * 4
    assert [len(s) for s in seconds.values()] == [3, 3]
    assert min(seconds["b"]) >= 0.01


def test_ratio_is_the_median_over_rounds_not_the_ratio_of_medians():
    found = bench.row("part", "what", [2.0, 30.0, 8.0], [1.0, 10.0, 2.0])
    assert found["ratio"] == 3.0 and found["median"] == 8.0  # of 2, 3, 4; the medians give 4
    assert "ratio" not in bench.row("part", "what", [1.0])


def test_flops_of_a_convolution_and_its_backward():
    conv = torch.nn.Conv2d(3, 5, 3, padding=1)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    forward = 2 * 2 * 8 * 8 * 5 * 3 * 9  # two a multiply-add
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


# --- the work ----------------------------------------------------------------------------------------------


def test_training_step_trains(args):
    step, denoiser = bench.ldm_step(args, PROCS, 8)
    before = {k: v.clone() for k, v in denoiser.state_dict().items()}
    for _ in range(3):
        step(*bench.random_posterior(args, PROCS, 8))
    still = [k for k, v in denoiser.state_dict().items() if torch.equal(v, before[k])]
    assert not still and all(p.grad is None for p in denoiser.parameters())


def saved_by_upsampling(channels, size):
    """FLOPs of 2 images that model.Upsample saves, forward and backward: 4 products an output instead of 9."""
    return 3 * 2 * 2 * channels**2 * (2 * size) ** 2 * (9 - 4)


def test_peer_does_the_same_work_as_the_unet(args, peer):
    posterior = bench.random_posterior(args, PROCS, 16)  # attention at the first level and in the middle
    step, denoiser = bench.ldm_step(args, PROCS, 16)
    net = bench.peer_unet(args, PROCS, 16, peer)
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in denoiser.parameters())
    peer_step = bench.peer_ldm_step(args, PROCS, 16, peer)
    theirs, ours = bench.count_flops(lambda: peer_step(*posterior)), bench.count_flops(lambda: step(*posterior))
    assert theirs - ours == saved_by_upsampling(32, 4) + saved_by_upsampling(16, 8)


def test_peer_does_the_same_work_as_the_autoencoder(args, peer):
    x = torch.rand(2, 1, 32, 32)
    ours, theirs = (bench.count_flops(lambda: step(x))  # noqa: B023
                    for step in (bench.vae_step(args, PROCS), bench.peer_vae_step(args, PROCS, peer)))
    quant = 3 * 2 * 2 * 4 * 4 * (8 * 8 + 4 * 4)  # its two 1x1 convolutions on the latent, forward and backward
    assert theirs - ours == quant + sum(saved_by_upsampling(c, s) for c, s in ((32, 4), (32, 8), (16, 16)))


def test_peer_settings(args):
    bf16 = PROCS._replace(dtype=torch.bfloat16, compile=True)
    found = bench.peer_settings(args, bf16)
    assert len({s.name for s in found}) == len(found) == 6
    assert [s.tuned for s in found] == [False] + [True] * 5 and [s.compiled for s in found] == [False] * 5 + [True]
    assert {(s.dtype, s.layout) for s in found[1:5]} == {
        (d, m) for d in (torch.float32, torch.bfloat16) for m in (torch.contiguous_format, torch.channels_last)}
    args.peer = False
    assert bench.peer_settings(args, bf16) == []


# --- the program -------------------------------------------------------------------------------------------


def test_parts_report_what_they_did(quick, image_tree):
    root = image_tree({"TB/train/normal": 3, "TB/train/tb": 3})
    done = quick("bench.py", *TINY, f"--data_root={root}", "--only=sample,epoch,vae,graph", "--json=-")
    assert done.code == 0, done.err
    report = json.loads(done.out)  # nothing but JSON on standard output
    rows = {(r["part"], r["what"]): r for r in report["rows"]}
    assert rows["sample 8x8", "dpmpp, 2 steps"]["evaluations"] == 2
    assert rows["sample 8x8", "ancestral, 5 steps"]["evaluations"] == 5
    assert {what for part, what in rows if part == "epoch, train"} == {"cached latents", "encoded on the fly"}
    r = rows["vae 32 px", "eager"]
    assert r["images_per_second"] == pytest.approx(2 / r["median"])
    assert r["share_of_peak"] == pytest.approx(r["gflop_per_image"] * r["images_per_second"] / r["peak_gflops"])
    for what in ("UNet", "autoencoder"):
        assert rows["graph", what]["graph_breaks"] == 0 and rows["graph", what]["recompiles"] == 0
    assert "torch.float32" in report["facts"]["precision"]
    assert all(part in done.err and what in done.err for part, what in rows)  # the table


@pytest.mark.slow
def test_child_reports_first_step_and_memory(args):
    args.peer = False
    ballast = torch.ones(2**28)  # 1 GiB that is not the child's
    found = bench.child(args, repeats=2)
    del ballast
    assert found["start"] < found["first"] < time.time() and len(found["seconds"]) == 2
    assert 50 * 2**20 < found["memory"] < 2**30  # torch alone takes more than 50 MiB


@pytest.mark.slow
def test_parts_with_processes_of_their_own():
    out, _ = run("bench.py", *TINY, "--only=train,first_step,processes")
    assert "train 8x8" in out and "first step" in out and "1, threads each" in out and "2, threads each" in out


def test_peer_without_diffusers_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit, match="pip install diffusers"):
        bench.main([*TINY, "--peer"])


@pytest.mark.parametrize(("flag", "message"), [("--only=train,sapmle", "sapmle"),
                                               ("--sampling_steps=20", "two numbers")])
def test_bad_arguments(flag, message):
    with pytest.raises(SystemExit, match=message):
        bench.main([*TINY, flag])
