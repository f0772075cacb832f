"""Image files as grey squares: what Pillow reads, and DICOM."""
import functools
import logging
import os
import warnings

import numpy as np
from PIL import Image, ImageOps

# For Pillow an image of up to 179 megapixels is only worth a warning.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

DICOM = {".dcm", ".dicom"}
EXTENSIONS = DICOM | {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".bmp", ".tif", ".tiff",
                      ".webp", ".gif", ".pgm"}


def may_be_image(path):
    """Whether a file has the suffix of an image, or none, or a number: archives hand out DICOM
    files as IM0001 or by UID, 1.2.840.4."""
    suffix = os.path.splitext(path)[1].lower()
    return suffix in EXTENSIONS or not suffix or suffix[1:].isdigit()


def read_square(path, img_size):
    """Centre square of an image file, resized (box filter down, bicubic up): uint16 [img_size,
    img_size], 0 black to 65535 white. Raises ValueError or OSError if it cannot be decoded."""
    grey = read_grey(path)
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
            if image.mode.startswith("I"):
                return _deep_grey(turned, image)
            if image.mode == "F":
                raise ValueError("floating-point image, its black and white are unknown")
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


def may_pass(error):
    """Whether a file may be readable later: with the disk back, or once a package is installed."""
    return getattr(error, "errno", None) is not None or "pip install" in str(error)


def _deep_grey(turned, image):
    """The same for 16 bits, and for 16-bit values that NumPy or a viewer wrote as 32 bits.
    turned: the image, upright."""
    values = np.asarray(turned)
    tags = image.tag_v2 if image.format == "TIFF" else {}
    signed_16 = tags.get(258) == (16,) and tags.get(339) == (2,)  # BitsPerSample, SampleFormat
    if signed_16 or values.min() < 0 or values.max() > 65535:
        raise ValueError("signed or 32-bit values, their black and white are unknown: export the "
                         "image with 16 bits")
    grey = values.astype(np.float32) / 65535
    return 1 - grey if tags.get(262) == 0 else grey  # WhiteIsZero


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
    with open(path, "rb") as file:
        if file.read(132)[128:] != b"DICM":
            raise ValueError("no DICOM file")
    pydicom = import_pydicom()
    try:
        dataset = pydicom.dcmread(path)
        _refuse(dataset)
        return _display(pydicom.pixels, dataset)
    except Exception as e:
        if isinstance(e, OSError) or str(e).startswith("DICOM"):  # a message of ours
            raise
        raise ValueError(f"damaged DICOM ({type(e).__name__})") from e


def _refuse(dataset):
    """ValueError if a dataset is not one grey image that pydicom displays as it says."""
    voi = dataset.get("VOILUTSequence")
    # In tables of 8-bit entries pydicom lets the index overflow.
    narrow = voi and voi[0].LUTDescriptor[2] == 8 and dataset.BitsStored > 8
    pixels = dataset.get("Rows", 0) * dataset.get("Columns", 0)
    for refused, reason in (
            ("PixelData" not in dataset, "without an image: a report, a plan or an index"),
            (int(dataset.get("NumberOfFrames") or 1) > 1, "of several frames: export one"),
            (pixels > Image.MAX_IMAGE_PIXELS, f"of {pixels} pixels: too many"),
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
    try:
        stored = dataset.pixel_array
    except Exception as e:
        syntax = dataset.file_meta.TransferSyntaxUID
        if not syntax.is_compressed:
            raise
        raise ValueError(f"DICOM compressed as {syntax.name} cannot be read: pip install pylibjpeg "
                         "pylibjpeg-libjpeg pylibjpeg-openjpeg; if it stays, it is damaged") from e
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
        padding = dataset.PixelPaddingValue
        first, last = sorted((padding, dataset.get("PixelPaddingRangeLimit", padding)))
        grey[(stored >= first) & (stored <= last)] = 0
    return grey.astype(np.float32)
