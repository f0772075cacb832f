"""evaluate.py: black levels in closed form, and the report through the real command line."""
import json

import numpy as np
import pytest
import torch
from conftest import write_png

import evaluate


def test_black_levels_of_known_images():
    x = torch.full((2, 1, 10, 20), 0.5)
    x[0, :, :, :5] = -1.0  # a quarter of the first image is black
    x[1, :, 0, :2] = -0.5  # one per cent of the second is dark grey, which is not black
    levels = evaluate.black_levels(x)
    assert levels["black_share"] == pytest.approx(0.125)
    assert levels["darkest_percent"] == pytest.approx((0.0 + 0.25) / 2)


def test_features_are_normalised_means_on_a_coarse_grid():
    class Fake:
        def encode(self, x):
            return type("P", (), {"mean": x.expand(-1, 2, -1, -1)})

    class OnCpu:
        device = torch.device("cpu")

    x = torch.arange(64.0).view(1, 1, 8, 8).repeat(17, 1, 1, 1)  # 17: one more than the batch inside
    features = evaluate.vae_features(Fake(), x, 0.5, OnCpu)
    blocks = np.arange(64.0).reshape(4, 2, 4, 2).mean((1, 3)) * 0.5
    assert features.shape == (17, 32)
    np.testing.assert_allclose(features[16].view(2, 4, 4).numpy(), np.stack([blocks, blocks]))


def test_report_and_its_floor(workspace, quick):
    result = quick("evaluate.py", *workspace.common, f"--ckpt={workspace.ldm_ckpt}", "--num_samples=4",
                   "--num_sampling_steps=5", "--sampler=ddim")
    assert result.code == 0, result.err
    report = json.loads((workspace.out / "l/evaluation.json").read_text())
    assert report["sampler"] == "ddim" and report["num_real"] == 6 and report["num_train"] == 16
    for name in ("all", "normal", "tb"):
        rows = report[name]
        # 20 steps of training: the samples must be further off than the training images.
        assert rows["samples"]["frechet"] > rows["train"]["frechet"]
        assert rows["real"]["black_share"] > 0.01
        assert f"{rows['samples']['kernel_distance']:.5f}" in result.out


def test_data_of_other_classes_are_refused(workspace, quick):
    for split in ("train", "val"):
        for name in ("a", "b"):
            for i in range(3):
                write_png(workspace.root / "other/TB" / split / name / f"{i}.png", np.zeros((32, 32), np.uint8))
    result = quick("evaluate.py", f"--data_root={workspace.root / 'other'}", f"--output_root={workspace.out}",
                   f"--ckpt={workspace.ldm_ckpt}", "--num_samples=2", "--num_sampling_steps=2")
    assert result.code == 1 and "normal, tb" in result.err and "a, b" in result.err
