"""Chest radiographs from folders, decoded once into a cache; latents of an autoencoder in another.

DATA_ROOT/TASK/SPLIT/CLASS/**/*.png, with patient and study folders at any depth below a class, or
all images of a split in one folder: names that begin with `TB.` are class tb, all others normal.
Without a data root: the phantom set.
"""
import collections
import dataclasses
import hashlib
import os
import pathlib
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

from lib import cache, decode, dist, phantom
from lib.cache import DONE, TODO
from lib.files import command_line, fail, notice

# Folders of patients, studies and archives, as CheXpert, MIMIC and NIH have them.
NO_CLASS = re.compile(r"(patient|subject|case|study|images)[ _-]?\d+|[ps]?\d{2,}", re.IGNORECASE)
MOST_CLASSES = 20

# --- folders ------------------------------------------------------------------------------------

# path: below the data root. size -1: such as a link without a target.
ImageFile = collections.namedtuple("ImageFile", "path class_name size mtime_ns")
# The images of one split. folder: ROOT/TASK/SPLIT, for messages.
Listing = collections.namedtuple("Listing", "root folder files class_names")


def _subfolders(folder):
    """Names of the folders in a folder, and of links without a target or suffix in their place."""
    _, folders, names = next(os.walk(folder, onerror=fail))
    folders += [name for name in names if not os.path.splitext(name)[1]
                and not os.path.exists(os.path.join(folder, name))]
    return sorted(name for name in folders if not decode.IGNORED.match(name))


def find_split(root, task, split):
    """(Folders TASK/SPLIT below `root`, {task: its splits}), both empty if there is no such root or
    task. ALL_CXR without a folder of its own joins all tasks."""
    tasks = _subfolders(root) if os.path.isdir(root) else []
    members = [task] if task in tasks else tasks if task == "ALL_CXR" else []
    splits = {member: _subfolders(os.path.join(root, member)) for member in members}
    names = ("val", "valid", "validation") if split == "val" else (split,)
    return [f"{member}/{name}" for member in members for name in names
            if name in splits[member]], splits


def split_folders(root, task, split, optional=False):
    """Folders TASK/SPLIT below `root`; see find_split. Exits with an error that names what is there
    if there are none, unless the split is `optional`."""
    if not os.path.isdir(root):
        fail(f"no folder --data_root={os.path.abspath(root)}")
    found, splits = find_split(root, task, split)
    if not splits:
        fail(f"no task {task!r} in {root}; there: {', '.join(_subfolders(root)) or 'no folder'}")
    if not found:
        there = ", ".join(sorted(set().union(*splits.values()))) or "none"
        message = f"no split {split!r} for task {task} in {root}; there: {there}"
        if not optional:
            fail(f"{message}. To make it: {_prepare_line(root, task)}")
        notice(f"{message}. Validation is skipped: for it, make or rename one to val")
    elif len(found) < len(splits):
        notice(f"ALL_CXR: split {split!r} is in {', '.join(found)} alone")
    return found


def _prepare_line(root, *folders):
    """The command that makes class folders of the images in a folder, by the CSV beside it."""
    labels = {"class_pattern": "_([01]).png"}
    for n in range(len(folders) + 1):
        for table in pathlib.Path(root, *folders[:n]).glob("*.csv*"):
            labels = {"csv": table, "file_column": "FILE", "patient_column": "PATIENT",
                      "label_column": "LABEL"}
    return command_line("prepare.py", images=os.path.join(root, *folders), **labels,
                        classes="normal=0,tb=1", out=os.path.join(root, f"{folders[0]}_classes"))


def scan(root, task, split, class_names=None, optional=False, class_filter=0):
    """Listing of DATA_ROOT/TASK/SPLIT, by name; None if it is `optional` and missing. One stat per
    file; one notice counts what is not read. class_names: those of the training split, which other
    splits are read against; None: this is it. class_filter: -1 if several classes are needed."""
    folders = split_folders(root, task, split, optional)
    if not folders:
        return None
    where = os.path.join(root, folders[0] if len(folders) == 1 else f"{task}/{split}")
    left_out, files, counts = collections.Counter(), [], collections.Counter()
    for folder in folders:
        top = os.path.join(root, folder)
        classes = _subfolders(top)
        counts.update(dict.fromkeys(classes, 0))
        for path in decode.find_images(top, left_out):
            if classes and path[0] not in classes:
                left_out["beside the class folders"] += 1
                continue
            if decode.LATERAL.search("/".join(path[1:] or path)):
                left_out["lateral views"] += 1
                continue
            flat = "tb" if path[0].startswith("TB.") else "normal"
            name = path[0] if classes else flat
            counts[name] += 1
            try:
                stat = os.stat(os.path.join(top, *path))
                size, mtime_ns = stat.st_size, stat.st_mtime_ns
            except OSError:  # a link without a target, or back to a folder above it
                size, mtime_ns = -1, 0
            files.append(ImageFile("/".join((folder, *path)), name, size, mtime_ns))
    if left_out:
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(left_out.items()))
        notice(f"{where}: not read: {reasons}")
    if not files:
        fail(f"no images in {where} (looked for {' '.join(sorted(decode.EXTENSIONS))})")
    if class_names is None:
        class_names, several = sorted(counts), len(counts) > 1 or class_filter >= 0
        if (not several or len(counts) > MOST_CLASSES or not all(counts.values())
                or len(counts) > 4 and sorted(counts.values())[len(counts) // 2] < 2
                or any(map(NO_CLASS.fullmatch, counts))):
            some = ", ".join(f"{name} {counts[name]}" for name in class_names[:5])
            fail(f"{len(counts)} folders in {where} (images: {some}) do not look like classes; 2 "
                 f"to {MOST_CLASSES} are needed, or --class_filter=0 for one. Mend them, or type: "
                 f"{_prepare_line(root, *folders[0].split('/'))}")
    elif split in class_names:
        fail(f"{where} is the folder of a class: give {os.path.dirname(where)}")
    if unknown := sorted(name for name in +counts if name not in class_names):
        fail(f"class {unknown[0]!r} in {where} is not one of the training classes, "
             f"{', '.join(class_names)}: rename the folder, or move it away")
    if class_filter >= len(class_names):
        fail(f"--class_filter={class_filter}, but classes are {dict(enumerate(class_names))}")
    return Listing(str(root), where, files, class_names)


def check_folders(args):
    """Exit with an error if --data_root does not have the split of the task."""
    if args.data_root:
        split_folders(args.data_root, args.task, args.split)


# --- images -------------------------------------------------------------------------------------

DARK = 2  # status of decoded pixels, beside DONE: no value over a quarter of the range


@dataclasses.dataclass
class ImageSet:
    """Decoded images of one split."""

    cache: cache.CachedArray  # of all files
    rows: np.ndarray  # which rows of the cache belong to it
    labels: np.ndarray  # class index of each
    names: np.ndarray  # path of each below the data root
    class_names: list
    key: str  # fingerprint of files and image size
    summary: list  # what notice_changes compares

    def __len__(self):
        return len(self.rows)

    def images(self, indices):
        """float32 [B, 1, S, S] in [-1, 1]."""
        return to_float(self.cache.rows(self.rows[indices]))

    def subset(self, indices):
        """ImageSet of some of them."""
        return dataclasses.replace(self, rows=self.rows[indices], labels=self.labels[indices],
                                   names=self.names[indices])


def to_float(rows):
    """Decoded uint16 [B, S, S] as float32 [B, 1, S, S] in [-1, 1]."""
    return (torch.from_numpy(rows.astype(np.float32)) / 32767.5 - 1)[:, None]


def read_image(path, img_size=None):
    """An image file as decode.read_square has it, float32 [1, 1, S, S] in [-1, 1]; ends the program
    if it cannot be decoded."""
    try:
        return to_float(decode.read_square(path, img_size)[None])
    except (OSError, ValueError) as e:
        fail(f"{path} cannot be decoded ({e}): mend it, or leave it out")


def spread(total, count):
    """Up to `count` positions from 0 to total - 1, spread evenly."""
    return np.linspace(0, total - 1, min(total, count)).astype(int)


def image_root(args):
    """Folder that holds the images of the settings: --data_root, else that of the phantom set."""
    return args.data_root or phantom.phantom_root(args.output_root, args.img_size)


def adopt_settings(args, settings, what):
    """Take the image size of a model's settings and, without --data_root, its data root: what was
    trained on real images is not measured on phantoms by mistake. what: what to call the model."""
    if args.img_size not in (None, settings["img_size"]):
        fail(f"{what} works at {settings['img_size']} pixels: leave --img_size out")
    args.img_size = settings["img_size"]
    if not args.data_root and settings.get("data_root"):
        args.data_root = settings["data_root"]
        notice(f"no --data_root: using that of {what}, {args.data_root}")


def open_images(args, ctx, split, optional=False, class_names=None, train=None):
    """ImageSet of a split, decoded on first use into OUTPUT_ROOT/cache; None if it is `optional`
    and missing. All ranks must call it. class_names: the classes, if a model knows them; train: the
    training ImageSet, whose classes are the classes and whose images are left out here."""
    if train is not None:
        class_names = train.class_names
    folder = pathlib.Path(args.output_root, "cache")
    # Rank 0 alone looks at the folders while the others wait for its list. They meet again when all
    # have decoded their share of what the cache lacks, and when rank 0 has judged the result.
    listing = ctx.on_main(lambda: scan(image_root(args), args.task, split, class_names, optional,
                                       args.class_filter))
    if listing is None:
        return None
    pool = ThreadPoolExecutor(args.num_workers or dist.own_cores())
    reasons = {}  # why this rank could not decode a file, by its index

    def read(index):
        path = os.path.join(listing.root, listing.files[index].path)
        try:
            pixels = decode.read_square(path, args.img_size)
        except (OSError, ValueError) as e:
            reasons[index] = getattr(e, "strerror", None) or str(e)
            return np.zeros((args.img_size, args.img_size), np.uint16), TODO
        return pixels, DONE | DARK * int(pixels.max() < 65535 // 4)

    def make(indices):
        pixels, status = zip(*pool.map(read, indices), strict=True)
        return np.stack(pixels), np.array(status, np.uint8)

    digest = hashlib.sha256(f"decoder 4 {args.img_size}".encode())
    for file in listing.files:
        digest.update(os.fsencode(file.path) + f" {file.size} {file.mtime_ns}\n".encode())
    key = digest.hexdigest()
    pixels = cache.cached_array(
        ctx, folder, f"images_{key[:16]}", (len(listing.files), args.img_size, args.img_size),
        np.uint16, make, f"decoding {listing.folder}")
    reasons = collections.ChainMap(*ctx.gather_objects(reasons))
    images = ctx.on_main(lambda: _image_set(listing, pixels, args, key, reasons))
    if train is not None and len(images):
        images = _without_copies(images, train, folder, ctx, listing.folder)
    lost = [name for c, name in enumerate(listing.class_names)
            if c not in images.labels and args.class_filter in (-1, c)]
    if lost and (class_names is None or not len(images)):
        ctx.on_main(lambda: fail(f"no images of class {', '.join(lost)} are left in "
                                 f"{listing.folder}: add some, or move it away"))
    return images


def _image_set(listing, pixels, args, key, reasons):
    """ImageSet of the files that could be decoded and are of the chosen class; names those that
    could not, and ends the program for them unless args.skip_bad_images. pixels: CachedArray."""
    bad, dark = pixels.status == TODO, pixels.status & DARK > 0
    names = np.array([file.path for file in listing.files], object)
    counted = f"of {len(names)} images in {listing.folder}"
    if bad.any():
        lines = "".join(f"\n  {names[i]}: {reasons.get(i, 'no image')}"
                        for i in np.flatnonzero(bad)[:20])
        if not args.skip_bad_images:
            fail(f"{bad.sum()} {counted} cannot be decoded; repair or remove them, or leave them "
                 f"out with --skip_bad_images:{lines}")
        notice(f"{bad.sum()} {counted} cannot be decoded and are left out:{lines}")
    if dark.any():
        notice(f"{dark.sum()} {counted}, such as {names[dark][0]}, have no value over a quarter of "
               "their range. 12-bit values in 16-bit files? Scale them up")
    labels = np.array([listing.class_names.index(file.class_name) for file in listing.files])
    rows = np.flatnonzero(~bad & ((labels == args.class_filter) | (args.class_filter < 0)))
    return ImageSet(pixels, rows, labels[rows], names[rows], listing.class_names, key,
                    class_summary(listing))


def class_summary(listing):
    """[[class name, number of files, digest of their names, sizes and times]]: to see what has
    changed between two starts of a run."""
    lines = {name: [] for name in listing.class_names}
    for f in listing.files:
        lines[f.class_name].append(f"{os.path.basename(f.path)} {f.size} {f.mtime_ns}")
    digests = {name: hashlib.sha256(os.fsencode("\n".join(sorted(lines[name])))) for name in lines}
    return [[name, len(lines[name]), digests[name].hexdigest()[:16]] for name in lines]


def count_files(summary):
    """'normal 53, tb 53' of an ImageSet.summary."""
    return ", ".join(f"{name} {count}" for name, count, _ in summary)


def notice_changes(before, images, since):
    """Say what has changed since `since`; before: ImageSet.summary then, None if not known."""
    if before and before != images.summary:
        notice(f"the training data (names, sizes, times) have changed since {since}: then "
               f"{count_files(before)}, now {count_files(images.summary)}")


def overfit_indices(labels, k):
    """k positions that take the classes in turn, first images first. Exits with an error if there
    are fewer."""
    if k > len(labels):
        fail(f"overfitting on {k} images, but there are only {len(labels)}")
    by_class = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    turns = [(turn, c, i) for c, members in enumerate(by_class) for turn, i in enumerate(members)]
    return np.array([i for _, _, i in sorted(turns)[:k]])


# --- copies between splits ----------------------------------------------------------------------

COPY_CORRELATION = 0.99  # of thumbnails: different images reach 0.970, copies 0.995 (docs/data.md)
THUMBNAIL_SIZE = 32  # side in pixels


def thumbnails(x):
    """[N, 1024] of images [N, 1, H, W]: averaged down to 32 x 32, with mean 0 and length 1, so that
    the product of two is their correlation and exposure does not count."""
    rows = F.interpolate(x, THUMBNAIL_SIZE, mode="area").flatten(1)
    rows = rows - rows.mean(1, keepdim=True)
    return rows / rows.std(1, correction=0, keepdim=True).clamp_min(1e-6) / THUMBNAIL_SIZE


def _derived_array(images, folder, ctx, name, row_shape, label, function, per_file=1):
    """CachedArray float32 [per_file num_files, *row_shape]: function(x, rows) of the decoded files
    of an ImageSet, x [B, 1, S, S]; row r is of file r % num_files. All ranks must call it. Of all
    files, so that subsets share the cache; the row of one that could not be read stays TODO."""
    num_files = len(images.cache.status)

    def make(indices):
        x = to_float(images.cache.rows(indices % num_files))
        read = images.cache.status[indices % num_files] != TODO
        return function(x, indices).numpy(), DONE * read

    return cache.cached_array(
        ctx, folder, name, (per_file * num_files, *row_shape), np.float32, make, label)


def cached_thumbnails(images, folder, ctx):
    """CachedArray float32 [num_files, 1024] of all files of an ImageSet; rows(images.rows) are
    those of its own images. All ranks must call it."""
    return _derived_array(images, folder, ctx, f"thumbnails_{images.key[:16]}",
                          (THUMBNAIL_SIZE**2,), "making thumbnails", lambda x, _: thumbnails(x))


def _without_copies(images, train, folder, ctx, where):
    """`images` without those that duplicate or nearly duplicate an image of `train` (rescaled,
    re-compressed), which one notice names. All ranks look for them together, once."""
    own, of_train = (cached_thumbnails(of, folder, ctx) for of in (images, train))

    def make(indices):
        mine, others = own.rows(images.rows[indices]), of_train.rows(train.rows)
        values, nearest = (torch.from_numpy(mine) @ torch.from_numpy(others).T).max(1)
        return nearest.where(values > COPY_CORRELATION, -1).numpy(), DONE

    key = hashlib.sha256(f"copies 3 {images.key} {train.key} {COPY_CORRELATION}".encode())
    key.update(images.rows.tobytes() + train.rows.tobytes())
    originals = cache.cached_array(
        ctx, folder, f"copies_{key.hexdigest()[:16]}", (len(images),), np.int64, make,
        "looking for copies").rows(np.arange(len(images)))  # position in train, or -1
    copies = np.flatnonzero(originals >= 0)
    if len(copies):
        lines = "".join(f"\n  {images.names[i]} is {train.names[originals[i]]}"
                        for i in copies[:20])
        notice(f"{len(copies)} images of {where} duplicate or nearly duplicate training images and "
               f"are excluded:{lines}")
    return images.subset(np.flatnonzero(originals < 0))


# --- latents ------------------------------------------------------------------------------------

# Most that augment changes: shift right and down as a fraction of the side, zoom, rotation in
# radians, contrast, brightness in grey from -1 to 1. Never a flip: that moves the heart.
AUG_RANGES = (0.06, 0.06, 0.08, 0.09, 0.1, 0.05)
AUG_DIM = len(AUG_RANGES)


def augment(x, augment_labels):
    """Images [B, 1, S, S] in [-1, 1], shifted, zoomed, rotated and with another exposure; what
    comes in at the edges is mirrored. augment_labels: [B, 6] in [-1, 1], of AUG_RANGES."""
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
    """Posterior means and log-variances of an ImageSet, from the cache or encoded on the fly. Each
    image has variants 0 to num_augmented: 0 is the image itself, the others are augmented."""

    def __init__(self, images, vae, vae_sha256, folder, ctx, use_cache=True, num_augmented=0):
        """vae: AutoencoderKL on ctx.device. The cache is keyed by VAE, data, image size and
        augmentation, shared by all runs below `folder`, and made by all ranks."""
        self.images, self.vae, self.ctx = images, vae, ctx
        self.cache = self.resident = None
        # Of all files, as the cache: variant v of file f is row v num_files + f.
        self.num_files = len(images.cache.status)
        rng = ctx.generator("augment", images.key)
        labels = torch.rand(num_augmented * self.num_files, AUG_DIM, generator=rng) * 2 - 1
        self.labels = F.pad(labels, (0, 0, self.num_files, 0))
        if not use_cache:
            return
        text = f"{vae_sha256} {images.key}"
        if num_augmented:
            text += f" {num_augmented} {AUG_RANGES}"
        key = hashlib.sha256(text.encode()).hexdigest()
        self.cache = _derived_array(
            images, folder, ctx, f"latents_{key[:16]}", (2, *vae.latent_shape),
            "encoding latents", lambda x, rows: self._encode(x, rows).cpu(), num_augmented + 1)
        if ctx.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(ctx.device)
            if os.path.getsize(self.cache.path) < 0.1 * free:
                self.resident = torch.from_numpy(self.cache.rows(slice(None))).to(ctx.device)

    @torch.no_grad()
    def _encode(self, x, rows):
        """Mean and log-variance, float32 [B, 2, C, h, w], of images x [B, 1, S, S] once they are
        the variants of these rows."""
        changed = torch.from_numpy(rows >= self.num_files)
        if changed.any():
            x[changed] = augment(x[changed], self.labels[torch.from_numpy(rows)[changed]])
        return torch.cat([torch.stack(self.vae.encode(part.to(self.ctx.device)), 1)
                          for part in x.split(16)])

    def posterior(self, indices, variants=0):
        """(mean, logvar), each float32 [B, C, h, w] on the device. variants [B]: of each image."""
        rows = self.images.rows[indices] + variants * self.num_files
        if self.resident is not None:
            both = self.resident[self.ctx.to_device(torch.from_numpy(rows))]
        elif self.cache is not None:
            both = self.ctx.to_device(torch.from_numpy(self.cache.rows(rows)))
        else:
            both = self._encode(self.images.images(indices), rows)
        return both[:, 0], both[:, 1]

    def augment_labels(self, indices, variants):
        """float32 [B, 6] on the device: see augment; zeros for variant 0."""
        rows = self.images.rows[indices] + variants * self.num_files
        return self.ctx.to_device(self.labels[torch.from_numpy(rows)])
