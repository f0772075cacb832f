"""dev/bench.py: it times in turn, does the same work on both sides, and reports it."""
import json
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_ldm
import train_vae
from dev import bench
from lib import dist
from lib.args import parse_settings

TINY = ("--latent_size=8", "--base_ch=8", "--batch=2", "--repeats=2", "--img_size=32",
        "--vae_base_ch=8", "--vae_batch=2", "--sampling_steps=3", "--device=cpu")
CPU = dist.DistContext(0, 1, torch.device("cpu"), torch.float32, "")


@pytest.fixture
def args():
    return parse_settings(bench.build_parser(), [*TINY, "--peer"])


@pytest.fixture
def trained(monkeypatch):
    """Networks that the trainers stepped, in order."""
    networks = []
    for stage in (train_ldm, train_vae):
        def step(models, *rest, original=stage.train_step):
            networks.append(getattr(models, "vae", models))
            return original(models, *rest)
        monkeypatch.setattr(stage, "train_step", step)
    return networks


# --- measuring ----------------------------------------------------------------------------------


def test_numbers_of_a_row_come_from_timed_rounds_in_turn(monkeypatch):
    seconds = iter([99, 1, 98, 1, 1, 2, 10, 30, 2, 8])  # two rounds of warm-up, then three
    monkeypatch.setattr(bench, "clock", lambda function, device: next(seconds))
    a, b = bench.measure("part", 4, {"a": None, "b": None}, 3, CPU.device)
    assert (a["part"], a["name"], b["name"]) == ("part", "a", "b")
    assert a["seconds"] == [1, 10, 2] and b["seconds"] == [2, 30, 8]
    assert a["ratio"] == 1 and b["ratio"] == 3  # the median of 2, 3, 4; that of medians is 4
    assert b["images_per_second"] == 0.5


# --- the work -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part, by_peer", [("train", False), ("train", True), ("vae", False)])
def test_a_step_trains_every_weight(args, trained, part, by_peer, dtype):
    pytest.importorskip("diffusers")
    run = bench.PARTS[part](args, CPU._replace(dtype=dtype), *[True] * by_peer)
    run()
    before = [p.clone() for p in trained[0].parameters()]
    run()
    run()
    after = list(trained[0].parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None and p.dtype == torch.float32 for p in after)
    kinds = {type(module).__module__.split(".")[0] for module in trained[0].modules()}
    assert ("diffusers" in kinds) == by_peer
    if by_peer:  # group norm is slow in channels_last on a CPU
        assert all(p.is_contiguous() for p in after)


def test_the_peer_does_the_same_work(args):
    pytest.importorskip("diffusers")
    args.latent_size = 16  # attention at the first level and in the middle
    # model.Upsample takes 4 products per output instead of 9: saved by 2 images in a forward pass.
    saved = sum(2 * 2 * channels**2 * (2 * size) ** 2 * (9 - 4)
                for channels, size in ((32, 4), (16, 8)))
    for part in ("train", "sample"):  # backward is twice the forward; three steps of sampling
        counts = []
        for peer in (False, True):
            run = bench.PARTS[part](args, CPU, peer)
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                run()
            counts.append(counter.get_total_flops())
        assert counts[1] - counts[0] == 3 * saved, part


# --- the program --------------------------------------------------------------------------------


def test_the_table_and_the_json_file_say_the_same(quick, tmp_path):
    pytest.importorskip("diffusers")
    path = tmp_path / "bench.json"
    done = quick("dev/bench.py", *TINY, "--only=sample,vae", "--vae_batch=1", "--peer",
                 f"--json={path}")
    assert done.code == 0, done.err
    report = json.loads(path.read_text())
    facts, rows = report["facts"], report["rows"]
    assert facts["compile"] == "off" and report["args"]["vae_base_ch"] == 8
    first, *lines = [line for line in done.out.splitlines() if not line.startswith("note: ")]
    assert all(str(value) in first for value in facts.values())
    assert [(r["part"], r["name"]) for r in rows] == [
        ("sample", "ours"), ("sample", "diffusers"), ("vae", "ours")]
    for line, r, images in zip(lines, rows, (2, 2, 1), strict=True):
        assert line.startswith(r["part"]) and r["name"] in line
        assert len(r["seconds"]) == 2 and min(r["seconds"]) > 0
        assert r["images_per_second"] == pytest.approx(images * 2 / sum(r["seconds"]))


@pytest.mark.parametrize("flags, message", [
    (["--only=train,sapmle"], "sapmle.*choose from train,vae,sample"),
    (["--latent_size=0"], "at least 1"), (["--only=train", "--latent_size=6"], "cannot be halved"),
    (["--peer", "--only=train"], "pip install diffusers")])
def test_bad_arguments_are_one_line(monkeypatch, flags, message):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit, match=message):
        bench.main([*TINY, *flags])
