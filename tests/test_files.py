"""What users have on disk: layouts, what files say about themselves, DICOM, the classes of other
splits, copies between splits, and data that changed between two starts."""
import contextlib
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
from conftest import write_png
from PIL import Image
from test_data import ALONE, message, settings

import data
from lib import cache, decode

RAMP = np.add.outer(np.arange(24) * 4, np.arange(16) * 9)  # no symmetry, 0 to 227


def notes(capsys):
    """The notices since the last call."""
    return [line for line in capsys.readouterr().out.split("note: ") if line]


def link(target, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


# --- folders ------------------------------------------------------------------------------------


def test_a_link_without_a_target_is_a_bad_image(image_tree, tmp_path, capsys):
    root = image_tree({"TB/train/normal": 2, "TB/train/tb/p1": 2})
    link("/not/mounted/7.png", root / "TB/train/tb/p1/7.png")
    link("/not/mounted/p2", root / "TB/train/tb/p2")  # a patient, without a suffix
    text = message(data.open_images, settings(root, tmp_path), ALONE, "train")
    assert "2 of 6 images" in text and "--skip_bad_images" in text
    assert [line.strip() for line in text.splitlines()[1:]] == [
        "TB/train/tb/p1/7.png: a link without a target", "TB/train/tb/p2: a link without a target"]
    skipping = settings(root, tmp_path, skip_bad_images=True)
    assert data.open_images(skipping, ALONE, "train").labels.tolist() == [0, 0, 1, 1]
    assert "2 images that cannot be decoded are left out" in notes(capsys)[0]


def test_images_are_found_at_any_depth_in_order(image_tree, capsys):
    root = image_tree({"TB/train/normal/patient1/study1": 1, "TB/train/normal/patient1/study2": 1,
                       "TB/train/tb": 2, "TB/train/tb/0a/b/c": 1})
    listing = data.scan(root, "TB", "train")
    assert [(file.path, file.class_name) for file in listing.files] == [
        ("TB/train/normal/patient1/study1/0.png", "normal"),
        ("TB/train/normal/patient1/study2/0.png", "normal"), ("TB/train/tb/0.png", "tb"),
        ("TB/train/tb/0a/b/c/0.png", "tb"), ("TB/train/tb/1.png", "tb")]
    assert not listing.flat and notes(capsys) == []


def test_one_notice_counts_by_reason_what_is_not_read(image_tree, capsys):
    root = image_tree({"TB/train/normal": 1, "TB/train/normal/p1": 1, "TB/train/tb": 1,
                       "TB/train/tb/.thumbnails": 2, "TB/train/tb/Masks": 2, "covid/p1": 2})
    split = root / "TB/train"
    for name in ("tb/a.txt", "tb/b.TXT", "normal/p1/c.nii.gz", "normal/IM0001", "tb/1.2.840.7",
                 "tb/._0.png", "beside.png", "README", ".hidden"):
        (split / name).touch()
    open(os.fsencode(split / "normal/x.p") + b"\xf6g", "w").close()
    (split / ".git").mkdir()
    link(".#lock", split / ".#lock")  # an editor's, without a target
    link("..", split / "tb/loop")
    link(root / "covid", split / "covid")  # a class that is a link
    link(root / "covid", root / "covid/p1/up")  # covid/p1/up is covid again
    listing = data.scan(root, "TB", "train")
    assert listing.class_names == ["covid", "normal", "tb"]
    names = sorted(os.path.basename(file.path) for file in listing.files)
    assert names == ["0.png"] * 4 + ["1.2.840.7", "1.png", "IM0001"]  # the two: DICOM, perhaps
    note, = notes(capsys)
    assert note.strip().split("not read: ")[1] == (
        "1 *.gz, 1 *.p\\xf6g, 2 *.txt, 2 beside the class folders, 1 folder of masks, 5 hidden, "
        "2 link back to a folder above it")


@pytest.mark.parametrize("path", ["TB/train/covid", "TB/val", "OTHER"])
def test_a_folder_whose_link_has_no_target_is_an_error(image_tree, path):
    root = image_tree({"TB/train/normal": 1, "TB/train/tb": 1})
    link("/not/mounted/folder", root / path)
    split = "val" if path == "TB/val" else "train"
    text = message(data.scan, root, "ALL_CXR", split)
    assert f"{root / path} is a link without a target, /not/mounted/folder" in text


def test_flat_layout_knows_montgomery_and_shenzhen(tmp_path, capsys):
    names = {"TB.1.png": "tb", "tb.2.png": "normal", "MCUCXR_0001_0.png": "normal",
             "MCUCXR_0104_1.png": "tb", "CHNCXR_0001_0.png": "normal", "CHNCXR_0330_1.png": "tb",
             "CHNCXR_0330_1_mask.png": "normal", "other_0001_1.png": "normal"}
    for name in names:
        write_png(tmp_path / "TB/train" / name, RAMP.astype(np.uint8))
    listing = data.scan(tmp_path, "TB", "train")
    assert {os.path.basename(file.path): file.class_name for file in listing.files} == names
    assert listing.flat and listing.class_names == ["normal", "tb"] and notes(capsys) == []
    assert data.FLAT_RULE in message(data.scan, tmp_path, "TB", "train", ["covid", "tb"])


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


def test_an_empty_class_stops_training_and_not_validation(image_tree, tmp_path, capsys):
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

SIGNED = {339: 2}  # SampleFormat
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
    assert grey.shape == expected.shape
    assert np.abs(grey - expected).max() < (0.02 if name == "x.jpg" else 1e-6)


def write_tiff(path, values, bits, order="<", tags=()):
    """Grey TIFF file of integers [H, W] with BitsPerSample `bits`; tags: {other tags}."""
    body = values.astype(np.int64).astype(f"{order}u{bits // 8}").tobytes() if bits >= 8 else b""
    if not body:  # rows of bits, the first bits first
        split = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        body = np.packbits(split.reshape(len(values), -1).astype(np.uint8), axis=1).tobytes()
    tags = dict(tags)
    body = zlib.compress(body) if tags.get(259) == 8 else body
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 0, 277: 1, 278: height,
            279: len(body), **tags}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    out = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, len(tags))
    for tag, value in sorted(tags.items()):
        short = tag not in (254, 256, 257, 273, 278, 279)
        out += struct.pack(order + ("HHIHH" if short else "HHII"), tag, 3 if short else 4, 1,
                           *((value, 0) if short else (value,)))
    pathlib.Path(path).write_bytes(out + struct.pack(order + "I", 0) + body)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits, tags, highest, full", [
    *((bits, {262: photometric, 259: compression}, 2**bits - 1, 2**bits - 1)
      for bits in (1, 4, 8, 16) for photometric in (0, 1) for compression in (1, 8)),
    (8, SIGNED, 127, 127), (16, SIGNED, 32767, 32767), (16, SIGNED, 4095, 32767),
    (32, {}, 65535, 65535), (32, SIGNED, 4095, 65535),  # 16-bit values that something widened
    (32, SIGNED, 2**31 - 1, 2**31 - 1), (32, {}, 2**32 - 1, 2**32 - 1), (32, {}, 70000, 2**32 - 1)])
def test_tiff_bits_sign_and_white_is_zero(tmp_path, bits, tags, highest, full, order):
    values = np.rint(RAMP / RAMP.max() * highest).astype(np.int64)
    write_tiff(tmp_path / "x.tif", values, bits, order, tags)
    expected = values / full if tags.get(262, 1) else 1 - values / full
    assert np.abs(decode.read_grey(tmp_path / "x.tif") - expected).max() < 1e-6


@pytest.mark.parametrize("name, highest, kind", [
    ("x.tif", 65535, np.int32), ("x.jp2", 65535, np.uint16), ("x.jp2", 255, np.uint8),
    ("x.pgm", 255, np.uint8), ("x.jfif", 255, np.uint8), ("x.JPE", 255, np.uint8)])
def test_formats_keep_their_range(tmp_path, name, highest, kind):
    values = np.rint(RAMP / RAMP.max() * highest).astype(kind)
    options = {"quality": 100} if kind == np.uint8 and name[2:] != "pgm" else {}
    format_name = "JPEG" if name[2] in "jJ" and name[3] != "p" else None
    Image.fromarray(values).save(tmp_path / name, format_name, **options)
    assert os.path.splitext(name)[1].lower() in decode.EXTENSIONS
    found = decode.read_grey(tmp_path / name)
    assert np.abs(found - values / highest).max() < (0.03 if options else 1e-6)


@pytest.mark.parametrize("values, bits, tags, reason", [
    (RAMP // 2 - 1, 8, SIGNED, "negative"), (RAMP - 1, 16, SIGNED, "negative"),
    (RAMP - 1, 32, SIGNED, "negative"), (RAMP, 8, {254: 1}, "reduced-size copy"),
    (RAMP, 8, {259: 99}, "not an image")])
def test_images_that_may_be_misread_are_refused(tmp_path, values, bits, tags, reason):
    write_tiff(tmp_path / "x.tif", values, bits, tags=tags)
    with pytest.raises(ValueError, match=reason) as e:
        decode.read_grey(tmp_path / "x.tif")
    assert not decode.may_pass(e.value)


@pytest.mark.parametrize("low, high, expected", [
    (0, 4095, "no value over a quarter"), (0, 20000, ""), (50000, 50100, "no contrast")])
def test_one_notice_counts_dark_or_flat_images(tmp_path, capsys, low, high, expected):
    for name, top in (("normal", 65535), ("tb", high)):
        for i in range(2):
            values = np.linspace(min(low, top), top - i, 256).reshape(16, 16).astype(np.uint16)
            write_png(tmp_path / "data/TB/train" / name / f"{i}.png", values)
    for _ in range(2):  # the second time from the cache
        data.open_images(settings(tmp_path / "data", tmp_path), ALONE, "train")
        found = notes(capsys)
        assert len(found) == bool(expected)
        assert not found or expected in found[0] and (
            "2 of 4 images (2 tb), such as TB/train/tb/0.png" in found[0])


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


@pytest.fixture
def shown(pydicom, tmp_path):
    """shown(STORED, BITS, SIGNED, TAG=...) -> grey values that such a file is read as."""
    def read(*args, **tags):
        write_dicom(tmp_path / "x.dcm", *args, **tags)
        return decode.read_grey(tmp_path / "x.dcm")
    return read


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
def test_dicom_without_a_window_takes_the_range_of_its_bits(shown, bits, signed):
    stored = values_of(bits, signed)
    expected = (stored - stored.min()) / (2**bits - 1)
    for slope in ("1", "0.5", "-1"):
        grey = shown(stored, bits, signed, RescaleSlope=slope, RescaleIntercept="-1024")
        assert grey.dtype == np.float32
        assert np.abs(grey - (1 - expected if slope == "-1" else expected)).max() < 1e-6
    inverse = shown(stored, bits, signed, PresentationLUTShape="INVERSE")
    one = shown(stored, bits, signed, PhotometricInterpretation="MONOCHROME1")
    both = shown(stored, bits, signed, PhotometricInterpretation="MONOCHROME1",
                 PresentationLUTShape="INVERSE")  # says the same twice
    assert all(np.abs(grey - (1 - expected)).max() < 1e-6 for grey in (inverse, one, both))


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
    for slope, intercept in ((1, 0), (2, -500)):
        dataset = write_dicom(
            tmp_path / "x.dcm", stored, 12, signed, WindowCenter=centre, WindowWidth=width,
            PhotometricInterpretation=photometric, RescaleSlope=str(slope),
            RescaleIntercept=str(intercept), **tags)
        values = pydicom.pixels.apply_modality_lut(dataset.pixel_array, dataset)
        windowed = pydicom.pixels.apply_windowing(values, dataset)  # several windows: the first
        low, high = slope * stored[[0, -1], [0, -1]] + intercept
        expected = (windowed - low) / (high - low)
        if photometric == "MONOCHROME1":
            expected = 1 - expected
        assert np.abs(decode.read_grey(tmp_path / "x.dcm") - expected).max() < 1e-5


def test_a_negative_slope_with_a_window_inverts_once(shown):
    stored = values_of(12)
    grey = shown(stored, RescaleSlope="-1", RescaleIntercept="4095", WindowCenter="2048",
                 WindowWidth="4096")
    assert np.abs(grey - (1 - stored / 4095)).max() < 1e-6


@pytest.mark.filterwarnings("ignore")  # pydicom writes a table of 65536 entries as VR UN
@pytest.mark.parametrize("kind", ["ModalityLUTSequence", "VOILUTSequence"])
@pytest.mark.parametrize("count, first, bits, words", [
    (4096, 0, 16, True), (4096, 0, 8, True), (4096, 0, 8, False), (200, 100, 8, False),
    (300, 1000, 16, True), (200, 4000, 16, True), (256, 0, 8, True), (65536, 0, 16, True)])
def test_dicom_look_up_tables(shown, kind, count, first, bits, words):
    stored = values_of(16 if count == 65536 else 12)
    table = np.rint(np.sqrt(np.linspace(0, 1, count)) * (2**bits - 1)).astype(np.int64)
    window = {"WindowCenter": "1", "WindowWidth": "2"} if kind == "VOILUTSequence" else {}
    grey = shown(stored, 16 if count == 65536 else 12,
                 **{kind: lut(count % 65536, first, bits, table, words)},
                 **window)  # which the table goes before
    expected = table[(stored - first).clip(0, count - 1)] / (2**bits - 1)
    assert np.abs(grey - expected).max() < 1e-6


def test_a_dicom_table_may_begin_below_zero(shown):
    stored = values_of(12)
    for first in (-1024, 65536 - 1024):  # some write it as an unsigned number
        grey = shown(stored, RescaleSlope="1", RescaleIntercept="-1024",
                     VOILUTSequence=lut(4096, first, 12, np.arange(4096)))
        assert np.abs(grey - stored / 4095).max() < 1e-6


def test_dicom_that_cannot_be_displayed_is_refused_by_name(shown, monkeypatch):
    with pytest.raises(ValueError, match="PresentationLUTSequence"):
        shown(values_of(12), PresentationLUTSequence=lut(4, 0, 8, [0, 1, 2, 255]))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(ValueError, match="DICOM of 16x16: too many pixels"):
        shown(values_of(12))


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyError, NotImplementedError])
def test_what_pydicom_says_of_a_file_is_not_repeated(pydicom, shown, monkeypatch, error):
    def damaged(dataset):
        raise error("cannot read (0010,0010) SECRET^NAME")
    monkeypatch.setattr(pydicom.dataset.Dataset, "pixel_array", property(damaged))
    with pytest.raises(ValueError) as e:
        decode.read_grey(shipped(pydicom, "MR_small_RLE.dcm"))
    assert "RLE Lossless" in str(e.value) and "pip install pylibjpeg" in str(e.value)
    assert "SECRET" not in str(e.value) and decode.may_pass(e.value)
    with pytest.raises(ValueError, match=rf"^damaged DICOM \({error.__name__}\)$") as e:
        shown(values_of(12))
    assert not decode.may_pass(e.value)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("signed", [False, True])
def test_dicom_padding_is_black(shown, photometric, signed):
    stored = values_of(12, signed)
    grey = (stored - stored.min()) / 4095
    grey = 1 - grey if photometric == "MONOCHROME1" else grey
    value, limit = int(stored[9, 9]), int(stored[3, 2])
    one, many = stored == value, (stored >= limit) & (stored <= value)
    for tags, padding in (({}, one), ({"PixelPaddingRangeLimit": limit}, many)):
        pixels = shown(stored, 12, signed, PixelPaddingValue=value,
                       PhotometricInterpretation=photometric, **tags)
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
    assert expected.std() > 1e-4
    assert np.abs(grey - expected).max() < 1e-5


@pytest.mark.parametrize("name, reason", [
    ("rtdose.dcm", "15 frames"), ("SC_rgb_rle_2frame.dcm", "2 frames"),
    ("SC_rgb_jpeg.dcm", "colour"), ("examples_palette.dcm", "colour"),
    ("rtplan.dcm", "without an image"), ("test-SR.dcm", "without an image"),
    ("MR_truncated.dcm", "damaged"), ("no_meta.dcm", "no DICOM file")])
def test_dicom_files_of_pydicom_that_are_no_grey_image(pydicom, name, reason):
    with pytest.raises(ValueError, match=reason):
        decode.read_grey(shipped(pydicom, name))


def test_damaged_dicom_raises_only_what_callers_expect(pydicom, tmp_path):
    path = tmp_path / "x.dcm"
    write_dicom(path, values_of(12), WindowCenter="700", WindowWidth="1500",
                VOILUTSequence=lut(4, 0, 8, [0, 1, 2, 255]), PatientName="A^B")
    whole = path.read_bytes()
    for content, says in ((b"Dear colleague, see attached.", "no DICOM file"),
                          (whole[:-100], "damaged DICOM")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=says):
            decode.read_grey(path)
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(whole[:rng.integers(len(whole) // 4, len(whole) + 1)])
        for _ in range(3):
            damaged[rng.integers(min(len(damaged), len(whole) - 512))] = rng.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(OSError, ValueError):
            assert decode.read_square(path, 16).shape == (16, 16)


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


def test_no_tag_of_a_patient_is_kept_or_printed(pydicom, image_tree, tmp_path, capfd, caplog):
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


def test_a_split_of_copies_alone_is_no_validation(leaky_tree, tmp_path, capsys):
    shutil.rmtree(leaky_tree / "TB/val")
    shutil.copytree(leaky_tree / "TB/train", leaky_tree / "TB/val")
    train, val = open_both(leaky_tree, tmp_path)
    assert val is None and len(train) == 12
    assert "12 images of" in capsys.readouterr().out
    args = settings(leaky_tree, tmp_path)
    text = message(data.open_images, args, ALONE, "val", train=train)
    assert "no image is left" in text


def test_copies_are_looked_for_once(leaky_tree, tmp_path, capsys, monkeypatch):
    _, first = open_both(leaky_tree, tmp_path)
    before = capsys.readouterr().out
    monkeypatch.setattr(data.F, "interpolate", None)
    read = cache.CachedArray.rows
    monkeypatch.setattr(cache.CachedArray, "rows", lambda self, indices: (
        read(self, indices) if "copies_" in self.path else pytest.fail("read")))
    _, second = open_both(leaky_tree, tmp_path)
    assert second.names.tolist() == first.names.tolist() and len(second) == 4
    assert copies_named(capsys.readouterr().out) == copies_named(before) == COPIES
    monkeypatch.undo()
    write_png(leaky_tree / "TB/train/normal/3.png", picture(99))  # another question
    assert len(open_both(leaky_tree, tmp_path)[1]) == 5


# --- data that changed --------------------------------------------------------------------------


@pytest.mark.parametrize("change, expected", [
    (lambda train: None, []),
    (lambda train: (train / "covid").rename(train / "effusion"),
     ["class effusion is new, with 2 images", "class covid is gone"]),
    (lambda train: (train / "tb/p1/0.png").unlink(), ["class tb has 3 images, it had 4"]),
    (lambda train: os.utime(train / "tb/p1/2.png", ns=(0, 0)),
     ["class tb has other files, as many as before (4)"]),
    (lambda train: (train / "tb/p1/2.png").rename(train / "tb/p1/20.png"),
     ["class tb has other files, as many as before (4)"])])
def test_changes_of_the_data_are_described(image_tree, change, expected):
    root = image_tree({"TB/train/covid": 2, "TB/train/normal": 3, "TB/train/tb/p1": 4})
    summary = data.class_summary(data.scan(root, "TB", "train"))
    before = json.loads(json.dumps(summary))  # as a run's JSON gives it back
    change(root / "TB/train")
    moved = root.rename(root.with_name("moved"))
    now = data.class_summary(data.scan(moved, "TB", "train"))
    assert data.describe_changes(before, now) == expected
