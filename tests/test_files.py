"""What users have on disk: layouts, what files say about themselves, DICOM, the classes of other
splits, copies between splits, and data that changed between two starts."""
import json
import os
import pathlib
import shutil
import struct
import sys
import unicodedata
import warnings
import zlib

import numpy as np
import pytest
import torch
from conftest import error_of, write_png
from PIL import Image
from test_data import ALONE, message, settings

import data
from lib import decode

RAMP = np.add.outer(np.arange(24) * 4, np.arange(16) * 9)  # no symmetry, 0 to 227


def classes_of(listing):
    """{file name: class} of a Listing, whose names differ."""
    return {os.path.basename(file.path): file.class_name for file in listing.files}


def notes(capsys):
    """The notices since the last call."""
    return [line for line in capsys.readouterr().out.split("note: ") if line]


def link(target, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


# --- folders ------------------------------------------------------------------------------------


def test_patient_and_study_folders_are_read_at_any_depth(image_tree, capsys):
    root = image_tree({"TB/train/normal/patient1/study1": 1, "TB/train/normal/patient1/study2": 1,
                       "TB/train/tb": 1, "TB/train/tb/p2/a/b/c": 1})
    listing = data.scan(root, "TB", "train")
    assert [(file.path, file.class_name) for file in listing.files] == [
        ("TB/train/normal/patient1/study1/0.png", "normal"),
        ("TB/train/normal/patient1/study2/0.png", "normal"),
        ("TB/train/tb/0.png", "tb"), ("TB/train/tb/p2/a/b/c/0.png", "tb")]
    assert not listing.flat and notes(capsys) == []


def test_one_notice_counts_by_reason_what_is_not_read(image_tree, capsys):
    root = image_tree({"TB/train/normal": 1, "TB/train/normal/p1": 1, "TB/train/tb": 1,
                       "TB/train/tb/.thumbnails": 2})
    split = root / "TB/train"
    for name in ("tb/a.txt", "tb/b.TXT", "normal/p1/c.nii.gz", "normal/IM0001", "tb/1.2.840.7",
                 "tb/._0.png", "beside.png", "README", ".hidden", "tb/Thumbs.db", ".DS_Store"):
        (split / name).touch()
    (split / ".git").mkdir()
    link(".#lock", split / ".#lock")  # an editor's, without a target
    link("..", split / "tb/loop")
    listing = data.scan(root, "TB", "train")
    assert listing.class_names == ["normal", "tb"]
    names = sorted(os.path.basename(file.path) for file in listing.files)
    assert names == ["0.png", "0.png", "0.png", "1.2.840.7", "IM0001"]  # the two: DICOM, perhaps
    note, = notes(capsys)
    assert note.strip().split("not read: ")[1] == (
        "1 *.gz, 2 *.txt, 2 beside the class folders, 5 hidden, "
        "1 link back to a folder above it")


def test_suffixes_that_cannot_be_printed_are_counted_too(image_tree, capsys):
    root = image_tree({"TB/train/normal": 1})
    open(os.fsencode(root / "TB/train/normal/x.p") + b"\xf6g", "w").close()
    data.scan(root, "TB", "train")
    assert r"1 *.p\xf6g" in notes(capsys)[0]


def test_links_are_followed_once_round_a_loop(image_tree, tmp_path, capsys):
    root = image_tree({"TB/train/normal": 1, "TB/train/tb": 1, "elsewhere/covid/p1": 2})
    link(root / "elsewhere/covid", root / "TB/train/covid")
    link(root / "elsewhere", root / "elsewhere/covid/p1/up")  # covid/p1/up/covid is covid again
    listing = data.scan(root, "TB", "train")
    assert [file.class_name for file in listing.files].count("covid") == 2
    assert "1 link back" in notes(capsys)[0]


def test_a_link_without_a_target_is_an_image_that_cannot_be_read(image_tree, tmp_path, capsys):
    root = image_tree({"TB/train/normal": 2, "TB/train/tb/p1": 2})
    link("/not/mounted/7.png", root / "TB/train/tb/p1/7.png")
    link("/not/mounted/p2", root / "TB/train/tb/p2")  # a patient, without a suffix
    text = message(data.open_images, settings(root, tmp_path), ALONE, "train")
    assert "2 of 6 images" in text and "--skip_bad_images" in text
    assert [line.strip() for line in text.splitlines()[1:]] == [
        "TB/train/tb/p1/7.png: a link without a target", "TB/train/tb/p2: a link without a target"]
    skipping = settings(root, tmp_path, skip_bad_images=True)
    images = data.open_images(skipping, ALONE, "train")
    assert images.labels.tolist() == [0, 0, 1, 1] and b"p1/7.png" not in b" ".join(images.names)
    assert "2 images that cannot be decoded are left out" in notes(capsys)[0]


@pytest.mark.parametrize("path", ["TB/train/covid", "TB/val", "OTHER"])
def test_a_folder_that_is_a_link_without_a_target_is_an_error(image_tree, path):
    root = image_tree({"TB/train/normal": 1, "TB/train/tb": 1})
    link("/not/mounted/folder", root / path)
    split = "val" if path == "TB/val" else "train"
    text = message(data.scan, root, "ALL_CXR", split)
    assert f"{root / path} is a link without a target, /not/mounted/folder" in text


def test_a_folder_that_cannot_be_read_is_one_line(image_tree, monkeypatch):
    root = image_tree({"TB/train/normal": 1, "TB/train/tb/p1": 1})
    scandir = os.scandir

    def refuse(folder):  # as root may read everything
        if str(folder).endswith("tb/p1"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)
    monkeypatch.setattr(os, "scandir", refuse)
    text = message(data.scan, root, "TB", "train")
    assert text == f"error: cannot read the folder {root}/TB/train/tb/p1: Permission denied"


@pytest.mark.parametrize("name, kind", [
    ("x.jfif", "JPEG"), ("x.jpe", "JPEG"), ("x.JP2", "JPEG2000"), ("x.pgm", "PPM")])
def test_rarer_suffixes_are_read(image_tree, tmp_path, capsys, name, kind):
    root = image_tree({"TB/train/normal": 1})
    (root / "TB/train/tb").mkdir()
    picture = Image.new("L", (20, 20), 100)
    picture.paste(60, (0, 0, 2, 2))  # 1 % of it, so that it has contrast
    picture.save(root / "TB/train/tb" / name, kind)
    images = data.open_images(settings(root, tmp_path), ALONE, "train")
    assert images.labels.tolist() == [0, 1] and notes(capsys) == []
    assert abs(float(images.images([1]).mean()) - (100 / 127.5 - 1)) < 0.02


def flat_tree(root, names):
    folder = root / "TB/train"
    for i, name in enumerate(names):
        write_png(folder / name, np.full((16, 16), 10 * i, np.uint8))
    return folder


def test_flat_layout_knows_montgomery_and_shenzhen(tmp_path, capsys):
    names = {"TB.1.png": "tb", "tb.2.png": "normal", "MCUCXR_0001_0.png": "normal",
             "MCUCXR_0104_1.png": "tb", "CHNCXR_0001_0.png": "normal", "CHNCXR_0330_1.png": "tb",
             "CHNCXR_0330_1_mask.png": "normal", "other_0001_1.png": "normal"}
    flat_tree(tmp_path, names)
    listing = data.scan(tmp_path, "TB", "train")
    assert classes_of(listing) == names
    assert listing.flat and listing.class_names == ["normal", "tb"] and notes(capsys) == []


def test_the_rule_of_the_flat_layout_is_said_where_it_applies(image_tree, tmp_path):
    flat_tree(tmp_path / "flat", ["a.png", "b.png"])
    text = message(data.open_images, settings(tmp_path / "flat", tmp_path), ALONE, "train")
    assert "only one class, 'normal'" in text and data.FLAT_RULE in text
    root = image_tree({"TB/train/normal": 1})
    assert data.FLAT_RULE not in message(data.open_images, settings(root, tmp_path), ALONE, "train")
    assert data.FLAT_RULE in message(data.scan, tmp_path / "flat", "TB", "train", ["covid", "tb"])


def test_all_cxr_names_the_tasks_without_the_split(image_tree, capsys):
    root = image_tree({"TB/train/tb": 1, "B/test/x": 1, "A/val/x": 1, "TB/val/tb": 1})
    assert len(data.scan(root, "ALL_CXR", "train").files) == 1
    assert [note.strip() for note in notes(capsys)] == ["ALL_CXR: no split 'train' in A, B"]


# --- classes ------------------------------------------------------------------------------------


def open_both(root, out, **changes):
    """(training set, validation set) as the trainers open them."""
    args = settings(root, out, **changes)
    train = data.open_images(args, ALONE, "train")
    return train, data.open_images(args, ALONE, "val", optional=True, train=train)


def test_validation_keeps_the_class_index_of_training(image_tree, tmp_path, capsys):
    root = image_tree({"TB/train/covid": 1, "TB/train/normal": 1, "TB/train/tb": 1})
    val = image_tree({"TB/val/TB": 1, "TB/val/Normal": 1}) / "TB/val"  # another order, no covid
    for i, folder in enumerate(("Normal", "TB")):
        write_png(val / folder / "0.png", np.roll(RAMP, 5 * i, 0).astype(np.uint8))
    _, images = open_both(root, tmp_path)
    assert images.class_names == ["covid", "normal", "tb"] and images.labels.tolist() == [1, 2]
    text = capsys.readouterr().out
    assert "'Normal' is read as class 'normal'" in text and "'TB' is read as class 'tb'" in text


def test_unicode_forms_of_one_name_are_one_class(image_tree, tmp_path):
    composed = unicodedata.normalize("NFC", "pneumothorax spontané")
    decomposed = unicodedata.normalize("NFD", composed)
    root = image_tree({f"TB/train/{composed}": 1, "TB/train/a": 1, f"TB/val/{decomposed}": 1})
    write_png(root / f"TB/val/{decomposed}/0.png", RAMP.astype(np.uint8))
    _, images = open_both(root, tmp_path)
    assert images.class_names == ["a", composed] and images.labels.tolist() == [1]
    # A model's list may be in the other form, and stays as it is.
    listing = data.scan(root, "TB", "val", ["a", decomposed])
    assert listing.class_names == ["a", decomposed] and listing.files[0].class_name == decomposed


def test_a_class_that_training_does_not_know_is_an_error(image_tree, tmp_path):
    root = image_tree({"TB/train/normal": 1, "TB/train/tb": 1, "TB/val/normal": 1,
                       "TB/val/tuberculosis": 1})
    text = message(open_both, root, tmp_path)
    assert "'tuberculosis'" in text and "normal, tb" in text and str(root / "TB/val") in text


def test_class_folders_that_are_no_utf8_stay_classes(image_tree, tmp_path):
    root = image_tree({"TB/train/a": 1, "TB/train/b": 1, "TB/val/b": 1})
    write_png(root / "TB/val/b/0.png", RAMP.astype(np.uint8))
    for split, folder, name in (("train", "a", b"r\xf6ntgen"), ("train", "b", b"r\xe4ntgen"),
                                ("val", "b", b"r\xe4ntgen")):
        os.rename(root / "TB" / split / folder, os.fsencode(root / "TB" / split) + b"/" + name)
    train, val = open_both(root, tmp_path)
    assert train.class_names == val.class_names == [r"r\xe4ntgen", r"r\xf6ntgen"]
    assert train.labels.tolist() == [0, 1] and val.labels.tolist() == [0]
    json.dumps(train.class_names, ensure_ascii=False).encode()
    json.dumps(train.summary, ensure_ascii=False).encode()


def test_an_empty_class_folder_stops_training_and_not_validation(image_tree, tmp_path, capsys):
    root = image_tree({"TB/train/normal": 1, "TB/train/tb": 1, "TB/val/normal": 1, "TB/val/tb": 0})
    write_png(root / "TB/val/normal/0.png", RAMP.astype(np.uint8))
    _, val = open_both(root, tmp_path)
    assert val.labels.tolist() == [0]
    assert [note.strip() for note in notes(capsys)] == [f"no images of class tb in {root}/TB/val"]
    (root / "TB/train/tb/0.png").rename(root / "TB/train/tb/0.txt")
    assert f"no images of class tb in {root}/TB/train" in message(data.scan, root, "TB", "train")


def test_tasks_whose_class_names_differ_in_case_join(image_tree, capsys):
    root = image_tree({"A/train/Normal": 1, "A/train/covid": 1, "B/train/normal": 2,
                       "C/train/normal": 1})
    listing = data.scan(root, "ALL_CXR", "train")
    assert listing.class_names == ["Normal", "covid"]
    assert [file.class_name for file in listing.files].count("Normal") == 4
    note, = notes(capsys)  # once, not once a task
    assert "'normal' is read as class 'Normal'" in note
    # A model that was trained when they were two classes keeps them apart.
    listing = data.scan(root, "ALL_CXR", "train", ["Normal", "covid", "normal"])
    assert [file.class_name for file in listing.files].count("normal") == 3


# --- what a file says about itself --------------------------------------------------------------

UPRIGHT = {  # EXIF orientation: how the stored array has to be turned
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.T, 6: lambda a: a.T[:, ::-1], 7: lambda a: a.T[::-1, ::-1],
    8: lambda a: a.T[::-1]}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("name, options, full", [
    ("x.jpg", {"quality": 95}, 255), ("x.png", {}, 255), ("x.webp", {"lossless": True}, 255),
    ("x.tif", {}, 255), ("x.png", {}, 65535), ("x.tif", {}, 65535)])
def test_orientation_is_followed(tmp_path, orientation, name, options, full):
    stored = RAMP.astype(np.uint8) if full == 255 else (RAMP * 257).astype(np.uint16)
    if name == "x.tif":
        options = {"tiffinfo": {274: orientation}}
    else:
        exif = Image.Exif()
        exif[274] = orientation
        options = {"exif": exif, **options}
    Image.fromarray(stored).save(tmp_path / name, **options)
    grey = decode.read_grey(tmp_path / name)
    expected = UPRIGHT[orientation](RAMP / 255)
    assert grey.pixels.shape == expected.shape and grey.bits == (8 if full == 255 else 16)
    assert np.abs(grey.pixels - expected).max() < (0.02 if name == "x.jpg" else 1e-6)


def packed(values, bits, order):
    """Bytes of a TIFF strip: rows of values with this many bits, the first bits first."""
    if bits % 8 == 0:
        return values.astype(np.int64).astype(f"{order}u{bits // 8}").tobytes()
    split = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(split.reshape(len(values), -1).astype(np.uint8), axis=1).tobytes()


def write_tiff(path, *pages, order="<"):
    """Grey TIFF file. pages: (integers [H, W], BitsPerSample, {other tags})."""
    out = bytearray((b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8))
    for number, (values, bits, more) in enumerate(pages):
        body = packed(values, bits, order)
        body = zlib.compress(body) if more.get(259) == 8 else body
        body += bytes(len(body) % 2)
        height, width = values.shape
        tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 0, 277: 1, 278: height,
                279: len(body), **more}
        tags[273] = len(out) + 2 + 12 * len(tags) + 4
        out += struct.pack(order + "H", len(tags))
        for tag, value in sorted(tags.items()):
            short = tag not in (254, 256, 257, 273, 278, 279)
            out += struct.pack(order + ("HHIHH" if short else "HHII"), tag, 3 if short else 4, 1,
                               *((value, 0) if short else (value,)))
        following = tags[273] + len(body) if number + 1 < len(pages) else 0
        out += struct.pack(order + "I", following) + body
    pathlib.Path(path).write_bytes(out)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("bits", [1, 4, 8, 12, 16])
def test_white_is_zero_and_bits_per_sample(tmp_path, bits, compression, order):
    values = np.rint(RAMP / RAMP.max() * (2**bits - 1)).astype(np.int64)
    for photometric in (0, 1):
        write_tiff(tmp_path / "x.tif", (values, bits, {262: photometric, 259: compression}),
                   order=order)
        grey = decode.read_grey(tmp_path / "x.tif")
        expected = values / (2**bits - 1)
        assert np.abs(grey.pixels - (expected if photometric else 1 - expected)).max() < 1e-6
        assert grey.bits == max(bits, 8)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits, sample_format, highest, full", [
    (8, 2, 127, 127), (16, 2, 32767, 32767), (16, 2, 4095, 32767),
    (32, 1, 65535, 65535), (32, 2, 4095, 65535),  # 16-bit values that something widened
    (32, 2, 2**31 - 1, 2**31 - 1), (32, 1, 2**32 - 1, 2**32 - 1), (32, 1, 70000, 2**32 - 1)])
def test_signed_and_32_bit_integers(tmp_path, bits, sample_format, highest, full, order):
    values = np.rint(RAMP / RAMP.max() * highest).astype(np.int64)
    write_tiff(tmp_path / "x.tif", (values, bits, {339: sample_format}), order=order)
    assert np.abs(decode.read_grey(tmp_path / "x.tif").pixels - values / full).max() < 1e-6


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_negative_values_are_refused(tmp_path, bits):
    write_tiff(tmp_path / "x.tif", (RAMP // 2 - 1, bits, {339: 2}))
    with pytest.raises(ValueError, match="negative"):
        decode.read_grey(tmp_path / "x.tif")


def test_32_bit_integers_that_pillow_writes(tmp_path):
    Image.fromarray((RAMP * 257).astype(np.int32)).save(tmp_path / "x.tif")
    assert np.abs(decode.read_grey(tmp_path / "x.tif").pixels - RAMP / 255).max() < 1e-6


def write_png16(path, values, significant):
    def chunk(kind, body):
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)
    height, width = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    path.write_bytes(b"\x89PNG\r\n\x1a\n"
                     + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0))
                     + (chunk(b"sBIT", bytes([significant])) if significant else b"")
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_significant_bits_of_a_png(tmp_path):
    raw = np.rint(RAMP / RAMP.max() * 4095).astype(np.int64)
    scaled = raw * 16 + raw // 256  # as the PNG standard has it: the high bits repeated
    for values, significant, full in ((raw, 12, 4095), (scaled, 12, 65535), (raw, None, 65535),
                                      (raw, 16, 65535)):
        write_png16(tmp_path / "x.png", values, significant)
        assert np.abs(decode.read_grey(tmp_path / "x.png").pixels - values / full).max() < 1e-6
    assert np.abs(scaled / 65535 - raw / 4095).max() < 2e-5


@pytest.mark.parametrize("highest", [255, 4095, 65535])
def test_the_highest_value_of_a_pgm_is_white(tmp_path, highest):
    values = np.rint(RAMP / RAMP.max() * highest).astype(np.int64)
    kind = "u1" if highest < 256 else ">u2"
    header = f"P5\n{values.shape[1]} {values.shape[0]}\n{highest}\n".encode()
    (tmp_path / "x.pgm").write_bytes(header + values.astype(kind).tobytes())
    assert np.abs(decode.read_grey(tmp_path / "x.pgm").pixels - values / highest).max() < 1e-5


def test_16_bit_jpeg_2000(tmp_path):
    Image.fromarray((RAMP * 257).astype(np.uint16)).save(tmp_path / "x.jp2")
    assert np.abs(decode.read_grey(tmp_path / "x.jp2").pixels - RAMP / 255).max() < 1e-6


def test_a_reduced_size_page_is_not_the_image(tmp_path):
    small = RAMP[::2, ::2]
    reduced, mask = (small, 8, {254: 1}), (255 - RAMP, 8, {254: 4})
    reduced_before_tiff_6 = small, 8, {255: 2}
    image = (RAMP * 16, 12, {254: 0, 274: 6, 262: 0})
    write_tiff(tmp_path / "x.tif", reduced, reduced_before_tiff_6, image, mask)
    expected = 1 - UPRIGHT[6](RAMP * 16 / 4095)  # turned and inverted as its own page says
    assert np.abs(decode.read_grey(tmp_path / "x.tif").pixels - expected).max() < 1e-6
    write_tiff(tmp_path / "y.tif", (RAMP, 8, {}), (255 - RAMP, 8, {}))  # two images: the first
    assert np.abs(decode.read_grey(tmp_path / "y.tif").pixels - RAMP / 255).max() < 1e-6
    write_tiff(tmp_path / "z.tif", reduced)  # nothing else there
    assert np.abs(decode.read_grey(tmp_path / "z.tif").pixels - small / 255).max() < 1e-6


@pytest.mark.parametrize("highest, kind, dark", [
    (4095, np.uint16, 4), (16000, np.uint16, 4), (20000, np.uint16, 2), (40000, np.uint16, 0),
    (40, np.uint8, 4), (200, np.uint8, 0)])
def test_one_notice_counts_the_images_that_are_dark(tmp_path, capsys, highest, kind, dark):
    for name in ("normal", "tb"):
        for i in range(2):
            picture = np.linspace(0, highest / (1 + i), 256).reshape(16, 16).astype(kind)
            write_png(tmp_path / "data/TB/train" / name / f"{i}.png", picture)
    for _ in range(2):  # the second time from the cache
        data.open_images(settings(tmp_path / "data", tmp_path), ALONE, "train")
        found = notes(capsys)
        assert len(found) == (dark > 0)
        counts = f"{dark} of 4 images ({dark // 2} normal, {dark // 2} tb), such as TB/train/"
        assert not dark or counts in found[0] and "no value over a quarter" in found[0]


def test_images_without_contrast_are_counted(image_tree, tmp_path, capsys):
    root = image_tree({"TB/train/normal": 2, "TB/train/tb": 1})
    for i, level in enumerate((0, 200)):
        picture = np.full((20, 20), level, np.uint8)
        write_png(root / f"TB/train/tb/flat{i}.png", picture)
    data.open_images(settings(root, tmp_path), ALONE, "train")
    dark, flat = notes(capsys)
    assert "1 of 5 images (1 tb), such as TB/train/tb/flat0.png, have no value over a" in dark
    assert "2 of 5 images (2 tb), such as TB/train/tb/flat0.png, have no contrast" in flat


@pytest.mark.parametrize("name", ["masks", "Mask", "segmentations", "@eaDir", "__MACOSX"])
def test_masks_and_thumbnails_of_systems_are_no_images(image_tree, capsys, name):
    root = image_tree({"TB/train/normal/images": 2, f"TB/train/normal/{name}": 2,
                       "TB/train/tb/images": 2})
    listing = data.scan(root, "TB", "train")
    assert len(listing.files) == 4
    note, = notes(capsys)
    assert ("hidden" if name[0] in "@_" else name) in note


def test_what_a_package_would_read_is_never_left_out_for_good(image_tree, tmp_path, monkeypatch):
    root = image_tree({"TB/train/normal": 2, "TB/train/tb": 2})

    def without_plugin(path):
        if path.endswith("normal/1.png"):
            raise ValueError("DICOM compressed as X cannot be read: pip install pylibjpeg")
        return whole(path)
    whole = decode.read_grey
    monkeypatch.setattr(decode, "read_grey", without_plugin)
    args = settings(root, tmp_path, skip_bad_images=True)
    assert "pip install pylibjpeg" in message(data.open_images, args, ALONE, "train")
    monkeypatch.setattr(decode, "read_grey", whole)
    assert len(data.open_images(args, ALONE, "train")) == 4


# --- DICOM --------------------------------------------------------------------------------------


@pytest.fixture
def pydicom():
    """The package; tests that need it are skipped without it."""
    module = pytest.importorskip("pydicom")
    decode.import_pydicom.cache_clear()  # pytest forgets after each test what it silenced
    return module


def lut(count, first, bits, table, words=True):
    """A LUT sequence. words: 16 bits for an entry, else 8."""
    from pydicom import Dataset
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [count, first, bits])
    if words:
        item.add_new("LUTData", "US", [int(v) for v in table])
    else:
        item.add_new("LUTData", "OW", np.asarray(table, np.uint8).tobytes())
    return [item]


def write_dicom(path, stored, bits=12, signed=False, **tags):
    """A grey DICOM file with these stored values; returns it as pydicom reads it."""
    import pydicom
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = "1.2.3"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = 8 if bits <= 8 else 16
    dataset.BitsStored, dataset.HighBit = bits, bits - 1
    dataset.PixelRepresentation = int(signed)
    kind = f"<{'i' if signed else 'u'}{dataset.BitsAllocated // 8}"
    dataset.PixelData = stored.astype(kind).tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return pydicom.dcmread(path)


@pytest.mark.parametrize("names", [("docs", "normal", "tb"), ("normal", "tb")])
def test_a_class_without_an_image_is_none(image_tree, tmp_path, capsys, names):
    """A file without a suffix may have been DICOM; a folder that holds nothing else is no class."""
    root = image_tree({f"TB/train/{name}": 2 for name in ("normal", "tb")})
    split = root / "TB/train"
    empty = split / names[0]
    shutil.rmtree(empty, ignore_errors=True)
    empty.mkdir()
    (empty / "LICENSE").write_text("no image")
    line = error_of(capsys, data.open_images, settings(root, tmp_path), ALONE, "train")
    assert f"no images of class {names[0]} are left" in line


def test_dicom_without_a_suffix_or_named_by_uid_is_read(
        image_tree, tmp_path, capsys, pydicom, monkeypatch):
    root = image_tree({"TB/train/normal": 1, "TB/train/tb": 1})
    stored = np.arange(256).reshape(16, 16) * 16
    for name in ("IM0001", "1.2.840.7"):
        write_dicom(root / "TB/train/tb" / name, stored)
    (root / "TB/train/tb/NOTES").write_text("no image" * 40)
    images = data.open_images(settings(root, tmp_path), ALONE, "train")
    assert np.bincount(images.labels).tolist() == [1, 3]
    position = images.names.tolist().index(b"TB/train/tb/IM0001")
    expected = torch.from_numpy(stored / 4095 * 2 - 1).float()
    assert torch.allclose(images.images([position])[0, 0], expected, atol=1e-3)
    note, = notes(capsys)
    assert note.strip().endswith("not read: 1 without a suffix")
    opened = []
    monkeypatch.setattr(decode, "is_dicom", opened.append)
    again = data.open_images(settings(root, tmp_path), ALONE, "train")
    assert len(again) == 4 and not opened  # once is enough


def values_of(bits, signed=False):
    """Stored values [16, 16] that take the whole range."""
    low = -(2 ** (bits - 1)) if signed else 0
    return np.rint(np.linspace(low, low + 2**bits - 1, 256)).astype(np.int64).reshape(16, 16)


@pytest.mark.parametrize("bits, signed", [(8, False), (10, False), (12, False), (12, True),
                                          (16, False), (16, True)])
def test_dicom_without_a_window_takes_the_range_of_its_bits(pydicom, tmp_path, bits, signed):
    stored = values_of(bits, signed)
    expected = (stored - stored.min()) / (2**bits - 1)
    for tags in ({}, {"RescaleSlope": "0.5", "RescaleIntercept": "-1024"}):
        write_dicom(tmp_path / "x.dcm", stored, bits, signed, **tags)
        grey = decode.read_grey(tmp_path / "x.dcm")
        assert grey.bits == bits and grey.pixels.dtype == np.float32
        assert np.abs(grey.pixels - expected).max() < 1e-6
    write_dicom(tmp_path / "x.dcm", stored, bits, signed, RescaleSlope="-1", RescaleIntercept="5")
    assert np.abs(decode.read_grey(tmp_path / "x.dcm").pixels - (1 - expected)).max() < 1e-6


@pytest.mark.filterwarnings("ignore:overflow encountered")  # in pydicom's sigmoid
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("centre, width", [(["700", "90"], ["1500", "40"]), ("1000", "1"),
                                           ("-30.5", "600.5")])
def test_dicom_windows_are_as_in_pydicom(pydicom, tmp_path, photometric, signed, function, centre,
                                         width):
    stored = values_of(12, signed)
    tags = {"VOILUTFunction": function} if function else {}
    for rescale in ({}, {"RescaleSlope": "2", "RescaleIntercept": "-500"}):
        dataset = write_dicom(tmp_path / "x.dcm", stored, 12, signed, WindowCenter=centre,
                              PhotometricInterpretation=photometric, WindowWidth=width,
                              **tags, **rescale)
        values = pydicom.pixels.apply_modality_lut(dataset.pixel_array, dataset)
        windowed = pydicom.pixels.apply_windowing(values, dataset)  # several windows: the first
        low = -2048 if signed else 0
        ends = [2 * v - 500 if rescale else v for v in (low, low + 4095)]
        expected = (windowed - ends[0]) / (ends[1] - ends[0])
        if photometric == "MONOCHROME1":
            expected = 1 - expected
        assert np.abs(decode.read_grey(tmp_path / "x.dcm").pixels - expected).max() < 1e-5


@pytest.mark.parametrize("first", [0, 100, 4000])
@pytest.mark.parametrize("bits, words", [(16, True), (8, True), (8, False)])
def test_dicom_modality_lut(pydicom, tmp_path, first, bits, words):
    stored = values_of(12)
    table = np.rint(np.linspace(0, 1, 200)**2 * (2**bits - 1)).astype(np.int64)
    sequence = lut(200, first, bits, table, words)
    write_dicom(tmp_path / "x.dcm", stored, ModalityLUTSequence=sequence)
    expected = table[(stored - first).clip(0, 199)] / (2**bits - 1)
    assert np.abs(decode.read_grey(tmp_path / "x.dcm").pixels - expected).max() < 1e-6
    dataset = write_dicom(tmp_path / "x.dcm", stored, ModalityLUTSequence=sequence,
                          WindowCenter="90", WindowWidth="80")  # of what the LUT gives
    expected = ((table[(stored - first).clip(0, 199)] - 89.5) / 79 + 0.5).clip(0, 1)
    assert np.abs(decode.read_grey(tmp_path / "x.dcm").pixels - expected).max() < 1e-6
    if words:
        values = pydicom.pixels.apply_modality_lut(dataset.pixel_array, dataset)
        windowed = pydicom.pixels.apply_windowing(values, dataset) / (2**bits - 1)
        assert np.abs(windowed - expected).max() < 1e-6


@pytest.mark.parametrize("count, first, bits, words", [
    (4096, 0, 12, True), (4096, 0, 8, True), (4096, 0, 8, False), (300, 1000, 16, True),
    (3000, -1024, 10, True)])
def test_dicom_voi_lut_goes_before_a_window(pydicom, tmp_path, count, first, bits, words):
    stored = values_of(12)
    table = np.rint(np.sqrt(np.linspace(0, 1, count)) * (2**bits - 1)).astype(np.int64)
    other = lut(2, 0, 16, [0, 65535])
    dataset = write_dicom(
        tmp_path / "x.dcm", stored, VOILUTSequence=lut(count, first, bits, table, words) + other,
        RescaleSlope="1", RescaleIntercept="-900" if first < 0 else "0", WindowCenter="1",
        WindowWidth="2")
    rescaled = stored - 900 if first < 0 else stored
    expected = table[(rescaled - first).clip(0, count - 1)] / (2**bits - 1)
    assert np.abs(decode.read_grey(tmp_path / "x.dcm").pixels - expected).max() < 1e-6
    if bits > 8:  # pydicom fails for 8 bits and more than 256 entries
        looked_up = pydicom.pixels.apply_voi_lut(rescaled.astype(np.int32), dataset)
        assert np.abs(looked_up / (2**bits - 1) - expected).max() < 1e-6


@pytest.mark.filterwarnings("ignore")  # pydicom writes such a LUT as VR UN, and says so
def test_dicom_lut_of_65536_entries_and_a_first_value_written_as_unsigned(pydicom, tmp_path):
    stored = values_of(16)
    table = np.arange(65536)[::-1]
    write_dicom(tmp_path / "x.dcm", stored, 16, ModalityLUTSequence=lut(0, 0, 16, table))
    assert np.abs(decode.read_grey(tmp_path / "x.dcm").pixels - (1 - stored / 65535)).max() < 1e-6
    stored, table = values_of(12), np.arange(4096)
    write_dicom(tmp_path / "x.dcm", stored, RescaleSlope="1", RescaleIntercept="-1024",
                VOILUTSequence=lut(4096, 65536 - 1024, 12, table))
    assert np.abs(decode.read_grey(tmp_path / "x.dcm").pixels - stored / 4095).max() < 1e-6


def test_dicom_lut_of_a_big_endian_file(pydicom, tmp_path):
    stored, table = values_of(8), np.arange(256) * 16
    dataset = write_dicom(tmp_path / "x.dcm", stored, 8)
    for kind, content in (("US", [int(v) for v in table]), ("OW", table.astype(">u2").tobytes())):
        dataset.ModalityLUTSequence = lut(256, 0, 16, table)
        dataset.ModalityLUTSequence[0].add_new("LUTData", kind, content)
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRBigEndian
        dataset["PixelData"].VR = "OB"
        pydicom.dcmwrite(tmp_path / "big.dcm", dataset, implicit_vr=False, little_endian=False)
        grey = decode.read_grey(tmp_path / "big.dcm")
        assert np.abs(grey.pixels - stored * 16 / 65535).max() < 1e-6


@pytest.mark.parametrize("words", [True, False])
def test_dicom_presentation_lut(pydicom, tmp_path, words):
    stored = values_of(12)
    bits = 12 if words else 8
    table = np.rint(np.linspace(0, 1, 256)**3 * (2**bits - 1)).astype(np.int64)
    write_dicom(tmp_path / "x.dcm", stored, WindowCenter="2048", WindowWidth="2001",
                PresentationLUTSequence=lut(256, 0, bits, table, words))
    windowed = ((stored - 2047.5) / 2000 + 0.5).clip(0, 1)
    expected = table[np.rint(windowed * 255).astype(int)] / (2**bits - 1)
    assert np.abs(decode.read_grey(tmp_path / "x.dcm").pixels - expected).max() < 1e-6


@pytest.mark.parametrize("photometric, shape, inverted", [
    ("MONOCHROME2", None, False), ("MONOCHROME2", "IDENTITY", False),
    ("MONOCHROME2", "INVERSE", True), ("MONOCHROME1", None, True),
    ("MONOCHROME1", "INVERSE", True)])  # one inversion, not two
def test_dicom_inversions(pydicom, tmp_path, photometric, shape, inverted):
    stored = values_of(12)
    tags = {"PresentationLUTShape": shape} if shape else {}
    write_dicom(tmp_path / "x.dcm", stored, PhotometricInterpretation=photometric, **tags)
    expected = 1 - stored / 4095 if inverted else stored / 4095
    assert np.abs(decode.read_grey(tmp_path / "x.dcm").pixels - expected).max() < 1e-6


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("signed", [False, True])
def test_dicom_padding_is_black(pydicom, tmp_path, photometric, signed):
    stored = values_of(12, signed)
    grey = (stored - stored.min()) / 4095
    grey = 1 - grey if photometric == "MONOCHROME1" else grey
    value, limit = int(stored[9, 9]), int(stored[3, 2])
    one, many = stored == value, (stored >= limit) & (stored <= value)
    for tags, padding in (({}, one), ({"PixelPaddingRangeLimit": limit}, many)):
        write_dicom(tmp_path / "x.dcm", stored, 12, signed, PixelPaddingValue=value,
                    PhotometricInterpretation=photometric, **tags)
        pixels = decode.read_grey(tmp_path / "x.dcm").pixels
        assert padding.any() and (pixels[padding] == 0).all()
        assert np.abs(pixels - grey)[~padding].max() < 1e-6


def shipped(pydicom, name):
    """Path of a file that comes with pydicom; nothing is downloaded."""
    path = pathlib.Path(pydicom.data.__file__).parent / "test_files" / name
    if not path.exists():
        pytest.skip(f"this pydicom comes without {name}")
    return path


@pytest.mark.parametrize("name", [
    "CT_small.dcm", "MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm",
    "MR_small_implicit.dcm", "MR_small_jp2klossless.dcm", "693_J2KI.dcm", "image_dfl.dcm",
    "examples_overlay.dcm", "J2K_pixelrep_mismatch.dcm"])
def test_dicom_files_of_pydicom(pydicom, name):
    path = shipped(pydicom, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(path)
        stored = dataset.pixel_array
        values = pydicom.pixels.apply_modality_lut(stored, dataset)
        shown = pydicom.pixels.apply_voi_lut(values, dataset).astype(np.float64)
    low = -(2 ** (dataset.BitsStored - 1)) if dataset.PixelRepresentation else 0
    ends = np.array([low, low + 2**dataset.BitsStored - 1])
    ends = ends * float(dataset.get("RescaleSlope", 1)) + float(dataset.get("RescaleIntercept", 0))
    expected = (shown - ends[0]) / (ends[1] - ends[0])
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        expected = 1 - expected
    if "PixelPaddingValue" in dataset:
        expected[stored == dataset.PixelPaddingValue] = 0
    grey = decode.read_grey(path)
    assert grey.bits == dataset.BitsStored and expected.std() > 1e-4
    assert np.abs(grey.pixels - expected).max() < 1e-5


@pytest.mark.parametrize("name, reason", [
    ("rtdose.dcm", "15 frames"), ("SC_rgb_rle_2frame.dcm", "2 frames"),
    ("SC_rgb_jpeg.dcm", "colour"), ("examples_palette.dcm", "colour"),
    ("rtplan.dcm", "without an image"), ("test-SR.dcm", "without an image"),
    ("MR_truncated.dcm", "damaged"), ("no_meta.dcm", "no DICOM file")])
def test_dicom_files_of_pydicom_that_are_no_grey_image(pydicom, name, reason):
    with pytest.raises(ValueError, match=reason):
        decode.read_grey(shipped(pydicom, name))


def test_damaged_dicom_files_raise_only_what_callers_expect(pydicom, tmp_path):
    path = tmp_path / "x.dcm"
    write_dicom(path, values_of(12), WindowCenter="700", WindowWidth="1500",
                VOILUTSequence=lut(4, 0, 8, [0, 1, 2, 255]), PatientName="A^B")
    whole = path.read_bytes()
    path.write_text("Dear colleague, see attached.")
    with pytest.raises(ValueError, match="no DICOM file"):
        decode.read_grey(path)
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="damaged DICOM"):
        decode.read_grey(path)
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(whole[:rng.integers(len(whole) // 4, len(whole) + 1)])
        for _ in range(3):
            damaged[rng.integers(min(len(damaged), len(whole) - 512))] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            assert decode.read_square(path, 16).shape == (16, 16)
        except (OSError, ValueError):
            pass


def test_compressed_dicom_says_which_packages_read_it(pydicom, monkeypatch):
    path = shipped(pydicom, "MR_small_RLE.dcm")

    def no_decoder(dataset):
        raise RuntimeError("Unable to decompress, the following packages are missing: ...")
    monkeypatch.setattr(pydicom.dataset.Dataset, "pixel_array", property(no_decoder))
    with pytest.raises(ValueError, match="RLE Lossless.* pip install pylibjpeg"):
        decode.read_grey(path)


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, KeyError, NotImplementedError])
def test_what_pydicom_says_of_a_damaged_file_is_not_repeated(pydicom, tmp_path, monkeypatch, kind):
    write_dicom(tmp_path / "x.dcm", values_of(12))

    def damaged(dataset):
        raise kind("cannot read (0010,0010) SECRET^NAME")
    monkeypatch.setattr(pydicom.dataset.Dataset, "pixel_array", property(damaged))
    with pytest.raises(ValueError) as e:
        decode.read_grey(tmp_path / "x.dcm")
    assert str(e.value) == f"damaged DICOM ({kind.__name__})"


def test_without_pydicom_one_line_says_how_to_install_it(image_tree, tmp_path, monkeypatch):
    root = image_tree({"TB/train/normal": 1})
    (root / "TB/train/tb").mkdir()
    (root / "TB/train/tb/x.DCM").write_bytes(bytes(128) + b"DICM")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    decode.import_pydicom.cache_clear()
    text = message(data.open_images, settings(root, tmp_path), ALONE, "train")
    assert "pip install pydicom" in text and len(text.splitlines()) == 1
    (root / "TB/train/tb/x.DCM").unlink()
    write_png(root / "TB/train/tb/x.png", RAMP.astype(np.uint8))
    assert len(data.open_images(settings(root, tmp_path), ALONE, "train")) == 2


def test_nothing_that_a_dicom_says_of_a_patient_is_kept_or_printed(pydicom, image_tree, tmp_path,
                                                                   capfd, caplog):
    root = image_tree({"TB/train/normal": 1, "TB/val/normal": 1})
    broken = {"window.dcm": (b"12345678", b"SECRET-1"), "slope.dcm": (b"87654321", b"SECRET-2"),
              "date.dcm": (b"20200202", b"SECRET-3"), "frames.dcm": (b"11112222", b"SECRET-4"),
              "syntax.dcm": (b"1.2.840.10008.1.2.1", b"SECRET.1.2.3.4.5.6."),
              "text.dcm": (b"ISO_IR 100", b"SECRET-7  ")}  # of which pydicom warns
    for name in ("good.dcm", *broken):
        path = root / "TB/train/tb" / name
        path.parent.mkdir(exist_ok=True)
        frames = {"NumberOfFrames": "11112222"} if name == "frames.dcm" else {}
        write_dicom(path, values_of(12), PatientName="SECRET^NAME", PatientID="SECRET-5",
                    StudyDate="20200202", WindowCenter="12345678", WindowWidth="900",
                    RescaleSlope="87654321", RescaleIntercept="0",
                    SpecificCharacterSet="ISO_IR 100", **frames)
        if name in broken:
            content = path.read_bytes()
            assert broken[name][0] in content
            path.write_bytes(content.replace(*broken[name]))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        text = message(data.open_images, settings(root, tmp_path), ALONE, "train")
        assert [line.split(": ")[0].strip() for line in text.splitlines()[1:]] == [
            f"TB/train/tb/{name}.dcm" for name in ("frames", "slope", "syntax", "window")]
        train, _ = open_both(root, tmp_path, skip_bad_images=True)
    assert train.labels.tolist() == [0, 1, 1, 1]  # broken dates and texts do no harm
    printed = "".join(capfd.readouterr())
    spoken = [text, printed, caplog.text, repr(train.summary), *(str(w.message) for w in warned)]
    stored = [path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(stored) >= 4 and "left out" in printed
    assert not any("SECRET" in words for words in spoken)
    assert not any(b"SECRET" in content for content in stored)


# --- copies between splits ----------------------------------------------------------------------


def picture(seed):
    """Smooth random uint8 [64, 64] with a little noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.uniform(20, 200, (7, 7)).astype(np.float32))
    smooth = np.asarray(coarse.resize((64, 64), Image.Resampling.BICUBIC))
    return (smooth + rng.normal(0, 3, (64, 64))).clip(0, 255).astype(np.uint8)


@pytest.fixture
def leaky_tree(tmp_path):
    """Twelve training images, and a validation split in which four of eight are copies of them."""
    root = tmp_path / "data/TB"
    for i in range(12):
        write_png(root / "train" / ("normal" if i < 6 else "tb") / f"{i}.png", picture(i))
    for i in range(20, 24):
        write_png(root / "val" / ("normal" if i < 22 else "tb") / f"other{i}.png", picture(i))
    shutil.copy(root / "train/normal/3.png", root / "val/normal/exact.png")
    rescaled = Image.fromarray(picture(4)).resize((40, 40), Image.Resampling.BICUBIC)
    rescaled.save(root / "val/normal/rescaled.png")
    Image.fromarray(picture(8)).save(root / "val/tb/compressed.jpg", quality=30)
    write_png(root / "val/tb/brighter.png", (picture(9) * 0.7 + 60).astype(np.uint8))
    return root.parent


COPIES = {"normal/exact.png": "normal/3.png", "normal/rescaled.png": "normal/4.png",
          "tb/brighter.png": "tb/9.png", "tb/compressed.jpg": "tb/8.png"}


def copies_named(text):
    """{validation image: training image} of the notice."""
    lines = [line.strip().split(" is ") for line in text.splitlines() if line.startswith("  ")]
    return {a.replace("TB/val/", ""): b.replace("TB/train/", "") for a, b in lines}


def test_copies_of_training_images_are_named_and_left_out(leaky_tree, tmp_path, capsys):
    train, val = open_both(leaky_tree, tmp_path, img_size=32)
    text = capsys.readouterr().out
    assert copies_named(text) == COPIES and text.startswith("note: 4 images of ")
    assert [os.path.basename(name) for name in val.names] == [
        b"other%d.png" % i for i in range(20, 24)]
    assert val.labels.tolist() == [0, 0, 1, 1] and len(train) == 12
    expected = decode.read_square(leaky_tree / val.name(2), 32) / 32767.5 - 1
    assert np.allclose(val.images([2])[0, 0], expected, atol=1e-6)  # rows, labels, names agree


def test_copies_are_looked_for_once(leaky_tree, tmp_path, capsys, monkeypatch):
    _, first = open_both(leaky_tree, tmp_path)
    monkeypatch.setattr(decode, "read_grey", None)
    monkeypatch.setattr(data.CachedArray, "rows", None)
    before = capsys.readouterr().out
    _, second = open_both(leaky_tree, tmp_path)
    assert second.names.tolist() == first.names.tolist() and len(second) == 4
    assert copies_named(capsys.readouterr().out) == copies_named(before) == COPIES


def test_a_search_for_copies_that_was_killed_leaves_nothing(leaky_tree, tmp_path):
    open_both(leaky_tree, tmp_path)
    path, = (tmp_path / "cache").glob("copies_*.json")
    left = path.rename(path.with_name(f".{path.name}.0123456789abcdef.tmp"))
    open_both(leaky_tree, tmp_path)
    assert path.exists() and not left.exists()


def test_other_training_images_are_another_question(leaky_tree, tmp_path, capsys):
    open_both(leaky_tree, tmp_path)
    write_png(leaky_tree / "TB/train/normal/3.png", picture(99))
    capsys.readouterr()
    _, val = open_both(leaky_tree, tmp_path)
    assert len(val) == 5 and "exact.png" not in copies_named(capsys.readouterr().out)


@pytest.mark.parametrize("class_filter, name", enumerate(["normal", "tb"]))
def test_copies_with_a_class_filter(leaky_tree, tmp_path, capsys, class_filter, name):
    open_both(leaky_tree, tmp_path)
    capsys.readouterr()
    train, val = open_both(leaky_tree, tmp_path, class_filter=class_filter)
    expected = {a: b for a, b in COPIES.items() if a.startswith(name)}
    assert copies_named(capsys.readouterr().out) == expected
    assert len(train) == 6 and val.labels.tolist() == [class_filter] * 2


def test_copies_across_classes_count_too(leaky_tree, tmp_path, capsys):
    shutil.copy(leaky_tree / "TB/train/normal/0.png", leaky_tree / "TB/val/tb/a.png")
    _, val = open_both(leaky_tree, tmp_path)
    assert copies_named(capsys.readouterr().out)["tb/a.png"] == "normal/0.png" and len(val) == 4


def test_a_split_of_copies_alone_is_no_validation(leaky_tree, tmp_path, capsys):
    shutil.rmtree(leaky_tree / "TB/val")
    shutil.copytree(leaky_tree / "TB/train", leaky_tree / "TB/val")
    train, val = open_both(leaky_tree, tmp_path)
    assert val is None and len(train) == 12
    assert "12 images of" in capsys.readouterr().out
    args = settings(leaky_tree, tmp_path)
    text = message(data.open_images, args, ALONE, "val", train=train)
    assert "no image is left" in text


def test_thumbnails_correlate_like_numpy():
    x = torch.randn(5, 1, 64, 64)
    rows = x.reshape(5, 32, 2, 32, 2).mean((2, 4)).flatten(1).numpy()
    small = data.thumbnails(x)
    assert np.allclose(small @ small.T, np.corrcoef(rows), atol=1e-5)
    assert np.allclose(small, data.thumbnails(3 * x + 0.5), atol=1e-5)


# --- data that changed --------------------------------------------------------------------------


def changes(root, before):
    return data.describe_changes(before, data.class_summary(data.scan(root, "TB", "train")))


@pytest.fixture
def three_classes(image_tree):
    """(data root, its class_summary as a run's JSON gives it back): 2, 3 and 4 images."""
    root = image_tree({"TB/train/covid": 2, "TB/train/normal": 3, "TB/train/tb/p1": 4})
    summary = data.class_summary(data.scan(root, "TB", "train"))
    return root, json.loads(json.dumps(summary))


def test_data_that_stayed_the_same_changed_nothing(three_classes, tmp_path):
    root, before = three_classes
    assert [(name, count) for name, count, _ in before] == [("covid", 2), ("normal", 3), ("tb", 4)]
    assert changes(root, before) == []
    moved = tmp_path / "moved"
    root.rename(moved)
    assert changes(moved, before) == []


def test_images_that_came_or_went_are_counted(three_classes):
    root, before = three_classes
    shutil.copy(root / "TB/train/normal/0.png", root / "TB/train/normal/9.png")
    (root / "TB/train/tb/p1/0.png").unlink()
    assert changes(root, before) == ["class normal has 4 images, it had 3",
                                     "class tb has 3 images, it had 4"]


def test_swapped_class_folders_are_seen(three_classes):
    root, before = three_classes
    train = root / "TB/train"
    for old, new in (("normal", "x"), ("tb", "normal"), ("x", "tb")):
        (train / old).rename(train / new)
    assert changes(root, before) == ["class normal now holds the images that were tb",
                                     "class tb now holds the images that were normal"]


def test_classes_that_came_or_went_are_named(three_classes):
    root, before = three_classes
    (root / "TB/train/covid").rename(root / "TB/train/effusion")
    assert changes(root, before) == ["class effusion is new, with 2 images", "class covid is gone"]


@pytest.mark.parametrize("change", ["renamed", "touched", "rewritten"])
def test_as_many_other_files_are_seen(three_classes, change):
    root, before = three_classes
    path = root / "TB/train/tb/p1/2.png"
    if change == "renamed":
        path.rename(path.with_name("20.png"))
    elif change == "touched":
        os.utime(path, ns=(0, 0))
    else:
        time_ns = path.stat().st_mtime_ns
        path.write_bytes(path.read_bytes() + b"\0")
        os.utime(path, ns=(time_ns, time_ns))
    assert changes(root, before) == ["class tb has other files, as many as before (4)"]
