"""Few images: val/loss, copies, best.pt, --patience, --init_from and --augment."""
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import read_jsonl

import data
import diffusion
import memorisation
import sample
import train_ldm
import train_vae
from lib import dist, run, verdicts
from lib.files import EXIT_FAILED

ALONE = dist.DistContext(0, 1, torch.device("cpu"), torch.float32, "")


@pytest.fixture
def ldm(workspace):
    """Words of a train_ldm.py call in the workspace: 2 steps an epoch, 6 validation images."""
    return ["train_ldm.py", *workspace.common, f"--config={workspace.ldm_config}",
            f"--ae_ckpt_path={workspace.vae_ckpt}", "--dtype=fp32", "--num_sampling_steps=2",
            "--sample_batch_size=2", "--lr=3e-3"]


def evaluations(folder):  # {step: record}
    return {r["step"]: r for r in read_jsonl(folder / "metrics.jsonl")
            if "sample_diversity/pairwise_mse_mean" in r}


def opened(workspace):
    """(LatentSet of the training images, autoencoder, its hash, settings)."""
    args = train_ldm.parse_args([*workspace.common, f"--config={workspace.ldm_config}"])
    vae, settings, sha256 = sample.load_autoencoder(workspace.vae_ckpt, ALONE)
    args.img_size = settings["img_size"]
    images = data.open_images(args, ALONE, "train")
    cache = workspace.out / "cache"
    return data.LatentSet(images, vae, sha256, cache, ALONE), vae, sha256, args


# --- val/loss and best.pt ---


def test_val_loss_is_the_loss_of_the_averaged_weights(workspace, quick, ldm):
    """Compared with a plain loop over the same draws."""
    assert quick(*ldm, "--run_name=r", "--max_steps=6").code == 0
    logged = evaluations(workspace.out / "r")[6]
    denoiser, _, checkpoint = sample.load_ldm(workspace.out / "r/ckpts/last.pt", ALONE)
    latents, vae, sha256, args = opened(workspace)
    scale = checkpoint["latent_scale_factor"]
    watch = memorisation.MemorisationMonitor(latents, vae, sha256, scale, workspace.out / "cache",
                                             args, ALONE)
    for name, inputs in (("val/loss", watch.val), ("val/train_loss", watch.train)):
        _, times, _, labels = inputs
        assert len(times) == 85 * 6 and (labels.bincount() == 85 * 3).all()
        assert torch.allclose(times.sort().values, (torch.arange(510) + 0.5) / 510)
        losses = []
        for x0, t, noise, y in zip(*(part.split(1) for part in inputs), strict=True):
            alpha, sigma = denoiser.schedule.alpha(t).item(), denoiser.schedule.sigma(t).item()
            v = denoiser.unet(alpha * x0 + sigma * noise, t, y)
            losses.append((v - (alpha * noise - sigma * x0)).square().mean().item())
        assert logged[name] == pytest.approx(np.mean(losses), rel=1e-4)
    assert (watch.train[0] - watch.val[0]).abs().max() > 0.1


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
    assert f"the one to use: {folder / 'ckpts/best.pt'}, of epoch {best // 2}" in result.out
    stored = run.load_checkpoint(folder / "ckpts/best.pt", "ldm")
    assert stored["step"] == best and stored["optimizer"] is None and stored["model"] is None
    # Its weights are the averaged ones of that step.
    assert quick(*argv, "--run_name=short", "--sample_every=100", f"--max_steps={best}").code == 0
    weights = run.load_checkpoint(workspace.out / "short/ckpts/last.pt", "ldm")["ema"]
    assert all(torch.equal(weights[k], v) for k, v in stored["ema"].items())
    # Without patience it continues.
    assert quick(*argv, f"--max_steps={best + 8}", "--patience=0").code == 0
    assert evaluations(folder).keys() == found.keys() | {best + 8}


def test_best_pt_holds_no_raw_weights(workspace, quick):
    result = quick("sample.py", f"--ckpt={workspace.out / 'l/ckpts/best.pt'}", "--no-use_ema")
    assert result.code == EXIT_FAILED and "averaged weights only" in result.err
    result = quick("sample.py", f"--ckpt={workspace.out / 'l'}")  # a run folder
    assert result.code == EXIT_FAILED and "give RUN/ckpts/best.pt" in result.err


def test_without_validation_images_there_is_no_best(workspace, quick, ldm):
    root = workspace.root / "d"
    shutil.copytree(workspace.data / "TB/train", root / "TB/train")
    result = quick(*ldm, f"--data_root={root}", "--run_name=r", "--max_steps=2", "--patience=1")
    assert result.code == 0 and "Validation is skipped" in result.out
    assert not (workspace.out / "r/ckpts/best.pt").exists() and "stopped at" not in result.out
    assert "sample.py --ckpt=" in result.out and "last.pt" in result.out.splitlines()[-1]
    logged = evaluations(workspace.out / "r")[2]
    assert "val/loss" not in logged and "copies/share" in logged


@pytest.mark.parametrize("task", ["TB", "ALL_CXR"])
@pytest.mark.parametrize("split, given, epochs", [
    (None, (), memorisation.SAFE_PASSES), (None, ("--epochs=1000",), 1000), ("val", (), 1000),
    ("valid", (), 1000), ("val_old", (), memorisation.SAFE_PASSES),
    (None, ("--mode=overfit_16",), 1500)])
def test_without_validation_images_training_ends_before_models_copy(tmp_path, task, split, given,
                                                                    epochs):
    for name in ("train", split) if split else ("train",):
        (tmp_path / "TB" / name / "tb").mkdir(parents=True)
    args = train_ldm.parse_args([f"--data_root={tmp_path}", f"--task={task}", *given])
    assert args.epochs == epochs


def test_a_run_without_validation_images_keeps_its_end(workspace, quick, ldm):
    """Also when it goes on, and where validation images have come since."""
    root = workspace.root / "d"
    shutil.copytree(workspace.data / "TB/train", root / "TB/train")
    argv = [*ldm, f"--data_root={root}", "--run_name=r", "--sample_every=1000"]
    result = quick(*argv, "--max_steps=2")
    assert f"ends after --epochs={memorisation.SAFE_PASSES}" in result.out
    shutil.copytree(workspace.data / "TB/val", root / "TB/val")
    result = quick(*argv, "--max_steps=1000")
    steps = 2 * memorisation.SAFE_PASSES
    assert run.load_checkpoint(workspace.out / "r/ckpts/last.pt", "ldm")["step"] == steps


# --- copies ---


def test_copies_among_the_last_samples_are_seen(workspace):
    """Also of a training image that is in `val` too; validation images are no copies."""
    root = workspace.root / "d"
    shutil.copytree(workspace.data, root)
    shutil.copy(root / "TB/train/tb/00003.png", root / "TB/val/tb/copy.png")
    workspace.common = [f"--data_root={root}", f"--output_root={workspace.root / 'o'}"]
    latents, vae, sha256, args = opened(workspace)
    watch = memorisation.MemorisationMonitor(latents, vae, sha256, 1.0, workspace.root / "o/cache",
                                             args, ALONE)
    assert watch.num_val == 6
    real = latents.images.images(np.arange(16))
    val = data.open_images(args, ALONE, "val", train=latents.images).images(np.arange(6))
    rng = torch.Generator().manual_seed(0)
    slightly_off = (real + 0.02 * torch.randn(real.shape, generator=rng)).clamp(-1, 1)
    assert verdicts.health(watch.copies(val))[0].level == "ok"
    found = watch.copies(slightly_off)
    assert found["copies/share"] == 16 / 22 and found["copies/expected"] == 1 / 17
    assert verdicts.health(found)[0].level == "bad"
    for _ in range(memorisation.WINDOW):  # only the last evaluations count
        found = watch.copies(val)
    assert len(watch.recent) == 6 * memorisation.WINDOW and found["copies/share"] < 0.2


def test_each_evaluation_draws_other_samples(workspace, quick, ldm):
    """Copies are counted over several, so none may be another look at the same sample."""
    assert quick(*ldm, "--run_name=r", "--lr=0", "--sample_every=1", "--max_steps=6").code == 0
    recent = run.load_checkpoint(workspace.out / "r/ckpts/last.pt", "ldm")["recent"]
    assert len(evaluations(workspace.out / "r")) > 1
    assert len(recent.unique(dim=0)) == len(recent)


# --- starting from another model ---


def test_a_run_starts_from_the_averaged_weights_of_another(workspace, quick, ldm):
    """Without a learning rate they stay; classes are found by name, a new one is the null class."""
    root = workspace.root / "d"
    for old, new in (("normal", "tb"), ("tb", "covid"), ("normal", "normal")):
        shutil.copytree(workspace.data / "TB/train" / old, root / "TB/train" / new)
    argv = [*ldm, f"--data_root={root}", "--run_name=n", f"--init_from={workspace.ldm_ckpt}",
            f"--ae_ckpt_path={workspace.vae_ckpt}", "--max_steps=1", "--lr=0"]
    result = quick(*argv)
    assert result.code == 0 and "does not know class covid" in result.out, result.err
    old = run.load_checkpoint(workspace.ldm_ckpt, "ldm")["ema"]
    new = run.load_checkpoint(workspace.out / "n/ckpts/last.pt", "ldm")
    assert new["class_names"] == ["covid", "normal", "tb"]
    for name, value in old.items():
        if name == "unet.class_emb.weight":
            value = value[[2, 0, 1, 2]]  # normal, tb and the null class before
        assert torch.equal(new["model"][name], value), name
    torch.testing.assert_close(new["ema"], new["model"])


# --- augmentation ---


def centre(x):
    """Centre of brightness of images [B, 1, S, S]: (right, down) pixels from the middle, [B, 2]."""
    side = x.shape[-1]
    weight = (x[:, 0] + 1).clamp_min(0)
    places = torch.arange(side) - (side - 1) / 2
    total = weight.sum((1, 2))
    return torch.stack([(weight.sum(1) * places).sum(1), (weight.sum(2) * places).sum(1)],
                       1) / total[:, None]


def spot(right, down, side=64):
    """Black image [1, 1, S, S] with a white spot of 8 x 8 pixels so far from its middle."""
    x = torch.full((1, 1, side, side), -1.0)
    top, left = side // 2 + down - 4, side // 2 + right - 4
    x[..., top:top + 8, left:left + 8] = 1
    return x


def how(**given):
    names = ("right", "down", "zoom", "angle", "contrast", "brightness")
    return torch.tensor([[given.get(name, 0.0) for name in names]])


def test_an_augmentation_does_what_its_numbers_say():
    x = spot(12, 0)
    torch.testing.assert_close(data.augment(x, how()), x, atol=1e-4, rtol=0)
    for given, expected in (({"right": 1}, (12 + 0.06 * 64, 0)), ({"down": -1}, (12, -0.06 * 64)),
                            ({"zoom": 1}, (12 * 1.08, 0)),
                            ({"angle": 1}, (12 * np.cos(0.09), 12 * np.sin(0.09)))):
        moved = data.augment(x, how(**given))
        assert centre(moved)[0].tolist() == pytest.approx(expected, abs=0.15), given
        size = (moved + 1).sum() / (x + 1).sum()
        assert size == pytest.approx(1.08**2 if "zoom" in given else 1, rel=0.03)
    grey = torch.full((1, 1, 16, 16), -0.5)
    assert data.augment(grey, how(contrast=1)).mean() == pytest.approx(0.5 * 1.1 - 1)
    assert data.augment(grey, how(brightness=-1)).mean() == pytest.approx(-0.55)


def test_versions_of_an_image_are_cached_as_they_are_encoded(workspace):
    plain, vae, sha256, _ = opened(workspace)
    few = plain.images.subset([3, 9, 12])
    cached, fresh = (data.LatentSet(few, vae, sha256, workspace.out / "cache", ALONE, use, 2)
                     for use in (True, False))
    index, versions = np.array([0, 1, 2, 1]), np.array([0, 2, 1, 1])
    told = cached.augment_labels(index, versions)
    assert (told[0] == 0).all() and told[1:].abs().max() <= 1 and len(told.unique()) > 15
    expected = vae.encode(data.augment(few.images(index), told)).mean
    for latents in (cached, fresh):
        mean, _ = latents.posterior(index, versions)
        torch.testing.assert_close(mean, expected, atol=1e-4, rtol=1e-4)
    same = cached.posterior(index[:1])[0], plain.posterior(np.array([3]))[0]
    torch.testing.assert_close(*same, atol=1e-4, rtol=1e-4)


def test_half_of_the_images_of_a_step_are_as_they_are(workspace):
    args = train_ldm.parse_args(["--augment=3"])
    two = [np.concatenate([train_ldm.draw_copies(8, step, args, ALONE._replace(
        rank=rank, world_size=2)) for rank in range(2)]) for step in range(200)]
    counts = np.bincount(np.concatenate(two), minlength=4)
    assert (abs(counts - [1600, 533, 533, 533]) < 120).all()  # 4 standard deviations
    assert (train_ldm.draw_copies(16, 7, args, ALONE) == two[7]).all()  # in one process, too


@pytest.mark.parametrize("told", [True, False])
def test_what_was_augmented_does_not_show_in_samples(told):
    """A spot in the middle, shifted in training: only a network that is told where samples it
    there."""
    args = train_ldm.parse_args(["--ldm_base_ch=16", "--ldm_ch_mults=1,2", "--ldm_num_res_blocks=1",
                                 "--ldm_attn_res=4", "--augment=1", "--lr=2e-3"])
    denoiser, ema, optimizer = train_ldm.build_models(args, ALONE, (1, 16, 16), 2)
    x = spot(0, 0, 16)
    rng = torch.Generator().manual_seed(0)
    for step in range(250):
        numbers = torch.zeros(16, 6)
        numbers[:8, :2] = 4 * (torch.rand(8, 2, generator=rng) * 2 - 1)  # up to 4 pixels
        mean = data.augment(x.expand(16, -1, -1, -1), numbers)
        batch = ((mean, torch.full_like(mean, -20.0)), torch.zeros(16, dtype=torch.long),
                 numbers * told)
        train_ldm.train_step(denoiser, ema, optimizer, denoiser, batch, 1.0, step, args, ALONE)
    y = torch.zeros(24, dtype=torch.long)
    samples = diffusion.sample(ema.module, y, lambda: torch.randn(24, 1, 16, 16, generator=rng),
                               "dpmpp_2m_sde", 10, 1.0, (0, 1))
    off = centre(samples).abs().max(1).values
    assert (off.quantile(0.9) < 0.7) == told


def test_the_autoencoder_sees_half_of_its_images_changed(workspace):
    plain, *_ = opened(workspace)
    images, index = plain.images, np.arange(16)
    args = SimpleNamespace(augment=True, seed=0)
    x = images.images(index)
    seen = torch.cat([train_vae.read_images(images, index, step, args, ALONE) for step in range(8)])
    same = (seen - x.repeat(8, 1, 1, 1)).abs().amax((1, 2, 3)) < 1e-3
    assert 0.35 < same.float().mean() < 0.65
    first = [train_vae.read_images(images, index[r::2], 0, args, ALONE._replace(
        rank=r, world_size=2)) for r in range(2)]
    whole = train_vae.read_images(images, np.concatenate([index[::2], index[1::2]]), 0, args, ALONE)
    assert torch.equal(torch.cat(first), whole)


def test_reconstructions_have_no_mean_error_within_a_square(workspace, quick):
    """Of the linear path, after the last step, once: it would be a lattice."""
    argv = [*workspace.vae("flat", "--linear_path", "--ch_mults=1,1", "--patch_size=2"),
            "--dtype=fp32"]
    errors, path = {}, workspace.out / "flat/ckpts/last.pt"
    for steps in (6, 9, 9):
        assert quick(*argv, "--max_steps=9", f"--epochs={steps // 2}").code == 0
        vae, _, sha256 = sample.load_autoencoder(path, ALONE)
        x = opened(workspace)[0].images.images(np.arange(16))
        with torch.no_grad():
            error = vae.decode(vae.encode(x).mean) - x
        squares = error[..., 4:-4, 4:-4].unfold(2, 4, 4).unfold(3, 4, 4)  # of 8 x 8, without 1
        errors[sha256] = squares.mean((0, 1, 2, 3))
    assert len(errors) == 2 and all(of.abs().max() < 1e-4 for of in errors.values())
