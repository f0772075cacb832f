"""Chest radiographs from folders, decoded once into a cache; latents of an autoencoder in another.

DATA_ROOT/TASK/SPLIT/CLASS/**/*.png, with patient and study folders at any depth below a class, or
all images of a split in one folder (see FLAT_RULE). Without a data root the phantom set of
phantom.py stands in.
"""
import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import logging
import math
import os
import pathlib
import re
import shutil
import socket
import struct
import time
import unicodedata
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, TiffImagePlugin

import experiment
import phantom
from experiment import fail, notice

# For Pillow an image of up to 179 megapixels is only worth a warning.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

DICOM = {".dcm", ".dicom"}
EXTENSIONS = DICOM | {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".bmp", ".tif", ".tiff",
                      ".webp", ".gif", ".pgm"}
LITTER = {".ds_store", "thumbs.db", "desktop.ini"}  # of file browsers: nobody misses them

HIDDEN = (".", "@eaDir", "__MACOSX")  # of systems, with thumbnails in them
MASKS = {"mask", "masks", "segmentation", "segmentations"}  # beside images, as COVID-19 sets have
FLAT_RULE = ("in a folder without class folders, names that begin with `TB.` are class tb, "
             "Montgomery's and Shenzhen's `..._1.png` are tb, and all others are normal")
BATCH = 64  # images that are worked on at once, so that a data set need not fit into memory

# Grey TIFF files that Pillow does not know, by byte order, WhiteIsZero (0) or BlackIsZero (1) and
# bits: how their values are stored. _deep_grey inverts WhiteIsZero.
for _order, _zero, _bits, _stored in ((b"II", 0, 12, ("I;16", "I;12")),
                                      (b"MM", 0, 12, ("I;16", "I;12")),
                                      (b"MM", 1, 12, ("I;16", "I;12")),
                                      (b"MM", 0, 16, ("I;16B", "I;16B")),
                                      (b"MM", 1, 32, ("I", "I;32B"))):
    TiffImagePlugin.OPEN_INFO.setdefault((_order, _zero, (1,), 1, (_bits,), ()), _stored)


# --- folders ------------------------------------------------------------------------------------


class ImageFile(NamedTuple):
    """A file that should be an image. size -1: a link without a target."""

    path: str  # below the data root
    class_name: str
    size: int
    mtime_ns: int


class Listing(NamedTuple):
    """The images of one split."""

    root: str
    files: list
    class_names: list
    flat: bool  # without class folders


def _entries(folder):
    """os.DirEntry objects of a folder, by name, without LITTER."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if e.name.lower() not in LITTER),
                          key=lambda entry: entry.name)
    except OSError as e:
        fail(f"cannot read the folder {folder}: {e.strerror}")


def _is_folder(entry):
    # Without a stat for each file; entry.is_dir() would raise for a link to itself.
    return entry.is_dir(follow_symlinks=False) or entry.is_symlink() and os.path.isdir(entry.path)


def _is_broken_link(path):
    return os.path.islink(path) and not os.path.exists(path)


def _refuse_broken_link(path):
    if _is_broken_link(path):
        fail(f"{path} is a link without a target, {os.readlink(path)}: is the disk mounted? "
             "Mend or remove it")


def _subfolders(folder):
    """Names of the folders in a folder, and of links without a target, that are not hidden."""
    return [e.name for e in _entries(folder)
            if (_is_folder(e) or _is_broken_link(e.path)) and not e.name.startswith(HIDDEN)]


def _shown(name):
    """A file's name as text that can be printed and stored, and that no other file's name gives."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def class_name(folder_name):
    """A class's name as it is shown and stored: valid text, in one Unicode form."""
    return unicodedata.normalize("NFC", _shown(folder_name))


def _class_key(name):
    """What two names of one class have in common, whatever their case and Unicode form."""
    return class_name(name).casefold()


def _walk(folder, above, left_out):
    """Image entries below a folder at any depth, by path; the rest is counted in left_out.

    above: real paths of the folders on the way here, which a link must not lead back to.
    """
    real = os.path.realpath(folder)
    if real in above:
        left_out["link back to a folder above it"] += 1
        return []
    found = []
    for entry in _entries(folder):
        suffix = _shown(os.path.splitext(entry.name)[1].lower())
        if entry.name.startswith(HIDDEN):
            left_out["hidden"] += 1
        elif _is_folder(entry) and entry.name.lower() in MASKS:
            left_out[f"folder {entry.name}, taken for masks"] += 1
        elif _is_folder(entry):
            found += _walk(entry.path, {*above, real}, left_out)
        elif suffix in EXTENSIONS or _may_be_dicom(suffix) or _is_broken_link(entry.path):
            found.append(entry)  # decoding looks into what may be DICOM, once
        else:
            left_out[f"*{suffix}"] += 1
    return found


def _flat_class(name):
    """Class of an image in a split without class folders; see FLAT_RULE."""
    published = re.fullmatch(r"(?:MCUCXR|CHNCXR)_[0-9]+_([01])", os.path.splitext(name)[0])
    is_tb = name.startswith("TB.") or (published and published[1] == "1")
    return "tb" if is_tb else "normal"


def _split_files(folder, left_out):
    """([(entry, class name)], class names, whether it is flat) of one TASK/SPLIT folder."""
    entries = _entries(folder)
    class_folders = [e for e in entries if _is_folder(e) and not e.name.startswith(HIDDEN)]
    if not class_folders:
        found = _walk(folder, set(), left_out)
        files = [(entry, _flat_class(entry.name)) for entry in found]
        return files, sorted({name for _, name in files}), True
    files = []
    for entry in entries:
        if entry in class_folders:
            found = _walk(entry.path, {os.path.realpath(folder)}, left_out)
            files += [(image, class_name(entry.name)) for image in found]
        elif entry.name.startswith(HIDDEN):
            left_out["hidden"] += 1
        else:
            _refuse_broken_link(entry.path)  # it may have been a class
            left_out["beside the class folders"] += 1
    return files, [class_name(e.name) for e in class_folders], False


def _image_file(entry, name, root):
    try:
        stat = entry.stat()
        size, mtime_ns = stat.st_size, stat.st_mtime_ns
    except OSError:
        size, mtime_ns = -1, 0
    return ImageFile(os.path.relpath(entry.path, root), name, size, mtime_ns)


def find_members(root, task, split):
    """Tasks whose SPLIT folders make up `split` of `task`, [] where there is no such split.

    ALL_CXR without such a folder joins all tasks. Ends the program, naming what is there, where
    root or task is missing.
    """
    if not os.path.isdir(root):
        here = "" if os.path.isabs(root) else f" in {os.getcwd()}"
        fail(f"no folder --data_root={root}{here}")
    tasks = _subfolders(root)
    if task != "ALL_CXR" and task not in tasks or not tasks:
        fail(f"no task {task!r} in {root}; there: {', '.join(tasks) or 'no folders at all'}")
    asked = [task] if task in tasks else tasks
    for member in asked:
        _refuse_broken_link(os.path.join(root, member))
        _refuse_broken_link(os.path.join(root, member, split))
    members = [t for t in asked if os.path.isdir(os.path.join(root, t, split))]
    if members and len(members) < len(asked):
        notice(f"ALL_CXR: no split {split!r} in {', '.join(sorted(set(asked) - set(members)))}")
    return members


def scan(root, task, split, class_names=None):
    """Listing of DATA_ROOT/TASK/SPLIT, None where there is no such split.

    class_names: those of the training split, which every other split is read against by name,
    whatever its case and Unicode form; None: this is the training split, and its folders are the
    classes. What is not read is counted in one notice. One `stat` per file.
    """
    members = find_members(root, task, split)
    if not members:
        return None
    where = os.path.join(root, task, split)
    left_out, found, folders, flat = collections.Counter(), [], [], False
    for member in members:
        files, names, is_flat = _split_files(os.path.join(root, member, split), left_out)
        found += files
        folders += names
        flat = flat or is_flat
    if left_out:
        counts = ", ".join(f"{n} {reason}" for reason, n in sorted(left_out.items()))
        notice(f"{where}: not read: {counts}")
    if not found:
        looked_for = " ".join(sorted(EXTENSIONS))
        fail(f"no images in {where} (looked for {looked_for})")
    known = {_class_key(name): name for name in reversed(class_names or sorted(set(folders)))}
    known |= {name: name for name in class_names or ()}
    read_as = {name: known.get(name, known.get(_class_key(name))) for name in sorted(set(folders))}
    for name, read_name in read_as.items():
        if read_name is None:
            rule = f" ({FLAT_RULE})" if flat else ""
            fail(f"class {name!r} in {where}{rule} is not one of the training classes, "
                 f"{', '.join(class_names)}: rename the folder, or move it away")
        if name != read_name:
            notice(f"{where}: {name!r} is read as class {read_name!r}")
    files = [_image_file(entry, read_as[name], root) for entry, name in found]
    names = class_names or sorted(set(read_as.values()))
    empty = sorted(set(read_as.values()) - {f.class_name for f in files})
    if empty:
        message = f"no images of class {', '.join(empty)} in {where}"
        notice(message) if class_names else fail(message)
    return Listing(str(root), files, names, flat)


# --- decoding -----------------------------------------------------------------------------------


class Grey(NamedTuple):
    """A whole image: float32 [H, W], 0 black to 1 white, and the bits that a value has."""

    pixels: np.ndarray
    bits: int


def decode(path, img_size):
    """One image file as uint16 [img_size, img_size], 0 black to 65535 white.

    What the file says about itself is followed (see read_grey). The centre square is cut out and
    resized (box filter down, bicubic up), which keeps the aspect ratio. Raises ValueError or
    OSError for what cannot be decoded, decompression bombs included.
    """
    return square(read_grey(path).pixels, img_size)


def square(grey, img_size):
    """Centre square of float32 [H, W] in [0, 1], resized, as uint16 [img_size, img_size].

    ValueError under 8 pixels.
    """
    height, width = grey.shape
    side = min(height, width)
    if side < 8:
        raise ValueError(f"{width}x{height} pixels are too few")
    top, left = (height - side) // 2, (width - side) // 2
    image = Image.fromarray(grey[top:top + side, left:left + side])
    if side != img_size:
        method = Image.Resampling.BOX if side > img_size else Image.Resampling.BICUBIC
        image = image.resize((img_size, img_size), method)
    return (np.asarray(image).clip(0, 1) * 65535 + 0.5).astype(np.uint16)


def read_grey(path):
    """Grey of an image file.

    Orientation in EXIF and TIFF, WhiteIsZero, BitsPerSample and PNG's sBIT are followed; 8-bit and
    16-bit grey keep their full range, colour becomes luma, transparency becomes black. ValueError
    or OSError for what cannot be decoded.
    """
    try:
        if is_dicom(path):
            return read_dicom(path)
        # By its name Pillow 13 would map a TIFF file, and garble orientations 5 to 8.
        with open(path, "rb") as file, Image.open(file) as image:
            _seek_full_size(image)
            image.load()
            turned = ImageOps.exif_transpose(image)
            if image.mode.startswith("I") or image.mode == "L" and _is_signed(image):
                return _deep_grey(turned, image, path)
            if image.mode == "F":
                raise ValueError("floating-point image, its black and white are unknown")
            if turned.has_transparency_data:
                turned = turned.convert("RGBA")
                black = Image.new("RGBA", turned.size, (0, 0, 0, 255))
                turned = Image.alpha_composite(black, turned)
            if turned.mode != "L":
                turned = turned.convert("RGB").convert("L")
            return Grey(np.asarray(turned, dtype=np.float32) / 255, 8)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise ValueError(f"too many pixels: {e}") from e
    except (SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError, MemoryError,
            ZeroDivisionError, AttributeError, struct.error) as e:  # parsers on damaged files
        raise ValueError(f"{type(e).__name__}: {e}") from e


def _seek_full_size(image):
    """Go to the first page of a TIFF file that is no reduced-size copy."""
    if image.format != "TIFF":
        return
    for page in range(image.n_frames):
        image.seek(page)
        reduced = image.tag_v2.get(254, 0) & 1 or image.tag_v2.get(255) == 2  # new, old SubfileType
        if not reduced:
            return
    image.seek(0)


def _is_signed(image):
    return image.format == "TIFF" and image.tag_v2.get(339, (1,))[0] == 2  # SampleFormat


def _deep_grey(turned, image, path):
    """Grey of an image of integers that are signed or have more than 8 bits; `turned`: upright."""
    values, signed = np.asarray(turned), _is_signed(image)
    tags = image.tag_v2 if image.format == "TIFF" else {}
    bits = tags[258][0] if tags else 16
    if bits == 8:
        values = values.view(np.int8)  # Pillow takes them for unsigned
    elif bits == 32 and not signed:
        values = values.view(np.uint32)  # and these for signed
    if values.min() < 0:
        raise ValueError("negative values: which of them is black is unknown")
    if bits == 32 and values.max() <= 65535:
        full = 65535  # 16-bit values that numpy or a viewer wrote as 32-bit integers
    else:
        full = 2**(bits - signed) - 1
    significant = _png_significant_bits(path) if image.format == "PNG" else None
    if significant and values.max() < 2**significant and (values % 2 ** (16 - significant)).any():
        full = 2**significant - 1  # written as they are; the standard has them scaled up to 16 bits
    grey = values.astype(np.float32) / full
    if tags.get(262) == 0:  # WhiteIsZero
        grey = 1 - grey
    return Grey(grey, bits)


def _png_significant_bits(path):
    """What a grey PNG's sBIT chunk says, None where there is none."""
    with open(path, "rb") as f:
        f.seek(8)
        while len(head := f.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"sBIT":
                return (f.read(1) or b"\0")[0] or None
            if kind == b"IDAT":
                return None
            f.seek(length + 4, os.SEEK_CUR)
    return None


# --- DICOM --------------------------------------------------------------------------------------


@functools.cache
def import_pydicom():
    """The optional pydicom, without the warnings in which it may quote a patient's tags."""
    try:
        import pydicom
    except ImportError:
        fail("DICOM files need the pydicom package: pip install pydicom, or export them as PNG")
    warnings.filterwarnings("ignore", module="pydicom")
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    return pydicom


def _may_be_dicom(suffix):
    """Whether archives hand out DICOM files that end so: IM0001, or by UID, 1.2.840.4."""
    return not suffix or suffix[1:].isdigit()


def is_dicom(path):
    """Whether a file is called DICOM, or has no suffix (or a number for one) and begins like it."""
    suffix = os.path.splitext(path)[1].lower()
    if not _may_be_dicom(suffix):
        return suffix in DICOM
    try:
        with open(path, "rb") as f:
            return f.read(132)[128:] == b"DICM"
    except OSError:
        return False


def read_dicom(path):
    """Grey of a DICOM file with one frame of one sample per pixel.

    Modality LUT or rescaling, VOI LUT or window, presentation LUT, MONOCHROME1 and padding are
    followed (DICOM PS3.3, C.7.6.3.1 and C.11). Without a VOI, the range is that of the stored bits.
    Nothing else of the file is kept, and no message quotes its tags. Raises ValueError.
    """
    pydicom = import_pydicom()
    try:
        dataset = pydicom.dcmread(path)
        if "PixelData" not in dataset:
            raise ValueError("DICOM without an image: a report, a plan or an index")
        frames = int(dataset.get("NumberOfFrames", 1) or 1)
        photometric = dataset.PhotometricInterpretation
        if frames > 1:
            raise ValueError(f"DICOM of {frames} frames, not one image: export the frame you want")
        samples = dataset.get("SamplesPerPixel", 1)
        if samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
            raise ValueError("DICOM in colour: export it as grey")
        stored = _dicom_pixels(dataset)
        grey = _present(dataset, _voi(dataset, *_modality(dataset, stored)))
        if photometric == "MONOCHROME1" or dataset.get("PresentationLUTShape") == "INVERSE":
            grey = 1 - grey
        if dataset.get("PixelPaddingValue") is not None:
            ends = (dataset.PixelPaddingValue,
                    dataset.get("PixelPaddingRangeLimit", dataset.PixelPaddingValue))
            grey[(stored >= min(ends)) & (stored <= max(ends))] = 0
        return Grey(grey.astype(np.float32), dataset.BitsStored)
    except pydicom.errors.InvalidDicomError as e:
        raise ValueError("no DICOM file") from e
    except ValueError as e:
        if str(e).startswith("DICOM"):
            raise
        raise ValueError("damaged DICOM (ValueError)") from e
    except AttributeError as e:  # of a dataset: a keyword of the standard that it lacks
        raise ValueError(f"damaged DICOM (no {e.name})") from e
    except OSError:
        raise
    except Exception as e:  # pydicom's own message may quote a tag
        raise ValueError(f"damaged DICOM ({type(e).__name__})") from e


def _dicom_pixels(dataset):
    """Stored values [H, W]; ValueError, with what to install, where they are compressed."""
    try:
        return dataset.pixel_array
    except Exception as e:
        syntax = dataset.file_meta.TransferSyntaxUID
        if not syntax.is_compressed:
            raise
        raise ValueError(f"DICOM compressed as {syntax.name} cannot be read: pip install pylibjpeg "
                         "pylibjpeg-libjpeg pylibjpeg-openjpeg; if it stays, it is damaged") from e


def _look_up(dataset, item, values):
    """(Values through the LUT of a sequence item, the highest value that it could give).

    DICOM PS3.3, C.11.1.1.1: what is below the first value mapped gets the first entry, what is
    above the last one the last.
    """
    count, first, bits = item.LUTDescriptor
    count = count or 65536
    if first > 32767 and values.min() < 0:
        first -= 65536  # negative, written as unsigned
    word = "<u2" if dataset.file_meta.TransferSyntaxUID.is_little_endian else ">u2"
    raw = item.LUTData
    if not isinstance(raw, bytes):
        raw = np.asarray(raw, word).tobytes()
    table = np.frombuffer(raw, word if len(raw) >= 2 * count else np.uint8)[:count]
    index = np.rint(values - float(first)).clip(0, len(table) - 1).astype(np.int64)
    return table[index].astype(np.float64), 2**bits - 1


def _modality(dataset, stored):
    """(Stored values through the modality LUT or rescaled, the lowest and the highest that there
    can be)."""
    if dataset.get("ModalityLUTSequence"):
        values, high = _look_up(dataset, dataset.ModalityLUTSequence[0], stored)
        return values, 0, high
    low = -(2 ** (dataset.BitsStored - 1)) if dataset.PixelRepresentation == 1 else 0
    slope = float(dataset.get("RescaleSlope") or 1)
    intercept = float(dataset.get("RescaleIntercept") or 0)
    ends = sorted(slope * v + intercept for v in (low, low + 2**dataset.BitsStored - 1))
    return slope * stored.astype(np.float64) + intercept, *ends


def _voi(dataset, values, low, high):
    """What _modality gave as grey in [0, 1]: by VOI LUT, first window, or whole range."""
    if dataset.get("VOILUTSequence"):
        looked_up, high = _look_up(dataset, dataset.VOILUTSequence[0], values)
        return looked_up / high
    centre, width = 0.0, 0.0
    if dataset.get("WindowCenter") is not None and dataset.get("WindowWidth") is not None:
        centre, width = (float(np.atleast_1d(dataset[name].value)[0])
                         for name in ("WindowCenter", "WindowWidth"))
    if width <= 0:  # no window
        return (values - low) / (high - low)
    function = dataset.get("VOILUTFunction", "LINEAR")
    if function == "SIGMOID":
        return (1 + np.tanh(2 * (values - centre) / width)) / 2  # 1 / (1 + exp(-4 x)), no overflow
    if function == "LINEAR_EXACT":
        return ((values - centre) / width + 0.5).clip(0, 1)
    # LINEAR has its ends on pixel values: a width of 1 is a threshold.
    return ((values - (centre - 0.5)) / max(width - 1, 1e-9) + 0.5).clip(0, 1)


def _present(dataset, grey):
    """Grey in [0, 1] after the presentation LUT, if there is one."""
    if not dataset.get("PresentationLUTSequence"):
        return grey
    item = dataset.PresentationLUTSequence[0]
    last = (item.LUTDescriptor[0] or 65536) - 1
    looked_up, high = _look_up(dataset, item, grey * last)
    return looked_up / high


def to_float(rows):
    """What `decode` made, uint16 [B, S, S], as float32 [B, 1, S, S] in [-1, 1]."""
    return (torch.from_numpy(rows.astype(np.float32)) / 32767.5 - 1)[:, None]


def decode_some(paths, img_size, most):
    """Up to `most` of these image files, evenly chosen: float32 [N, 1, S, S] in [-1, 1]. OSError or
    ValueError where one cannot be decoded."""
    index = np.linspace(0, len(paths) - 1, min(most, len(paths))).astype(int)
    return to_float(np.stack([decode(paths[i], img_size) for i in index]))


# --- caches -------------------------------------------------------------------------------------

PIECE = 128  # rows that are made, written and counted at once: what a kill can cost a process
DAY = 86400  # seconds after which nobody will come back to an unfinished cache


class CachedArray(NamedTuple):
    """Rows in a .npy file. They are read through a map that lives for one call, so that memory
    stays flat."""

    path: str
    shape: tuple
    notes: dict  # {what: [JSON values]} that came up when the rows were made

    def rows(self, indices):
        """Copy of some rows."""
        return np.asarray(np.lib.format.open_memmap(self.path, "r")[indices])


def cached_notes(folder, name, num_rows):
    """The notes of cache NAME, without a look at its rows; None where there are none, or damaged
    ones. A note is the position of a row, or [position, name, reason]."""
    try:
        stored = experiment.parse_json(pathlib.Path(folder, f"{name}.json"))["notes"]
        notes = {what: list(values) for what, values in stored.items()}
        for what, values in notes.items():
            positions = [position for position, _, _ in values] if what == "bad" else values
            if not all(type(p) is int and 0 <= p < num_rows for p in positions):
                return None
        return notes
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _open_cached(path, shape, dtype):
    """CachedArray at `path`, without reading its rows; ValueError or OSError if it is not whole."""
    notes = cached_notes(path.parent, path.stem, shape[0])
    if notes is None:
        raise ValueError("its .json is missing, damaged or of an earlier version")
    array = np.lib.format.open_memmap(path, mode="r")
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"holds {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}")
    if array.offset + array.nbytes != path.stat().st_size:
        raise ValueError("has another size than its header says")
    return CachedArray(str(path), shape, notes)


def _open_if_whole(path, shape, dtype, say=True):
    """What _open_cached gives; None where it is damaged, which a notice says, or not there."""
    if not (path.exists() and path.with_suffix(".json").exists()):
        return None
    try:
        return _open_cached(path, shape, dtype)
    except Exception as e:  # whatever numpy raises on a damaged header
        if say:
            notice(f"cache {path} is not whole ({experiment.first_line(e)}): building it again")
        return None


def cached_array(procs, folder, name, shape, dtype, label, prepare, check=None):
    """CachedArray `name` of this shape and dtype in `folder`, made by all ranks together where it
    is missing or damaged.

    prepare() is called on every rank once it is clear that rows must be made. It returns
    make(start, stop, tick), which gives rows start to stop and {what: [JSON values]} to note about
    them, and calls tick(n) when n more are done. check(notes) may end the program before the cache
    is put in place. label: of the progress line.

    The rows grow in the folder NAME.part, and its *.jsonl say which are there: what a killed start
    has made the next one keeps. NAME.lock lets one run build, while others wait. NAME.json is put
    in place last: where it is, NAME.npy is whole.
    """
    path = pathlib.Path(folder, f"{name}.npy")
    part = path.with_suffix(".part")
    lock, finished = None, {}  # on rank 0

    def begin():
        """(whole cache or None, pieces [(start, stop)] to be made)."""
        nonlocal lock, finished
        if cache := _open_if_whole(path, shape, dtype, say=False):
            return cache, []
        experiment.make_folder(path.parent)
        lock = experiment.take_lock(path.with_suffix(".lock"), part, wait=True)
        if cache := _open_if_whole(path, shape, dtype):  # another run has made it meanwhile
            return cache, []
        _remove_leftovers(path.parent, part)
        _begin_part(path, part, shape, dtype)
        finished = _finished_pieces(part)
        pieces = [(start, min(start + PIECE, shape[0])) for start in range(0, shape[0], PIECE)]
        return None, [piece for piece in pieces if piece not in finished]

    cache, pieces = experiment.on_main(procs, begin)
    if cache:
        return cache
    made = _make_pieces(part, pieces[procs.rank::procs.world_size], shape, dtype, prepare(), procs,
                        label)
    # Not from the journals: a network disk may show those of other machines late.
    for of_rank in experiment.gather_objects(procs, made):
        finished |= of_rank

    def finish():
        notes = collections.defaultdict(list)
        for piece in sorted(finished):
            for what, values in finished[piece].items():
                notes[what] += values
        try:
            if check:
                check(notes)
        except SystemExit:
            clean = {piece: of for piece, of in finished.items() if not of.get("bad")}
            _keep_pieces(part, clean)
            raise
        os.replace(part / "rows.npy", path)
        try:
            experiment.write_json(path.with_suffix(".json"), {"notes": notes})
        except BaseException:
            os.replace(path, part / "rows.npy")  # a full disk: nothing is left in the way
            raise
        shutil.rmtree(part, ignore_errors=True)
        return _open_cached(path, shape, dtype)
    return experiment.on_main(procs, finish)


def _maker(images, batch_size, function):
    """make(start, stop, tick) for cached_array: function(x, rows) of the decoded images x
    [B, 1, S, S] of all files of an ImageSet, over and over where there are more rows than files.
    All ranks must call it."""
    decoded = dataclasses.replace(images.decoded(), rows=np.arange(images.num_files))

    def make(start, stop, tick):
        made = []
        for first in range(start, stop, batch_size):
            rows = np.arange(first, min(first + batch_size, stop))
            made.append(function(decoded.images(rows % images.num_files), rows))
            tick(len(rows))
        return np.concatenate(made), {}
    return make


def _make_pieces(part, pieces, shape, dtype, make, procs, label):
    """Make the rows of some pieces, write them to the disk, and only then note that they are:
    {(start, stop): notes}."""
    progress = experiment.Progress(procs, label, sum(stop - start for start, stop in pieces))
    made, done = {}, 0

    def tick(count):
        nonlocal done
        done += count
        progress.update(done, f"on each of {procs.world_size} processes"
                        if procs.world_size > 1 else "")

    row_bytes = np.dtype(dtype).itemsize * math.prod(shape[1:])
    journal = part / f"{socket.gethostname()}-{os.getpid()}-{procs.rank}.jsonl"
    try:
        with (open(part / "rows.npy", "r+b") as rows_file,
              open(experiment.open_own(journal, os.O_APPEND), "a") as journal_file):
            first = os.fstat(rows_file.fileno()).st_size - shape[0] * row_bytes
            journal_file.write("\n")  # after a line that a process of this number left torn
            for start, stop in pieces:
                rows, notes = make(start, stop, tick)
                rows_file.seek(first + start * row_bytes)
                rows_file.write(np.ascontiguousarray(rows, dtype).data)
                rows_file.flush()
                os.fsync(rows_file.fileno())
                journal_file.write(json.dumps([start, stop, notes]) + "\n")
                journal_file.flush()
                made[start, stop] = notes
    except OSError as e:
        fail(f"cannot write {part}: {e.strerror}; free some space or choose another --output_root. "
             "What is done stays")
    progress.clear()
    return made


def _begin_part(path, part, shape, dtype):
    """Make the folder `part` with a file for all rows, unless an earlier start has left it."""
    experiment.make_folder(part)
    rows = part / "rows.npy"
    journalled = any(part.glob("*.jsonl"))
    if path.exists() and journalled and not (rows.exists() or path.with_suffix(".json").exists()):
        os.replace(path, rows)  # it was killed when all but the .json was in place
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {
        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False,
        "shape": shape})
    size = len(header.getvalue()) + np.dtype(dtype).itemsize * math.prod(shape)
    if not rows.exists() or rows.stat().st_size != size:
        _keep_pieces(part, {})

        def write(f):
            f.write(header.getvalue())
            f.truncate(size)
        experiment.write_atomic(rows, write)


def _finished_pieces(part):
    """{(start, stop): notes} of the rows that are on the disk."""
    finished = {}
    for journal in part.glob("*.jsonl"):
        for line in journal.read_bytes().splitlines():
            with contextlib.suppress(ValueError, TypeError):  # torn, when its process was killed
                start, stop, notes = json.loads(line)
                finished[start, stop] = dict(notes)
    return finished


def _keep_pieces(part, finished):
    """Forget all pieces but these {(start, stop): notes}."""
    for journal in part.glob("*.jsonl"):
        journal.unlink()
    if finished:
        lines = [json.dumps([*piece, notes]) + "\n" for piece, notes in finished.items()]
        experiment.write_atomic(part / "kept.jsonl", lambda f: f.write("".join(lines).encode()))


def _remove_leftovers(cache_folder, part):
    """Remove what builds that nobody went on with for a day have left; `part` is ours."""
    experiment.sweep(cache_folder, DAY)
    experiment.sweep(cache_folder, name=part.with_suffix(".json").name)  # ours: we have the lock
    for kind in ("images", "latents", "thumbnails"):
        for left in [*cache_folder.glob(f"{kind}_*.npy"), *cache_folder.glob(f"{kind}_*.part")]:
            last = max(path.stat().st_mtime for path in (left, *left.glob("*")))
            ours = part in (left, left.with_suffix(".part"))
            indexed = left.suffix == ".npy" and left.with_suffix(".json").exists()
            if ours or indexed or time.time() - last < DAY:
                continue
            notice(f"removing {left}, which was never finished")
            shutil.rmtree(left) if left.is_dir() else left.unlink()


# --- images -------------------------------------------------------------------------------------


@dataclasses.dataclass
class ImageSet:
    """Decoded images of one split."""

    cache: CachedArray  # None: not opened, since all that is known of the images is enough
    rows: np.ndarray  # which rows of the cache belong to it
    labels: np.ndarray  # class index of each
    names: np.ndarray  # path of each below the data root, as bytes
    class_names: list
    key: str  # fingerprint of files and image size
    summary: list  # what describe_changes compares
    num_files: int  # rows of the cache
    decode: Callable = None  # opens the cache, or makes it; where that is still to be done

    def __len__(self):
        return len(self.rows)

    def images(self, indices):
        """float32 [B, 1, S, S] in [-1, 1]."""
        return to_float(self.cache.rows(self.rows[indices]))

    def name(self, index):
        """Path of one of them below the data root, as text that can be printed."""
        return _shown(os.fsdecode(self.names[index]))

    def decoded(self):
        """ImageSet with its pixels at hand. All ranks must call it."""
        return self if self.cache else dataclasses.replace(self, cache=self.decode(), decode=None)

    def subset(self, indices):
        """ImageSet of some of them."""
        return dataclasses.replace(self, rows=self.rows[indices], labels=self.labels[indices],
                                   names=self.names[indices])


def batches(images):
    """All of an ImageSet, or of what is read like one, in order: float32 [B, 1, S, S]."""
    for start in range(0, len(images), BATCH):
        yield images.images(np.arange(start, min(start + BATCH, len(images))))


def image_root(args):
    """Folder that holds the images of the settings: --data_root, else that of the phantom set."""
    return args.data_root or phantom.phantom_root(args.output_root, args.img_size)


def adopt_root(args, settings, what):
    """Without --data_root, take that of a model's settings: what was trained on real images is not
    measured on phantoms by mistake."""
    root = settings.get("data_root")
    if not args.data_root and root:
        args.data_root = root
        notice(f"no --data_root: using that of {what}, {root}")


def _no_split(root, task, split):
    tasks = _subfolders(root) if task == "ALL_CXR" else [task]
    splits = sorted({s for t in tasks for s in _subfolders(os.path.join(root, t))})
    return f"no split {split!r} for task {task} in {root}; there: {', '.join(splits) or 'none'}"


def check_folders(args):
    """End the program where --data_root has not got the split of the task."""
    if args.data_root and not find_members(args.data_root, args.task, args.split):
        fail(_no_split(args.data_root, args.task, args.split))


def open_images(args, procs, split, optional=False, class_names=None, train=None, pixels=True):
    """ImageSet of a split, decoded on first use into OUTPUT_ROOT/cache by all ranks.

    args: the flags of args.add_data_arguments. With `optional`, a missing split is None.
    class_names: the classes, where a model knows them; train: the training ImageSet, whose classes
    are the classes and whose images are left out here. pixels=False: if they were decoded once, the
    cache is not opened (see ImageSet.decoded). Ends the program, naming all files that cannot be
    decoded, unless args.skip_bad_images. Rank 0 alone looks at the folders, and of a cache that is
    there it reads no row.
    """
    if train is not None:
        class_names = train.class_names
    folder = pathlib.Path(args.output_root, "cache")
    listing = None  # on rank 0 alone: the others need no list of a hundred thousand files

    def look():
        nonlocal listing
        root = image_root(args)
        listing = _list_split(args, root, split, optional, class_names)
        return listing and (len(listing.files), fingerprint(listing, args.img_size),
                            os.path.join(root, args.task, split))

    found = experiment.on_main(procs, look)
    if found is None:
        return None
    num_files, key, where = found
    name = f"images_{key[:16]}"

    def decode():
        return cached_array(
            procs, folder, name, (num_files, args.img_size, args.img_size), np.uint16,
            f"decoding {where}", lambda: _decoder(listing, args, procs),
            lambda notes: _refuse_bad(notes.get("bad", []), num_files, args, where))

    cache, notes = None, None
    if not pixels:
        notes = experiment.on_main(procs, lambda: cached_notes(folder, name, num_files))
    if notes is None:
        cache = decode()
        notes = cache.notes

    def select():
        images = _image_set(listing, notes, args, where, key)
        lost = sorted({f.class_name for f in listing.files}
                      - {listing.class_names[c] for c in images.labels})
        if lost and args.class_filter < 0:
            message = f"no images of class {', '.join(lost)} are left in {where}"
            notice(message) if class_names else fail(message)
        return images

    images = experiment.on_main(procs, select)
    images = dataclasses.replace(images, cache=cache, decode=None if cache else decode)
    if train is not None and len(images):
        images = _without_copies(images, train, folder, procs, where)
    if len(images) == 0 and not optional:
        experiment.on_main(procs, lambda: fail(f"no image is left in {where}"))
    if len(images) == 0:
        notice(f"no image is left in {where}: validation is skipped")
        return None
    return images


def _list_split(args, root, split, optional, class_names):
    """Listing of a split, once its classes are fit for training; None where it may be missing."""
    listing = scan(root, args.task, split, class_names)
    if listing is None:
        message = _no_split(root, args.task, split)
        if not optional:
            fail(message)
        notice(f"{message}. Validation is skipped")
        return None
    names = listing.class_names
    if args.class_filter >= len(names):
        there = ", ".join(f"{i} = {n}" for i, n in enumerate(names))
        fail(f"--class_filter={args.class_filter}, but the classes are {there}")
    if len(names) == 1 and args.class_filter != 0:
        where = os.path.join(root, args.task, split)
        rule = f" ({FLAT_RULE})" if listing.flat else ""
        fail(f"only one class, {names[0]!r}, in {where}{rule}; the model needs two to tell apart. "
             "Check the folders, or give --class_filter=0 to train on this class alone")
    return listing


def _image_set(listing, notes, args, where, key):
    """ImageSet, without its cache, of the files that could be decoded and are of the asked class;
    says what is odd about them. notes: of the cache."""
    bad = notes.get("bad", [])
    if bad:
        _refuse_or_notice(bad, len(listing.files), args.skip_bad_images, where)
    _notice_odd(listing, notes.get("dark", []), where,
                "have no value over a quarter of their range. 12-bit values in 16-bit files? Scale "
                "them up, or save what says so (TIFF's BitsPerSample, PNG's sBIT)")
    _notice_odd(listing, notes.get("flat", []), where,
                "have no contrast at all: empty, or cut off by their window")
    if other := notes.get("other", []):
        notice(f"{where}: not read: {len(other)} without a suffix")
    number = {name: i for i, name in enumerate(listing.class_names)}
    labels = np.array([number[file.class_name] for file in listing.files])
    keep = (labels == args.class_filter) | (args.class_filter < 0)
    keep[[*other, *(position for position, _, _ in bad)]] = False
    rows = np.flatnonzero(keep)
    names = np.array([os.fsencode(listing.files[i].path) for i in rows])
    return ImageSet(None, rows, labels[rows], names, listing.class_names, key,
                    class_summary(listing), len(listing.files))


def fingerprint(listing, img_size):
    """Hex digest of what a cache of images depends on: their names, sizes and times, and how they
    are decoded."""
    digest = hashlib.sha256(f"decoder 3 {img_size}".encode())
    for file in listing.files:
        digest.update(os.fsencode(file.path) + f" {file.size} {file.mtime_ns}\n".encode())
    return digest.hexdigest()


def class_summary(listing):
    """[[class name, number of files, digest of what is in them as far as names, sizes and times
    tell]]: to see what has changed between two starts of a run."""
    found = []
    for name in listing.class_names:
        members = [f for f in listing.files if f.class_name == name]
        lines = sorted(f"{os.path.basename(f.path)} {f.size} {f.mtime_ns}" for f in members)
        text = "\n".join(lines).encode("utf-8", "surrogateescape")
        found.append([name, len(members), hashlib.sha256(text).hexdigest()[:16]])
    return found


def describe_changes(before, now):
    """What is different between two class_summary lists: one line per class that is."""
    old = {name: (count, digest) for name, count, digest in before}
    by_digest = {digest: name for name, _, digest in before}
    lines = []
    for name, count, digest in now:
        if name not in old:
            lines.append(f"class {name} is new, with {count} images")
        elif digest != old[name][1]:
            same_as = by_digest.get(digest)
            if same_as:
                lines.append(f"class {name} now holds the images that were {same_as}")
            elif count != old[name][0]:
                lines.append(f"class {name} has {count} images, it had {old[name][0]}")
            else:
                lines.append(f"class {name} has other files, as many as before ({count})")
    return lines + [f"class {name} is gone" for name in old if name not in {n for n, _, _ in now}]


def notice_changes(before, images, since):
    """Say what has changed since `since`; before: ImageSet.summary then, None if not known."""
    try:
        changes = describe_changes(before, images.summary) if before else []
    except (TypeError, ValueError):  # damaged: there is nothing to compare with
        changes = []
    if changes:
        notice(f"the training data have changed since {since}: {'; '.join(changes)}")


def _decoder(listing, args, procs):
    """make(start, stop, tick) for cached_array: a row for each file, black where it cannot be
    decoded. listing: on rank 0, which hands the list on.

    Its notes: "bad", [position, name, reason] of those; positions of "other", files without a
    suffix that are no DICOM, "dark", images without a value over a quarter of their range, and
    "flat", with hardly two values.
    """
    def look():
        files = [(file.path, file.size >= 0) for file in listing.files]
        if any(there and is_dicom(os.path.join(listing.root, path)) for path, there in files):
            import_pydicom()  # one error, not one per file
        return listing.root, files

    root, files = experiment.on_main(procs, look)
    pool = ThreadPoolExecutor(args.num_workers or experiment.own_cores())

    def decode_or_reason(name, there):
        if not there:
            return "a link without a target"
        path = os.path.join(root, name)
        if _may_be_dicom(os.path.splitext(name)[1]) and not is_dicom(path):
            return None
        try:
            return decode(path, args.img_size)
        except (OSError, ValueError) as e:
            return str(e) or type(e).__name__

    def make(start, stop, tick):
        rows = np.zeros((stop - start, args.img_size, args.img_size), np.uint16)
        bad, other, dark, flat = [], [], [], []
        decoded = pool.map(decode_or_reason, *zip(*files[start:stop], strict=True))
        for position, image in enumerate(decoded, start):
            tick(1)
            if image is None:
                other.append(position)
                continue
            if isinstance(image, str):
                bad.append([position, _shown(files[position][0]), image])
                continue
            rows[position - start] = image
            lowest, highest = int(image.min()), int(image.max())
            if highest < 65535 // 4:
                dark.append(position)
            if highest - lowest < 655:  # 1 % of the range
                flat.append(position)
        return rows, {"bad": bad, "other": other, "dark": dark, "flat": flat}
    return make


def _refuse_bad(bad, count, args, where):
    """End the program for files that cannot be decoded, so that nothing is stored of what may pass:
    a network disk, a package that can be installed."""
    installable = any("pip install" in reason for _, _, reason in bad)
    if bad and (installable or not args.skip_bad_images):
        _refuse_or_notice(bad, count, False, where)


def _notice_odd(listing, positions, where, what):
    """One notice on the files at some positions, with their classes, or none."""
    if positions:
        odd = [listing.files[i] for i in positions]
        counts = collections.Counter(file.class_name for file in odd)
        classes = ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))
        notice(f"{where}: {len(odd)} of {len(listing.files)} images ({classes}), such as "
               f"{_shown(odd[0].path)}, {what}")


def _first_lines(lines):
    """The first twenty of some lines for the end of a message, and how many more there are."""
    more = [f"and {len(lines) - 20} more"] if len(lines) > 20 else []
    return "".join(f"\n  {line}" for line in lines[:20] + more)


def _refuse_or_notice(bad, count, skip, where):
    names = _first_lines([f"{name}: {reason}" for _, name, reason in bad])
    if not skip:
        fail(f"{len(bad)} of {count} images in {where} cannot be decoded; repair or remove them, "
             f"or leave them out with --skip_bad_images:{names}")
    notice(f"{len(bad)} images that cannot be decoded are left out:{names}")


# --- copies between splits ----------------------------------------------------------------------

# Correlation of thumbnails. Of 920 images from two sites at 128 px, different ones reach at most
# 0.970; copies of half the size, of JPEG quality 30, with noise of 3 % or another gamma at least
# 0.995.
COPY_CORRELATION = 0.99
THUMBNAIL_SIZE = 32  # side in pixels of what copies are looked for in


def thumbnails(x):
    """[N, 1024] of images [N, 1, H, W]: averaged down to 32 x 32, with mean 0 and length 1, so that
    the product of two is their correlation and exposure does not count."""
    rows = F.interpolate(x, THUMBNAIL_SIZE, mode="area").flatten(1)
    rows = rows - rows.mean(1, keepdim=True)
    return rows / rows.std(1, correction=0, keepdim=True).clamp_min(1e-6) / THUMBNAIL_SIZE


def cached_thumbnails(images, folder, procs):
    """CachedArray float32 [num_files, 1024]: the thumbnails of all files of an ImageSet, made once
    by all ranks. rows(images.rows) are those of its own images."""
    def prepare():
        return _maker(images, BATCH, lambda x, _: thumbnails(x).numpy())

    shape = (images.num_files, THUMBNAIL_SIZE**2)
    return cached_array(procs, folder, f"thumbnails_{images.key[:16]}", shape, np.float32,
                        "making thumbnails", prepare)


def find_copies(images, train, folder, procs):
    """[[position in images, position in train]] of images that stand in `train` too, exactly or
    nearly (rescaled, re-compressed). All ranks must call it."""
    of_images, of_train = (cached_thumbnails(of, folder, procs) for of in (images, train))
    mine = torch.from_numpy(of_images.rows(images.rows))
    best, where = torch.full((len(mine),), -1.0), torch.zeros(len(mine), dtype=torch.long)
    for start in range(0, len(train), 256):
        others = torch.from_numpy(of_train.rows(train.rows[start:start + 256]))
        values, nearest = (mine @ others.T).max(1)
        better = values > best
        best[better], where[better] = values[better], nearest[better] + start
    return [[i, int(where[i])] for i in (best > COPY_CORRELATION).nonzero()[:, 0].tolist()]


def _without_copies(images, train, folder, procs, where):
    """`images` without those that stand in the training set too, which one notice names.

    They are looked for once, by all ranks: the answer is kept beside the caches.
    """
    key = hashlib.sha256(f"copies 2 {images.key} {train.key} {COPY_CORRELATION}".encode())
    key.update(images.rows.tobytes() + train.rows.tobytes())
    path = pathlib.Path(folder, f"copies_{key.hexdigest()[:16]}.json")
    if not experiment.on_main(procs, path.exists):
        found = find_copies(images, train, folder, procs)

        def write():
            with experiment.take_lock(path.with_suffix(".lock"), path, wait=True):
                experiment.sweep(path.parent, name=path.name)
                experiment.write_json(path, {"pairs": found})
        experiment.on_main(procs, write)
    pairs = experiment.on_main(
        procs, lambda: experiment.read_json(path, "list of copies")["pairs"])
    if not pairs:
        return images
    names = _first_lines([f"{images.name(i)} is {train.name(j)}" for i, j in pairs])
    notice(f"{len(pairs)} images of {where} stand in the training set too, exactly or nearly, and "
           f"are left out:{names}")
    copies = [i for i, _ in pairs]
    return images.subset(np.setdiff1d(np.arange(len(images)), copies))


def count_classes(images):
    """'normal 53, tb 53' of an ImageSet."""
    names, labels = images.class_names, images.labels
    return ", ".join(f"{names[c]} {(labels == c).sum()}" for c in np.unique(labels))


def overfit_indices(labels, k):
    """k positions that take the classes in turn, first images first. Ends the program if there are
    fewer."""
    if k > len(labels):
        fail(f"overfitting on {k} images, but there are only {len(labels)}")
    by_class = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    turns = [(turn, c, i) for c, members in enumerate(by_class) for turn, i in enumerate(members)]
    return np.array([i for _, _, i in sorted(turns)[:k]])


# --- latents ------------------------------------------------------------------------------------


# Most that augment changes: shift as a fraction of the side, zoom, rotation in radians, contrast,
# brightness in grey from -1 to 1. A film is never flipped: that moves the heart.
AUG_RANGES = (0.06, 0.06, 0.08, 0.09, 0.1, 0.05)


def augment(x, how):
    """Images [B, 1, S, S] in [-1, 1], shifted, zoomed, rotated and exposed otherwise.

    how [B, 6] in [-1, 1], as fractions of AUG_RANGES: shift to the right and down, zoom, rotation,
    contrast, brightness. What comes in at the edges is mirrored.
    """
    right, down, zoom, angle, contrast, brightness = (how * how.new_tensor(AUG_RANGES)).unbind(1)
    scale = 1 / (1 + zoom)
    rows = [torch.stack([scale * angle.cos(), scale * angle.sin(), -2 * right], 1),
            torch.stack([-scale * angle.sin(), scale * angle.cos(), -2 * down], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), x.shape, align_corners=False)
    x = F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    black = (x + 1) * (1 + contrast)[:, None, None, None] - 1
    return (black + brightness[:, None, None, None]).clamp(-1, 1)


class LatentSet:
    """Posterior means and log-variances of an ImageSet, from the cache or encoded on the fly.

    With `versions`, of so many augmented versions of each image too; version 0 is the image itself.
    """

    def __init__(self, images, vae, vae_sha256, folder, procs, use_cache=True, batch_size=16,
                 versions=0):
        """vae: AutoencoderKL on procs.device. The cache is keyed by VAE, data, image size and
        augmentation, shared by all runs below `folder`, and made by all ranks."""
        self.images, self.vae, self.device = images, vae, procs.device
        self.cache = self.resident = None
        self.versions = versions
        # All rows: a subset or one class shares the cache. Version v of row r is row v total + r.
        total = images.num_files
        rng = experiment.generator("cpu", "augment", images.key)
        how = torch.rand(versions * total, len(AUG_RANGES), generator=rng) * 2 - 1
        self.how = torch.cat([torch.zeros(total, len(AUG_RANGES)), how])
        if not use_cache:
            return
        text = f"{vae_sha256} {images.key}"
        if versions:
            text += f" {versions} {AUG_RANGES}"
        key = hashlib.sha256(text.encode()).hexdigest()
        shape = (len(self.how), 2, *vae.latent_shape)

        def encode(x, rows):
            posterior = self._encode(self._augmented(x, rows))
            return torch.stack(posterior, 1).cpu().numpy()  # [B, 2, C, h, w]

        self.cache = cached_array(procs, folder, f"latents_{key[:16]}", shape, np.float32,
                                  "encoding latents", lambda: _maker(images, batch_size, encode))
        if procs.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(procs.device)
            mine = np.concatenate([images.rows + v * total for v in range(versions + 1)])
            if len(mine) * 4 * np.prod(shape[1:]) < 0.1 * free:
                self.resident = torch.from_numpy(self.cache.rows(mine)).to(procs.device)

    def _augmented(self, x, rows):
        """Images x [B, 1, S, S] as the versions of these rows are; version 0 stays as it is."""
        changed = torch.from_numpy(rows >= self.images.num_files)
        if changed.any():
            x = x.clone()
            x[changed] = augment(x[changed], self.how[torch.from_numpy(rows)[changed]])
        return x

    @torch.no_grad()
    def _encode(self, x):
        # In float32 and without autocast, so that cached and fresh latents are the same.
        return self.vae.encode(x.to(self.device))

    def _rows(self, indices, versions):
        return self.images.rows[indices] + versions * self.images.num_files

    def posterior(self, indices, versions=0):
        """(mean, logvar), each float32 [B, C, h, w] on the device. versions [B]: of each image."""
        if self.resident is not None:
            index = torch.from_numpy(indices + versions * len(self.images))
            both = self.resident[experiment.send(index, self.device)]
        elif self.cache is not None:
            rows = self.cache.rows(self._rows(indices, versions))
            both = experiment.send(torch.from_numpy(rows), self.device)
        else:
            x = self._augmented(self.images.images(indices), self._rows(indices, versions))
            return tuple(self._encode(x))
        return both[:, 0], both[:, 1]

    def how_augmented(self, indices, versions):
        """float32 [B, 6] on the device: see augment; zeros for version 0."""
        how = self.how[torch.from_numpy(self._rows(indices, versions))]
        return experiment.send(how, self.device)


if __name__ == "__main__":
    phantom.main()  # `python data.py --out=FOLDER` drew the phantom set in earlier versions
