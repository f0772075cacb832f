"""A folder of samples holds images of one set of settings, and its manifest.json says which."""
import numpy as np
import pytest
import torch
from conftest import error_of, strict, tree_hashes, write_png
from PIL import Image

import sample
from lib import run


def argv(w, *more):
    """argv of sample.py: two samples of each class of `l` into the folder s."""
    return [f"--ckpt={w.ldm_ckpt}", "--num_samples=2", "--num_sampling_steps=2", "--device=cpu",
            f"--out_dir={w.root / 's'}", *more]


def manifest(folder):
    return strict(folder / "manifest.json")


def drawn(folder):
    return {p.name: p.read_bytes() for p in folder.glob("*_0*.png")}


@pytest.fixture
def folder(workspace):
    """Samples with --guidance_scale=7."""
    sample.main(argv(workspace, "--guidance_scale=7"))
    return workspace.root / "s"


@pytest.mark.parametrize("change, says", [
    (["--guidance_interval=0.1,0.2"], "guidance_interval [0.3, 0.7], now [0.1, 0.2]"),
    (["--seed=1"], "seed 0, now 1"), (["--num_sampling_steps=3"], "num_sampling_steps 2, now 3"),
    (["--sampler=ddim"], "sampler ancestral, now ddim"), (["--no-use_ema"], "use_ema"),
    (["--num_samples=5", "--guidance_scale=1"], "guidance_scale 7.0, now 1.0"),
    ({"step": 21}, "step 20, now 21"), ({"extra": 1}, "ckpt_sha256 ")])
def test_a_folder_never_mixes_two_settings(workspace, folder, capsys, change, says):
    if isinstance(change, dict):  # another state of the checkpoint is another setting
        change_checkpoint(workspace, change)
        change = []
    before = tree_hashes(folder)
    message = error_of(capsys, sample.main, argv(workspace, "--guidance_scale=7", *change))
    assert f"({says}" in message and "another --out_dir, or remove the folder" in message
    assert tree_hashes(folder) == before


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_images_without_a_manifest_are_not_added_to(workspace, capsys, content):
    folder = workspace.root / "s"
    write_png(folder / "tb_00000.png", np.zeros((32, 32), np.uint8))
    if content:
        (folder / "manifest.json").write_text(content)
    before = tree_hashes(folder)
    message = error_of(capsys, sample.main, argv(workspace))
    assert f"{folder} holds samples of other settings" in message and "--out_dir" in message
    assert tree_hashes(folder) == before


def test_more_and_fewer_of_the_same_settings_go_on(workspace, folder):
    first, settings = drawn(folder), manifest(folder)
    sample.main(argv(workspace, "--guidance_scale=7", "--num_samples=3", "--classes=tb"))
    more = drawn(folder)
    assert sorted(more) == sorted([*first, "tb_00002.png"])
    assert all(more[name] == first[name] for name in first if name.startswith("normal"))
    sample.main(argv(workspace, "--guidance_scale=7", "--num_samples=1"))
    assert sorted(drawn(folder)) == sorted(more) and manifest(folder) == settings


def test_a_run_that_was_broken_off_goes_on(workspace, monkeypatch):
    folder, count = workspace.root / "s", 0
    save_image = run.save_image

    def three_times(path, x):
        nonlocal count
        count += 1
        if count > 3:
            raise KeyboardInterrupt
        save_image(path, x)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "save_image", three_times)
        sample.main(argv(workspace, "--num_samples=4"))
    assert len(drawn(folder)) == 3
    sample.main(argv(workspace, "--num_samples=4"))
    assert len(drawn(folder)) == 8


def test_what_is_not_given_is_as_in_training(workspace, capsys):
    """And two settings have two folders."""
    state = torch.load(workspace.ldm_ckpt, weights_only=True)
    change_checkpoint(workspace, {"args": state["args"] | {  # a sampler's name of earlier versions
        "sampler": "dpmpp_sde", "num_sampling_steps": 3, "guidance_scale": 2.0}})
    common = [f"--ckpt={workspace.ldm_ckpt}", "--num_samples=1", "--device=cpu"]
    for flags, name in (([], "dpmpp_2m_sde_3_guidance2"), (["--sampler=ddim"], "ddim_3_guidance2"),
                        (["--num_sampling_steps=2"], "dpmpp_2m_sde_2_guidance2"),
                        (["--guidance_scale=1.5"], "dpmpp_2m_sde_3_guidance1.5")):
        sample.main([*common, *flags])
        made = manifest(workspace.out / f"l/samples_{name}_seed0")
        assert name == (f"{made['sampler']}_{made['num_sampling_steps']}"
                        f"_guidance{made['guidance_scale']:g}")


def change_checkpoint(w, values):
    torch.save({**torch.load(w.ldm_ckpt, weights_only=True), **values}, w.ldm_ckpt)


@pytest.mark.parametrize("name", ["../outside", "a/b", "..", ".hidden", "a\0b", "", 3])
def test_a_class_name_that_is_no_file_name_is_not_loaded(workspace, capsys, name):
    change_checkpoint(workspace, {"class_names": [name, "tb"]})
    before = tree_hashes(workspace.root)
    assert repr(name) in error_of(capsys, sample.main, argv(workspace))
    assert tree_hashes(workspace.root) == before


@pytest.mark.parametrize("classes, drawn_classes", [
    (None, ["a", "b c"]), ("b c", ["b c"]), ("a, b c", ["a", "b c"]), ("b c:a", ["a", "b c"]),
    ("b", None), ("a,", None), ("a,a", ["a"])])
def test_classes_are_a_list_of_names(workspace, capsys, classes, drawn_classes):
    change_checkpoint(workspace, {"class_names": ["a", "b c"]})
    words = argv(workspace, "--num_samples=1", *([f"--classes={classes}"] if classes else []))
    if drawn_classes is None:
        assert "it knows a, b c" in error_of(capsys, sample.main, words)
        return
    sample.main(words)
    assert sorted(drawn(workspace.root / "s")) == [f"{name}_00000.png" for name in drawn_classes]


def test_real_images_stand_above_the_samples_of_their_class(workspace, capsys):
    real = workspace.root / "d/TB/val"
    for i, grey in enumerate((0, 60, 120, 180, 240)):
        write_png(real / f"tb/{i}.png", np.full((64, 80), grey, np.uint8))
    sample.main(argv(workspace, f"--real_dir={real}"))
    sheet = np.asarray(Image.open(workspace.root / "s/grid.png"))
    assert sheet.shape == (3 * (32 + 16), 5 * 34 + 2)  # real ones of tb, then samples of both
    row = sheet[14:46, 2:].reshape(32, 5, 34)[:, :, :32]
    assert (row == np.array([0, 60, 120, 180, 240])[:, None]).all()
    for wrong in (real.parent, real / "none"):  # of the task, of no split
        message = error_of(capsys, sample.main, argv(
            workspace, f"--real_dir={wrong}", f"--out_dir={workspace.root / 'no'}"))
        assert "class 'val' in" in message or "no folder --real_dir=" in message
        assert not (workspace.root / "no").exists()


# --- composition and editing ---


@pytest.mark.parametrize("flags, says", [
    ("--classes=tb+flu", "each part once, out of normal, tb, null"),
    ("--classes=tb+tb", "each part once"),
    ("--classes=normal+tb,tb", "it knows normal, tb"),
    ("--classes=tb --compose=or", "--classes=A+B"), ("--classes=tb --base=null", "--classes=A+B"),
    ("--classes=normal+tb --weights=1", "a number for each of normal+tb"),
    ("--classes=normal+tb --base=flu", "the model of normal was not trained on that class"),
    ("--classes=normal+tb --compose=or --weights=1,0", "above 0 for --compose=or"),
    ("--classes=normal+tb --compose=or --sampler=ddim", "--sampler=ancestral"),
    ("--classes=normal+tb --compose=product --base=normal", "no --base"),
    ("--classes=normal+tb+null --compose=and", "takes two classes"),
    ("--classes=normal+tb --compose=and --weights=1,1", "--weights are for add and or"),
    ("--classes=normal+tb --guidance_scale=2", "takes no guidance"),
    ("--init_image=none.png", "error: none.png cannot be decoded ([Errno 2] No such file")])
def test_what_cannot_be_composed_or_edited_is_refused(workspace, capsys, flags, says):
    assert says in error_of(capsys, sample.main, argv(workspace, *flags.split()))
    assert not (workspace.root / "s").exists()


def test_null_is_no_base_of_a_model_without_a_null_class(workspace, capsys):
    state = torch.load(workspace.ldm_ckpt, weights_only=True)
    change_checkpoint(workspace, {"args": state["args"] | {"prob_uncond": 0.0}})
    flags = ["--classes=normal+tb", "--base=null"]
    assert "--base=null: the model of" in error_of(capsys, sample.main, argv(workspace, *flags))


@pytest.mark.parametrize("change, says", [
    ({"latent_scale_factor": 2.0}, "latent_scale_factor 2.0"), ({"vae_sha256": "x"}, "its hash"),
    ({"args": {"prediction": "x0"}}, "prediction x0"),
    ({"args": {"noise_schedule": "flow"}}, "noise_schedule flow")])
def test_a_second_model_must_be_of_the_same_process(workspace, capsys, change, says):
    state = torch.load(workspace.ldm_ckpt, weights_only=True)
    other = workspace.root / "b.pt"
    torch.save({**state, **change, "args": state["args"] | change.get("args", {})}, other)
    flags = ["--classes=normal+tb", f"--ckpt_b={other}"]
    assert says in error_of(capsys, sample.main, argv(workspace, *flags))


@pytest.mark.parametrize("rule, says", [
    ("add", ""), ("or", "are of the first class"), ("and", ""), ("product", "effective sample")])
def test_compositions_are_drawn_as_other_samples_are(workspace, capsys, rule, says):
    """With a second model of another class: tb of --ckpt, flu of --ckpt_b."""
    state = torch.load(workspace.ldm_ckpt, weights_only=True)
    other = workspace.root / "b.pt"
    torch.save({**state, "class_names": ["normal", "flu"]}, other)
    drawn_twice = []
    for batch in ("--batch_size=2", "--batch_size=1"):
        sample.main([f"--ckpt={workspace.ldm_ckpt}", f"--ckpt_b={other}", "--num_samples=2",
                     "--classes=tb+flu", f"--compose={rule}", "--num_sampling_steps=3", batch,
                     "--device=cpu", f"--out_dir={workspace.root / batch}"])
        drawn_twice.append(drawn(workspace.root / batch))
        assert says in capsys.readouterr().out
    assert sorted(drawn_twice[0]) == ["tb+flu_00000.png", "tb+flu_00001.png"]
    assert len(set(drawn_twice[0].values())) == 2 or rule == "product"  # of one start
    assert drawn_twice[0] == drawn_twice[1] or rule == "product"  # whose images are not independent
    made = manifest(workspace.root / batch)
    assert (made["compose"], made["ckpt_b"], made["guidance_scale"]) == (rule, str(other), 1)
    assert made["sampler"] == "ancestral"


def test_an_edited_image_begins_as_its_reconstruction(workspace, capsys):
    """At strength 0 for all classes; its own class is that of its folder, with the same noise."""
    path = sorted((workspace.data / "TB/val/tb").glob("*.png"))[0]
    for strength, sampler in (("0", "ancestral"), ("0.7", "ancestral"), ("0.7", "ddim")):
        folder = workspace.root / f"{strength}_{sampler}"
        sample.main([*argv(workspace, f"--init_image={path}", f"--strength={strength}"),
                     f"--out_dir={folder}", f"--sampler={sampler}"])
        made = {p.stem: np.asarray(Image.open(p)).astype(int) for p in folder.glob("*_0*.png")}
        sheet = np.asarray(Image.open(folder / "grid.png"))
        assert sheet.shape == (3 * (32 + 16), 2 * 34 + 2)  # image, normal and tb, differences
        assert (sheet[14:46, 2:34] == np.asarray(Image.open(path))).all()
        same = [np.abs(image - sheet[14:46, 36:68]).max() <= 1 for image in made.values()]
        assert all(same) if strength == "0" else not any(same)
        if strength == "0.7":
            assert (made["tb_00000"] != made["normal_00000"]).any() and len(made) == 2
        less_own = sheet[2 * 48 + 14:2 * 48 + 46, 36:68]
        assert (less_own == 128).all()  # tb less tb: the grey in the middle
