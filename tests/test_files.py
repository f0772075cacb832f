"""What users have on disk: layouts, what files say about themselves, DICOM, the classes of other
splits, copies between splits, and data that changed between two starts."""
import json
import os
import pathlib
import shutil
import struct
import sys
import warnings
from types import SimpleNamespace

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


def test_a_link_without_a_target_is_an_image_that_cannot_be_read(image_tree, tmp_path, capsys):
    root = image_tree({"TB/train/normal": 2, "TB/train/tb/p1": 2})
    link("/not/mounted/7.png", root / "TB/train/tb/p1/7.png")
    link("/not/mounted/p2", root / "TB/train/tb/p2")  # a patient, without a suffix
    text = message(data.open_images, settings(root, tmp_path), ALONE, "train")
    assert "2 of 6 images" in text and "--skip_bad_images" in text
    assert [line.strip() for line in text.splitlines()[1:]] == [
        f"TB/train/tb/{name}: No such file or directory" for name in ("p1/7.png", "p2")]
    skipping = settings(root, tmp_path, skip_bad_images=True)
    images = data.open_images(skipping, ALONE, "train")
    assert images.labels.tolist() == [0, 0, 1, 1] and "p1/7.png" not in " ".join(images.names)
    assert "2 of 6 images" in (note := notes(capsys)[0]) and "are left out" in note


def test_a_link_to_a_folder_around_it_is_refused_and_others_are_followed(image_tree, capsys):
    root = image_tree({"TB/train/normal": 1, "TB/train/tb": 1, "more": 2})
    link(root / "more", root / "TB/train/tb/more")
    assert len(data.scan(root, "TB", "train").files) == 4
    link(root / "TB/train", root / "TB/train/tb/loop")
    assert "tb/loop is a link to a folder around it" in message(data.scan, root, "TB", "train")


def test_images_are_found_at_any_depth_in_order(image_tree, capsys):
    root = image_tree({"TB/train/normal/patient1/study1": 1, "TB/train/normal/patient1/study2": 1,
                       "TB/train/tb": 2, "TB/train/tb/0a/b/c": 1})
    listing = data.scan(root, "TB", "train")
    assert [(file.path, file.class_name) for file in listing.files] == [
        ("TB/train/normal/patient1/study1/0.png", "normal"),
        ("TB/train/normal/patient1/study2/0.png", "normal"), ("TB/train/tb/0.png", "tb"),
        ("TB/train/tb/0a/b/c/0.png", "tb"), ("TB/train/tb/1.png", "tb")]
    assert notes(capsys) == []


def test_one_notice_counts_by_reason_what_is_not_read(image_tree, capsys):
    root = image_tree({"TB/train/bilateral": 1, "TB/train/bilateral/p1": 1, "TB/train/tb": 1,
                       "TB/train/bilateral/lateral": 3, "TB/train/tb/.thumbnails": 2,
                       "TB/train/tb/Masks": 2, "covid/p1": 2, "TB/train/ManualMask/leftMask": 2})
    split = root / "TB/train"
    for name in ("tb/a.txt", "tb/b.TXT", "bilateral/p1/c.nii.gz", "bilateral/IM0001",
                 "tb/1.2.840.7", "tb/._0.png", "tb/0_mask.png", "tb/view2_lateral.png",
                 "tb/a-LAT.png", "tb/flat_unilateral.png", "beside.png", "README", ".hidden"):
        (split / name).touch()
    (split / ".git").mkdir()
    link("me@here.1", split / ".#lock")  # an editor's, without a target
    link(root / "covid", split / "covid")  # a class that is a link
    listing = data.scan(root, "TB", "train")
    assert listing.class_names == ["bilateral", "covid", "tb"]
    names = sorted(os.path.basename(file.path) for file in listing.files)
    assert names == [*["0.png"] * 4, "1.2.840.7", "1.png", "IM0001", "flat_unilateral.png"]
    note, = notes(capsys)  # the two without a suffix: DICOM, perhaps
    assert note.strip().split("not read: ")[1] == (
        "1 *.gz, 2 *.txt, 2 beside the class folders, 10 hidden or masks, 5 lateral views")


@pytest.mark.parametrize("path", ["TB/train/covid", "TB/val", "OTHER"])
def test_a_folder_that_is_a_link_without_a_target_is_an_error(image_tree, tmp_path, path):
    root = image_tree({"TB/train/normal": 1, "TB/train/tb": 1})
    link("/not/mounted/folder", root / path)
    args = settings(root, tmp_path, task="ALL_CXR")
    text = message(data.open_images, args, ALONE, "val" if path == "TB/val" else "train")
    assert path in text and "No such file or directory" in text


PATIENTS = {f"T/train/patient{i:05d}/study1": 2 for i in range(3)}


@pytest.mark.parametrize("tree, csv, says", [
    (PATIENTS, "T/train.csv", "3 folders in"), (PATIENTS, None, "--class_pattern="),
    ({f"T/train/images_00{i}/images": 3 for i in (1, 2)}, "T/train/Data_Entry.csv", "images_001 3"),
    ({f"T/train/p1{i}/p1000{i}/s5000{i}": 3 for i in range(3)}, "chexpert.csv.gz", "p10 3"),
    ({"T/train/normal": 9, "T/train/00001234": 1}, None, "00001234 1"),
    ({f"T/train/class {i}": 2 for i in range(21)}, None, "21 folders"),
    ({f"T/train/{name}": 1 for name in "abcde"}, None, "5 folders"),
    ({"T/train/normal": 2, "T/train/tb": 2, "T/train/readings": 0}, None, "readings 0"),
    ({"T/train/CXR_png": 2, "T/train/ManualMask/leftMask": 2}, None, "CXR_png 2"),
    ({"T/train": 2}, "T/stage_2.csv", "normal 2")])
def test_folders_that_are_no_classes_are_refused(image_tree, tmp_path, monkeypatch, tree, csv,
                                                 says):
    root = image_tree(tree)
    if csv:
        (root / csv).touch()
    monkeypatch.setattr(decode, "read_square", None)  # before anything is decoded
    text = message(data.open_images, settings(root, tmp_path, task="T"), ALONE, "train")
    assert says in text and len(text.splitlines()) == 1
    assert f"type: python prepare.py --images={root}/T/train " in text
    assert not csv or f"--csv={root / csv} --file_column=" in text


def test_a_class_or_a_number_in_its_name_is_no_patient(image_tree):
    tree = {f"T/train/{name}": 1 for name in ("covid19", "0", "1", "stage 20")}
    assert len(data.scan(image_tree(tree), "T", "train").class_names) == 4
    many = image_tree({f"M/train/grade {i}/p10": 2 for i in range(20)})
    assert len(data.scan(many, "M", "train").class_names) == 20


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_val_may_be_called_otherwise(image_tree, tmp_path, name):
    root = image_tree({"T/train/a": 1, "T/train/b": 1, f"T/{name}/b": 1, "U/train/a": 1,
                       "U/train/b": 1, "U/val/a": 2})
    assert data.scan(root, "T", "val", ["a", "b"]).files[0].path == f"T/{name}/b/0.png"
    assert len(data.scan(root, "ALL_CXR", "val", ["a", "b"]).files) == 3


def test_the_folder_of_a_class_is_no_split(image_tree):
    root = image_tree({"TB/val/tb": 1})
    text = message(data.scan, str(root / "TB"), "val", "tb", ["normal", "tb"])
    assert text.endswith(f"give {root}/TB/val")


def test_in_a_flat_layout_names_with_TB_are_tb(image_tree, capsys):
    root = image_tree({"TB/train": 0})
    names = {"TB.1.png": "tb", "TB.png": "tb", "tb.2.png": "normal", "TB_3.png": "normal"}
    for name in names:
        write_png(root / "TB/train" / name, RAMP.astype(np.uint8))
    listing = data.scan(root, "TB", "train")
    assert {os.path.basename(file.path): file.class_name for file in listing.files} == names
    assert listing.class_names == ["normal", "tb"] and notes(capsys) == []


# --- classes ------------------------------------------------------------------------------------


def open_both(root, out, **changes):
    """(training set, validation set) as the trainers open them."""
    args = settings(root, out, **changes)
    train = data.open_images(args, ALONE, "train")
    return train, data.open_images(args, ALONE, "val", optional=True, train=train)


def test_validation_keeps_the_class_index_of_training(image_tree, tmp_path):
    root = image_tree({"TB/train/covid": 1, "TB/train/normal": 1, "TB/train/tb": 1,
                       "TB/val/covid": 0, "TB/val/tb": 1})  # an empty one, and no normal
    write_png(root / "TB/val/tb/0.png", RAMP.astype(np.uint8))
    _, images = open_both(root, tmp_path)
    assert images.class_names == ["covid", "normal", "tb"] and images.labels.tolist() == [2]
    (root / "TB/train/tb/0.png").rename(root / "TB/train/tb/0.txt")
    assert "(images: covid 1, normal 1, tb 0" in message(data.scan, root, "TB", "train")


@pytest.mark.parametrize("name", ["tuberculosis", "TB"])
def test_a_class_that_training_does_not_know_is_an_error(image_tree, tmp_path, name):
    root = image_tree({"TB/train/normal": 1, "TB/train/tb": 1, "TB/val/normal": 1,
                       f"TB/val/{name}": 1})
    text = message(open_both, root, tmp_path)
    assert f"'{name}'" in text and "normal, tb" in text and str(root / "TB/val") in text


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
    assert grey.shape == expected.shape
    assert np.abs(grey - expected).max() < (0.02 if name == "x.jpg" else 1e-6)


def write_tiff(path, values, bits, more, order="<"):
    """Grey TIFF file of integers [H, W]; bits: 1, 8, 16 or 32; more: {other tag: short}."""
    body = (np.packbits(values.astype(bool), axis=1) if bits == 1 else
            values.astype(np.int64).astype(f"{order}u{bits // 8}")).tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 0, 277: 1, 278: height,
            279: len(body), **more}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    out = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, len(tags))
    for tag, value in sorted(tags.items()):
        short = tag not in (256, 257, 273, 278, 279)
        out += struct.pack(order + ("HHIHH" if short else "HHII"), tag, 3 if short else 4, 1,
                           *((value, 0) if short else (value,)))
    pathlib.Path(path).write_bytes(out + bytes(4) + body)


@pytest.mark.parametrize("bits, order", [(1, "<"), (8, "<"), (16, "<"), (1, ">"), (8, ">")])
def test_white_is_zero_and_bits_per_sample(tmp_path, bits, order):
    values = np.rint(RAMP / RAMP.max() * (2**bits - 1)).astype(np.int64)
    for photometric in (0, 1):
        write_tiff(tmp_path / "x.tif", values, bits, {262: photometric}, order)
        grey = decode.read_grey(tmp_path / "x.tif")
        expected = values / (2**bits - 1)
        assert np.abs(grey - (expected if photometric else 1 - expected)).max() < 1e-6


@pytest.mark.parametrize("bits, sample_format, lowest, highest, refused", [
    (32, 1, 0, 65535, ""), (32, 2, 0, 65535, ""), (32, 2, 0, 4095, ""),  # widened by something
    (32, 1, 0, 70000, "32-bit"), (32, 1, 0, 2**32 - 1, "32-bit"), (32, 2, -1, 300, "negative"),
    (16, 2, -1, 300, "negative"), (64, 1, 0, 255, "identify")])
def test_32_bits_that_hold_16_are_read_and_others_refused(tmp_path, bits, sample_format, lowest,
                                                          highest, refused):
    values = np.rint(RAMP / RAMP.max() * (highest - lowest)).astype(np.int64) + lowest
    write_tiff(tmp_path / "x.tif", values, bits, {339: sample_format})
    if refused:
        with pytest.raises((ValueError, OSError), match=refused):
            decode.read_grey(tmp_path / "x.tif")
    else:
        assert np.abs(decode.read_grey(tmp_path / "x.tif") - values / 65535).max() < 1e-6


@pytest.mark.parametrize("high, dark", [(4095, True), (20000, False)])
def test_one_notice_counts_dark_images(tmp_path, capsys, high, dark):
    for name, top in (("normal", 65535), ("tb", high)):
        for i in range(2):
            values = np.linspace(0, top - i, 256).reshape(16, 16).astype(np.uint16)
            write_png(tmp_path / "data/TB/train" / name / f"{i}.png", values)
    for _ in range(2):  # the second time from the cache
        data.open_images(settings(tmp_path / "data", tmp_path), ALONE, "train")
        found = notes(capsys)
        assert len(found) == dark
        assert not dark or "2 of 4 images in" in found[0] and "as TB/train/tb/0.png" in found[0]


# --- DICOM --------------------------------------------------------------------------------------


@pytest.fixture
def pydicom():
    """The package; tests that need it are skipped without it."""
    module = pytest.importorskip("pydicom")
    decode.import_pydicom.cache_clear()  # pytest forgets after each test what it silenced
    return module


def lut(count, first, bits, table):
    """A LUT sequence."""
    from pydicom import Dataset
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [count, first, bits])
    item.add_new("LUTData", "US", [int(v) for v in table])
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


def test_dicom_without_a_suffix_or_named_by_uid_is_read(image_tree, tmp_path, pydicom):
    root = image_tree({"TB/train/normal": 1, "TB/train/tb": 1})
    stored = np.arange(256).reshape(16, 16) * 16
    for name in ("IM0001", "1.2.840.7"):
        write_dicom(root / "TB/train/tb" / name, stored)
    (root / "TB/train/tb/NOTES").write_text("no image" * 40)
    text = message(data.open_images, settings(root, tmp_path), ALONE, "train")
    line, = text.splitlines()[1:]
    assert line.startswith("  TB/train/tb/NOTES: no readable DICOM (InvalidDicomError); ")
    images = data.open_images(settings(root, tmp_path, skip_bad_images=True), ALONE, "train")
    assert np.bincount(images.labels).tolist() == [1, 3]
    position = images.names.tolist().index("TB/train/tb/IM0001")
    expected = torch.from_numpy(stored / 4095 * 2 - 1).float()
    assert torch.allclose(images.images([position])[0, 0], expected, atol=1e-3)


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
        assert grey.dtype == np.float32
        assert np.abs(grey - expected).max() < 1e-6
    write_dicom(tmp_path / "x.dcm", stored, bits, signed, RescaleSlope="-1", RescaleIntercept="5")
    assert np.abs(decode.read_grey(tmp_path / "x.dcm") - (1 - expected)).max() < 1e-6


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
        assert np.abs(decode.read_grey(tmp_path / "x.dcm") - expected).max() < 1e-5


@pytest.mark.parametrize("kind, count, first, bits", [
    ("ModalityLUTSequence", 4096, 0, 8), ("ModalityLUTSequence", 300, 1000, 16),
    ("VOILUTSequence", 4096, 0, 16), ("VOILUTSequence", 4096, 0, 12),
    ("VOILUTSequence", 300, 1000, 16), ("VOILUTSequence", 200, 4000, 16)])
def test_dicom_look_up_tables(pydicom, tmp_path, kind, count, first, bits):
    stored = values_of(12)
    table = np.rint(np.sqrt(np.linspace(0, 1, count)) * (2**bits - 1)).astype(np.int64)
    window = {"WindowCenter": "1", "WindowWidth": "2"} if kind == "VOILUTSequence" else {}
    write_dicom(tmp_path / "x.dcm", stored, **{kind: lut(count, first, bits, table)},
                **window)  # which the table goes before
    expected = table[(stored - first).clip(0, count - 1)] / (2**bits - 1)
    assert np.abs(decode.read_grey(tmp_path / "x.dcm") - expected).max() < 1e-6


@pytest.mark.parametrize("inverted, tags", [
    (False, {"RescaleSlope": "1", "RescaleIntercept": "-1024",  # which a table goes on from
             "VOILUTSequence": (4096, -1024, 12, range(4096))}),
    (True, {"RescaleSlope": "-1", "RescaleIntercept": "4095", "WindowCenter": "2048",
            "WindowWidth": "4096"}),
    (True, {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"}),
    (True, {"PhotometricInterpretation": "MONOCHROME2", "PresentationLUTShape": "INVERSE"})])
def test_what_a_dicom_file_says_is_applied_once(pydicom, tmp_path, inverted, tags):
    stored = values_of(12)
    if "VOILUTSequence" in tags:
        tags = tags | {"VOILUTSequence": lut(*tags["VOILUTSequence"])}
    write_dicom(tmp_path / "x.dcm", stored, **tags)
    expected = 1 - stored / 4095 if inverted else stored / 4095
    assert np.abs(decode.read_grey(tmp_path / "x.dcm") - expected).max() < 1e-6


def test_dicom_that_cannot_be_displayed_is_refused_by_name(pydicom, tmp_path):
    table = lut(4, 0, 8, [0, 1, 2, 255])
    for tags, reason in (({"PresentationLUTSequence": table}, "LUTSequence or an 8-bit table"),
                         ({"VOILUTSequence": table}, "LUTSequence or an 8-bit table"),
                         ({"ViewPosition": "LL"}, "DICOM of a lateral view")):
        write_dicom(tmp_path / "x.dcm", values_of(12), **tags)
        with pytest.raises(ValueError, match=reason):
            decode.read_grey(tmp_path / "x.dcm")


def test_a_compression_that_cannot_be_read_says_what_to_install(pydicom, monkeypatch):
    def no_decoder(dataset):
        raise NotImplementedError("cannot read (0010,0010) SECRET^NAME")
    monkeypatch.setattr(pydicom.dataset.Dataset, "pixel_array", property(no_decoder))
    with pytest.raises(ValueError, match="compressed .*: pip install pylibjpeg") as e:
        decode.read_grey(shipped(pydicom, "MR_small_RLE.dcm"))
    assert "SECRET" not in str(e.value)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("signed", [False, True])
def test_dicom_padding_is_black(pydicom, tmp_path, photometric, signed):
    stored = values_of(12, signed)
    grey = (stored - stored.min()) / 4095
    grey = 1 - grey if photometric == "MONOCHROME1" else grey
    padding = stored == stored[9, 9]
    write_dicom(tmp_path / "x.dcm", stored, 12, signed, PixelPaddingValue=int(stored[9, 9]),
                PhotometricInterpretation=photometric)
    pixels = decode.read_grey(tmp_path / "x.dcm")
    assert padding.any() and (pixels[padding] == 0).all()
    assert np.abs(pixels - grey)[~padding].max() < 1e-6


def shipped(pydicom, name):
    """Path of a file that comes with pydicom; nothing is downloaded."""
    path = pathlib.Path(pydicom.data.__file__).parent / "test_files" / name
    if not path.exists():
        pytest.skip(f"this pydicom comes without {name}")
    return path


@pytest.mark.parametrize("name, reason", [
    ("rtdose.dcm", "several frames"), ("SC_rgb_rle_2frame.dcm", "several frames"),
    ("SC_rgb_jpeg.dcm", "colour"), ("examples_palette.dcm", "colour"),
    ("rtplan.dcm", "without an image"), ("test-SR.dcm", "without an image"),
    ("MR_truncated.dcm", "no readable"), ("no_meta.dcm", "no readable")])
def test_dicom_files_of_pydicom_that_are_no_grey_image(pydicom, name, reason):
    with pytest.raises(ValueError, match=reason):
        decode.read_grey(shipped(pydicom, name))


def test_without_pydicom_the_error_says_how_to_install_it(image_tree, tmp_path, monkeypatch):
    root = image_tree({"TB/train/normal": 1})
    (root / "TB/train/tb").mkdir()
    (root / "TB/train/tb/x.DCM").write_bytes(bytes(128) + b"DICM")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    decode.import_pydicom.cache_clear()
    text = message(data.open_images, settings(root, tmp_path), ALONE, "train")
    assert "TB/train/tb/x.DCM: DICOM files need pydicom: pip install pydicom" in text
    write_png(root / "TB/train/tb/x.png", RAMP.astype(np.uint8))
    skipping = settings(root, tmp_path, skip_bad_images=True)
    assert len(data.open_images(skipping, ALONE, "train")) == 2


def test_no_tag_of_a_patient_is_kept_or_printed(pydicom, image_tree, tmp_path, capfd, caplog):
    root = image_tree({"TB/train/normal": 1, "TB/train/tb": 0})
    broken = {"window.dcm": (b"12345678", b"SECRET-1"), "slope.dcm": (b"87654321", b"SECRET-2"),
              "syntax.dcm": (b"1.2.840.10008.1.2.1", b"SECRET.1.2.3.4.5.6."),
              "text.dcm": (b"ISO_IR 100", b"SECRET-7  ")}  # of which pydicom warns
    for name in ("good.dcm", *broken):
        path = root / "TB/train/tb" / name
        write_dicom(path, values_of(12), PatientName="SECRET^NAME", PatientID="SECRET-5",
                    WindowCenter="12345678", WindowWidth="900", RescaleSlope="87654321",
                    RescaleIntercept="0", SpecificCharacterSet="ISO_IR 100")
        if name in broken:
            content = path.read_bytes()
            assert broken[name][0] in content
            path.write_bytes(content.replace(*broken[name]))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        text = message(data.open_images, settings(root, tmp_path), ALONE, "train")
        assert [line.split(": ")[0].strip() for line in text.splitlines()[1:]] == [
            f"TB/train/tb/{name}.dcm" for name in ("slope", "syntax", "window")]
        train = data.open_images(settings(root, tmp_path, skip_bad_images=True), ALONE, "train")
    assert train.labels.tolist() == [0, 1, 1]  # a broken text does no harm
    spoken = [text, *capfd.readouterr(), caplog.text, repr(train.summary),
              *(str(w.message) for w in warned)]
    stored = [path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(stored) >= 3 and not any("SECRET" in words for words in spoken)
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
        f"other{i}.png" for i in range(20, 24)]
    assert val.labels.tolist() == [0, 0, 1, 1] and len(train) == 12
    expected = decode.read_square(leaky_tree / val.names[2], 32) / 32767.5 - 1
    assert np.allclose(val.images([2])[0, 0], expected, atol=1e-6)  # rows, labels, names agree


def test_a_split_of_copies_alone_is_an_error(leaky_tree, tmp_path, capsys):
    shutil.rmtree(leaky_tree / "TB/val")
    shutil.copytree(leaky_tree / "TB/train", leaky_tree / "TB/val")
    text = message(open_both, leaky_tree, tmp_path)
    assert "no images of class normal, tb are left" in text
    assert "12 images of" in capsys.readouterr().out


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
    (lambda train: None, None),
    (lambda train: (train / "covid").rename(train / "effusion"),
     "effusion 2, normal 3, tb 4"),
    (lambda train: (train / "tb/p1/0.png").unlink(), "covid 2, normal 3, tb 3"),
    (lambda train: os.utime(train / "tb/p1/2.png", ns=(0, 0)), "covid 2, normal 3, tb 4")])
def test_changes_of_the_data_are_described(image_tree, capsys, change, expected):
    root = image_tree({"TB/train/covid": 2, "TB/train/normal": 3, "TB/train/tb/p1": 4})
    summary = data.class_summary(data.scan(root, "TB", "train"))
    before = json.loads(json.dumps(summary))  # as a run's JSON gives it back
    change(root / "TB/train")
    moved = root.rename(root.with_name("moved"))
    now = SimpleNamespace(summary=data.class_summary(data.scan(moved, "TB", "train")))
    data.notice_changes(before, now, "X")
    data.notice_changes(None, now, "X")  # not known
    found = notes(capsys)
    assert len(found) == bool(expected)
    assert not expected or found[0].startswith(
        "the training data (names, sizes, times) have changed since X: "
        f"then covid 2, normal 3, tb 4, now {expected}")
