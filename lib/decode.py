"""Image files as grey squares: what Pillow reads, and DICOM."""
import errno
import functools
import logging
import os
import struct
import warnings

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from lib.files import fail

# For Pillow an image of up to 179 megapixels is only worth a warning.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

DICOM = {".dcm", ".dicom"}
EXTENSIONS = DICOM | {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".bmp", ".tif", ".tiff",
                      ".webp", ".gif", ".pgm"}

# Big-endian grey TIFF that Pillow does not know: 16 bits with WhiteIsZero, which _deep_grey
# inverts, and 32 bits.
TiffImagePlugin.OPEN_INFO.setdefault((b"MM", 0, (1,), 1, (16,), ()), ("I;16B", "I;16B"))
TiffImagePlugin.OPEN_INFO.setdefault((b"MM", 1, (1,), 1, (32,), ()), ("I", "I;32B"))


def read_square(path, img_size):
    """Centre square of an image file, resized (box filter down, bicubic up), which keeps the aspect
    ratio: uint16 [img_size, img_size], 0 black to 65535 white.

    Raises ValueError or OSError if it cannot be decoded, decompression bombs included.
    """
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
    """A whole image file as float32 [H, W], 0 black to 1 white. Raises ValueError or OSError if it
    cannot be decoded.

    EXIF and TIFF orientation, WhiteIsZero and BitsPerSample are followed. 8-bit and 16-bit grey
    keep their full range, colour becomes luma, transparency becomes black.
    """
    try:
        if is_dicom(path):
            return read_dicom(path)
        # By its name Pillow 13 would map a TIFF file, and garble orientations 5 to 8.
        with open(path, "rb") as file, Image.open(file) as image:
            if image.format == "TIFF" and image.tag_v2.get(254, 0) & 1:  # NewSubfileType
                raise ValueError("TIFF that begins with a reduced-size copy: export the image")
            image.load()
            turned = ImageOps.exif_transpose(image)
            if image.mode.startswith("I") or image.mode == "L" and _is_signed(image):
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
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise ValueError(f"too many pixels: {e}") from e
    except UnidentifiedImageError as e:
        raise ValueError("not an image that Pillow can read") from e
    except MemoryError as e:
        raise OSError(errno.ENOMEM, "not enough memory") from e
    except (SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError,
            ZeroDivisionError, AttributeError, struct.error) as e:  # parsers on damaged files
        raise ValueError(f"{type(e).__name__}: {e}") from e


def may_pass(error):
    """Whether a file may be readable later: with the disk back, or once a package is installed."""
    return (getattr(error, "errno", None) is not None or "pip install" in str(error)
            or str(error).endswith("not available"))  # a decoder that this Pillow lacks


def _is_signed(image):
    return image.format == "TIFF" and image.tag_v2.get(339, (1,))[0] == 2  # SampleFormat


def _deep_grey(turned, image):
    """The same for integers that are signed or have more than 8 bits; `turned`: upright."""
    values, signed = np.asarray(turned), _is_signed(image)
    tags = image.tag_v2 if image.format == "TIFF" else {}
    bits = tags[258][0] if tags else 16  # BitsPerSample
    if bits == 8:
        values = values.view(np.int8)  # Pillow takes them for unsigned
    elif bits == 32 and not signed:
        values = values.view(np.uint32)  # and these for signed
    if values.min() < 0:
        raise ValueError("negative values: which of them is black is unknown")
    # 32-bit integers are mostly 16-bit values that NumPy or a viewer wrote.
    full = 65535 if bits == 32 and values.max() <= 65535 else 2**(bits - signed) - 1
    grey = values.astype(np.float32) / full
    return 1 - grey if tags.get(262) == 0 else grey  # WhiteIsZero


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


def may_be_dicom(suffix):
    """Whether archives hand out DICOM files with such a suffix: IM0001, or by UID, 1.2.840.4."""
    return not suffix or suffix[1:].isdigit()


def is_dicom(path):
    """Whether a file is called DICOM, or has no suffix (or a number for one) and begins like it."""
    suffix = os.path.splitext(path)[1].lower()
    if not may_be_dicom(suffix):
        return suffix in DICOM
    with open(path, "rb") as f:
        return f.read(132)[128:] == b"DICM"


def read_dicom(path):
    """The same for a DICOM file with one frame of one sample per pixel.

    Modality LUT or rescaling, VOI LUT or window, PresentationLUTShape, MONOCHROME1 and padding are
    followed (DICOM PS3.3, C.7.6.3.1 and C.11). Nothing else of the file is kept, and no message
    quotes its tags, as pydicom's own may.
    """
    pydicom = import_pydicom()
    try:
        dataset = pydicom.dcmread(path)
        _refuse(dataset)
        stored = _stored_values(dataset)
        grey = _display(pydicom.pixels, dataset, stored)
        padding = dataset.get("PixelPaddingValue")
        if padding is not None:
            low, high = sorted((padding, dataset.get("PixelPaddingRangeLimit", padding)))
            grey[(stored >= low) & (stored <= high)] = 0
        return grey.astype(np.float32)
    except pydicom.errors.InvalidDicomError as e:
        raise ValueError("no DICOM file") from e
    except AttributeError as e:  # of a dataset: a keyword of the standard that it lacks
        raise ValueError(f"damaged DICOM (no {e.name})") from e
    except (OSError, MemoryError):
        raise
    except Exception as e:
        if str(e).startswith("DICOM"):  # a message of ours
            raise
        raise ValueError(f"damaged DICOM ({type(e).__name__})") from e


def _refuse(dataset):
    """ValueError if a dataset is not one grey image that can be displayed as it says."""
    if "PixelData" not in dataset:
        raise ValueError("DICOM without an image: a report, a plan or an index")
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    if frames > 1:
        raise ValueError(f"DICOM of {frames} frames, not one image: export the frame you want")
    if dataset.Rows * dataset.Columns > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"DICOM of {dataset.Columns}x{dataset.Rows}: too many pixels")
    if dataset.get("SamplesPerPixel", 1) != 1 or dataset.PhotometricInterpretation not in (
            "MONOCHROME1", "MONOCHROME2"):
        raise ValueError("DICOM in colour: export it as grey")
    if dataset.get("PresentationLUTSequence"):
        raise ValueError("DICOM with a PresentationLUTSequence: export it as PNG")


def _stored_values(dataset):
    """Stored values [H, W]. Raises ValueError if nothing installed can decompress them."""
    try:
        return dataset.pixel_array
    except Exception as e:
        syntax = dataset.file_meta.TransferSyntaxUID
        if not syntax.is_compressed:
            raise
        raise ValueError(f"DICOM compressed as {syntax.name} cannot be read: pip install pylibjpeg "
                         "pylibjpeg-libjpeg pylibjpeg-openjpeg; if it stays, it is damaged") from e


def _display(pixels, dataset, stored):
    """Stored values as grey in [0, 1]; without a VOI the range is that of the stored bits.

    pixels: the module pydicom.pixels.
    """
    if dataset.get("ModalityLUTSequence"):
        values, ends = _look_up(dataset, dataset.ModalityLUTSequence[0], stored)
    else:
        values = pixels.apply_modality_lut(stored, dataset)  # RescaleSlope, RescaleIntercept
        low = -(2 ** (dataset.BitsStored - 1)) if dataset.PixelRepresentation == 1 else 0
        ends = pixels.apply_modality_lut(np.array([low, low + 2**dataset.BitsStored - 1]), dataset)
    if dataset.get("VOILUTSequence"):
        values, ends = _look_up(dataset, dataset.VOILUTSequence[0], values)
    elif float(np.atleast_1d(dataset.get("WindowWidth") or 0)[0]) > 0:
        with np.errstate(over="ignore"):  # in its sigmoid
            values = pixels.apply_voi_lut(values, dataset)  # black is ends[0], even if it is higher
    else:
        ends = sorted(ends)  # a negative slope turns them round
    grey = (values - float(ends[0])) / (float(ends[1]) - float(ends[0]))
    inverted = (dataset.PhotometricInterpretation == "MONOCHROME1"
                or dataset.get("PresentationLUTShape") == "INVERSE")
    return 1 - grey if inverted else grey


def _look_up(dataset, item, values):
    """(Values through the LUT of a sequence item, the ends of its range): DICOM PS3.3, C.11.1.1.1.

    Not by pydicom, which refuses tables with entries of 8 bits (or lets the index overflow).
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
    return table[index].astype(np.float64), (0, 2**bits - 1)
