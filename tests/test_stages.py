"""The stages through the real command line: files, resuming, overfitting, processes, bad input."""
import argparse
import ast
import importlib
import json
import re
import shlex
import shutil
import signal
import socket

import numpy as np
import pytest
import torch
from conftest import ROOT, only_error, read_jsonl, start, strict, tree_hashes
from PIL import Image

import model
from lib import args as command_line
from lib.files import EXIT_FAILED, EXIT_STOPPED
from lib.run import load_checkpoint

DIVERSITY = {f"sample_diversity/{c}pairwise_mse_{k}"
             for c in ("", "normal/", "tb/") for k in ("mean", "std", "min", "max")}
LATENT = {f"final_latent_stats/{k}" for k in ("mean", "std", "min", "max", "target_std")}


def grey(path):
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image).astype(int)


def same(a, b):
    """Whether two checkpoints (nested dicts, lists, tensors, numbers) are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


# --- the files of the contract ---


def test_train_vae_leaves_the_files_of_the_contract(stages):
    folder = stages.out / "v"
    meta, summary = strict(folder / "run_meta.json"), strict(folder / "summary.json")
    assert meta["class_names"] == ["normal", "tb"]
    assert meta["img_size"] == 32 and meta["world_size"] == 1
    assert meta["args"]["z_channels"] == 2
    assert meta["packages"]["torch"] == torch.__version__ and "git_commit" in meta
    records = read_jsonl(folder / "metrics.jsonl")
    train = [r for r in records if "train/loss" in r]
    assert [r["step"] for r in train] == list(range(10, 101, 10))
    assert all("epoch" in r for r in records)
    names = ("loss", "rec", "kl", "g_loss", "d_loss", "grad_norm", "learning_rate")
    assert {f"train/{name}" for name in names} <= train[0].keys()
    assert train[0]["train/d_loss"] == 0 and train[-1]["train/d_loss"] > 0  # from disc_start on
    assert train[-1]["train/rec"] < 0.7 * train[0]["train/rec"]
    assert 12 < records[-1]["val/psnr"] < 40
    for name in ("ssim", "l1", "detail", "power_fine", "power_finest"):
        assert 0 < records[-1][f"val/{name}"] < 1  # so short a run leaves them blurred
    assert summary["step"] == 100
    judged = {v["metric"] for v in summary["verdicts"]}
    assert judged == {"train/loss", "train/grad_norm", "train/bad_steps", "val/psnr", "val/detail",
                      "val/power_finest", "val/lattice"}
    assert grey(folder / "samples/recon_ep0050.png").shape == (2 * (32 + 16), 6 * 34 + 2)


def test_an_autoencoder_is_judged_by_its_reconstructions(workspace, quick):
    """The adversarial part of train/loss rises and falls with a judge that learns too."""
    log = workspace.out / "v/metrics.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    lines = [json.dumps(r | {"train/loss": None} if "train/loss" in r else r) for r in records]
    log.write_text("".join(line + "\n" for line in lines))
    assert quick("train_vae.py", f"--resume_dir={workspace.out / 'v'}").code == 0
    levels = {v["metric"]: v["level"] for v in strict(workspace.out / "v/summary.json")["verdicts"]}
    assert levels["train/loss"] == "ok"  # null is never ok


def test_train_ldm_leaves_the_files_of_the_contract(stages):
    folder = stages.out / "l"
    summary, meta = strict(folder / "summary.json"), strict(folder / "run_meta.json")
    records = read_jsonl(folder / "metrics.jsonl")
    train = [r for r in records if "train/loss" in r]
    assert [r["step"] for r in train] == [5, 10, 15, 20]
    names = {f"train/{name}" for name in (
        "loss", "grad_norm", "learning_rate", "loss_t0", "loss_t1", "loss_t2", "loss_t3")}
    assert names <= train[0].keys()
    assert train[0]["train/learning_rate"] == pytest.approx(1e-3)  # warm-up of 5 steps is over
    sampled = [r for r in records if "final_latent_stats/mean" in r]
    assert [(r["step"], r["epoch"]) for r in sampled] == [(10, 5), (20, 10)]
    wanted = DIVERSITY | LATENT | {
        "sample_diversity/real_pairwise_mse_mean", "sample_diversity/ratio_to_real"}
    assert wanted <= sampled[0].keys() and wanted | names <= summary.keys()
    judged = {v["metric"] for v in summary["verdicts"]}
    assert {"train/loss", "final_latent_stats/std", "sample_diversity/pairwise_mse_mean"} <= judged
    assert all(v["level"] in ("ok", "watch", "bad") for v in summary["verdicts"])
    scale = strict(stages.out / "v/latent_scale.json")
    assert sampled[0]["final_latent_stats/target_std"] == pytest.approx(scale["std"])
    assert meta["latent_scale_factor"] == scale["latent_scale_factor"]
    assert meta["vae_sha256"] == scale["vae_sha256"]
    assert sorted(p.name for p in (folder / "samples").iterdir()) == [
        *(f"real_{c}.png" for c in ("normal", "tb")),
        *(f"sample_ep{e:04d}_{c}.png" for e in (5, 10) for c in ("normal", "tb"))]
    state = load_checkpoint(stages.ldm_ckpt, "ldm")
    assert state["latent_scale_factor"] == scale["latent_scale_factor"] and state["step"] == 20
    assert not [k for k in state["model"] if "_orig_mod" in k or k.startswith("module.")]


def test_sample_leaves_images_manifest_and_grid(stages):
    folder = stages.out / "l/samples_ancestral_10_guidance1_seed0"
    names = [f"{c}_{i:05d}.png" for c in ("normal", "tb") for i in range(3)]
    manifest = strict(folder / "manifest.json")
    assert (manifest["guidance_scale"], manifest["seed"], manifest["sampler"]) == (
        1.0, 0, "ancestral")
    files = [*names, "manifest.json", "metrics.json", "grid.png"]
    assert sorted(p.name for p in folder.iterdir()) == sorted(files)
    pictures = [grey(folder / n) for n in names]
    assert all(p.shape == (32, 32) for p in pictures)
    assert len({p.tobytes() for p in pictures}) == 6
    assert DIVERSITY | LATENT <= strict(folder / "metrics.json").keys()


READ = set()  # names of settings that were read


class Spy(argparse.Namespace):
    """Settings that remember which of them were read."""

    def __getattribute__(self, name):
        if not name.startswith("_"):
            READ.add(name)
        return super().__getattribute__(name)


# Flags that have a meaning only beside another one, or that parse_settings or build_denoiser read.
FOLLOWED = {"config", "check", "resume_dir", "wandb_project", "wandb_entity", "wandb_tags",
            "cache_latents", "num_workers", "skip_bad_images"}
ONLY_WITH = {
    "train_vae": {"perceptual_weight", "repeat_len", "disc_loss"},
    "train_ldm": {"ae_config_path", "repeat_len", "ldm_base_ch", "ldm_num_res_blocks",
                  "loss_weighting"},
    "find_latent_scale": {"ae_config_path"}, "sample": {"strength"}, "evaluate": {"samples_dir"}}


@pytest.mark.parametrize("name", ONLY_WITH)
def test_a_stage_reads_every_flag_that_it_takes(workspace, monkeypatch, name):
    stage = importlib.import_module(name)
    names = set()

    def spy(parser, argv=None, preset=None, kind=None):
        known = vars(command_line.parse_settings(parser, argv, preset, kind))
        names.update(known)
        READ.clear()
        return Spy(**known)
    monkeypatch.setattr(stage, "parse_settings", spy)
    monkeypatch.setattr(stage, "print_settings", lambda *args: None, raising=False)
    ldm, few = f"--ckpt={workspace.ldm_ckpt}", "--num_sampling_steps=2"
    argv = {"train_vae": workspace.vae("x", "--max_steps=2")[1:],
            "train_ldm": workspace.ldm("x", "--max_steps=2")[1:],
            "find_latent_scale": [*workspace.common, f"--ae_ckpt_path={workspace.vae_ckpt}"],
            "sample": [ldm, "--num_samples=2", few],
            "evaluate": [*workspace.common, ldm, "--num_samples=4", "--classifier_steps=2", few]}
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        stage.main(argv[name])
    finally:
        torch.set_num_threads(1)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    unread = names - READ - FOLLOWED - ONLY_WITH[name]
    assert not unread, f"{name}.py takes flags that do nothing: {sorted(unread)}"


def test_library_and_stages_import_no_other_stage():
    """But for the functions of sample.py, and for tests and the benchmark."""
    stages = {"train_vae", "train_ldm", "find_latent_scale", "sample", "evaluate", "report",
              "export", "bench", "gpu_check"}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("lib/*.py"), *ROOT.glob("slurm/*.py")]:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        imported = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
        imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        allowed = {"sample"} if path.parent == ROOT else set()
        assert not imported & (stages - allowed) or path.name == "bench.py", path.name


# --- resuming ---

FINAL = ("model", "ema", "disc", "vae_optimizer", "disc_optimizer", "optimizer",
         "step", "bad_steps", "best", "recent")


def assert_same_run(a, b, kind):
    one, two = (load_checkpoint(f / "ckpts/last.pt", kind) for f in (a, b))
    for key in FINAL:
        assert (key in one) == (key in two) and (key not in one or same(one[key], two[key])), key
    if kind == "ldm":
        one, two = (load_checkpoint(f / "ckpts/best.pt", kind) for f in (a, b))
        assert one["step"] > 0 and all(same(one[key], two[key]) for key in ("ema", "step", "best"))
    assert read_jsonl(a / "metrics.jsonl") == read_jsonl(b / "metrics.jsonl")
    pictures = {p.name: p.read_bytes() for p in (a / "samples").iterdir()}
    assert pictures and pictures == {p.name: p.read_bytes() for p in (b / "samples").iterdir()}
    ends = [strict(folder / "summary.json") for folder in (a, b)]
    for end in ends:
        end.pop("train/images_per_second", None)
    assert ends[0] == ends[1]


def test_a_stopped_run_ends_like_one_that_was_not_stopped(workspace, quick):
    """Here by a terminal that was closed; tests/robustness has the other signals."""
    more = ["--max_steps=14", "--disc_start=2", "--log_every=1", "--sample_every=5",
            "--cooldown=0.5"]
    assert quick(*workspace.vae("whole", *more)).code == 0
    process = start(*workspace.vae("parts", *more))
    for line in process.stdout:
        if "step 4 " in line:
            process.send_signal(signal.SIGHUP)
            break
    text, err = process.communicate(timeout=300)
    parts = workspace.out / "parts"
    assert process.returncode == EXIT_STOPPED, text + err
    assert "stopped (SIGHUP)" in text and f"--resume_dir={parts}" in text
    assert not (parts / "summary.json").exists()
    stopped_at = re.search(r"at step (\d+)", text).group(1)
    result = quick(*workspace.vae("parts", *more))
    assert re.search(rf"continues at step\s+{stopped_at}\n", result.out), result.err
    assert_same_run(workspace.out / "whole", parts, "vae")
    rates = [r["train/learning_rate"] for r in read_jsonl(parts / "metrics.jsonl")
             if "train/loss" in r]
    assert np.allclose(rates, 2e-3 * np.array([1] * 7 + [n / 7 for n in range(7, 0, -1)]))


@pytest.mark.parametrize("kind, dtype", [("vae", "fp32"), ("ldm", "bf16"), ("vae", "auto")])
def test_a_run_extended_by_max_steps_ends_like_a_longer_one(workspace, quick, kind, dtype):
    def train(name, steps):
        more = ["--disc_start=2"] if kind == "vae" else ["--num_sampling_steps=10"]
        result = quick(*getattr(workspace, kind)(
            name, *more, "--sample_every=2", "--log_every=1", f"--dtype={dtype}",
            f"--max_steps={steps}"))
        assert result.code == 0, result.err

    train("whole", 8)
    train("parts", 4)
    parts = workspace.out / "parts"
    result = quick(f"train_{kind}.py", f"--resume_dir={parts}", "--max_steps=8")  # its own settings
    assert result.code == 0, result.err
    assert "continues with max_steps=8 (was 4)" in result.out
    meta = strict(parts / "run_meta.json")
    stored = meta["args"]["dtype"]  # auto was decided by the first start
    assert meta["dtype"] == {"fp32": "float32", "bf16": "bfloat16"}[stored]
    assert dtype in (stored, "auto") and "since bf16" not in result.out
    assert_same_run(workspace.out / "whole", parts, kind)


@pytest.mark.parametrize("script, name", [("train_vae.py", "v"), ("train_ldm.py", "l")])
def test_continuing_a_finished_run_changes_nothing(workspace, quick, script, name):
    def files():
        return {p: v for p, v in tree_hashes(folder).items() if p != "run_meta.json"}
    folder = workspace.out / name
    before = files()
    result = quick(script, f"--resume_dir={folder}")
    assert result.code == 0, result.err
    assert files() == before


def test_a_run_that_diverges_says_so_and_leaves_good_weights(workspace, quick):
    result = quick(*workspace.ldm("bad", "--max_steps=40", "--lr=1e30", "--warmup_steps=0",
                                  "--max_bad_steps=4"))
    assert result.code == EXIT_FAILED and "--resume_dir" in only_error(result)
    state = load_checkpoint(workspace.out / "bad/ckpts/last.pt", "ldm")
    assert all(v.isfinite().all() for v in state["model"].values())
    summary = strict(workspace.out / "bad/summary.json")
    assert summary["diverged"] is True
    assert summary["train/bad_steps"] == 4  # the first step was good
    assert "  bad_steps 4  " in result.out
    assert "BAD    train/bad_steps" in result.out
    assert any(v["metric"] == "train/bad_steps" and v["level"] == "bad"
               for v in summary["verdicts"])


# --- it learns ---


def test_overfit_one_reproduces_its_image(workspace, quick):
    result = quick(*workspace.ldm(
        "one", "--overfit_one", "--batch_per_device=4", "--lr=2e-3", "--warmup_steps=0",
        "--sampler=dpmpp_2m", "--num_sampling_steps=20", "--max_steps=300", "--sample_every=1000",
        "--log_every=50"))
    summary = strict(workspace.out / "one/summary.json")
    assert summary["overfit/passed"] is True and "PASS: " in result.out
    assert summary["overfit/nearest_psnr"] > 25 and summary["overfit/coverage"] == 1
    records = read_jsonl(workspace.out / "one/metrics.jsonl")
    train = [r for r in records if "train/loss" in r]
    assert train[-1]["train/loss"] < 0.5 * train[0]["train/loss"]
    # sample.py draws the same image from the checkpoint.
    quick("sample.py", f"--ckpt={workspace.out}/one/ckpts/last.pt", "--num_samples=2",
          "--sampler=dpmpp_2m", "--num_sampling_steps=20", f"--out_dir={workspace.root}/s")
    original = grey(workspace.data / "TB/train/normal/00000.png")
    other = grey(workspace.data / "TB/train/normal/00001.png")
    drawn = grey(workspace.root / "s/normal_00000.png")
    assert np.abs(drawn - original).mean() < 0.6 * np.abs(drawn - other).mean()


@pytest.mark.parametrize("prob_uncond, trained", [
    (0.0, [True, True, False]), (0.999999, [False, False, True])])
def test_class_dropout_trains_the_null_row_and_only_it(workspace, quick, prob_uncond, trained):
    result = quick(*workspace.ldm("x", "--max_steps=6", "--weight_decay=0", "--warmup_steps=0",
                                  "--guidance_scale=1", f"--prob_uncond={prob_uncond}"))
    assert result.code == 0, result.err
    state = load_checkpoint(workspace.out / "x/ckpts/last.pt", "ldm")
    torch.manual_seed(0)
    before = model.build_denoiser(state["args"], state["latent_shape"], 2).unet.class_emb.weight
    after = state["model"]["unet.class_emb.weight"]
    assert (after != before).any(1).tolist() == trained


# --- sampling ---


def drawn(folder):
    return {p.name: grey(p) for p in folder.glob("*_0*.png")}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_samples_depend_on_no_batch_process_or_other_class(workspace, together, dtype):
    common = ["sample.py", f"--ckpt={workspace.ldm_ckpt}", "--num_samples=3",
              "--num_sampling_steps=10", f"--dtype={dtype}"]
    changes = {"reference": [], "one": ["--batch_size=1"], "five": ["--batch_size=5"],
               "tb": ["--classes=tb"], "two": ["--batch_size=2"]}
    for name, flags in changes.items():
        argv = [*common, *flags, f"--out_dir={workspace.root / name}"]
        results = together([argv] * (2 if name == "two" else 1), ranks=name == "two")
        assert not any(r.code for r in results), results[0].err
    pictures = {name: drawn(workspace.root / name) for name in changes}
    reference = pictures["reference"]
    for name, found in pictures.items():
        assert found.keys() == {k for k in reference if name != "tb" or k.startswith("tb")}
        worst = max(np.abs(p - reference[k]).max() for k, p in found.items())
        # bf16 keeps 8 bits, and batches round differently.
        assert worst <= (1 if dtype == "fp32" else 8), name
    two, one = (strict(workspace.root / n / "metrics.json") for n in ("two", "one"))
    tolerance = dict(rel=1e-3, abs=1e-4) if dtype == "fp32" else dict(rel=0.05, abs=0.05)
    for key in DIVERSITY | LATENT:
        assert two[key] == pytest.approx(one[key], **tolerance)


def test_a_moved_autoencoder_is_accepted_by_its_hash(workspace, quick):
    state = torch.load(workspace.ldm_ckpt, weights_only=True)
    torch.save({**state, "ae_ckpt_path": str(workspace.root / "gone/last.pt")}, workspace.ldm_ckpt)
    other = torch.load(workspace.vae_ckpt, weights_only=True)
    torch.save({**other, "step": 7}, workspace.root / "other.pt")
    common = ["sample.py", f"--ckpt={workspace.ldm_ckpt}", "--num_samples=1",
              "--num_sampling_steps=2"]
    before = tree_hashes(workspace.out)
    assert "--ae_ckpt_path" in only_error(quick(*common))
    line = only_error(quick(*common, f"--ae_ckpt_path={workspace.root / 'other.pt'}"))
    assert "hash" in line and tree_hashes(workspace.out) == before
    assert quick(*common, f"--ae_ckpt_path={workspace.vae_ckpt}").code == 0


# --- two processes ---

COMPILED = """
import importlib, os, sys
name = sys.argv.pop(1)
import torch
from torch._dynamo.utils import counters
compile = torch.compile
# What is traced, without generating code.
torch.compile = lambda module, mode: compile(module, backend="aot_eager")
importlib.import_module(name).main()
graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
open("graphs" + os.environ.get("RANK", "0"), "w").write(f"{graphs} graphs, {breaks} breaks")
"""


@pytest.mark.parametrize("kind, networks, processes", [
    ("ldm", 1, 1), *(pytest.param(*case, marks=pytest.mark.slow)
                     for case in (("vae", 2, 1), ("ldm", 1, 2), ("vae", 2, 2)))])
def test_a_run_compiles_each_network_once(workspace, together, kind, networks, processes):
    """Also under DDP, whose first pass is thrown away: its inputs have the strides of training."""
    script = workspace.root / "compiled.py"
    script.write_text(COMPILED)
    name, *argv = getattr(workspace, kind)(
        "c", "--max_steps=4", "--batch_per_device=4", "--compile=on",
        *(["--disc_start=1"] if kind == "vae" else []))
    results = together([(script, name.removesuffix(".py"), *argv)] * processes, processes > 1,
                       cwd=workspace.root)
    assert not any(r.code for r in results), results[0].err
    for rank in range(processes):
        assert (workspace.root / f"graphs{rank}").read_text() == f"{networks} graphs, 0 breaks"


# --- --check ---


def test_check_looks_at_the_inputs_and_writes_nothing(workspace, quick):
    def argv(script):
        ae = [f"--ae_ckpt_path={workspace.vae_ckpt}"] if script != "train_vae.py" else []
        return [script, *workspace.common, *ae]

    def refused(script, flag, says, *more):
        assert says in only_error(quick(*argv(script), flag, *more))

    trees = []
    for script in ("train_vae.py", "train_ldm.py", "find_latent_scale.py"):
        trees.append(tree_hashes(workspace.root))
        assert quick(*argv(script), "--check").code == 0
        refused(script, "--check=flags", "there: TB", "--task=CT")
    assert tree_hashes(workspace.root) == trees[0]
    (workspace.out / "v/latent_scale.json").unlink()
    refused("train_ldm.py", "--check", "find_latent_scale.py")
    workspace.vae_ckpt.unlink()
    for script in ("train_ldm.py", "find_latent_scale.py"):
        refused(script, "--check", "no checkpoint")
        assert quick(*argv(script), "--check=flags").code == 0


# --- bad input ---


BAD = {  # test_data.py has what is wrong with the images
    "size": ("train_vae.py --data_root={data} --img_size=30", "a multiple of 8"),
    "other size": ("train_ldm.py --data_root={data} --img_size=64", "works at 32"),
    "latent size": ("train_ldm.py --data_root={data} --ldm_ch_mults=1,1,1,1,1", "ldm_ch_mults"),
    "eps": ("train_ldm.py --data_root={data} --prediction=eps --zero_terminal_snr",
            "--no-zero_terminal_snr"),
    "no checkpoint": ("train_ldm.py --data_root={data} --ae_ckpt_path={tmp}/no.pt", "no.pt"),
    "no autoencoder": ("train_ldm.py --data_root={data} --task=CT", "train_vae.py"),
    "foreign checkpoint": ("train_ldm.py --data_root={data} --ae_ckpt_path={tmp}/foreign.pt",
                           "no checkpoint of this program"),
    "wrong kind": ("find_latent_scale.py --data_root={data} --ae_ckpt_path={ldm}", "train_ldm.py"),
    "wrong run": ("train_ldm.py --data_root={data} --resume_dir={out}/v", "train_vae.py"),
    "other prediction": ("train_ldm.py --resume_dir={out}/l --prediction=x0", "prediction=v"),
    "output root": ("train_vae.py --data_root={data} --output_root={ldm}/runs", "cannot write"),
    "no run": ("train_ldm.py --data_root={data} --resume_dir={tmp}/empty", "not a run folder"),
    "other scale size": ("find_latent_scale.py --data_root={data} --img_size=64", "works at 32"),
    "overfit k": ("train_ldm.py --data_root={data} --overfit_k=17", "only 16"),
    "device": ("train_vae.py --data_root={data} --device=abacus", "--device=cpu"),
    "missing gpu": ("sample.py --ckpt={ldm} --device=cuda:7", "--device=cpu"),
    "no ckpt": ("sample.py", "--ckpt"),
    "sample missing": ("sample.py --ckpt={tmp}/no.pt", "no.pt"),
    "sample kind": ("sample.py --ckpt={vae}", "train_ldm.py"),
}


@pytest.fixture(scope="module")
def bad_tree(stages, tmp_path_factory):
    """A copy of the runs, an empty folder, and a checkpoint of another program."""
    tmp = tmp_path_factory.mktemp("bad")
    shutil.copytree(stages.out, tmp / "runs")
    (tmp / "empty").mkdir()
    torch.save({"state_dict": {"w": torch.ones(2)}}, tmp / "foreign.pt")
    return tmp


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_changes_nothing(stages, bad_tree, quick, name):
    command, says = BAD[name]
    out = bad_tree / "runs"
    script, *args = command.format(
        data=stages.data, tmp=bad_tree, out=out, vae=out / "v/ckpts/last.pt",
        ldm=out / "l/ckpts/last.pt", vae_config=stages.vae_config).split()
    before = tree_hashes(bad_tree)
    root = [] if script == "sample.py" else [f"--output_root={out}"]
    result = quick(script, *root, *args)
    assert result.code == EXIT_FAILED and says in only_error(result), result.out
    assert tree_hashes(bad_tree) == before


def test_an_error_of_rank_0_ends_every_rank(workspace, together):
    argv = ["sample.py", f"--ckpt={workspace.ldm_ckpt}", f"--out_dir={workspace.ldm_ckpt}/s"]
    results = together([argv] * 2, ranks=True)
    assert [r.code for r in results] == [EXIT_FAILED] * 2
    assert "cannot write" in only_error(results[0])


@pytest.mark.parametrize("change", [None, {"vae_sha256": "0" * 64}])
def test_a_missing_or_wrong_scale_names_the_command(workspace, quick, change):
    path = workspace.out / "v/latent_scale.json"
    stored = strict(path)
    path.unlink()
    if change:
        path.write_text(json.dumps(stored | change))
    before = tree_hashes(workspace.out)
    line = only_error(quick(*workspace.ldm("x", "--max_steps=1")))
    assert tree_hashes(workspace.out) == before
    command = re.search("python (find_latent_scale.py .*)$", line).group(1)
    assert quick(*shlex.split(command), cwd=workspace.root).code == 0
    assert strict(path) == stored


@pytest.mark.parametrize("command, says", [
    ("train_vae.py --resume_dir={out}/v --z_channels=3", "leave --z_channels out"),
    ("train_vae.py --data_root={data} --init_from={out}/v/ckpts/last.pt --base_ch=16",
     "leave --base_ch out"),
    ("train_ldm.py --resume_dir={out}/l --ldm_ch_mults=1,1", "give '--ldm_ch_mults=(1, 2)'"),
    ("train_ldm.py --data_root={data} --config={config} --init_from={out}/l/ckpts/best.pt "
     "--ldm_base_ch=32", "give --ldm_base_ch=16"),
    ("train_ldm.py --data_root={data} --config={config} --init_from={out}/l/ckpts/best.pt "
     "--prediction=x0", "give --prediction=v"),
    ("train_ldm.py --resume_dir={out}/l --data_root={root}/d", "one of the training classes"),
    ("train_ldm.py --resume_dir={out}/l --data_root={root}/no", "no folder --data_root=")])
def test_a_start_that_does_not_fit_decodes_nothing(workspace, quick, image_tree, command, says):
    image_tree({f"TB/train/{name}": 2 for name in ("normal", "covid")}, "d")
    shutil.rmtree(workspace.out / "cache")
    before = tree_hashes(workspace.root)
    argv = command.format(data=workspace.data, out=workspace.out, root=workspace.root,
                          config=workspace.ldm_config)
    script, *flags = argv.split()
    assert says in only_error(quick(script, f"--output_root={workspace.out}", *flags))
    assert tree_hashes(workspace.root) == before


def test_a_newer_autoencoder_changes_no_run_that_goes_on(workspace, quick):
    argv = ["train_ldm.py", *workspace.common, f"--config={workspace.ldm_config}", "--run_name=x"]
    assert quick(*argv, "--max_steps=2").code == 0
    shutil.copytree(workspace.out / "v", workspace.out / "v2")
    meta, newer = (workspace.out / "v2" / name for name in ("run_meta.json", "ckpts/last.pt"))
    meta.write_text(json.dumps(strict(meta) | {"created": "2999-01-01T00:00:00+0000"}))
    torch.save({**torch.load(newer, weights_only=True), "step": 7}, newer)
    result = quick(*argv, "--max_steps=4")
    assert result.code == 0 and f"{workspace.out}/v/" in result.out, result.err


def test_a_factor_given_by_hand_wins_with_a_warning(workspace, quick):
    measured = strict(workspace.out / "v/latent_scale.json")["latent_scale_factor"]
    off, near = (quick(*workspace.ldm(name, "--max_steps=1",
                                      f"--latent_scale_factor={factor * measured}"))
                 for name, factor in (("off", 2), ("near", 1.005)))
    assert off.code == near.code == 0 and "+100 % off" in off.out and "% off" not in near.out
    state = load_checkpoint(workspace.out / "off/ckpts/last.pt", "ldm")
    assert state["latent_scale_factor"] == 2 * measured


def test_guidance_from_a_model_without_null_class_is_refused(workspace, quick):
    result = quick(*workspace.ldm("k", "--overfit_k=2", "--max_steps=1", "--no-use_ema"))
    assert result.code == 0, result.err
    before = tree_hashes(workspace.out)
    ckpt = f"--ckpt={workspace.out}/k/ckpts/last.pt"
    for flag, instead in (("--guidance_scale=2", "--guidance_scale=1"),
                          ("--use_ema", "--no-use_ema")):
        assert instead in only_error(quick("sample.py", ckpt, flag))
    assert tree_hashes(workspace.out) == before
    assert quick("sample.py", ckpt, "--num_samples=1", "--num_sampling_steps=2").code == 0


def test_a_process_whose_torchrun_is_gone_ends_at_once(stages, quick, monkeypatch):
    """PyTorch would try for ten minutes to reach it, and then perhaps the next one's port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}.items():
        monkeypatch.setenv(name, str(value))
    result = quick("find_latent_scale.py", *stages.common)
    assert result.code == EXIT_STOPPED and "torchrun has ended" in only_error(result)
