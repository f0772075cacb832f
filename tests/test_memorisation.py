"""What a run tells of memorising while it trains: val/loss, copies, best.pt and --patience."""
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import read_jsonl, run

import data
import experiment
import metrics
import model
import train_ldm

ALONE = experiment.Processes(0, 1, torch.device("cpu"), torch.float32, False)


@pytest.fixture
def ldm(workspace):
    """Words of a train_ldm.py call in the workspace: 2 steps an epoch, 6 validation images."""
    return ["train_ldm.py", *workspace.common, f"--config={workspace.ldm_config}",
            f"--ae_ckpt_path={workspace.vae_ckpt}", "--dtype=fp32", "--num_sampling_steps=2",
            "--sample_batch_size=2", "--lr=3e-3"]


def evaluations(folder):
    """{step: record} of the evaluations in a run's metrics.jsonl."""
    return {r["step"]: r for r in read_jsonl(folder / "metrics.jsonl")
            if "sample_diversity/num_pairs" in r}


def opened(workspace):
    """(LatentSet of the training images, autoencoder, its hash, settings)."""
    args = train_ldm.parse_args([*workspace.common, f"--config={workspace.ldm_config}"])
    vae, settings, sha256 = experiment.load_autoencoder(workspace.vae_ckpt, ALONE)
    args.img_size = settings["img_size"]
    images = data.open_images(args, ALONE, "train")
    cache = workspace.out / "cache"
    return data.LatentSet(images, vae, sha256, cache, ALONE), vae, sha256, args


# --- val/loss and best.pt ---


def test_val_loss_is_the_loss_of_the_averaged_weights(workspace, quick, ldm):
    """Against a plain loop over the same draws; times are spread evenly, and draws stay the same.
    """
    assert quick(*ldm, "--run_name=r", "--max_steps=6").code == 0
    logged = evaluations(workspace.out / "r")[6]
    denoiser, _, checkpoint = experiment.load_ldm(workspace.out / "r/ckpts/last.pt", ALONE)
    latents, vae, sha256, args = opened(workspace)
    scale = checkpoint["latent_scale_factor"]
    watch = train_ldm.Memorisation(latents, vae, sha256, scale, workspace.out / "cache", args,
                                   ALONE)
    val = data.open_images(args, ALONE, "val", train=latents.images)
    encoded = model.Posterior(*data.LatentSet(val, vae, sha256, workspace.out, ALONE, False)
                              .posterior(np.arange(6)))
    for name, inputs in (("val/loss", watch.val), ("val/train_loss", watch.train)):
        assert len(inputs.t) == 85 * 6 and (inputs.y.bincount() == 85 * 3).all()
        times = inputs.t.sort().values
        assert torch.allclose(times, (torch.arange(510) + 0.5) / 510)
        losses = []
        for x0, t, noise, y in zip(*(part.split(1) for part in inputs), strict=True):
            alpha, sigma = denoiser.schedule.alpha(t).item(), denoiser.schedule.sigma(t).item()
            v = denoiser.unet(alpha * x0 + sigma * noise, t, y)
            losses.append((v - (alpha * noise - sigma * x0)).square().mean().item())
        assert logged[name] == pytest.approx(np.mean(losses), rel=1e-4)
    # The latents are those of the validation images: over 85 draws the posterior's noise is small.
    mean = watch.val.x0.view(85, 6, *vae.latent_shape).mean(0) / scale
    tolerance = 4 * (0.5 * encoded.logvar.max()).exp().item() / 85**0.5 + 1e-3
    assert (mean - encoded.mean).abs().max() < tolerance
    assert (watch.train.x0 - watch.val.x0).abs().max() > 0.1


def test_two_processes_measure_the_same(workspace, quick, ldm):
    assert quick(*ldm, "--run_name=one", "--max_steps=2").code == 0
    run(*ldm, "--run_name=two", "--max_steps=2", "--batch_per_device=4", processes=2)
    one, two = (evaluations(workspace.out / name)[2] for name in ("one", "two"))
    for name in ("val/loss", "val/train_loss", "copies/share", "copies/probability"):
        assert two[name] == pytest.approx(one[name], rel=1e-3), name


def test_best_pt_is_of_the_lowest_val_loss_and_patience_stops(workspace, quick, ldm):
    folder = workspace.out / "r"
    # The learning rate makes the loss jump, so that the lowest is not the last.
    argv = [*ldm, "--run_name=r", "--sample_every=1", "--lr=0.03", "--ema_decay=0.5"]
    result = quick(*argv, "--max_steps=200", "--patience=3")
    assert result.code == 0, result.err
    found = evaluations(folder)
    losses = {step: r["val/loss"] for step, r in found.items()}
    best = min(losses, key=losses.get)
    assert max(found) == best + 6 < 200  # two steps an epoch, three evaluations
    assert f"stopped at step {best + 6} of 200" in result.out and "--patience" in result.out
    path = folder / "ckpts/best.pt"
    assert f"the one to use: {path}, of epoch {best // 2}" in result.out
    assert f"sample.py --ckpt={path}" in result.out.splitlines()[-1]
    stored = experiment.load_checkpoint(path, "ldm")
    assert stored["step"] == best and stored["optimizer"] is None and stored["model"] is None
    assert json.loads((folder / "summary.json").read_text())["best"]["step"] == best
    # Its weights are the averaged ones of that step.
    assert quick(*argv[:-3], *argv[-2:], "--run_name=short", "--sample_every=100",
                 f"--max_steps={best}").code == 0
    weights = experiment.load_checkpoint(workspace.out / "short/ckpts/last.pt", "ldm")["ema"]
    assert all(torch.equal(weights[k], v) for k, v in stored["ema"].items())
    # Started again, it stops again; with more patience it goes on.
    again = quick(*argv, "--max_steps=200", "--patience=3")
    assert again.code == 0 and f"stopped at step {best + 6} of 200" in again.out
    assert evaluations(folder).keys() == found.keys()
    assert quick(*argv, f"--max_steps={best + 8}", "--patience=0").code == 0
    assert max(evaluations(folder)) == best + 8


def test_best_pt_is_sampled_and_evaluated_and_holds_no_raw_weights(workspace, quick, ldm):
    assert quick(*ldm, "--run_name=r", "--max_steps=2").code == 0
    best = workspace.out / "r/ckpts/best.pt"
    few = ["--num_samples=1", "--num_sampling_steps=2"]
    folders = []
    for ckpt in (best, best.with_name("last.pt")):
        folders.append(workspace.root / ckpt.stem)
        assert quick("sample.py", f"--ckpt={ckpt}", *few, f"--out_dir={folders[-1]}").code == 0
    one, two = ((folder / "tb_00000.png").read_bytes() for folder in folders)
    assert one == two  # the same weights here
    result = quick("sample.py", f"--ckpt={best}", *few, "--no-use_ema")
    assert result.code == experiment.EXIT_FAILED and "averaged weights alone" in result.err
    result = quick("sample.py", f"--ckpt={workspace.out / 'r'}")
    assert f"give {best}" in result.err


def test_without_validation_images_there_is_no_best(workspace, quick, ldm):
    root = workspace.root / "d"
    shutil.copytree(workspace.data / "TB/train", root / "TB/train")
    result = quick(*ldm, f"--data_root={root}", "--run_name=r", "--max_steps=2", "--patience=1")
    assert result.code == 0 and "Validation is skipped" in result.out
    assert not (workspace.out / "r/ckpts/best.pt").exists()
    assert "sample.py --ckpt=" in result.out and "last.pt" in result.out.splitlines()[-1]
    assert "stopped at" not in result.out
    logged = evaluations(workspace.out / "r")[2]
    assert "val/loss" not in logged and "copies/share" in logged


# --- copies ---


def test_copies_among_the_last_samples_are_seen(workspace):
    """Training images among the samples, also where one of them stands in `val` too; samples of
    validation images are none."""
    root = workspace.root / "d"
    shutil.copytree(workspace.data, root)
    shutil.copy(root / "TB/train/tb/00003.png", root / "TB/val/tb/copy.png")
    workspace.common = [f"--data_root={root}", f"--output_root={workspace.root / 'o'}"]
    latents, vae, sha256, args = opened(workspace)
    watch = train_ldm.Memorisation(latents, vae, sha256, 1.0, workspace.root / "o/cache", args,
                                   ALONE)
    assert watch.num_val == 6
    real = latents.images.images(np.arange(16))
    val = data.open_images(args, ALONE, "val", train=latents.images).images(np.arange(6))
    rng = torch.Generator().manual_seed(0)
    slightly_off = (real + 0.02 * torch.randn(real.shape, generator=rng)).clamp(-1, 1)
    assert metrics.health(watch.copies(val))[0].level == "ok"
    found = watch.copies(slightly_off)
    assert found["copies/share"] == 16 / 22 and found["copies/expected"] == 1 / 17
    assert metrics.health(found)[0].level == "bad"
    for _ in range(train_ldm.WINDOW):  # only the last evaluations count
        found = watch.copies(val)
    assert len(watch.recent) == 6 * train_ldm.WINDOW and found["copies/share"] < 0.2


# --- starting from another model ---


def test_a_run_starts_from_the_averaged_weights_of_another(workspace, quick, ldm):
    """Without a learning rate they stay; classes are found by name, a new one is the null class."""
    root = workspace.root / "d"
    for old, new in (("normal", "tb"), ("tb", "covid"), ("normal", "normal")):
        shutil.copytree(workspace.data / "TB/train" / old, root / "TB/train" / new)
    argv = [*ldm, f"--data_root={root}", "--run_name=n", f"--init_from={workspace.ldm_ckpt}",
            f"--ae_ckpt_path={workspace.vae_ckpt}", "--max_steps=1", "--lr=0"]
    result = quick(*argv)
    assert result.code == 0 and "no class covid" in result.out, result.err
    old = experiment.load_checkpoint(workspace.ldm_ckpt, "ldm")["ema"]
    new = experiment.load_checkpoint(workspace.out / "n/ckpts/last.pt", "ldm")
    assert new["class_names"] == ["covid", "normal", "tb"]
    for name, value in old.items():
        if name == "unet.class_emb.weight":
            value = value[[2, 0, 1, 2]]  # normal, tb and the null class before
        assert torch.equal(new["model"][name], value), name
    torch.testing.assert_close(new["ema"], new["model"])


INIT_ERRORS = {
    "prediction": (["--prediction=x0"], "give --prediction=v"),
    "shape": (["--ldm_base_ch=8"], "does not fit"),
    "no file": (["--init_from=none.pt"], "no checkpoint at none.pt"),
}


@pytest.mark.parametrize("case", INIT_ERRORS)
def test_weights_that_mean_nothing_are_refused(workspace, quick, ldm, case):
    flags, says = INIT_ERRORS[case]
    result = quick(*ldm, "--run_name=n", f"--init_from={workspace.ldm_ckpt}", "--max_steps=1",
                   *flags)
    assert result.code == experiment.EXIT_FAILED and says in result.err
    assert "Traceback" not in result.err
