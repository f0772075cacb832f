"""evaluate.py: every metric catches the constructed case it is meant for, and the report comes out
of the command line."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import error_of, tree_hashes, write_png
from PIL import Image, ImageFilter

import evaluate
import sample
from lib import dist, phantom

TSTR, ON_HELD_OUT = (f"{name}, tested on {evaluate.HELD_OUT}" for name in (
    evaluate.TSTR, evaluate.REAL))
CPU = dist.DistContext(0, 1, torch.device("cpu"), torch.float32, "")


def test_the_baseline_has_as_many_of_each_class_as_samples():
    labels = np.repeat([0, 1, 2], [50, 3, 20])
    like = np.array([1, 0, 1, 0, 1, 1, 1])  # no samples of class 2

    def choose(seed):
        return evaluate.as_many(labels, like, np.random.default_rng(seed))
    chosen = choose(0)
    assert np.bincount(labels[chosen]).tolist() == [2, 3]  # all three there are of class 1
    assert len(set(chosen)) == 5
    assert chosen.tolist() == choose(0).tolist() != choose(1).tolist()


def test_a_distance_stands_beside_that_of_as_many_real_images():
    g = torch.Generator().manual_seed(0)

    def group(count):
        return evaluate.Labelled(np.arange(count) % 2, torch.randn(count, 3, generator=g))

    samples, train, held_out = group(40), group(300), group(200)
    found = evaluate.distance(samples, train, held_out, seed=0)
    assert found["num"] == 40
    # All are of one distribution: the samples lie within what the choice of images alone does.
    assert abs(found["fid"] - found["baseline"]) < 4 * found["bootstrap_std"] > 0
    all_images = evaluate.distance(train, train, held_out, seed=0)
    assert found["baseline"] > 1.5 * all_images["fid"]  # which is why the number matters
    found = evaluate.distance(samples, train.subset(np.arange(40)), held_out, seed=0)
    assert found["num"] == 40 and found["bootstrap_std"] > 0.01  # though there is no choice


def test_uneven_classes_are_compared_in_equal_proportions():
    g = torch.Generator().manual_seed(0)

    def images(*counts):
        labels = np.repeat([0, 1], counts)
        return evaluate.Labelled(labels, torch.randn(len(labels), 3, generator=g)
                                 + 4 * torch.from_numpy(labels)[:, None])

    samples, train, held_out = images(45, 45), images(120, 6), images(48, 3)
    like = evaluate.proportional(held_out.labels, samples.labels, train.labels)
    assert np.bincount(like).tolist() == [45, 2]
    assert np.bincount(evaluate.proportional(held_out.labels, train.labels)).tolist() == [96, 6]
    found = evaluate.distance(samples, train, held_out, seed=0)
    assert found["num"] == 47
    assert abs(found["fid"] - found["baseline"]) < 3 * found["bootstrap_std"]
    assert found["fid"] < 0.5 * evaluate.distance(samples, train, images(24, 24), seed=0)["fid"]


def grey(path, value=0, shape=(16, 16)):
    write_png(path, np.full(shape, value, np.uint8))


def test_folders_without_samples_are_refused(tmp_path, capsys):
    grey(tmp_path / "tb/a.png")
    for wrong in (tmp_path / "tb", tmp_path / "none"):
        message = error_of(capsys, evaluate.read_samples, wrong, ["normal", "tb"], None)
        assert f"no images in {wrong}: name them CLASS_NUMBER.png" in message
    (tmp_path / "tb/b.png").write_bytes(b"no image")
    message = error_of(capsys, evaluate.read_samples, tmp_path, ["normal", "tb"], None)
    assert f"{tmp_path / 'tb/b.png'} cannot be decoded" in message


def test_the_name_of_a_file_or_folder_says_the_class_of_a_sample(tmp_path, capsys):
    names = ["tb", "tb_old", "covid [PA]", "a, b", "x.y", "*", "none"]
    for file in ("tb_0.png", "tb_old_0.png", "tb_old_1.png", "covid [PA]_0.png", "a, b_0.png",
                 "a, b/1.png", "x.y_0.png", "*_0.png", "covid P_0.png", "tb.png", "old/tb_0.png"):
        grey(tmp_path / file)
    grey(tmp_path / "grid.png")
    (tmp_path / "a, b/notes.txt").write_text("")
    samples = evaluate.read_samples(tmp_path, names, None)
    assert np.bincount(samples.labels, minlength=7).tolist() == [1, 2, 1, 2, 1, 1, 0]
    assert (samples.values == -1).all()
    assert "3 images of no class of the data are left out" in capsys.readouterr().out
    grey(tmp_path / "tb/wide.png", shape=(32, 40))
    message = error_of(capsys, evaluate.read_samples, tmp_path, names, None)
    assert "images of 16, 32 pixels: give --img_size" in message
    assert evaluate.read_samples(tmp_path, names, 24).values.shape == (9, 1, 24, 24)


def test_halves_are_disjoint_and_have_every_class():
    def halves(labels):
        images = evaluate.Labelled(labels, torch.arange(len(labels)))
        return evaluate.halves(images, seed=0)
    one, other = halves(np.repeat([0, 1], [9, 3]))
    assert sorted(one.joined(other).values.tolist()) == list(range(12))
    for half in (one, other):
        assert len(half) == 6 and np.bincount(half.labels).min() >= 1
    one, other = halves(np.zeros(3 * evaluate.MOST_FOR_C2ST, int))
    assert len(one) == len(other) == evaluate.MOST_FOR_C2ST
    assert not set(one.values.tolist()) & set(other.values.tolist())


@pytest.mark.parametrize("side, size, most", [(128, 64, 64), (65, 64, 0), (32, 32, 0)])
def test_crops_stay_on_a_lattice_of_eight_pixels(side, size, most):
    rng = torch.Generator().manual_seed(0)
    x = torch.arange(side * side, dtype=torch.float32).view(1, 1, side, side)
    corners = set()
    for _ in range(200):
        crop = evaluate.random_crop(x, rng)
        assert crop.shape == (1, 1, size, size)
        row, column = divmod(int(crop[0, 0, 0, 0]), side)
        corners |= {row, column}
    assert corners == set(range(0, most + 1, 8))


# --- constructed generators: each must be caught by the metric that is meant for it ---


def as_grey(values):
    return values.round().clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def generators(tmp_path_factory):
    """Folders of phantom 'samples' beside a real data set, and the report of each through the
    command line."""
    root = tmp_path_factory.mktemp("generators")
    phantom.write_phantoms(root / "data", 120, 60, 64)
    phantom.write_phantoms(root / "fresh", 60, 0, 64, seed=2)
    fresh, train = root / "fresh/TB/train", root / "data/TB/train"
    rng = np.random.default_rng(0)
    for name in ("normal", "tb"):
        other = {"normal": "tb", "tb": "normal"}[name]
        shutil.copytree(fresh / name, root / "good" / name)
        shutil.copytree(fresh / other, root / "swapped" / name)
        (root / "collapsed" / name).mkdir(parents=True)
        for i in range(60):
            noise = rng.integers(0, 256, (64, 64), dtype=np.uint8)
            write_png(root / "noise" / name / f"{i}.png", noise)
            with Image.open(train / name / f"{i:05d}.png") as image:
                copy = np.asarray(image).astype(float) * 0.9 + rng.normal(8, 2, (64, 64))
            write_png(root / "copies" / name / f"{i}.png", as_grey(copy))
            with Image.open(fresh / name / f"{i:05d}.png") as image:
                real = np.asarray(image, float)
                blurred = np.asarray(image.resize((8, 8)).resize((64, 64)))
                softer = np.asarray(image.filter(ImageFilter.GaussianBlur(0.7)))
            lattice = np.add.outer(np.arange(64) % 4 == 0, np.arange(64) % 4 == 0) * 2.0
            write_png(root / "latticed" / name / f"{i}.png", as_grey(real + lattice))
            write_png(root / "slightly_blurred" / name / f"{i}.png", softer)
            write_png(root / "blurred" / name / f"{i}.png", blurred)
            write_png(root / "upside_down" / name / f"{i}.png", as_grey(real[::-1]))
            shutil.copy(fresh / name / "00000.png", root / "collapsed" / name / f"{i}.png")

    def report(name):
        out = root / "out" / name
        if not out.exists():
            parts = {"good": "distances,power,c2st,copies,tstr", "latticed": "distances,c2st",
                     "swapped": "distances,tstr", "copies": "copies", "slightly_blurred": "power"}
            evaluate.main([f"--samples_dir={root / name}", f"--data_root={root / 'data'}",
                           f"--parts={parts.get(name, 'distances')}", f"--out_dir={out}",
                           f"--output_root={root / 'runs'}",
                           f"--classifier_steps={120 if name in ('good', 'swapped') else 200}"])
        return json.loads((out / "evaluation.json").read_text())
    return report


def level(report, metric):
    return next(v["level"] for v in report["verdicts"] if v["metric"] == metric)


def test_real_images_of_other_patients_pass(generators):
    report = generators("good")
    assert {v["level"] for v in report["verdicts"]} == {"ok"}, report["verdicts"]
    value, low, high = report["auroc"][evaluate.ON_SAMPLES]
    assert low < value < high and value > 0.8
    value, low, high = report["auroc"][TSTR]
    assert value > 0.7 and low <= value <= high
    # Images that are as good as more real ones are of no more use than these are.
    gain, low, high = report["gain"][evaluate.HELD_OUT]
    assert low <= gain <= high and low <= 0
    assert report["copies"]["probability"] > 0.025


@pytest.mark.parametrize("name", ["noise", "upside_down", "blurred", "collapsed"])
def test_what_is_plainly_wrong_is_far(generators, name):
    assert level(generators(name), "fid (classifier)") == "bad", generators(name)["verdicts"]


def test_wrong_fine_detail_shows_in_its_power(generators):
    report = generators("slightly_blurred")
    assert 0.1 < report["power"]["samples"]["16-32"] < 0.5
    assert level(report, "sample_quality/power") != "ok"


def test_a_lattice_is_seen_by_c2st(generators):
    report, good = generators("latticed"), generators("good")
    assert level(good, "two-sample") == "ok" and level(report, "two-sample") == "watch"
    assert level(report, "fid (classifier)") != "bad"
    coarse, half, full = (area for area, _, _ in report["c2st_by_size"]["samples"].values())
    assert max(coarse, half) < 0.65 < 0.9 < full
    (value, low, high), = good["c2st_by_size"]["baseline"].values()
    assert low < 0.5 < high and low < value < high


def test_copies_of_training_images_are_found(generators):
    report = generators("copies")
    assert report["copies"]["share"] > 0.9 and level(report, "copies/share") == "bad"


def test_swapped_labels_are_found(generators):
    report, good = generators("swapped"), generators("good")
    assert report["auroc"][evaluate.ON_SAMPLES][2] < 0.5
    assert level(report, "class fidelity") == "bad"
    assert report["auroc"][TSTR][0] < 0.4
    for name, farther in (("all", False), ("normal", True)):  # the whole is the same
        fid, good_fid = (r["groups"]["classifier"][name]["fid"] for r in (report, good))
        assert (fid > 2 * good_fid) == farther


@pytest.mark.parametrize("interval, expected", [
    ((1.0, 0.98, 1.0), "watch"), ((0.92, 0.85, 0.97), "ok")])
def test_a_caricature_is_no_success(interval, expected):
    auroc = {evaluate.ON_SAMPLES: interval, ON_HELD_OUT: (0.85, 0.78, 0.91)}
    verdict, = evaluate.judge({"groups": {}, "auroc": auroc})
    assert (verdict.metric, verdict.level) == ("class fidelity", expected)
    assert ("caricatures" in verdict.advice) == (expected == "watch")


@pytest.mark.parametrize("samples, baseline, expected", [
    ((1.0, 0.55, 1.0), (0.7, 0.3, 1.0), "watch"), ((0.8, 0.72, 0.87), (0.66, 0.4, 0.9), "watch"),
    ((0.8, 0.72, 0.87), (0.79, 0.7, 0.86), "ok"), ((0.62, 0.5, 0.7), (0.5, 0.4, 0.6), "ok")])
def test_what_a_network_tells_apart_is_not_green(samples, baseline, expected):
    verdict, = evaluate.judge({"c2st_by_size": {
        row: {"16": (0.5, 0.4, 0.6), "32": of}
        for row, of in (("samples", samples), ("baseline", baseline))}})
    assert (verdict.metric, verdict.level) == ("two-sample", expected)


def test_a_verdict_names_its_baseline_and_what_to_do():
    verdicts = [*evaluate.judge({
        "groups": {"x": {"all": {"fid": 9.0, "baseline": 1.0, "bootstrap_std": 0.1}}},
        "power": {"samples": {"num": 8, "4-8": 2.1, "8-16": 0.2}}})]
    assert [(v.metric, v.level, v.value) for v in verdicts] == [
        ("fid (x)", "bad", "9.000 (baseline 1.000)"),
        ("sample_quality/power", "bad", "0.2 (0.5 to 2)")]
    assert all("train longer" in v.advice.lower() for v in verdicts)


# --- the command line ---


def test_report_of_a_model_and_of_its_samples(workspace, quick):
    common = [*workspace.common, "--classifier_steps=20"]
    ckpt = f"--ckpt={workspace.ldm_ckpt}"
    sampling = ["--num_samples=4", "--num_sampling_steps=5", "--sampler=ddim"]
    result = quick("evaluate.py", *common, ckpt, *sampling)
    assert result.code == 0, result.err
    report = json.loads((workspace.out / "l/evaluation.json").read_text())
    assert report["sampler"] == "ddim" and report["step"] == 20
    assert list(report["groups"]) == ["classifier", "vae"]
    assert {row: of["num"] for row, of in report["power"].items()} == {
        "samples": 8, "baseline": 16, "held_out": 6, "decoded": 6}
    for name in ("all", "normal", "tb"):
        for space in ("classifier", "vae"):
            found = report["groups"][space][name]
            assert list(found) == ["num", "fid", "baseline", "bootstrap_std"]
            assert found["num"] == (8 if name == "all" else 4)
            assert f"fid {found['fid']:.4g}" in result.out
    with Image.open(workspace.out / "l/evaluation_pairs.png") as pairs:
        assert pairs.size == (8 * 34 + 2, 2 * (32 + 16))

    # --- a part alone: what was measured before on the same samples stays ---
    assert report.keys() >= {"c2st_by_size", "diffusion_classifier", "membership", "gain"}
    assert len(report["copies"]["power"]) == 8
    result = quick("evaluate.py", *common, ckpt, *sampling, "--parts=power,copies")
    assert result.code == 0 and "classifier on" not in result.err + result.out, result.err
    assert json.loads((workspace.out / "l/evaluation.json").read_text()) == report

    lost = quick("evaluate.py", *common, ckpt, *sampling, "--parts=power", "--seed=1")
    assert "has parts of other settings (seed)" in lost.err and lost.code != 0

    # --- the same samples as a folder, in one space: nothing is written there ---
    folder = workspace.root / "s"
    assert quick("sample.py", ckpt, *sampling, f"--out_dir={folder}").code == 0
    before = tree_hashes(folder)
    again = quick("evaluate.py", *common, f"--ae_ckpt_path={workspace.vae_ckpt}", "--features=vae",
                  f"--samples_dir={folder}")
    assert again.code == 0, again.err
    assert tree_hashes(folder) == before
    made, = workspace.out.glob("evaluation_tb_*")
    assert {path.name for path in made.iterdir()} == {"evaluation.json", "evaluation_pairs.png"}
    other = json.loads((made / "evaluation.json").read_text())
    assert other["auroc"] == report["auroc"] and other["c2st_by_size"] == report["c2st_by_size"]
    assert other["groups"] == {"vae": report["groups"]["vae"]}
    again = ["evaluate.py", *common, "--features=vae", f"--ae_ckpt_path={workspace.vae_ckpt}",
             f"--samples_dir={folder}", f"--out_dir={made}", "--parts=power"]
    assert quick(*again).code == 0
    grey(folder / "tb_00000.png", 9, (32, 32))  # another image of that name
    assert "(samples_sha256)" in quick(*again).err


def test_bad_input_is_one_line(workspace, image_tree, capsys, monkeypatch):
    monkeypatch.setattr(sample, "sample_batches", None)  # mistakes show before
    counts = {f"TB/{split}/{name}": 3 for split in ("train", "val") for name in ("a", "b")}
    other, ckpt = image_tree(counts, "other"), f"--ckpt={workspace.ldm_ckpt}"
    small = image_tree({"normal": 1, "tb": 1}, "small")
    for argv, says in (
            ([f"--data_root={other}", ckpt], "normal, tb"),
            ([], "--samples_dir"),
            ([ckpt, "--samples_dir=x"], "either"),
            (["--samples_dir=x"], "--img_size"),
            ([*workspace.common, ckpt, "--img_size=64"], "works at 32"),
            ([*workspace.common, f"--samples_dir={small}"], "of class normal, tb: raise"),
            ([*workspace.common, ckpt, "--parts=power,kid"], "no part kid: --parts takes distan"),
            ([*workspace.common, f"--samples_dir={small}", "--parts=membership"], "no part member"),
            ([*workspace.common, ckpt, "--features=x"], "classifier,vae")):
        assert says in error_of(capsys, evaluate.main, [
            f"--output_root={workspace.out}", "--classifier_steps=1", "--device=cpu", *argv])


def test_classes_without_samples_are_not_compared(workspace, quick):
    result = quick("evaluate.py", f"--data_root={workspace.data}", "--classes=normal",
                   "--split=train", f"--output_root={workspace.out}",
                   f"--ckpt={workspace.ldm_ckpt}", "--num_samples=4", "--num_sampling_steps=2",
                   "--classifier_steps=2")
    assert result.code == 0, result.err
    report = json.loads((workspace.out / "l/evaluation.json").read_text())
    assert set(report["groups"]["classifier"]) == {"all", "normal"}
    assert "auroc" not in report and "gain" not in report
    assert None not in report["groups"]["vae"]["all"].values()


def test_nan_is_never_ok():
    for bad, watch in ((False, False), (False, True)):
        assert evaluate.verdict("x", float("nan"), "", bad, watch, "", "").level == "bad"
    labels, nan = np.arange(20) % 2, float("nan")
    fine = evaluate.Labelled(labels, torch.randn(20, 4))
    broken = evaluate.Labelled(labels, torch.full((20, 4), nan))
    for sets in ((broken, fine, fine), (fine, broken, fine), (broken, broken, broken)):
        found = evaluate.distance(*sets, seed=0)
        auroc = dict.fromkeys((evaluate.ON_SAMPLES, ON_HELD_OUT), (nan, nan, nan))
        levels = [v.level for v in evaluate.judge({
            "groups": {"x": {"all": found}}, "auroc": auroc,
            "power": {"samples": {"num": 20, "4-8": nan, "8-16": 1.0}}})]
        assert levels == ["bad"] * 3


def test_classifiers_are_tested_on_another_site_too(workspace, quick):
    """There the same classifiers do worse on images whose classes are swapped, and the two gains
    share their error."""
    site = workspace.root / "site"
    phantom.write_phantoms(site, 0, 8, 32, seed=5)
    for old, new in (("normal", "x"), ("tb", "normal"), ("x", "tb")):
        (site / "TB/val" / old).rename(site / "TB/val" / new)
    result = quick("evaluate.py", *workspace.common, f"--ckpt={workspace.ldm_ckpt}",
                   f"--test_root={site}", "--parts=tstr,classifier", "--num_samples=3",
                   "--num_sampling_steps=2", "--classifier_steps=60")
    assert result.code == 0, result.err
    report = json.loads((workspace.out / "l/evaluation.json").read_text())
    assert {where: [count for _, count, _ in of] for where, of in report["test_data"].items()} == {
        evaluate.HELD_OUT: [3, 3], evaluate.SITE: [8, 8]}
    assert report["gain"].keys() == {evaluate.HELD_OUT, evaluate.SITE}
    for found in (report["auroc"], report["diffusion_classifier"]):
        assert found[ON_HELD_OUT][0] > 0.5 > found[f"{evaluate.REAL}, tested on {evaluate.SITE}"][0]


# --- what the model knows: trained on phantoms with and without an effusion ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory, quick):
    """{name: evaluation.json} of models of phantoms with and without an effusion, of their training
    images as they are, with shuffled labels, or few of them; `swapped`: the first model, with the
    two classes of the held-out images swapped."""
    root = tmp_path_factory.mktemp("trained")
    right = root / "right/TB"
    phantom.write_phantoms(root / "right", 100, 40, 32, classes=("normal", "effusion"))
    for name in ("shuffled", "swapped", "few"):
        shutil.copytree(right, root / name / "TB")
    for i in range(100):
        paths = [Path("TB/train", name, f"{i:05d}.png") for name in ("normal", "effusion")]
        if i % 2:
            for path, other in zip(paths, paths[::-1], strict=True):
                shutil.copy(root / "right" / path, root / "shuffled" / other)
        if i >= 12:
            for path in paths:
                (root / "few" / path).unlink()
    for old, new in (("normal", "x"), ("effusion", "normal"), ("x", "effusion")):
        (root / "swapped/TB/val" / old).rename(root / "swapped/TB/val" / new)

    def stage(script, name, *flags):
        result = quick(script, f"--data_root={root / name}", f"--output_root={root}",
                       "--device=cpu", *flags)
        assert result.code == 0, result.err

    autoencoder = f"--ae_ckpt_path={root / 'ae/ckpts/last.pt'}"
    stage("train_vae.py", "right", "--img_size=32", "--base_ch=16", "--ch_mults=1,2",
          "--num_res_blocks=1", "--disc_weight=0", "--patch_size=2", "--linear_path",
          "--max_steps=300", "--batch_per_device=8", "--lr=1e-3", "--run_name=ae", "--dtype=fp32")
    stage("find_latent_scale.py", "right", autoencoder)
    for name, steps in (("right", 1000), ("shuffled", 700), ("few", 700)):
        stage("train_ldm.py", name, autoencoder, f"--max_steps={steps}", f"--run_name={name}",
              "--ldm_base_ch=32", "--ldm_ch_mults=1,2", "--ldm_num_res_blocks=1", "--patience=0",
              "--ldm_attn_res=4", "--epochs=1000", "--sample_every=1000", "--lr=1e-3",
              "--warmup_steps=50", "--sampler=ddim", "--num_sampling_steps=2", "--no-wandb",
              "--sample_batch_size=2", "--dtype=fp32")
    reports = {}
    for name, run in (("right", "right"), ("shuffled", "shuffled"), ("swapped", "right"),
                      ("few", "few")):
        stage("evaluate.py", name, f"--ckpt={root / run / 'ckpts/last.pt'}", "--dtype=fp32",
              "--parts=classifier,membership", f"--out_dir={root / name}", "--classifier_steps=50")
        reports[name] = json.loads((root / name / "evaluation.json").read_text())
    return reports


@pytest.mark.slow
@pytest.mark.parametrize("name, low, high, expected", [
    ("right", 0.9, 1, "ok"), ("shuffled", 0.35, 0.65, "watch"), ("swapped", 0, 0.1, "bad")])
def test_a_model_judges_classes_by_the_labels_it_learnt(trained, name, low, high, expected):
    found = trained[name]["diffusion_classifier"]
    area, *interval = found[f"{evaluate.DENOISING}, tested on {evaluate.HELD_OUT}"]
    assert low < area < high and interval[0] < area < interval[1]
    assert level(trained[name], "diffusion classifier") == expected


@pytest.mark.slow
def test_a_model_of_few_images_gives_them_away(trained):
    found = trained["few"]["membership"]
    assert found["loss"][0] > 0.9 and level(trained["few"], "membership") == "bad"
    assert found["control"][1] < 0.6  # the autoencoder has seen more images
    assert level(trained["right"], "membership") == "ok"
