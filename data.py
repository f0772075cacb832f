"""Chest radiographs from folders, decoded once into a cache; latents of an autoencoder in another.

DATA_ROOT/TASK/SPLIT/CLASS/**/*.png, with patient and study folders at any depth below a class, or
all images of a split in one folder (see FLAT_RULE). Without a data root: the phantom set.
"""
import collections
import dataclasses
import hashlib
import os
import pathlib
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from lib import cache, decode, dist, phantom
from lib.cache import DONE, TODO
from lib.files import fail, notice

HIDDEN = (".", "@eaDir", "__MACOSX")  # of systems, with thumbnails in them
MASKS = {"mask", "masks", "segmentation", "segmentations"}  # beside images, as COVID-19 sets have
FLAT_RULE = ("in a folder without class folders, names that begin with `TB.` are class tb, "
             "Montgomery's and Shenzhen's `..._1.png` are tb, and all others are normal")
BATCH = 64  # images that are worked on at once, so that a data set need not fit into memory


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
    folder: str  # ROOT/TASK/SPLIT, for messages
    files: list
    class_names: list
    flat: bool  # without class folders


def _entries(folder):
    """os.DirEntry objects of a folder, by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
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
            left_out["folder of masks"] += 1
        elif _is_folder(entry):
            found += _walk(entry.path, {*above, real}, left_out)
        elif (suffix in decode.EXTENSIONS or decode.may_be_dicom(suffix)
              or _is_broken_link(entry.path)):
            found.append(entry)
        else:
            left_out[f"*{suffix}"] += 1
    return found


def _flat_class(name):
    """Class of an image in a split without class folders; see FLAT_RULE."""
    published = re.fullmatch(r"(?:MCUCXR|CHNCXR)_[0-9]+_1\.\w+", name)
    return "tb" if name.startswith("TB.") or published else "normal"


def _split_files(folder, left_out):
    """([(entry, class name)], class names, whether it is flat) of one TASK/SPLIT folder."""
    entries = _entries(folder)
    class_folders = [e for e in entries if _is_folder(e) and not e.name.startswith(HIDDEN)]
    if not class_folders:
        files = [(entry, _flat_class(entry.name)) for entry in _walk(folder, set(), left_out)]
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
        stat = os.stat(entry.path)  # entry.stat() would keep it in memory
        size, mtime_ns = stat.st_size, stat.st_mtime_ns
    except OSError:
        size, mtime_ns = -1, 0
    return ImageFile(os.path.relpath(entry.path, root), name, size, mtime_ns)


def find_members(root, task, split):
    """Tasks whose SPLIT folders make up `split` of `task`, [] if there is no such split.

    ALL_CXR without such a folder joins all tasks. Exits with an error that names what is there if
    root or task is missing.
    """
    if not os.path.isdir(root):
        here = "" if os.path.isabs(root) else f" in {os.getcwd()}"
        fail(f"no folder --data_root={root}{here}")
    tasks = _subfolders(root)
    if task != "ALL_CXR" and task not in tasks or not tasks:
        fail(f"no task {task!r} in {root}; there: {', '.join(tasks) or 'no folders at all'}")
    candidates = [task] if task in tasks else tasks
    for member in candidates:
        _refuse_broken_link(os.path.join(root, member))
        _refuse_broken_link(os.path.join(root, member, split))
    members = [t for t in candidates if os.path.isdir(os.path.join(root, t, split))]
    if members and len(members) < len(candidates):
        missing = ", ".join(t for t in candidates if t not in members)
        notice(f"ALL_CXR: no split {split!r} in {missing}")
    return members


def _read_as(folders, class_names, where, flat):
    """{name of a class folder: class it is read as}, whatever its case and Unicode form.

    class_names: those of the training split; None: the folders are the classes.
    """
    known = {class_name(n).casefold(): n for n in reversed(class_names or folders)}
    known |= {name: name for name in class_names or ()}
    read_as = {}
    for name in folders:
        read_as[name] = known.get(name, known.get(class_name(name).casefold()))
        if read_as[name] is None:
            rule = f" ({FLAT_RULE})" if flat else ""
            fail(f"class {name!r} in {where}{rule} is not one of the training classes, "
                 f"{', '.join(class_names)}: rename the folder, or move it away")
        if name != read_as[name]:
            notice(f"{where}: {name!r} is read as class {read_as[name]!r}")
    return read_as


def scan(root, task, split, class_names=None):
    """Listing of DATA_ROOT/TASK/SPLIT, None if there is no such split. One stat per file.

    class_names: those of the training split, which every other split is read against by name;
    None: this is the training split. One notice counts by reason what is not read.
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
        fail(f"no images in {where} (looked for {' '.join(sorted(decode.EXTENSIONS))})")
    read_as = _read_as(sorted(set(folders)), class_names, where, flat)
    files = [_image_file(entry, read_as[name], root) for entry, name in found]
    names = sorted(set(read_as.values()))
    empty = sorted(set(names) - {f.class_name for f in files})
    if empty:
        message = f"no images of class {', '.join(empty)} in {where}"
        notice(message) if class_names else fail(message)
    return Listing(str(root), where, files, class_names or names, flat)


# --- images -------------------------------------------------------------------------------------

# Status of a row of decoded pixels, beside TODO (it could not be read now) and DONE.
DARK, FLAT = 2, 4  # no value over a quarter of the range; hardly two values
BAD, NOT_DICOM = 8, 16  # read, and no image; without a suffix, and no DICOM


@dataclasses.dataclass
class ImageSet:
    """Decoded images of one split."""

    cache: cache.CachedArray  # of all files
    rows: np.ndarray  # which rows of the cache belong to it
    labels: np.ndarray  # class index of each
    names: np.ndarray  # path of each below the data root, as bytes
    class_names: list
    key: str  # fingerprint of files and image size
    summary: list  # what describe_changes compares

    def __len__(self):
        return len(self.rows)

    @property
    def num_files(self):
        """Rows of the cache."""
        return len(self.cache.status)

    def images(self, indices):
        """float32 [B, 1, S, S] in [-1, 1]."""
        return to_float(self.cache.rows(self.rows[indices]))

    def name(self, index):
        """Path of one of them below the data root, as text that can be printed."""
        return _shown(os.fsdecode(self.names[index]))

    def subset(self, indices):
        """ImageSet of some of them."""
        return dataclasses.replace(self, rows=self.rows[indices], labels=self.labels[indices],
                                   names=self.names[indices])


def to_float(rows):
    """Decoded uint16 [B, S, S] as float32 [B, 1, S, S] in [-1, 1]."""
    return (torch.from_numpy(rows.astype(np.float32)) / 32767.5 - 1)[:, None]


def decode_some(paths, img_size, most):
    """Up to `most` of these image files, evenly chosen: float32 [N, 1, S, S] in [-1, 1]. Raises
    OSError or ValueError if one cannot be decoded."""
    index = np.linspace(0, len(paths) - 1, min(most, len(paths))).astype(int)
    return to_float(np.stack([decode.read_square(paths[i], img_size) for i in index]))


def batches(images):
    """All of an ImageSet, or of what is read like one, in order: float32 [B, 1, S, S]."""
    for start in range(0, len(images), BATCH):
        yield images.images(np.arange(start, min(start + BATCH, len(images))))


def image_root(args):
    """Folder that holds the images of the settings: --data_root, else that of the phantom set."""
    return args.data_root or phantom.phantom_root(args.output_root, args.img_size)


def adopt_settings(args, settings, what):
    """Take the image size of a model's settings and, without --data_root, its data root: what was
    trained on real images is not measured on phantoms by mistake. what: what to call the model."""
    if args.img_size not in (None, settings["img_size"]):
        fail(f"--img_size={args.img_size}, but {what} works at {settings['img_size']}: leave "
             "--img_size out")
    args.img_size = settings["img_size"]
    root = settings.get("data_root")
    if not args.data_root and root:
        args.data_root = root
        notice(f"no --data_root: using that of {what}, {root}")


def _no_split(root, task, split):
    tasks = _subfolders(root) if task == "ALL_CXR" else [task]
    splits = sorted({s for t in tasks for s in _subfolders(os.path.join(root, t))})
    return f"no split {split!r} for task {task} in {root}; there: {', '.join(splits) or 'none'}"


def check_folders(args):
    """Exit with an error if --data_root does not have the split of the task."""
    if args.data_root and not find_members(args.data_root, args.task, args.split):
        fail(_no_split(args.data_root, args.task, args.split))


def open_images(args, ctx, split, optional=False, class_names=None, train=None):
    """ImageSet of a split, decoded on first use into OUTPUT_ROOT/cache. All ranks must call it.

    args: the flags of args.add_data_arguments. class_names: the classes, if a model knows them;
    train: the training ImageSet, whose classes are the classes and whose images are left out here.
    Exits with an error that names the files that cannot be decoded, unless args.skip_bad_images.
    Returns None if the split is missing and `optional`.
    """
    if train is not None:
        class_names = train.class_names
    folder = pathlib.Path(args.output_root, "cache")
    # Rank 0 alone looks at the folders while the others wait for its list. They meet again when all
    # have decoded their share of what the cache lacks, and when rank 0 has judged the result.
    listing = ctx.on_main(lambda: _list_split(args, split, optional, class_names))
    if listing is None:
        return None
    key = fingerprint(listing, args.img_size)
    pixels = cache.cached_array(
        ctx, folder, f"images_{key[:16]}", (len(listing.files), args.img_size, args.img_size),
        np.uint16, _decoder(listing, args), f"decoding {listing.folder}")
    images = ctx.on_main(lambda: _image_set(listing, pixels, args, key, class_names is not None))
    if train is not None and len(images):
        images = _without_copies(images, train, folder, ctx, listing.folder)
    if len(images):
        return images
    message = f"no image is left in {listing.folder}"
    if not optional:
        ctx.on_main(lambda: fail(message))
    notice(f"{message}: validation is skipped")
    return None


def _list_split(args, split, optional, class_names):
    """Listing of a split whose classes are fit for training; None if it may be missing, and is."""
    root = image_root(args)
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
        rule = f" ({FLAT_RULE})" if listing.flat else ""
        fail(f"only one class, {names[0]!r}, in {listing.folder}{rule}; the model needs two to "
             "tell apart. Check the folders, or give --class_filter=0 to train on this class alone")
    return listing


def _decoder(listing, args):
    """make(indices) for cached_array: the pixels of these files, black if there are none."""
    pool = ThreadPoolExecutor(args.num_workers or dist.own_cores())

    def read(path):
        black = np.zeros((args.img_size, args.img_size), np.uint16)
        try:
            suffix = os.path.splitext(path)[1]
            if decode.may_be_dicom(suffix) and not decode.is_dicom(path):
                return black, DONE | NOT_DICOM
            pixels = decode.read_square(path, args.img_size)
        except (OSError, ValueError) as e:
            return black, TODO if decode.may_pass(e) else DONE | BAD
        low, high = int(pixels.min()), int(pixels.max())
        dark, flat = high < 65535 // 4, high - low < 655  # 1 % of the range
        return pixels, DONE | DARK * dark | FLAT * flat

    def make(indices):
        paths = [os.path.join(listing.root, listing.files[i].path) for i in indices]
        if any(path.lower().endswith(tuple(decode.DICOM)) for path in paths):
            decode.import_pydicom()  # one error, not one per file
        pixels, status = zip(*pool.map(read, paths), strict=True)
        return np.stack(pixels), np.array(status, np.uint8)
    return make


def _image_set(listing, pixels, args, key, classes_known):
    """ImageSet of the files that could be decoded and are of the chosen class; says what is odd
    about them. pixels: CachedArray."""
    status, where, count = pixels.status, listing.folder, len(listing.files)
    bad = (status == TODO) | (status & BAD > 0)
    not_dicom = status & NOT_DICOM > 0
    if bad.any():
        _refuse_or_notice(listing, np.flatnonzero(bad), status, args)
    for bit, what in ((DARK, "have no value over a quarter of their range. 12-bit values in 16-bit "
                             "files? Scale them up"),
                      (FLAT, "have no contrast at all: empty, or cut off by their window")):
        odd = [listing.files[i] for i in np.flatnonzero(status & bit)]
        if odd:
            classes = sorted(collections.Counter(file.class_name for file in odd).items())
            notice(f"{where}: {len(odd)} of {count} images "
                   f"({', '.join(f'{n} {name}' for name, n in classes)}), such as "
                   f"{_shown(odd[0].path)}, {what}")
    if not_dicom.any():
        notice(f"{where}: not read: {not_dicom.sum()} without a suffix")
    number = {name: i for i, name in enumerate(listing.class_names)}
    labels = np.array([number[file.class_name] for file in listing.files])
    readable = ~bad & ~not_dicom
    lost = [listing.class_names[c] for c in np.setdiff1d(labels, labels[readable])]
    if lost and args.class_filter < 0:
        message = f"no images of class {', '.join(sorted(lost))} are left in {where}"
        notice(message) if classes_known else fail(message)
    rows = np.flatnonzero(readable & ((labels == args.class_filter) | (args.class_filter < 0)))
    names = np.array([os.fsencode(listing.files[i].path) for i in rows])
    return ImageSet(pixels, rows, labels[rows], names, listing.class_names, key,
                    class_summary(listing))


def _refuse_or_notice(listing, bad, status, args):
    """Exit with an error that names files that cannot be decoded, or say that they are left out.

    Reasons are found again by decoding the files that are named; no start does so for files that
    --skip_bad_images left out before.
    """
    lines = []
    for i in bad[:20]:
        path = os.path.join(listing.root, listing.files[i].path)
        reason = "no image"
        if _is_broken_link(path):
            reason = "a link without a target"
        elif status[i] == TODO or not args.skip_bad_images:
            try:
                decode.read_square(path, args.img_size)
                reason = "it could not be read for a moment: start again"
            except (OSError, ValueError) as e:
                reason = str(e) or type(e).__name__
        lines.append(f"{_shown(listing.files[i].path)}: {reason}")
    names = _first_lines(lines, len(bad))
    if not args.skip_bad_images:
        fail(f"{len(bad)} of {len(listing.files)} images in {listing.folder} cannot be decoded; "
             f"repair or remove them, or leave them out with --skip_bad_images:{names}")
    notice(f"{len(bad)} images that cannot be decoded are left out:{names}")


def _first_lines(lines, count):
    """Up to twenty of `count` lines for the end of a message, and how many more there are."""
    more = [f"and {count - 20} more"] if count > 20 else []
    return "".join(f"\n  {line}" for line in lines[:20] + more)


def fingerprint(listing, img_size):
    """Hex digest of what a cache of images depends on: their names, sizes and times, and how they
    are decoded."""
    digest = hashlib.sha256(f"decoder 3 {img_size}".encode())
    for file in listing.files:
        digest.update(os.fsencode(file.path) + f" {file.size} {file.mtime_ns}\n".encode())
    return digest.hexdigest()


def class_summary(listing):
    """[[class name, number of files, digest of their names, sizes and times]]: to see what has
    changed between two starts of a run."""
    summary = []
    for name in listing.class_names:
        members = [f for f in listing.files if f.class_name == name]
        lines = sorted(f"{os.path.basename(f.path)} {f.size} {f.mtime_ns}" for f in members)
        text = "\n".join(lines).encode("utf-8", "surrogateescape")
        summary.append([name, len(members), hashlib.sha256(text).hexdigest()[:16]])
    return summary


def describe_changes(before, now):
    """What is different between two class_summary lists: one line per class that is."""
    old = {name: (count, digest) for name, count, digest in before}
    lines = []
    for name, count, digest in now:
        if name not in old:
            lines.append(f"class {name} is new, with {count} images")
        elif digest != old[name][1]:
            same = f"other files, as many as before ({count})"
            lines.append(f"class {name} has " + (same if count == old[name][0] else
                                                 f"{count} images, it had {old[name][0]}"))
    return lines + [f"class {name} is gone" for name in old if name not in {n for n, _, _ in now}]


def notice_changes(before, images, since):
    """Say what has changed since `since`; before: ImageSet.summary then, None if not known."""
    try:
        changes = describe_changes(before, images.summary) if before else []
    except (TypeError, ValueError):  # damaged: there is nothing to compare with
        changes = []
    if changes:
        notice(f"the training data have changed since {since}: {'; '.join(changes)}")


def count_classes(images):
    """'normal 53, tb 53' of an ImageSet."""
    names, labels = images.class_names, images.labels
    return ", ".join(f"{names[c]} {(labels == c).sum()}" for c in np.unique(labels))


def overfit_indices(labels, k):
    """k positions that take the classes in turn, first images first. Exits with an error if there
    are fewer."""
    if k > len(labels):
        fail(f"overfitting on {k} images, but there are only {len(labels)}")
    by_class = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    turns = [(turn, c, i) for c, members in enumerate(by_class) for turn, i in enumerate(members)]
    return np.array([i for _, _, i in sorted(turns)[:k]])


# --- copies between splits ----------------------------------------------------------------------

# Correlation of thumbnails. Of 920 images from two sites at 128 px, different ones reach at most
# 0.970; copies of half the size, of JPEG quality 30, with noise of 3 % or another gamma at least
# 0.995.
COPY_CORRELATION = 0.99
THUMBNAIL_SIZE = 32  # side in pixels


def thumbnails(x):
    """[N, 1024] of images [N, 1, H, W]: averaged down to 32 x 32, with mean 0 and length 1, so that
    the product of two is their correlation and exposure does not count."""
    rows = F.interpolate(x, THUMBNAIL_SIZE, mode="area").flatten(1)
    rows = rows - rows.mean(1, keepdim=True)
    return rows / rows.std(1, correction=0, keepdim=True).clamp_min(1e-6) / THUMBNAIL_SIZE


def _derived_array(images, folder, ctx, name, row_shape, label, batch_size, function, per_file=1):
    """CachedArray float32 [per_file num_files, *row_shape]: function(x, rows) of the decoded files
    of an ImageSet, x [B, 1, S, S]; row r is of file r % num_files. All ranks must call it.

    All files: a subset or one class shares the cache. A file that could not be read yet has no row.
    """
    def make(indices):
        parts = []
        for start in range(0, len(indices), batch_size):
            rows = indices[start:start + batch_size]
            parts.append(function(to_float(images.cache.rows(rows % images.num_files)), rows))
        return torch.cat(parts).numpy(), np.full(len(indices), DONE, np.uint8)

    return cache.cached_array(
        ctx, folder, name, (per_file * images.num_files, *row_shape), np.float32, make, label,
        np.tile(images.cache.status != TODO, per_file))


def cached_thumbnails(images, folder, ctx):
    """CachedArray float32 [num_files, 1024]: the thumbnails of all files of an ImageSet, made once
    by all ranks. rows(images.rows) are those of its own images."""
    return _derived_array(images, folder, ctx, f"thumbnails_{images.key[:16]}",
                          (THUMBNAIL_SIZE**2,), "making thumbnails", BATCH,
                          lambda x, rows: thumbnails(x))


def _without_copies(images, train, folder, ctx, where):
    """`images` without those that duplicate or nearly duplicate an image of `train` (rescaled,
    re-compressed), which one notice names. All ranks look for them together, once."""
    own, of_train = (cached_thumbnails(of, folder, ctx) for of in (images, train))

    def make(indices):
        mine = torch.from_numpy(own.rows(images.rows[indices]))
        best, nearest = torch.full((len(mine),), COPY_CORRELATION), torch.full((len(mine),), -1)
        for start in range(0, len(train), 1024):
            others = torch.from_numpy(of_train.rows(train.rows[start:start + 1024]))
            values, places = (mine @ others.T).max(1)
            better = values > best
            best[better], nearest[better] = values[better], places[better] + start
        return nearest.numpy(), np.full(len(indices), DONE, np.uint8)

    key = hashlib.sha256(f"copies 3 {images.key} {train.key} {COPY_CORRELATION}".encode())
    key.update(images.rows.tobytes() + train.rows.tobytes())
    originals = cache.cached_array(
        ctx, folder, f"copies_{key.hexdigest()[:16]}", (len(images),), np.int64, make,
        "looking for copies").rows(np.arange(len(images)))  # position in train, or -1
    copies = np.flatnonzero(originals >= 0)
    if len(copies) == 0:
        return images
    lines = [f"{images.name(i)} is {train.name(originals[i])}" for i in copies]
    notice(f"{len(copies)} images of {where} duplicate or nearly duplicate training images and are "
           f"excluded:{_first_lines(lines, len(lines))}")
    return images.subset(np.flatnonzero(originals < 0))


# --- latents ------------------------------------------------------------------------------------

# Most that augment changes: shift right and down as a fraction of the side, zoom, rotation in
# radians, contrast, brightness in grey from -1 to 1. Never a flip: that moves the heart.
AUG_RANGES = (0.06, 0.06, 0.08, 0.09, 0.1, 0.05)
AUG_DIM = len(AUG_RANGES)


def augment(x, augment_labels):
    """Images [B, 1, S, S] in [-1, 1], shifted, zoomed, rotated and with another exposure.

    augment_labels: [B, 6] in [-1, 1], as fractions of AUG_RANGES. What comes in at the edges is
    mirrored.
    """
    changes = augment_labels * augment_labels.new_tensor(AUG_RANGES)
    right, down, zoom, angle, contrast, brightness = changes.unbind(1)
    scale = 1 / (1 + zoom)
    rows = [torch.stack([scale * angle.cos(), scale * angle.sin(), -2 * right], 1),
            torch.stack([-scale * angle.sin(), scale * angle.cos(), -2 * down], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), x.shape, align_corners=False)
    x = F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    black = (x + 1) * (1 + contrast)[:, None, None, None] - 1
    return (black + brightness[:, None, None, None]).clamp(-1, 1)


class LatentSet:
    """Posterior means and log-variances of an ImageSet, from the cache or encoded on the fly.

    Each image has variants 0 to num_augmented: 0 is the image itself, the others are augmented.
    """

    def __init__(self, images, vae, vae_sha256, folder, ctx, use_cache=True, batch_size=16,
                 num_augmented=0):
        """vae: AutoencoderKL on ctx.device. The cache is keyed by VAE, data, image size and
        augmentation, shared by all runs below `folder`, and made by all ranks."""
        self.images, self.vae, self.ctx = images, vae, ctx
        self.cache = self.resident = None
        # For all files: a subset or one class shares the cache. Variant v of file f is row
        # v num_files + f.
        num_files = images.num_files
        rng = ctx.generator("augment", images.key)
        labels = torch.rand(num_augmented * num_files, AUG_DIM, generator=rng) * 2 - 1
        self.labels = torch.cat([torch.zeros(num_files, AUG_DIM), labels])
        if not use_cache:
            return
        text = f"{vae_sha256} {images.key}"
        if num_augmented:
            text += f" {num_augmented} {AUG_RANGES}"
        key = hashlib.sha256(text.encode()).hexdigest()
        self.cache = _derived_array(
            images, folder, ctx, f"latents_{key[:16]}", (2, *vae.latent_shape),
            "encoding latents", batch_size,
            lambda x, rows: torch.stack(self._encode(self._augmented(x, rows)), 1).cpu(),
            num_augmented + 1)
        if ctx.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(ctx.device)
            own = np.concatenate([images.rows + v * num_files for v in range(num_augmented + 1)])
            if len(own) * 4 * 2 * np.prod(vae.latent_shape) < 0.1 * free:
                self.resident = torch.from_numpy(self.cache.rows(own)).to(ctx.device)

    def _augmented(self, x, rows):
        """Images x [B, 1, S, S] as the variants of these rows; variant 0 stays as it is."""
        changed = torch.from_numpy(rows >= self.images.num_files)
        if changed.any():
            x = x.clone()
            x[changed] = augment(x[changed], self.labels[torch.from_numpy(rows)[changed]])
        return x

    @torch.no_grad()
    def _encode(self, x):
        # In float32 and without autocast, so that cached and fresh latents are the same.
        return self.vae.encode(x.to(self.ctx.device))

    def _rows(self, indices, variants):
        return self.images.rows[indices] + variants * self.images.num_files

    def posterior(self, indices, variants=0):
        """(mean, logvar), each float32 [B, C, h, w] on the device. variants [B]: of each image."""
        if self.resident is not None:
            index = torch.from_numpy(indices + variants * len(self.images))
            both = self.resident[self.ctx.to_device(index)]
        elif self.cache is not None:
            rows = self.cache.rows(self._rows(indices, variants))
            both = self.ctx.to_device(torch.from_numpy(rows))
        else:
            x = self._augmented(self.images.images(indices), self._rows(indices, variants))
            return tuple(self._encode(x))
        return both[:, 0], both[:, 1]

    def augment_labels(self, indices, variants):
        """float32 [B, 6] on the device: see augment; zeros for variant 0."""
        labels = self.labels[torch.from_numpy(self._rows(indices, variants))]
        return self.ctx.to_device(labels)
