"""Full disks, damaged files, random input: one clear line or the right result, no traceback."""
import argparse

import contextlib
import io
import hashlib
import json
import math
import os
import random
import resource
import signal
import struct
import subprocess
import tempfile
import zlib

import hypothesis
import numpy as np
import pytest
import torch
from conftest import save_checkpoint, tree_hashes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_stages import assert_same_run, drawn, only_error, same, strict

import train_ldm
from lib import args as command_line, decode, dist, run
from lib.files import EXIT_FAILED

ALONE = dist.DistContext(0, 1, torch.device("cpu"), torch.float32, False)
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


def pages(path):
    return -(-path.stat().st_size // PAGE) * PAGE


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
    """The error of a stage that met a full disk: its exit code and one line that names the file."""
    line = only_error(result)
    assert result.code == EXIT_FAILED and "cannot write" in line and what in line, line
    return line


def trainer(stages, script):
    """Arguments of a short training run: 2 steps per epoch, evaluated every 4 steps."""
    own = {"train_vae.py": [f"--config={stages.vae_config}", "--disc_weight=0"],
           "train_ldm.py": [f"--config={stages.ldm_config}", f"--ae_ckpt_path={stages.vae_ckpt}",
                            "--num_sampling_steps=2"]}
    return [script, f"--data_root={stages.data}", *own[script], "--sample_every=2", "--log_every=4"]


@pytest.mark.parametrize("script, kind", [("train_vae.py", "vae"), ("train_ldm.py", "ldm")])
def test_a_full_disk_at_a_checkpoint_keeps_the_one_before(
        stages, tmp_path, disk, quick, script, kind):
    args = trainer(stages, script)
    assert quick(*args, f"--output_root={tmp_path}", "--run_name=whole", "--max_steps=8").code == 0
    parts = [*args, f"--output_root={disk.folder}", "--run_name=parts"]
    assert quick(*parts, "--max_steps=4").code == 0
    folder, ckpt = disk.folder / "parts", disk.folder / "parts/ckpts/last.pt"
    before = ckpt.read_bytes()
    for room, what in ((0, "run_meta.json"), (len(before) // 2, "last.pt")):
        disk.leave(room)
        refused(quick(*parts, "--max_steps=8"), what)
        assert ckpt.read_bytes() == before and run.load_checkpoint(ckpt, kind)["step"] == 4
        assert set(os.listdir(ckpt.parent)) <= {"best.pt", "last.pt"}
        assert not list(folder.glob(".*"))
    disk.free()
    assert quick(*parts, "--max_steps=8").code == 0
    assert_same_run(tmp_path / "whole", folder, kind)


def test_a_full_disk_at_any_file_of_a_run_is_one_line(stages, tmp_path, disk, quick):
    """Each time there is room for a little more; what is done stays, and at last all fits."""
    args = trainer(stages, "train_ldm.py")
    assert quick(*args, f"--output_root={tmp_path}", "--run_name=whole", "--max_steps=4").code == 0
    parts = [*args, f"--output_root={disk.folder}", "--run_name=parts", "--max_steps=4"]
    ckpts, named = disk.folder / "parts/ckpts", []
    for room in (0, 1, 8, 12, 16, 20, 100):
        disk.leave(room * PAGE)
        done = {path: path.read_bytes() for path in disk.folder.glob("cache/*.status")}
        named.append(refused(quick(*parts), "cannot write"))
        assert all(sum(path.read_bytes()) >= sum(before) for path, before in done.items())
        assert not list(disk.folder.rglob(".*")), "something temporary is left"
        assert not (ckpts / "last.pt").exists()
    for kind in ("images_", "latents_", "thumbnails_", "last.pt"):
        assert any(kind in line for line in named), named
    disk.free()
    result = quick(*parts)
    assert result.code == 0 and "building it again" not in result.out, result.err
    assert_same_run(tmp_path / "whole", disk.folder / "parts", "ldm")


def test_a_metrics_line_cut_by_a_full_disk_is_written_again(
        stages, tmp_path, disk, quick):
    args = [*trainer(stages, "train_ldm.py"), "--batch_per_device=1", "--log_every=1",
            "--sample_every=4"]  # every 64 steps
    whole = [*args, f"--output_root={tmp_path}", "--run_name=whole"]
    assert quick(*whole, "--max_steps=128").code == 0
    parts = [*args, f"--output_root={disk.folder}", "--run_name=parts"]
    metrics = disk.folder / "parts/metrics.jsonl"
    assert quick(*parts, "--max_steps=64").code == 0
    disk.leave(pages(disk.folder / "parts/run_meta.json"))  # 64 more lines do not fit in there
    line = refused(quick(*parts, "--max_steps=128"), "metrics.jsonl")
    assert f"--resume_dir={disk.folder / 'parts'}" in line
    with open(metrics, "a") as f:
        disk.free()
        f.write('{"step": 100, "ep')  # even if the disk was full between two lines
    assert quick(*parts, "--max_steps=128").code == 0
    assert_same_run(tmp_path / "whole", disk.folder / "parts", "ldm")


def test_no_half_phantom_set_is_taken_for_one(disk, quick):
    """Nothing at all is left of it, so that the next start is like the first."""
    disk.leave(20 * PAGE)
    result = quick("train_vae.py", f"--output_root={disk.folder}", "--img_size=32", "--base_ch=4",
                   "--max_steps=1")
    refused(result, ".png")
    assert tree_hashes(disk.folder).keys() == {"filler", "cache"}


def test_samples_that_do_not_fit_are_one_line_and_whole_pictures(stages, disk, quick):
    out = disk.folder / "s"
    command = ["sample.py", f"--ckpt={stages.ldm_ckpt}", "--num_samples=3",
               "--num_sampling_steps=10", f"--out_dir={out}"]
    disk.leave(0)
    result = quick(*command)
    assert result.code == EXIT_FAILED
    assert "--num_samples" in only_error(result) and not out.exists()
    # The estimate is of the images' pixels, without the file system's overhead.
    disk.leave(4 * PAGE)
    refused(quick(*command), ".png")
    reference = drawn(stages.out / "l/samples_ancestral_0")
    pictures = drawn(out)
    assert 0 < len(pictures) < 6
    assert {p.name for p in out.iterdir()} == {*pictures, "manifest.json"}
    assert all((pictures[k] == reference[k]).all() for k in pictures)
    disk.free()
    assert quick(*command).code == 0
    expected = strict(stages.out / "l/samples_ancestral_0/manifest.json")["images"]
    assert strict(out / "manifest.json")["images"] == expected
    assert all((p == reference[k]).all() for k, p in drawn(out).items())


# --- damaged JSON -------------------------------------------------------------------------------

NO_OBJECTS = {
    "empty": b"", "list": b"[]", "null": b"null", "number": b"5", "text": b'"x"', "NaN": b"NaN",
    "digits": b"1" * 6000, "no UTF-8": b'\xff\xfe{"args": {}}', "zeros": bytes(40),
    "deep": b"[" * 100_000, "deep dict": b'{"a":' * 100_000}


def damaged(content, count, seed=0):
    """The file cut at `count` positions, and with one bit flipped at as many."""
    rng = random.Random(seed)
    for position in rng.sample(range(len(content)), min(count, len(content))):
        yield content[:position]
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.randrange(8)
        yield bytes(flipped)


def value_or_line(function, *args):
    """(value, None), or (None, line) where the call ends the program; all else fails the test."""
    try:
        return function(*args), None
    except SystemExit as e:
        return None, line_of(e)


def assert_types(parser, values):
    """Every value has the type that the argument of its name gives it, and is taken again."""
    for action in parser._actions:
        name, value = action.dest, values.get(action.dest)
        if name in values and not (value is None and action.default is None):
            if action.default is not None:
                assert type(value) is type(action.default), (name, value)
            if isinstance(value, tuple):
                assert all(type(v) in (int, float) for v in value), (name, value)
            assert not isinstance(value, float) or math.isfinite(value), (name, value)
    values = {k: v for k, v in values.items() if k not in ("config", "resume_dir", "run_name")}
    again = vars(parser.parse(command_line.as_flags(parser, values, "again")))
    assert {k: again[k] for k in values} == values


def test_a_damaged_run_meta_is_one_line_or_has_the_right_types(stages, tmp_path):
    path = tmp_path / "run_meta.json"
    content = (stages.out / "l/run_meta.json").read_bytes()
    refusals = 0
    for broken in damaged(content, 100):
        path.write_bytes(broken)
        args, line = value_or_line(train_ldm.parse_args, [f"--resume_dir={tmp_path}"])
        refusals += line is not None
        assert args or "run_meta.json" in line or "--" in line or "mode" in line, line
        if args:
            assert_types(train_ldm.build_parser(), vars(args))
    assert refusals > 100  # all that are cut, and more


def scale_in(folder, vae_sha256):
    args = argparse.Namespace(task="TB", data_root=None, output_root="runs",
                              latent_scale_factor=None, resume_dir=None, split="train")
    return run.read_latent_scale(args, folder / "ckpts/last.pt", vae_sha256)[0]


def test_a_damaged_latent_scale_is_never_another_factor(stages, tmp_path):
    """One flipped bit cannot turn both the factor and the standard deviation, its inverse."""
    path = tmp_path / "latent_scale.json"
    content = (stages.out / "v/latent_scale.json").read_bytes()
    path.write_bytes(content)
    sha = hashlib.sha256(stages.vae_ckpt.read_bytes()).hexdigest()
    factor = scale_in(tmp_path, sha)
    assert factor == strict(path)["latent_scale_factor"]
    for broken in [*damaged(content, 300), *NO_OBJECTS.values()]:
        path.write_bytes(broken)
        value, line = value_or_line(scale_in, tmp_path, sha)
        assert value is None or abs(value / factor - 1) < 1e-9, broken
        assert value or "latent_scale.json" in line


@pytest.mark.parametrize(
    "wrong", [None, [], {}, "0.9", -0.9, 0.0, math.nan, math.inf, True, 1e308, 10**400],
    ids=lambda v: repr(v)[:5])
def test_a_latent_scale_that_is_none_is_one_line(stages, tmp_path, wrong):
    stored = strict(stages.out / "v/latent_scale.json")
    for name in ("latent_scale_factor", "std"):
        (tmp_path / "latent_scale.json").write_text(json.dumps({**stored, name: wrong}))
        value, line = value_or_line(scale_in, tmp_path, stored["vae_sha256"])
        assert value is None and "latent_scale.json" in line, (name, value)


# --- damaged checkpoints ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(state, bytes of the checkpoint file, a path to write damaged ones to)"""
    path = tmp_path_factory.mktemp("checkpoint") / "last.pt"
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.Linear(8, 9))
    optimizer = torch.optim.AdamW(layers.parameters())
    sum(p.square().sum() for p in layers.parameters()).backward()
    optimizer.step()
    save_checkpoint(path, "ldm", {
        "model": layers.state_dict(), "optimizer": optimizer.state_dict(), "step": 7,
        "ema": None, "args": {"lr": 1e-3, "ldm_ch_mults": (1, 2)}})
    return run.load_checkpoint(path, "ldm"), path.read_bytes(), path


def assert_equal_or_refused(checkpoint, content):
    state, _, path = checkpoint
    path.write_bytes(content)
    loaded, line = value_or_line(run.load_checkpoint, path, "ldm")
    assert line is not None or same(loaded, state)
    assert line is None or "last.pt" in line
    return line


@settings(repeatable, max_examples=300)
@given(st.data())
def test_a_checkpoint_with_flipped_bits_is_refused_or_whole(checkpoint, draw):
    content = bytearray(checkpoint[1])
    for bit in draw.draw(st.lists(st.integers(0, 8 * len(content) - 1), min_size=1, max_size=3)):
        content[bit // 8] ^= 1 << bit % 8
    assert_equal_or_refused(checkpoint, bytes(content))


@settings(repeatable, max_examples=150)
@given(st.data())
def test_a_cut_or_holed_checkpoint_is_refused_or_whole(checkpoint, draw):
    content = checkpoint[1]
    start = draw.draw(st.integers(0, len(content) - 1))
    assert_equal_or_refused(checkpoint, content[:start])
    length = draw.draw(st.integers(1, 5000))
    assert_equal_or_refused(checkpoint, content[:start] + content[start + length:])
    assert_equal_or_refused(checkpoint, content[:start] + bytes(length) + content[start + length:])


# --- random images ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """({name: bytes} of images in every format and mode that is read, a path for damaged ones)"""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (6, 7), dtype=np.uint8)
    grey = Image.fromarray(np.kron(blocks, np.ones((4, 4), np.uint8)))
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    bits, palette, rgb, rgba = (grey.convert(mode) for mode in ("1", "P", "RGB", "RGBA"))
    exif = b"Exif\0\0II*\0\x08\0\0\0\0\0"
    saved = {
        "grey.png": (grey, {}),
        "16.png": (wide, {}),
        "rgb.png": (rgb, {}),
        "rgba.png": (rgba, {}),
        "la.png": (grey.convert("LA"), {}),
        "bits.png": (bits, {}),
        "palette.png": (palette, {"transparency": 3}),
        "key.png": (grey, {"transparency": 9}),
        "text.png": (grey, {"dpi": (72, 72), "icc_profile": b"profile" * 20, "exif": exif}),
        "grey.jpg": (grey, {}),
        "rgb.jpg": (rgb, {"progressive": True}),
        "cmyk.jpg": (grey.convert("CMYK"), {}),
        "grey.tif": (grey, {}),
        "16.tif": (wide, {}),
        "lzw.tif": (rgb, {"compression": "tiff_lzw"}),
        "deflate.tif": (wide, {"compression": "tiff_adobe_deflate"}),
        "bits.tif": (bits, {"compression": "group4"}),
        "palette.gif": (palette, {"transparency": 3}),
        "two.gif": (palette, {"save_all": True, "append_images": [palette]}),
        "grey.bmp": (grey, {}),
        "rgb.bmp": (rgb, {}),
        "bits.bmp": (bits, {}),
        "rgb.webp": (rgb, {}),
        "rgba.webp": (rgba, {"lossless": True}),
        "i.tif": (wide.convert("I"), {}),
    }
    contents = {}
    for name, (image, options) in saved.items():
        file = io.BytesIO()
        file.name = name
        image.save(file, **options)
        contents[name] = file.getvalue()
    return contents, tmp_path_factory.mktemp("picture") / "x.png"


def with_checksums(png):
    """The PNG with right checksums, so that what was changed is not refused for them alone."""
    out, at = bytearray(png), 8
    while at + 12 <= len(out):
        length = struct.unpack(">I", out[at:at + 4])[0]
        end = at + 8 + length
        if end + 4 > len(out):
            break
        out[end:end + 4] = struct.pack(">I", zlib.crc32(out[at + 4:end]))
        at = end + 4
    return bytes(out)


def mutated(contents, name, rng):
    """A damaged copy.

    Bits flipped, bytes or lengths overwritten, pieces cut, doubled or taken from another file.
    """
    out = bytearray(contents[name])
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(min(len(out), 200) if rng.random() < 0.6 else len(out)) if out else 0
        kind = rng.randrange(6)
        if kind == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and out:
            out[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        elif kind == 2:
            sizes = (0, 1, 8, 100, 2**15, 2**16 - 1, 2**20, 2**31 - 1, 2**31, 2**32 - 1)
            number = rng.choice(sizes)
            out[at:at + 4] = number.to_bytes(4, rng.choice(("little", "big")))
        elif kind == 3:
            del out[at:at + rng.choice((1, 2, 4, 12, 50))]
        elif kind == 4:
            out[at:at] = out[at:at + rng.randrange(1, 60)]
        else:
            other = contents[rng.choice(sorted(contents))]
            start = rng.randrange(len(other))
            out[at:at + rng.randrange(40)] = other[start:start + rng.randrange(1, 80)]
    if rng.random() < 0.25:
        del out[rng.randrange(len(out) + 1):]
    return with_checksums(out) if out[:4] == b"\x89PNG" and rng.random() < 0.7 else bytes(out)


@pytest.fixture
def within_a_minute():
    """Ends what hangs."""
    def late(number, frame):
        raise TimeoutError("still decoding")
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.filterwarnings("ignore", "error::PIL.Image.DecompressionBombWarning")
@settings(repeatable, max_examples=3000)
@given(seed=st.integers(0, 2**32), which=st.integers(0, 10**6))
def test_a_random_image_is_decoded_or_refused(pictures, within_a_minute, seed, which):
    contents, path = pictures
    names = sorted(contents)
    path.write_bytes(mutated(contents, names[which % len(names)], random.Random(seed)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        decoded = decode.read_square(path, 16)
        assert decoded.shape == (16, 16) and decoded.dtype == np.uint16
    except (ValueError, OSError) as e:
        assert not isinstance(e, TimeoutError)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_500_000  # kB


# --- random settings ----------------------------------------------------------------------------

PARSER = train_ldm.build_parser()
NAMES = sorted(a.dest for a in PARSER._actions if a.dest not in ("help", "config"))
numbers = st.one_of(st.integers(-3, 70), st.integers(), st.floats(),
                    st.sampled_from([10**400, 2**63, 2**64, -(10**30)]))
words = st.sampled_from(["flow", "eps", "auto", "overfit_8", "None", "1,2"])
scalars = st.one_of(numbers, st.booleans(), st.none(), st.text(max_size=8), st.binary(max_size=4),
                    words)


def containers(inner):
    lists = st.lists(inner, max_size=4)
    return st.one_of(lists, lists.map(tuple),
                     st.dictionaries(st.text(max_size=3), inner, max_size=2))


literals = st.recursive(scalars, containers, max_leaves=5)
expressions = st.sampled_from([
    "0x" + "f" * 6000, "1" * 5000, "(" * 300, "[" * 90 + "]" * 90, "'", "int", "...", "lambda: 1",
    "1j", "frozenset({1})", "range(3)", "float('nan')"])
sources = st.one_of(literals.map(repr).map(lambda s: s.replace("inf", "1e999")), expressions)
config_names = st.one_of(st.sampled_from(NAMES),
                         st.sampled_from(["epoch", "π", "_x", "config", "help"]))
argument_names = st.sampled_from([n for n in NAMES if n not in ("run_name", "resume_dir")])
argument_values = st.one_of(
    st.text(max_size=8), numbers.map(str),
    st.sampled_from(["", "9" * 400, "9" * 5000, "None", "1,,2", "-"]))


@pytest.fixture(scope="module")
def config_path(tmp_path_factory):
    return tmp_path_factory.mktemp("config") / "settings.py"


def read_config(path, content):
    path.write_bytes(content)
    values, line = value_or_line(command_line.read_config, str(path))
    flags = None
    if line is None:
        flags, line = value_or_line(command_line.as_flags, PARSER, values, str(path))
    PARSER.source = ""  # where the call above ended the program
    if line is None:
        assert set(values) <= set(NAMES)
        assert_types(PARSER, {name: vars(PARSER.parse(flags))[name] for name in values})
    else:
        assert "settings.py" in line


@settings(repeatable, max_examples=700)
@given(st.lists(st.tuples(config_names, sources), min_size=1, max_size=3))
def test_a_random_config_file_is_read_or_refused(config_path, lines):
    text = "".join(f"{name} = {value}\n" for name, value in lines)
    read_config(config_path, text.encode("utf-8", "surrogatepass"))


@pytest.mark.filterwarnings("ignore")  # SyntaxWarning
@settings(repeatable, max_examples=1500)
@given(seed=st.integers(0, 2**32))
def test_a_damaged_config_file_is_read_or_refused(config_path, stages, seed):
    """Damaged by characters that cannot make a call or a power out of numbers."""
    rng, out = random.Random(seed), bytearray(stages.ldm_config.read_bytes())
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(out))
        piece = rng.choice((
            b"\0", b"\n", b" ", b"\t", b"[", b"]", b",", b"=", b"'", b'"', b"0", b"9" * 30, b"-",
            b".", b"e", b"#", b"\\", b"\xff", "é".encode(), b"_", b"\r", b":", b"{", b"\x0c",
            b"\xef\xbb\xbf"))
        out[at:at + rng.randrange(3)] = piece
    read_config(config_path, bytes(out))


@settings(repeatable, max_examples=200)
@given(st.lists(st.tuples(argument_names, argument_values, st.booleans()), max_size=4))
def test_random_arguments_are_taken_or_refused(given_arguments):
    argv = []
    for name, value, joined in given_arguments:
        argv += [f"--{name}={value}"] if joined else [f"--{name}", value]
    argv = [a for a in argv if a not in ("-h", "--help")]
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            args = train_ldm.parse_args(argv)
    except SystemExit as e:
        assert (e.code == 2 and ": error: " in err.getvalue()) or line_of(e)
    else:
        assert_types(PARSER, vars(args))
