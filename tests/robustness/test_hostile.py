"""Full disks, damaged files, random input: one clear line or the right result, no traceback."""
import contextlib
import io
import os
import resource
import subprocess
import tempfile

import hypothesis
import numpy as np
import pytest
import torch
from conftest import only_error, tree_hashes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_stages import assert_same_run, same

from lib import decode, run
from lib.files import EXIT_FAILED

PAGE = os.sysconf("SC_PAGE_SIZE")

hypothesis.configuration.set_hypothesis_home_dir(tempfile.gettempdir())  # nothing beside the tests
repeatable = settings(derandomize=True, deadline=None, database=None,
                      suppress_health_check=list(hypothesis.HealthCheck))


def line_of(error):
    """The one line that SystemExit ends the program with."""
    line = str(error)
    assert error.code == EXIT_FAILED and line.startswith("error: "), line
    assert len(line.splitlines()) == 1, line
    return line


# --- full disk ----------------------------------------------------------------------------------


class Disk:
    """A small file system of its own. `filler` takes what a test wants taken."""

    def __init__(self, folder):
        self.folder, self.filler = folder, folder / "filler"

    def leave(self, size):
        """Fill the disk but for `size` bytes."""
        self.free()
        stat = os.statvfs(self.folder)
        with open(self.filler, "wb") as f:
            os.posix_fallocate(f.fileno(), 0, stat.f_bavail * stat.f_frsize - size)

    def free(self):
        self.filler.unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)],
                               capture_output=True, text=True, check=False)
    except FileNotFoundError as e:
        pytest.skip(f"no disk to fill: {e}")
    if mount.returncode:
        pytest.skip(f"no disk to fill: {mount.stderr.strip()}")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def refused(result, what):
    """The error of a stage that met a full disk: one line that names the file."""
    line = only_error(result)
    assert result.code == EXIT_FAILED and "cannot write" in line and what in line, line
    return line


def short(stages, kind, folder, name, steps):
    """argv of a run below `folder`: 2 steps per epoch, evaluated every 4 steps."""
    more = ["--disc_weight=0"] if kind == "vae" else []
    return [*getattr(stages, kind)(name), f"--output_root={folder}", "--sample_every=2",
            "--log_every=4", f"--max_steps={steps}", *more]


@pytest.mark.parametrize("kind", ["vae", "ldm"])
def test_a_full_disk_at_a_checkpoint_keeps_the_one_before(stages, tmp_path, disk, quick, kind):
    assert quick(*short(stages, kind, tmp_path, "whole", 8)).code == 0
    assert quick(*short(stages, kind, disk.folder, "parts", 4)).code == 0
    folder, ckpt = disk.folder / "parts", disk.folder / "parts/ckpts/last.pt"
    before = ckpt.read_bytes()
    longer = short(stages, kind, disk.folder, "parts", 8)
    for room, what in ((0, "run_meta.json"), (len(before) // 2, "last.pt")):
        disk.leave(room)
        refused(quick(*longer), what)
        assert ckpt.read_bytes() == before and run.load_checkpoint(ckpt, kind)["step"] == 4
        assert set(os.listdir(ckpt.parent)) <= {"best.pt", "last.pt"}
        assert not list(folder.glob(".*"))
    disk.free()
    assert quick(*longer).code == 0
    assert_same_run(tmp_path / "whole", folder, kind)


def test_a_full_disk_at_any_file_of_a_run_is_one_line(stages, tmp_path, disk, quick):
    """Each time there is room for a little more; what is done stays, and at last all fits."""
    assert quick(*short(stages, "ldm", tmp_path, "whole", 4)).code == 0
    parts = short(stages, "ldm", disk.folder, "parts", 4)
    named = []
    for room in (0, 1, 8, 12, 16, 20, 100):
        disk.leave(room * PAGE)
        done = {path: path.read_bytes() for path in disk.folder.glob("cache/*.status")}
        named.append(refused(quick(*parts), "cannot write"))
        assert all(sum(path.read_bytes()) >= sum(before) for path, before in done.items())
        assert not list(disk.folder.rglob(".*")), "something temporary is left"
        assert not (disk.folder / "parts/ckpts/last.pt").exists()
    for kind in ("images_", "latents_", "thumbnails_", "last.pt"):
        assert any(kind in line for line in named), named
    disk.free()
    result = quick(*parts)
    assert result.code == 0 and "building it again" not in result.out, result.err
    assert_same_run(tmp_path / "whole", disk.folder / "parts", "ldm")


def test_no_half_phantom_set_is_taken_for_one(disk, quick):
    """Nothing at all is left of it, so that the next start is like the first."""
    disk.leave(20 * PAGE)
    result = quick("train_vae.py", f"--output_root={disk.folder}", "--img_size=32", "--base_ch=4",
                   "--max_steps=1")
    refused(result, ".png")
    assert tree_hashes(disk.folder).keys() == {"filler", "cache"}


# --- damaged checkpoints ------------------------------------------------------------------------


def value_or_line(function, *args):
    """(value, None), or (None, line) where the call ends the program; all else fails the test."""
    try:
        return function(*args), None
    except SystemExit as e:
        return None, line_of(e)


ODD = [  # settings or contents of a checkpoint that no trainer writes
    ("vae", {"ema": {}}), ("vae", {"base_ch": 10**7}), ("vae", {"base_ch": "8"}),
    ("vae", {"patch_size": 0}), ("ldm", {"args": {}}), ("ldm", {"prediction": "x"}),
    ("ldm", {"latent_shape": (10**9, 8, 8)}), ("ldm", {"class_names": []}),
    ("ldm", {"class_names": ["a/b", "c"]})]


@pytest.mark.parametrize("kind, change", ODD, ids=str)
def test_an_odd_checkpoint_is_one_line(stages, quick, tmp_path, kind, change):
    state = torch.load(getattr(stages, f"{kind}_ckpt"), weights_only=True)
    top = {name: value for name, value in change.items() if name in state}
    odd = tmp_path / "odd.pt"
    torch.save(state | (top or {"args": state["args"] | change}), odd)
    argv = {"vae": ["find_latent_scale.py", *stages.common, f"--ae_ckpt_path={odd}"],
            "ldm": ["sample.py", f"--ckpt={odd}", f"--ae_ckpt_path={stages.vae_ckpt}",
                    "--num_samples=1", "--num_sampling_steps=1", f"--out_dir={tmp_path / 's'}"]}
    assert "odd.pt" in only_error(quick(*argv[kind]))


@pytest.fixture(scope="module")
def checkpoint(stages, tmp_path_factory):
    """(state, bytes of the checkpoint file, a path to write damaged ones to)"""
    path = tmp_path_factory.mktemp("checkpoint") / "last.pt"
    return run.load_checkpoint(stages.ldm_ckpt, "ldm"), stages.ldm_ckpt.read_bytes(), path


@st.composite
def damaged(draw, content, most):
    """bytes with bits flipped, the end cut off, or a piece of up to `most` bytes cut out or zeroed.
    Half of the time near the beginning, where headers are."""
    end = draw(st.sampled_from([min(200, len(content)), len(content)])) - 1
    flipped = bytearray(content)
    for bit in draw(st.lists(st.integers(0, 8 * end), min_size=1, max_size=3)):
        flipped[bit // 8] ^= 1 << bit % 8
    start, length = draw(st.integers(0, end)), draw(st.integers(1, most))
    rest = content[start + length:]
    return draw(st.sampled_from([bytes(flipped), content[:start], content[:start] + rest,
                                 content[:start] + bytes(length) + rest]))


@settings(repeatable, max_examples=300)
@given(st.data())
def test_a_damaged_checkpoint_is_refused_or_whole(checkpoint, draw):
    state, content, path = checkpoint
    path.write_bytes(draw.draw(damaged(content, 5000)))
    loaded, line = value_or_line(run.load_checkpoint, path, "ldm")
    # A flipped bit that no tensor is made of changes the hash of the file alone.
    assert line is not None or same(loaded, state | {"sha256": loaded["sha256"]})
    assert line is None or "last.pt" in line


# --- damaged images -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """({name: bytes} of images in every format and mode that is read, a path for damaged ones)"""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (6, 7), dtype=np.uint8)
    grey = Image.fromarray(np.kron(blocks, np.ones((4, 4), np.uint8)))
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    bits, palette, rgb, rgba = (grey.convert(mode) for mode in ("1", "P", "RGB", "RGBA"))
    images = {"grey.png": grey, "16.png": wide, "rgb.png": rgb, "rgba.png": rgba, "bits.png": bits,
              "la.png": grey.convert("LA"), "palette.png": palette, "grey.jpg": grey,
              "cmyk.jpg": grey.convert("CMYK"), "grey.tif": grey, "16.tif": wide,
              "i.tif": wide.convert("I"), "grey.bmp": grey, "bits.bmp": bits,
              "palette.gif": palette, "rgb.webp": rgb}
    contents = {}
    for name, image in images.items():
        file = io.BytesIO()
        file.name = name
        image.save(file)
        contents[name] = file.getvalue()
    return contents, tmp_path_factory.mktemp("picture") / "x.png"


@pytest.mark.filterwarnings("ignore", "error::PIL.Image.DecompressionBombWarning")
@settings(repeatable, max_examples=3000)
@given(st.data())
def test_a_damaged_image_is_decoded_or_refused(pictures, draw):
    contents, path = pictures
    path.write_bytes(draw.draw(damaged(contents[draw.draw(st.sampled_from(sorted(contents)))], 50)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(ValueError, OSError):
        decoded = decode.read_square(path, 16)
        assert decoded.shape == (16, 16) and decoded.dtype == np.uint16
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_500_000  # kB
