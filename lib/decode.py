"""Which files of a folder are images, and images as grey squares: what Pillow reads, and DICOM."""
import functools
import logging
import os
import re
import warnings

import numpy as np
from PIL import Image, ImageOps

from lib.files import fail

DICOM = {".dcm", ".dicom"}
EXTENSIONS = DICOM | {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".bmp", ".tif", ".tiff",
                      ".webp", ".gif", ".pgm"}
# Hidden files, thumbnails, and the masks that some sets have beside the images.
IGNORED = re.compile(r"\.|@eadir$|__macosx$|.*(mask|segmentation)s?(\.\w+)?$", re.IGNORECASE)
LATERAL = re.compile(r"(?<![a-z])lat(eral)?(?![a-z])", re.IGNORECASE)  # view2_lateral.jpg


def find_images(folder, left_out):
    """Sorted paths of the images below a folder, as lists of their parts, by their names alone;
    left_out counts the other files by reason. Links are followed."""
    paths, start = [], len(os.path.join(folder, ""))
    for parent, _, names in os.walk(folder, onerror=fail, followlinks=True):
        if os.path.islink(parent) and not os.path.relpath(os.path.realpath(
                os.path.dirname(parent)), os.path.realpath(parent)).startswith(os.pardir):
            fail(f"{parent} is a link to a folder around it: remove the link")
        for name in names:
            path = os.path.join(parent, name)[start:].split("/")
            suffix = os.path.splitext(name)[1].lower()
            if any(map(IGNORED.match, path)):
                left_out["hidden or masks"] += 1
            # Archives hand out DICOM files as IM0001 or by UID, 1.2.840.4.
            elif suffix in EXTENSIONS or not suffix or suffix[1:].isdigit():
                paths.append(path)
            else:
                left_out[f"*{suffix}"] += 1
    return sorted(paths)


def read_square(path, img_size):
    """Centre square of an image file, resized (box filter down, bicubic up; img_size None: not at
    all): uint16 [img_size, img_size], 0 black to 65535 white. Raises ValueError or OSError if it
    cannot be decoded."""
    grey = read_grey(path)
    height, width = grey.shape
    side = min(height, width)
    img_size = img_size or side
    top, left = (height - side) // 2, (width - side) // 2
    image = Image.fromarray(grey[top:top + side, left:left + side])
    method = Image.Resampling.BOX if side > img_size else Image.Resampling.BICUBIC
    image = image.resize((img_size, img_size), method)
    return (np.asarray(image).clip(0, 1) * 65535 + 0.5).astype(np.uint16)


def read_grey(path):
    """A whole image file as float32 [H, W], 0 black to 1 white. Orientation, WhiteIsZero and
    BitsPerSample are followed; colour becomes luma, transparency black. Raises ValueError or
    OSError if it cannot be decoded."""
    try:
        if os.path.splitext(path)[1].lower() not in EXTENSIONS - DICOM:
            return read_dicom(path)
        # By its name Pillow 13 would map a TIFF file, and garble orientations 5 to 8.
        with open(path, "rb") as file, Image.open(file) as image:
            image.load()
            turned = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":  # 16 bits, perhaps written as 32
                values = np.asarray(turned)
                if image.mode == "F" or values.min() < 0 or values.max() > 65535:
                    raise ValueError("negative, 32-bit or floating-point values, their black and "
                                     "white are unknown: export the image with 16 bits")
                grey = values.astype(np.float32) / 65535
                white_is_zero = image.format == "TIFF" and image.tag_v2.get(262) == 0
                return 1 - grey if white_is_zero else grey
            if turned.has_transparency_data:
                turned = turned.convert("RGBA")
                black = Image.new("RGBA", turned.size, (0, 0, 0, 255))
                turned = Image.alpha_composite(black, turned)
            if turned.mode != "L":
                turned = turned.convert("RGB").convert("L")
            return np.asarray(turned, dtype=np.float32) / 255
    except (OSError, ValueError):
        raise
    except Exception as e:  # parsers on damaged files, decompression bombs
        raise ValueError(f"{type(e).__name__}: {e}") from e


# --- DICOM --------------------------------------------------------------------------------------


@functools.cache
def import_pydicom():
    """The optional pydicom, without the warnings in which it may quote a patient's tags."""
    try:
        import pydicom
    except ImportError as e:
        raise ValueError("DICOM files need pydicom: pip install pydicom") from e
    warnings.filterwarnings("ignore", module="pydicom")
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    return pydicom


def read_dicom(path):
    """The same for a DICOM file with one frame of one sample per pixel: modality LUT or rescaling,
    VOI LUT or window, PresentationLUTShape and MONOCHROME1 (PS3.3, C.7.6.3.1 and C.11), black
    padding. Nothing else of the file is kept, and no message quotes its tags, as pydicom's own may.
    """
    pydicom = import_pydicom()
    try:
        dataset = pydicom.dcmread(path)
        _refuse(dataset)
        return _display(pydicom.pixels, dataset)
    except Exception as e:
        if isinstance(e, OSError) or str(e).startswith("DICOM"):  # a message of ours
            raise
        raise ValueError(f"no readable DICOM ({type(e).__name__}); a compressed one may need: pip "
                         "install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg") from e


def _refuse(dataset):
    """ValueError if a dataset is not one grey image that pydicom displays as it says."""
    voi = dataset.get("VOILUTSequence")
    # In tables of 8-bit entries pydicom lets the index overflow.
    narrow = voi and voi[0].LUTDescriptor[2] == 8 and dataset.BitsStored > 8
    for refused, reason in (
            ("PixelData" not in dataset, "without an image: a report, a plan or an index"),
            (int(dataset.get("NumberOfFrames") or 1) > 1, "of several frames: export one"),
            ("MONOCHROME" not in dataset.get("PhotometricInterpretation", "MONOCHROME"),
             "in colour: export it as grey"),
            (dataset.get("ViewPosition") in ("LL", "RL", "LATERAL"), "of a lateral view"),
            (narrow or dataset.get("PresentationLUTSequence"),
             "with a PresentationLUTSequence or an 8-bit table: export it as PNG")):
        if refused:
            raise ValueError(f"DICOM {reason}")


def _display(pixels, dataset):
    """Grey float32 [H, W] in [0, 1], without a VOI over the range of the stored bits. pixels: the
    module pydicom.pixels."""
    stored = dataset.pixel_array
    low = -(2 ** (dataset.BitsStored - 1)) if dataset.PixelRepresentation == 1 else 0
    ends = np.array([low, low + 2**dataset.BitsStored - 1])
    table = dataset.get("VOILUTSequence") or dataset.get("ModalityLUTSequence")
    if table:
        ends = 0, 2 ** table[0].LUTDescriptor[2] - 1
    else:
        ends = pixels.apply_modality_lut(ends, dataset)  # RescaleSlope, RescaleIntercept
        if dataset.get("WindowWidth") is None:  # else black is ends[0], even if it is higher
            ends = sorted(ends)  # a negative slope turns them round
    with np.errstate(over="ignore"):  # in the sigmoid
        values = pixels.apply_voi_lut(pixels.apply_modality_lut(stored, dataset), dataset)
    grey = (values - float(ends[0])) / (float(ends[1]) - float(ends[0]))
    if (dataset.PhotometricInterpretation == "MONOCHROME1"
            or dataset.get("PresentationLUTShape") == "INVERSE"):
        grey = 1 - grey
    if "PixelPaddingValue" in dataset:
        grey[stored == dataset.PixelPaddingValue] = 0
    return grey.astype(np.float32)
