"""Folders, decoding, caches, latents and the phantom set; the moments of find_latent_scale.py."""
import json
import os
import pathlib
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_png
from PIL import Image

import data
import find_latent_scale
import model
import sample
from lib import cache, decode, dist, phantom
from lib.phantom import draw_phantom

ALONE = dist.DistContext(0, 1, torch.device("cpu"), torch.float32, "")


def settings(root, out, **changes):
    defaults = dict(data_root=str(root), task="TB", img_size=16, class_filter=-1,
                    skip_bad_images=False, num_workers=2, output_root=str(out))
    return SimpleNamespace(**{**defaults, **changes})


def message(function, *args, **kwargs):
    with pytest.raises(SystemExit) as e:
        function(*args, **kwargs)
    assert str(e.value).startswith("error: ")
    return str(e.value)


# --- folders ---


def test_all_cxr_joins_the_tasks(image_tree):
    root = image_tree({"TB/train/normal": 1, "TB/train/tb": 1, "PNEUMONIA/train/normal": 2,
                       "PNEUMONIA/train/pneumonia": 1, "OTHER/val/x": 1})
    listing = data.scan(root, "ALL_CXR", "train")
    assert listing.class_names == ["normal", "pneumonia", "tb"]
    names = [file.class_name for file in listing.files]
    assert [names.count(name) for name in listing.class_names] == [3, 1, 1]
    image_tree({"ALL_CXR/train/a": 1, "ALL_CXR/train/b": 1})  # a folder of that name comes first
    assert data.scan(root, "ALL_CXR", "train").class_names == ["a", "b"]


def test_what_is_missing_is_answered_with_what_is_there(image_tree, tmp_path):
    root = image_tree({"TB/train/normal": 1, "TB/val/normal": 1, "COVID/train/a": 1,
                       "EMPTY/train/a": 0})
    assert str(tmp_path / "nowhere") in message(data.scan, tmp_path / "nowhere", "TB", "train")
    assert "COVID, EMPTY, TB" in message(data.scan, root, "CT", "train")
    assert "train, val" in message(data.open_images, settings(root, tmp_path), ALONE, "test")
    assert "no images" in message(data.scan, root, "EMPTY", "train")
    joined = settings(root, tmp_path, task="ALL_CXR")
    assert "train, val" in message(data.open_images, joined, ALONE, "test")
    image_tree({"TB/train/tb": 0})
    assert "normal 1, tb 0" in message(data.scan, root, "TB", "train")
    assert "there: train" in message(data.scan, root, "COVID", "val")
    assert data.scan(root, "COVID", "val", optional=True) is None
    assert data.open_images(settings(root, tmp_path, task="COVID"), ALONE, "val", True) is None


def test_one_class_only_is_refused_unless_asked_for(image_tree, tmp_path):
    root = image_tree({"TB/train/normal": 3, "TB/val/normal": 1, "TWO/train/normal": 1,
                       "TWO/train/tb": 1, "TWO/val/normal": 2})
    assert "--class_filter=0" in message(data.open_images, settings(root, tmp_path), ALONE, "train")
    assert len(data.open_images(settings(root, tmp_path, class_filter=0), ALONE, "train")) == 3
    two = settings(root, tmp_path, task="TWO")  # of two classes, validation may hold one
    images = data.open_images(two, ALONE, "val", class_names=["normal", "tb"])
    assert images.labels.tolist() == [0, 0] and images.class_names == ["normal", "tb"]


def test_class_filter_keeps_the_class_index(image_tree, tmp_path):
    root = image_tree({"TB/train/normal": 3, "TB/train/tb": 2})
    whole = data.open_images(settings(root, tmp_path), ALONE, "train")
    tb = data.open_images(settings(root, tmp_path, class_filter=1), ALONE, "train")
    assert tb.labels.tolist() == [1, 1] and tb.class_names == ["normal", "tb"] and len(whole) == 5
    assert tb.names.tolist() == ["TB/train/tb/0.png", "TB/train/tb/1.png"]
    assert [(name, count) for name, count, _ in tb.summary] == [("normal", 3), ("tb", 2)]
    assert torch.equal(tb.images([0, 1]), whole.images([3, 4]))
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1  # shared
    beyond = settings(root, tmp_path, class_filter=2)
    assert "{0: 'normal', 1: 'tb'}" in message(data.open_images, beyond, ALONE, "train")


# --- decoding ---


def decode_array(tmp_path, image, size=16, name="x.png", **options):
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(tmp_path / name, **options)
    return decode.read_square(tmp_path / name, size).astype(float) / 65535


def test_8_and_16_bit_keep_their_full_range(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.abs(decode_array(tmp_path, ramp) - ramp / 255).max() < 1e-5
    fine = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    fine[0, :5] = (0, 1, 4095, 4096, 65535)
    decoded = decode_array(tmp_path, fine)
    assert np.abs(decoded - fine / 65535).max() < 1.1 / 65535
    assert decoded.max() == 1 and decoded[0, 3] > decoded[0, 2]
    assert np.abs(decode_array(tmp_path, fine, name="x.tif") - fine / 65535).max() < 1.1 / 65535


def test_colour_palette_transparency_and_1_bit(tmp_path):
    grey = np.full((16, 16), 100, np.uint8)
    expected = 100 / 255
    shape = (16, 16)
    opaque, clear = np.full(shape, 255, np.uint8), np.zeros(shape, np.uint8)
    for mode in ("RGB", "CMYK", "P", "LA", "RGBA"):
        name = "x.tif" if mode == "CMYK" else "x.png"
        decoded = decode_array(tmp_path, Image.fromarray(grey).convert(mode), name=name)
        assert np.abs(decoded - expected).max() < 1.5 / 255, mode
    red = np.stack([opaque, clear, clear], -1)
    assert np.abs(decode_array(tmp_path, red) - 0.299).max() < 2 / 255  # ITU-R 601 luma
    white_but_clear = np.stack([opaque, opaque, opaque, clear], -1)
    assert decode_array(tmp_path, white_but_clear).max() == 0
    half = np.stack([opaque, opaque, opaque, np.full(shape, 128, np.uint8)], -1)
    assert np.abs(decode_array(tmp_path, half) - 128 / 255).max() < 1.5 / 255
    palette = Image.new("P", shape, 0)
    palette.putpalette([255, 255, 255, 200, 200, 200])
    palette.paste(1, (0, 0, 8, 16))
    decoded = decode_array(tmp_path, palette, transparency=0)
    assert np.abs(decoded[:, :8] - 200 / 255).max() < 1e-3 and decoded[:, 8:].max() == 0
    bits = Image.new("1", shape, 0)
    bits.paste(1, (0, 0, 16, 4))
    decoded = decode_array(tmp_path, bits)
    assert decoded[:4].min() == 1 and decoded[4:].max() == 0


@pytest.mark.parametrize("height, width", [(16, 30), (30, 16), (17, 16), (16, 21)])
def test_the_centre_square_is_kept_unflipped(tmp_path, height, width):
    picture = (np.arange(height * width) % 251).astype(np.uint8)  # no symmetry
    picture = picture.reshape(height, width)
    top, left = (height - 16) // 2, (width - 16) // 2
    expected = picture[top:top + 16, left:left + 16] / 255
    assert np.abs(decode_array(tmp_path, picture) - expected).max() < 1e-5


def test_downsizing_averages_areas_and_upsizing_keeps_the_range(tmp_path):
    picture = np.random.default_rng(0).integers(0, 65536, (16, 16)).astype(np.uint16)
    expected = picture.reshape(4, 4, 4, 4).mean((1, 3)) / 65535
    assert np.abs(decode_array(tmp_path, picture, 4) - expected).max() < 2 / 65535
    upsized = decode_array(tmp_path, picture, 32)
    corners = upsized.reshape(16, 2, 16, 2).mean((1, 3))[::15, ::15]
    assert np.abs(corners - picture[::15, ::15] / 65535).max() < 0.25
    assert upsized.min() >= 0 and upsized.max() <= 1


def bomb(path):
    def chunk(kind, body):
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)
                     + chunk(b"IEND", b""))


def test_files_that_cannot_be_decoded_are_named_or_skipped_and_counted(image_tree, tmp_path,
                                                                       capsys):
    root = image_tree({"TB/train/normal": 3, "TB/train/tb": 1})
    folder = root / "TB/train/normal"  # before the good one of class tb
    good = (folder / "0.png").read_bytes()
    (folder / "truncated.png").write_bytes(good[:len(good) // 2])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("Dear colleague, see attached.")
    Image.fromarray(np.zeros((40, 40), np.float32)).save(folder / "float.tif")
    bomb(folder / "bomb.png")
    for _ in range(2):  # the second time from the cache
        text = message(data.open_images, settings(root, tmp_path), ALONE, "train")
        assert "5 of 9 images" in text and "--skip_bad_images" in text
        assert [line.split(": ")[0].split("/")[-1] for line in text.splitlines()[1:]] == [
            "bomb.png", "empty.png", "float.tif", "text.png", "truncated.png"]
        assert "DecompressionBombError" in text and "floating-point" in text
    skipping = settings(root, tmp_path, skip_bad_images=True)
    images = data.open_images(skipping, ALONE, "train")
    assert images.labels.tolist() == [0, 0, 0, 1]
    assert images.images(range(4)).shape == (4, 1, 16, 16)
    assert "5 of 9 images in" in (out := capsys.readouterr().out) and "are left out" in out
    expected = decode.read_square(root / "TB/train/tb/0.png", 16) / 32767.5 - 1
    assert np.allclose(images.images([3])[0, 0], expected, atol=1e-6)
    (root / "TB/train/tb/0.png").write_text("nothing")
    line = message(data.open_images, skipping, ALONE, "train")
    assert "no images of class tb are left" in line


# --- image cache ---


def marker_tree(image_tree):
    root = image_tree({"TB/train/normal": 2, "TB/train/tb": 2})
    marker = np.zeros((16, 16), np.uint8)
    marker[:4, :4] = 255  # top left
    write_png(root / "TB/train/tb/0.png", marker)
    return root


def test_a_second_start_reads_no_image_and_no_row_of_a_cache(image_tree, tmp_path, monkeypatch):
    root = marker_tree(image_tree)
    first = data.open_images(settings(root, tmp_path), ALONE, "train").images(range(4))
    expected = -torch.ones(16, 16)
    expected[:4, :4] = 1  # in place, never flipped
    assert first.dtype == torch.float32 and torch.equal(first[2, 0], expected)
    monkeypatch.setattr(decode, "read_square", None)
    with monkeypatch.context() as closed:
        closed.setattr(cache.CachedArray, "rows", None)
        second = data.open_images(settings(root, tmp_path), ALONE, "train")
    assert torch.equal(second.images(range(4)), first)


def test_a_changed_file_or_size_is_decoded_again(image_tree, tmp_path):
    root = marker_tree(image_tree)
    before = data.open_images(settings(root, tmp_path), ALONE, "train")
    path = root / "TB/train/tb/0.png"
    time_ns = path.stat().st_mtime_ns
    write_png(path, np.full((16, 16), 255, np.uint8))
    os.utime(path, ns=(time_ns + 10**9, time_ns + 10**9))
    after = data.open_images(settings(root, tmp_path), ALONE, "train")
    assert before.key != after.key and after.images([2]).min() == 1
    smaller = data.open_images(settings(root, tmp_path, img_size=8), ALONE, "train")
    assert smaller.images([0]).shape == (1, 1, 8, 8)
    write_png(root / "TB/train/normal/9.png", np.zeros((16, 16), np.uint8))
    assert len(data.open_images(settings(root, tmp_path), ALONE, "train")) == 5


DAMAGE = {
    "cut": lambda rows, status: rows.write_bytes(rows.read_bytes()[:-100]),
    "empty": lambda rows, status: rows.write_bytes(b""),
    "header": lambda rows, status: rows.write_bytes(bytes(80) + rows.read_bytes()[80:]),
    "other shape": lambda rows, status: np.save(rows, np.zeros((4, 8, 8), np.uint16)),
    "short status": lambda rows, status: status.write_bytes(b"\1\1"),
    "no rows": lambda rows, status: rows.unlink(),
    "no status": lambda rows, status: status.unlink()}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_built_again(image_tree, tmp_path, monkeypatch, damage):
    root = marker_tree(image_tree)
    first = data.open_images(settings(root, tmp_path), ALONE, "train").images(range(4))
    rows, = (tmp_path / "cache").glob("*.npy")
    DAMAGE[damage](rows, rows.with_suffix(".status"))
    again = data.open_images(settings(root, tmp_path), ALONE, "train").images(range(4))
    assert torch.equal(again, first)
    monkeypatch.setattr(decode, "read_square", None)  # it is whole now
    data.open_images(settings(root, tmp_path), ALONE, "train")


def build(folder, rows, make=None):
    """CachedArray of `rows`; make: what gives some of them, else plain copies."""
    make = make or (lambda indices: (rows[indices], np.full(len(indices), cache.DONE, np.uint8)))
    return cache.cached_array(ALONE, folder, "a", rows.shape, rows.dtype, make, "x")


def test_cache_rows_and_status_across_chunks(tmp_path):
    rows = np.arange(2 * cache.CHUNK + 10, dtype=np.float32).reshape(-1, 2)
    status = np.arange(len(rows)).astype(np.uint8) % 7 + 1

    def make(indices):
        return rows[indices], status[indices]
    for _ in range(2):
        array = build(tmp_path, rows, make)
        assert array.status.tolist() == status.tolist()
        requests = np.array([cache.CHUNK + 1, 0, cache.CHUNK + 1])
        assert np.array_equal(array.rows(requests), rows[requests])
        make = None  # it is there
    assert np.array_equal(np.load(tmp_path / "a.npy"), rows)  # a file that NumPy opens
    assert {p.name for p in tmp_path.iterdir()} == {"a.npy", "a.status", "a.lock"}
    wider = np.ones((5, 1), np.float32)
    assert np.array_equal(build(tmp_path, wider).rows(range(5)), wider)


def test_a_killed_build_continues_where_it_was(tmp_path):
    rows, made = np.arange(10 * cache.CHUNK, dtype=np.uint16).reshape(-1, 2), []

    def make(indices):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(indices.tolist())
        return rows[indices], np.full(len(indices), cache.DONE, np.uint8)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, rows, make)
    made.append("killed")
    assert np.array_equal(build(tmp_path, rows, make).rows(range(len(rows))), rows)
    starts = [chunk if chunk == "killed" else chunk[0] // cache.CHUNK for chunk in made]
    assert starts == [0, 1, 2, "killed", 3, 4]


def test_a_row_is_on_disk_before_the_byte_that_says_so(tmp_path, monkeypatch):
    rows = np.arange(4, dtype=np.uint16).reshape(-1, 1)
    write = cache._write

    def broken(path, *args):
        if path.suffix == ".npy":
            raise KeyboardInterrupt
        write(path, *args)
    monkeypatch.setattr(cache, "_write", broken)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, rows)
    assert (tmp_path / "a.status").read_bytes() == bytes(4)
    monkeypatch.undo()
    assert np.array_equal(build(tmp_path, rows).rows(range(4)), rows)


def test_a_file_that_cannot_be_read_now_is_read_later(image_tree, tmp_path, monkeypatch, capsys):
    root = image_tree({"TB/train/normal": 2, "TB/train/tb": 2})
    args = settings(root, tmp_path, skip_bad_images=True)
    read = decode.read_grey

    def failing(path):
        if path.endswith("tb/0.png"):
            raise ValueError("DICOM compressed as X: pip install pylibjpeg")
        return read(path)
    monkeypatch.setattr(decode, "read_grey", failing)
    some = data.open_images(args, ALONE, "train")
    made = data.cached_thumbnails(some, tmp_path / "cache", ALONE)
    assert made.status.tolist() == [cache.DONE, cache.DONE, cache.TODO, cache.DONE]
    out = capsys.readouterr().out
    assert len(some) == 3 and "1 of 4 images in" in out and "pip install" in out
    monkeypatch.undo()
    images = data.open_images(args, ALONE, "train")
    assert len(images) == 4 and images.key == some.key
    found = data.cached_thumbnails(images, tmp_path / "cache", ALONE).rows(images.rows)
    assert np.allclose(found, data.thumbnails(images.images(range(4))), atol=1e-6)


def open_at_once(barrier, root, out):
    barrier.wait()
    images = data.open_images(settings(root, out), ALONE, "train")
    assert len(images) == 12 and images.images(range(12)).std() > 0.1


def test_two_processes_can_build_the_cache_at_once(image_tree, tmp_path, fork_server):
    root = image_tree({"TB/train/normal": 6, "TB/train/tb": 6})
    barrier = fork_server.Barrier(2)
    args = (barrier, str(root), str(tmp_path))
    both = [fork_server.Process(target=open_at_once, args=args) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(180)
    assert [process.exitcode for process in both] == [0, 0]
    names = sorted(p.suffix for p in (tmp_path / "cache").iterdir())
    assert names == [".lock", ".npy", ".status"]  # one copy, nothing temporary


def test_no_data_root_means_the_phantom_set(tmp_path, capsys):
    images = data.open_images(settings("", tmp_path, data_root=None, img_size=16), ALONE, "val")
    assert images.class_names == ["normal", "tb"]
    assert np.bincount(images.labels).tolist() == [16, 16]
    assert "phantom" in capsys.readouterr().out
    folder = pathlib.Path(tmp_path, "cache", "phantom_16")
    assert len(list(folder.glob("TB/train/*/*.png"))) == 128
    stamps = {p: p.stat().st_mtime_ns for p in folder.rglob("*.png")}
    data.open_images(settings("", tmp_path, data_root=None, img_size=16), ALONE, "val")
    assert stamps == {p: p.stat().st_mtime_ns for p in folder.rglob("*.png")}


# --- subsets and latents ---


def test_overfit_indices_take_the_classes_in_turn():
    labels = np.array([1, 1, 0, 0, 0, 2])
    assert data.overfit_indices(labels, 5).tolist() == [2, 0, 5, 3, 1]
    assert data.overfit_indices(labels, 1).tolist() == [2]
    assert sorted(data.overfit_indices(labels, 6).tolist()) == list(range(6))
    assert data.overfit_indices(np.zeros(3, int), 2).tolist() == [0, 1]
    assert "only 6" in message(data.overfit_indices, labels, 7)


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return model.AutoencoderKL(16, 2, 4, (1, 2), 1).eval().requires_grad_(False)


def test_cached_latents_are_those_encoded_on_the_fly(image_tree, tmp_path, vae):
    root = image_tree({"TB/train/normal": 5, "TB/train/tb": 4})
    images = data.open_images(settings(root, tmp_path), ALONE, "train")
    cached = data.LatentSet(images, vae, "a" * 64, tmp_path / "cache", ALONE)
    fresh = data.LatentSet(images, vae, "a" * 64, tmp_path / "cache", ALONE, use_cache=False)
    index = np.array([8, 0, 3, 0])
    direct = vae.encode(images.images(index))
    for got, want, plain in zip(cached.posterior(index), fresh.posterior(index), direct,
                                strict=True):
        assert got.shape == (4, 2, 8, 8) and got.dtype == torch.float32
        assert torch.allclose(got, want, atol=1e-5)
        assert torch.allclose(got, plain, atol=1e-5)
    assert not torch.equal(cached.posterior(index)[0][0], cached.posterior(index)[0][1])


def test_a_cache_that_is_removed_meanwhile_is_one_line(image_tree, tmp_path):
    root = image_tree({"TB/train/normal": 3, "TB/train/tb": 3})
    images = data.open_images(settings(root, tmp_path), ALONE, "train")
    (tmp_path / "cache").rename(tmp_path / "away")
    assert "type the same command again" in message(images.images, np.array([0, 1]))


def test_latents_of_subsets_share_a_cache_other_vaes_do_not(image_tree, tmp_path, vae):
    root = image_tree({"TB/train/normal": 3, "TB/train/tb": 3})
    images = data.open_images(settings(root, tmp_path), ALONE, "train")
    tb = data.open_images(settings(root, tmp_path, class_filter=1), ALONE, "train")
    last = data.LatentSet(tb.subset([2]), vae, "a", tmp_path / "cache", ALONE)  # builds it for all
    whole = data.LatentSet(images, vae, "a", tmp_path / "cache", ALONE)
    assert len(list((tmp_path / "cache").glob("latents_*.npy"))) == 1
    for _ in range(2):
        assert torch.equal(last.posterior(np.array([0]))[0], whole.posterior(np.array([5]))[0])
        last.resident = torch.from_numpy(last.cache.rows(slice(None)))  # as on a GPU
    other = model.AutoencoderKL(16, 2, 4, (1, 2), 1).eval()
    mean = data.LatentSet(images, other, "b", tmp_path / "cache", ALONE).posterior(np.array([5]))[0]
    assert torch.allclose(mean, other.encode(images.images([5])).mean, atol=1e-5)


def test_moments_match_numpy_far_from_zero():
    rng = np.random.default_rng(0)
    # A hundred deviations from zero, where E[x^2] - E[x]^2 in float32 is off by 1e-3.
    x = (1e2 * np.arange(1, 4)[:, None, None] + rng.standard_normal((150, 3, 5, 5)))
    x = torch.from_numpy(x.astype(np.float32))
    latents = SimpleNamespace(images=x, posterior=lambda index: (
        x[index], torch.full_like(x[index], -200.0)))
    result, x = find_latent_scale.measure(latents, 0, ALONE), x.double().numpy()
    assert np.allclose(result["channel_mean"], x.mean((0, 2, 3)), rtol=1e-12)
    assert np.allclose(result["channel_std"], x.std((0, 2, 3)), rtol=1e-9)
    assert np.isclose(result["mean"], x.mean(), rtol=1e-12)
    assert np.isclose(result["std"], x.std(), rtol=1e-12)


def test_latent_scale_json_is_what_a_direct_computation_gives(stages):
    stored = json.loads((stages.out / "v/latent_scale.json").read_text())
    vae, args, sha = sample.load_autoencoder(stages.vae_ckpt, ALONE)
    paths = sorted(stages.data.glob("TB/train/*/*.png"))
    pixels = np.stack([np.asarray(Image.open(p), dtype=np.float32) for p in paths])
    mean, logvar = (p.double() for p in vae.encode(torch.from_numpy(pixels / 127.5 - 1)[:, None]))
    noise = torch.randn(mean.shape, generator=ALONE.generator(0, "scale", 0)).double()
    z = (mean + torch.exp(logvar / 2) * noise).numpy()
    assert stored["num_images"] == len(z) == 16
    assert stored["vae_sha256"] == sha and stored["img_size"] == 32
    assert np.isclose(stored["latent_scale_factor"], 1 / z.std(), rtol=1e-5)
    assert np.isclose(stored["std"], z.std(), rtol=1e-5)
    assert np.isclose(stored["mean"], z.mean(), rtol=1e-4, atol=1e-6)
    assert np.allclose(stored["channel_std"], z.std((0, 2, 3)), rtol=1e-5)
    assert np.allclose(stored["channel_mean"], z.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert np.isclose(stored["posterior_noise_share"], logvar.exp().mean() / z.var(), rtol=1e-5)


# --- phantom ---

SEEDS = range(24)


def phantoms(class_name, img_size=64):
    drawn = [draw_phantom(np.random.default_rng(seed), class_name, img_size) for seed in SEEDS]
    return np.stack(drawn).astype(np.float32)


def test_tuberculosis_brightens_the_upper_zones_only():
    # One seed is one patient in both classes: the difference of a pair is the disease alone.
    difference = phantoms("tb") - phantoms("normal")  # [seed, 64, 64], grey levels
    assert difference[:, 8:32].mean() > 4
    assert (difference.max(axis=(1, 2)) > 30).all()
    assert np.abs(difference[:, 44:]).max() <= 2


def test_an_effusion_fills_the_base_of_one_lung():
    normal = phantoms("normal")
    fluid, two = phantoms("effusion") - normal, phantoms("tb+effusion") - normal
    right, left = fluid[:, :, :30].mean((1, 2)), fluid[:, :, 34:].mean((1, 2))
    assert (np.maximum(left, right) > 3).all() and (np.minimum(left, right) < 0.5).all()
    assert 6 < (left > right).sum() < 18 and np.abs(fluid[:, :10]).max() <= 2
    both = (phantoms("tb") - normal)[fluid == 0], two[fluid == 0]
    assert np.abs(both[0] - both[1]).max() <= 2  # above the fluid are the lesions of the same seed


def test_corners_are_black_and_the_heart_is_on_the_right():
    for img_size in (32, 64):
        normal = phantoms("normal", img_size)
        assert (normal[:, [0, 0, -1, -1], [0, -1, 0, -1]] == 0).all()
        assert (normal.max(axis=(1, 2)) > 150).all()
    mean_image = normal.mean(axis=0)
    heart_rows = slice(28, 36)
    assert mean_image[heart_rows, 38:44].mean() > mean_image[heart_rows, 20:26].mean() + 15


def test_the_written_phantom_set_has_no_image_twice(tmp_path):
    phantom.write_phantoms(tmp_path, 3, 2, 32)
    paths = sorted(tmp_path.rglob("*.png"))
    assert [str(p.relative_to(tmp_path)) for p in paths] == [
        f"TB/{split}/{name}/0000{i}.png"
        for split, n in (("train", 3), ("val", 2)) for name in ("normal", "tb") for i in range(n)]
    pixels = [p.read_bytes() for p in paths]
    assert len(set(pixels)) == 10
    phantom.write_phantoms(tmp_path / "again", 3, 2, 32)
    assert [p.read_bytes() for p in sorted((tmp_path / "again").rglob("*.png"))] == pixels
