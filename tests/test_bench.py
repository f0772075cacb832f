"""dev/bench.py: it times what the trainers do, and reports it."""
import pytest
import torch

import train_ldm
import train_vae
from dev import bench
from lib import dist
from lib.args import parse_settings

TINY = ("--latent_size=8", "--base_ch=8", "--batch=2", "--img_size=32",
        "--vae_base_ch=8", "--vae_batch=1", "--sampling_steps=3", "--device=cpu")
CPU = dist.DistContext(0, 1, torch.device("cpu"), torch.float32, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part, stage", [("train", train_ldm), ("vae", train_vae)])
def test_a_step_trains_every_weight(monkeypatch, part, stage, dtype):
    networks = []

    def step(models, *rest, original=stage.train_step):
        networks.append(models.vae if isinstance(models, train_vae.Models) else models)
        return original(models, *rest)
    monkeypatch.setattr(stage, "train_step", step)
    args = parse_settings(bench.build_parser(), [*TINY])
    run = bench.PARTS[part](args, CPU._replace(dtype=dtype))
    run()
    before = [p.clone() for p in networks[0].parameters()]
    run()
    run()
    after = list(networks[0].parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None and p.dtype == torch.float32 for p in after)


def test_each_part_is_a_line(capsys):
    bench.main([*TINY, "--seconds=0.1"])
    first, *rows = [line for line in capsys.readouterr().out.splitlines() if line[:5] != "note:"]
    assert "compile False, torch" in first and [row.split()[0] for row in rows] == [*bench.PARTS]
    assert all(float(row.split()[1]) > 0 for row in rows)


@pytest.mark.parametrize("flags, message", [
    (["--only=train,sapmle"], "sapmle.*choose from train,vae,sample"),
    (["--latent_size=0"], "at least 1"), (["--only=train", "--latent_size=6"], "cannot be halved")])
def test_bad_arguments_are_one_line(flags, message):
    with pytest.raises(SystemExit, match=message):
        bench.main([*TINY, *flags])
