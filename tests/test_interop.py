"""To diffusers and back: the same numbers there as here, a card that tells the truth, and no
patients handed on. Every network there is made by diffusers itself."""
import hashlib
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import error_of, run
from PIL import Image

import diffusion
import export
import model
import sample
import train_vae
from lib import diffusers_io, dist, verdicts
from lib.run import load_checkpoint

diffusers = pytest.importorskip("diffusers")
safetensors = pytest.importorskip("safetensors.torch")
exported_pipeline = pytest.importorskip("lib.exported_pipeline")
CPU = dist.DistContext(0, 1, torch.device("cpu"), torch.float32, False)
LDM = {"ldm_base_ch": 32, "ldm_ch_mults": (1, 2), "ldm_num_res_blocks": 2, "ldm_attn_res": (4,),
       "augment": 0, "zero_terminal_snr": True, "loss_weighting": "uniform", "prediction": "flow",
       "noise_schedule": "flow", "guidance_scale": 3.0, "guidance_interval": (0.3, 0.7)}
VAE = {"img_size": 32, "z_channels": 3, "base_ch": 16, "ch_mults": (1, 2, 3), "num_res_blocks": 1,
       "attn_res": (16,), "patch_size": 1, "linear_path": False, "quant_conv": False}
LATENT = (3, 8, 8)


@pytest.fixture(autouse=True)
def one_seed_and_cache(tmp_path, monkeypatch):
    torch.manual_seed(3)
    cache = "diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE"
    monkeypatch.setattr(cache, str(tmp_path / "hf"))
    monkeypatch.setattr(sys, "path", sys.path.copy())  # the cache is added to it


def randomised(module, seed=0):
    """Random weights of about the size that training leaves, also where they start at zero."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in [*module.parameters(), *module.buffers()]:
            fan_in = p[0].numel() if p.ndim > 1 else 1
            noise = torch.randn(p.shape, generator=rng)
            p.copy_(noise / fan_in**0.5 if p.ndim > 1 else p + 0.1 * noise)
    return module.eval().requires_grad_(False)


def exported(folder, ldm=None, vae=None):
    """(Denoiser, AutoencoderKL, pipeline that diffusers opens) of random networks in a folder."""
    ldm, vae = {**LDM, **(ldm or {})}, {**VAE, **(vae or {})}
    net = randomised(model.AutoencoderKL(*(vae[name] for name in model.VAE_SHAPE)))
    denoiser = model.build_denoiser(ldm, net.latent_shape, 2)
    randomised(denoiser, seed=1)
    export.write_parts(folder, denoiser, net, vae, {
        "args": ldm, "class_names": ["normal", "tb"], "trained_classes": [0, 1],
        "latent_shape": net.latent_shape, "latent_scale_factor": 0.7})
    return denoiser, net, diffusers.DiffusionPipeline.from_pretrained(
        folder, trust_remote_code=True)


def largest(a, b):
    return (a - b).abs().max().item()


# --- to diffusers ---


@pytest.mark.parametrize("ldm", [
    {"ldm_attn_res": (8, 4), "ldm_base_ch": 48, "ldm_num_res_blocks": 1, "augment": 7},
    {"ldm_ch_mults": (1, 1, 2), "ldm_attn_res": ()}])
def test_the_unet_gives_the_same_output_there(tmp_path, ldm):
    denoiser, _, _ = exported(tmp_path, ldm)
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet")
    x, t, y = torch.randn(3, *LATENT), torch.tensor([0.0, 0.37, 1.0]), torch.tensor([0, 1, 2])
    ours = denoiser.unet(x, t, y)
    assert largest(ours, theirs(x, 1000 * t, y).sample) < 1e-5
    assert largest(ours, denoiser.unet(x, t, y.flip(0))) > 1e-3  # the class matters


@pytest.mark.parametrize("kind, vae", [
    (diffusers.AutoencoderKL, {}),
    (diffusers.AutoencoderKL, {"ch_mults": (1, 1, 2), "num_res_blocks": 2, "quant_conv": True}),
    (exported_pipeline.CXRAutoencoder, {"patch_size": 2, "ch_mults": (1, 2)}),
    (exported_pipeline.CXRAutoencoder, {"linear_path": True}),
    (exported_pipeline.CXRAutoencoder,
     {"patch_size": 4, "ch_mults": (1,), "linear_path": True, "quant_conv": True})])
def test_the_autoencoder_gives_the_same_output_there(tmp_path, kind, vae):
    _, net, _ = exported(tmp_path, vae=vae)
    theirs = kind.from_pretrained(tmp_path / "vae")
    x, z = torch.rand(2, 1, 32, 32) * 2 - 1, torch.randn(2, *net.latent_shape)
    posterior = theirs.encode(x).latent_dist
    assert largest(net.encode(x).mean, posterior.mean) < 1e-5
    assert largest(net.encode(x).logvar, posterior.logvar) < 1e-5
    assert largest(net.decode(z), theirs.decode(z).sample) < 1e-5
    assert theirs.config.scaling_factor == 0.7
    if kind is exported_pipeline.CXRAutoencoder:  # nobody decodes noise with a plain one
        with pytest.raises(ValueError, match="cxrautoencoder"):
            diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")


@pytest.mark.parametrize("process, vae", [
    ({}, {}), ({"prediction": "v", "noise_schedule": "cosine"}, {}),
    ({"prediction": "x0", "noise_schedule": "linear"}, {}),
    ({"prediction": "eps", "noise_schedule": "linear", "zero_terminal_snr": False}, {}),
    ({"guidance_scale": 1.0}, {"patch_size": 2, "ch_mults": (1, 2), "linear_path": True})])
def test_a_sample_is_the_same_image_there(tmp_path, process, vae):
    denoiser, vae, pipeline = exported(tmp_path, process, vae)
    settings = {**LDM, **process}
    noise, y = torch.randn(2, *LATENT), torch.tensor([1, 1])
    z = diffusion.sample(denoiser, y, lambda: noise, "ddim", 20, settings["guidance_scale"],
                         settings["guidance_interval"])
    ours = vae.decode(z / 0.7).clamp(-1, 1)
    theirs = pipeline.sample(noise, "tb", steps=20)
    assert largest(ours, theirs) < 2e-3  # a quarter of a grey level
    assert ours.std() > 0.05 and largest(ours, pipeline.sample(noise, "normal", steps=20)) > 0.01


@pytest.mark.parametrize("process", [{"prediction": "v"}, {"zero_terminal_snr": False}])
def test_a_process_without_a_scheduler_there_is_refused(tmp_path, capsys, process):
    assert "no scheduler" in error_of(capsys, exported, tmp_path, process)


@pytest.mark.parametrize("process", [
    {}, {"prediction": "v", "noise_schedule": "cosine"},
    {"prediction": "eps", "noise_schedule": "linear", "zero_terminal_snr": False}])
def test_their_own_loop_starts_at_full_noise(tmp_path, process):
    _, _, pipeline = exported(tmp_path, {**process, "guidance_scale": 1.0})
    scheduler = pipeline.scheduler
    noise = x = torch.randn(8, *LATENT)
    y = torch.zeros(8, dtype=torch.long)
    scheduler.set_timesteps(50)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pipeline.unet(x, t, y).sample, t, x).prev_sample
        theirs = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample.clamp(-1, 1)
    ours = pipeline.sample(noise, "normal", 50)
    assert theirs.isfinite().all() and abs(theirs.mean() - ours.mean()) < 0.1


# --- the command ---


@pytest.fixture
def evaluated(workspace):
    """workspace whose LDM has an evaluation.json with hardly any copies."""
    w = workspace
    report = {
        "ckpt": str(w.ldm_ckpt), "split": "val",
        "ckpt_sha256": hashlib.sha256(w.ldm_ckpt.read_bytes()).hexdigest(),
        "sampler": "dpmpp_2m_sde", "num_sampling_steps": 20, "guidance_scale": 1.0,
        "num_samples": {"normal": 100, "tb": 100},
        "copies": {"share": 0.02, "probability": 0.2},
        "verdicts": [verdicts.Verdict("fid (vae)", "ok", "1.25", "as 0.75", "")._asdict()]}

    def write(**changes):
        (w.out / "l" / "evaluation.json").write_text(json.dumps({**report, **changes}))
    w.write_evaluation = write
    write()
    return w


def test_export_writes_a_folder_that_samples_by_itself(evaluated, tmp_path):
    folder = tmp_path / "handed on"
    run("export.py", f"--ckpt={evaluated.ldm_ckpt}", f"--out_dir={folder}")
    moved = shutil.move(folder, tmp_path / "elsewhere")
    shutil.rmtree(evaluated.out)  # it needs nothing of ours
    env = {"CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(tmp_path / "cache")}

    def sampled(*argv, code=0):
        done = subprocess.run([sys.executable, moved / "pipeline.py", *argv], cwd=tmp_path, env=env,
                              capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done.stderr
    sampled("--num_samples=2", "--steps=4")
    made = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert made == [f"{name}_0000{i}.png" for name in ("normal", "tb") for i in range(2)]
    assert "knows normal, tb" in sampled("--classes=tb,x", code=2)
    drawn = [np.asarray(Image.open(tmp_path / "samples" / name)).astype(int) for name in made]
    assert drawn[0].shape == (32, 32) and drawn[0].std() > 1
    for other in drawn[1:3]:  # of the class, and of another with the same number
        assert np.abs(drawn[0] - other).mean() > 3
    card = (moved / "README.md").read_text()
    code = re.search("```python\n(.*?)```", card, re.DOTALL)[1]
    subprocess.run([sys.executable, "-c", f"{code}assert images[3].size == (32, 32)"], cwd=moved,
                   check=True, env=env)
    for text in ("license: ", "normal (8), tb (8)", "synthetic", "2.0 % of 200", "0.8 to 5.0 %",
                 "OK     fid (vae)  1.25  as 0.75"):
        assert text in card, text


@pytest.mark.parametrize("changes, reason, says", [
    ({"copies": {"share": 0.5, "probability": 1e-9}}, "50.0 % of the samples", "50.0 % of 200"),
    ({"num_samples": {"tb": 200}}, "no search for copies in 100 samples", "Not evaluated"),
    ({"num_samples": {"normal": 3, "tb": 3}}, "samples of all classes", "Not evaluated"),
    ({"data": [["tb", 9, "other"]]}, "run `python evaluate.py --ckpt=", "Not evaluated"),
    ({"ckpt_sha256": "another"}, "no search for copies", "Not evaluated")])
def test_no_model_that_may_copy_is_handed_on_unless_asked_for(evaluated, tmp_path, capsys, changes,
                                                              reason, says):
    evaluated.write_evaluation(**changes)
    argv = [f"--ckpt={evaluated.ldm_ckpt}", f"--out_dir={tmp_path / 'made'}"]
    assert reason in error_of(capsys, export.main, argv)
    assert not (tmp_path / "made").exists()
    export.main([*argv, "--allow_copies"])
    assert says in (tmp_path / "made" / "README.md").read_text()
    assert "exists" in error_of(capsys, export.main, [*argv, "--allow_copies"])


def test_the_card_says_what_the_model_was_made_of(evaluated):
    checkpoint = load_checkpoint(evaluated.ldm_ckpt, "ldm")
    checkpoint["args"] |= {"init_from": "/home/me/runs/parent/ckpts/best.pt", "augment": 2,
                           "overfit_k": 8}
    checkpoint |= {"class_names": ["normal", "tb"], "trained_classes": [1]}
    meta = {"data": [["normal", 5, ""], ["tb", 8, ""]], "world_size": 3, "git_commit": "abc"}
    vae_settings = load_checkpoint(evaluated.vae_ckpt, "vae")["args"]
    card = export.model_card(checkpoint, vae_settings, meta, None)
    for text in (": tb (8)", "started from a model of other images",
                 "2 augmented copies", "- autoencoder: phantom/TB, split train", "steps of 24",
                 "- memorised on purpose: 8", "Not evaluated"):
        assert text in card
    assert "/home" not in card and "normal" not in card
    assert "pipeline('tb', num_samples=4)" in card


# --- from diffusers ---


def make_theirs(folder, channels=3, widths=(32, 64), attention=False, quant_conv=True):
    """A random AutoencoderKL of diffusers, saved in a folder."""
    kind = "AttnDownEncoderBlock2D" if attention else "DownEncoderBlock2D"
    kinds = ["DownEncoderBlock2D"] * (len(widths) - 1) + [kind]
    net = diffusers.AutoencoderKL(
        in_channels=channels, out_channels=channels, down_block_types=kinds,
        up_block_types=[k.replace("DownEncoder", "UpDecoder") for k in reversed(kinds)],
        block_out_channels=widths, layers_per_block=2, latent_channels=4, norm_num_groups=32,
        use_quant_conv=quant_conv, use_post_quant_conv=quant_conv)
    randomised(net).save_pretrained(folder)
    return net


def started(folder, size=32):
    """Models of train_vae.py that start from a diffusers folder."""
    args = train_vae.parse_args([f"--init_from={folder}", f"--img_size={size}"])
    models = train_vae.build_models(args, CPU)
    weights = train_vae.initial_weights(args)
    train_vae.Run.restore(None, {models.vae: weights, models.ema.module: weights})
    return models


SD = (128, 256, 512, 512)  # sd-vae-ft-mse


@pytest.mark.parametrize("channels, widths, attention, quant_conv, size", [
    (3, (32, 64), False, True, 32), (1, (32, 32, 64), True, False, 32), (3, SD, False, True, 64)])
def test_an_autoencoder_of_theirs_is_the_same_here(tmp_path, channels, widths, attention,
                                                   quant_conv, size):
    theirs = make_theirs(tmp_path / "vae", channels, widths, attention, quant_conv)
    models = started(tmp_path, size)
    x = torch.rand(1, 1, size, size) * 2 - 1
    z = torch.randn(1, *models.vae.latent_shape)
    with torch.no_grad():
        posterior = theirs.encode(x.expand(-1, channels, -1, -1)).latent_dist
        decoded = theirs.decode(z).sample.mean(1, keepdim=True)
        for vae in (models.vae, models.ema.module):
            assert largest(vae.encode(x).mean, posterior.mean) < 1e-5
            assert largest(vae.encode(x).logvar, posterior.logvar) < 1e-5
            assert largest(vae.decode(z), decoded) < 1e-5


def test_attention_names_before_diffusers_018_are_read(tmp_path):
    theirs = make_theirs(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = safetensors.load_file(path)
    for old, new in diffusers_io.OLD_NAMES.items():
        weights = {key.replace(f".{new}.", f".{old}."): value for key, value in weights.items()}
    assert len(weights.keys() - theirs.state_dict().keys()) == 16
    safetensors.save_file(weights, path)
    vae = started(tmp_path).vae
    z = torch.randn(1, *vae.latent_shape)
    assert largest(vae.decode(z), theirs.decode(z).sample.mean(1, keepdim=True)) < 1e-5


@pytest.mark.parametrize("change, flags, reason", [
    ({"norm_num_groups": 16}, [], "norm_num_groups=16"),
    ({"_class_name": "VQModel"}, [], "VQModel"), ({"act_fn": "gelu"}, [], "act_fn"),
    ({}, ["--z_channels=8"], "z_channels=4: leave --z_channels out")])
def test_another_architecture_is_refused_by_name(tmp_path, capsys, change, flags, reason):
    make_theirs(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert reason in error_of(capsys, train_vae.parse_args, [f"--init_from={tmp_path}", *flags])


def test_weights_that_do_not_fit_are_refused(tmp_path, capsys):
    make_theirs(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = safetensors.load_file(path)
    safetensors.save_file(weights | {"encoder.more.bias": torch.zeros(1)}, path)
    assert "encoder.more.bias" in error_of(capsys, started, tmp_path)
    del weights["encoder.conv_out.bias"]
    safetensors.save_file(weights, path)
    assert "encoder.conv_out.bias" in error_of(capsys, started, tmp_path)
    path.write_bytes(b"x" * 99)
    assert "download it again" in error_of(capsys, started, tmp_path)


def test_the_stages_go_on_from_it_without_training(stages, tmp_path):
    make_theirs(tmp_path / "theirs")
    common = [f"--data_root={stages.data}", f"--output_root={tmp_path}"]
    out, _ = run("train_vae.py", *common, f"--init_from={tmp_path / 'theirs'}", "--img_size=32",
                 "--max_steps=0", "--run_name=v")
    assert "val/psnr" in out and (tmp_path / "v/samples/recon_ep0000.png").exists()
    shutil.rmtree(tmp_path / "theirs")  # it is in the run now
    run("train_vae.py", "--resume_dir", tmp_path / "v", f"--output_root={tmp_path}")
    run("find_latent_scale.py", *common, f"--ae_ckpt_path={tmp_path}/v/ckpts/last.pt")
    run("train_ldm.py", *common, f"--config={stages.ldm_config}", "--run_name=l", "--max_steps=4",
        f"--ae_ckpt_path={tmp_path}/v/ckpts/last.pt")
    run("export.py", f"--ckpt={tmp_path}/l/ckpts/best.pt", f"--out_dir={tmp_path}/out",
        "--allow_copies")
    again, _, _ = sample.load_autoencoder(tmp_path / "v/ckpts/last.pt", CPU)
    back = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out" / "vae")
    z = torch.randn(1, *again.latent_shape)
    with torch.no_grad():
        assert largest(again.decode(z), back.decode(z).sample) < 1e-5


def test_a_run_of_ours_is_a_start_too(stages):
    argv = [f"--init_from={stages.vae_ckpt}", f"--config={stages.vae_config}"]
    weights = train_vae.initial_weights(train_vae.parse_args(argv))
    expected = load_checkpoint(stages.vae_ckpt, "vae")["ema"]
    assert weights.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
