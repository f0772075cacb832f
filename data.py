"""Chest radiographs from folders, decoded once into a cache; latents of an autoencoder in another.

DATA_ROOT/TASK/SPLIT/CLASS/*.png, or names that begin with `TB.` beside others in one folder.
Without a data root the phantom set of phantom.py stands in.
"""
import dataclasses
import hashlib
import json
import os
import pathlib
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import experiment
import phantom
from experiment import fail, notice

# For Pillow an image of up to 179 megapixels is only worth a warning.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif"}


# --- folders ------------------------------------------------------------------------------------


class Listing(NamedTuple):
    """The image files of one split: paths below root, and a class index for each."""

    root: pathlib.Path
    paths: list
    labels: list
    class_names: list


def _image_files(folder):
    return sorted(p for p in folder.iterdir()
                  if p.suffix.lower() in EXTENSIONS and p.is_file() and not p.name.startswith("."))


def _subfolders(folder):
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _split_files(folder):
    """[(path, class name)] of one TASK/SPLIT folder, and its class names."""
    class_folders = _subfolders(folder)
    if class_folders:
        files = [(path, c.name) for c in class_folders for path in _image_files(c)]
        return files, [c.name for c in class_folders]
    files = [(path, "tb" if path.name.startswith("TB.") else "normal")
             for path in _image_files(folder)]
    return files, sorted({name for _, name in files})


def scan(root, task, split, optional=False):
    """Listing of DATA_ROOT/TASK/SPLIT; task ALL_CXR without such a folder joins all tasks.

    Ends the program, naming what is there, where root, task or split is missing; with `optional`, a
    missing split is None.
    """
    root = pathlib.Path(root)
    if not root.is_dir():
        fail(f"no folder --data_root={root}")
    tasks = [p.name for p in _subfolders(root)]
    if task in tasks:
        members = [task]
    elif task == "ALL_CXR" and tasks:
        members = [t for t in tasks if (root / t / split).is_dir()]
    else:
        fail(f"no task {task!r} in {root}; there: {', '.join(tasks) or 'no folders at all'}")
    if not members or not (root / members[0] / split).is_dir():
        if optional:
            return None
        asked = tasks if task == "ALL_CXR" else [task]
        splits = sorted({p.name for t in asked for p in _subfolders(root / t)})
        fail(f"no split {split!r} for task {task} in {root}; there: {', '.join(splits) or 'none'}")
    files, names = [], set()
    for member in members:
        member_files, member_names = _split_files(root / member / split)
        files += member_files
        names |= set(member_names)
    class_names = sorted(names)
    if not files:
        looked_for = " ".join(sorted(EXTENSIONS))
        fail(f"no images in {root}/{task}/{split} (looked for {looked_for})")
    labels = [class_names.index(name) for _, name in files]
    empty = [name for i, name in enumerate(class_names) if i not in labels]
    if empty:
        fail(f"no images of class {', '.join(empty)} in {root}/{task}/{split}")
    return Listing(root, [path for path, _ in files], labels, class_names)


# --- decoding -----------------------------------------------------------------------------------


def decode(path, img_size):
    """One image file as uint16 [img_size, img_size], 0 black to 65535 white.

    8-bit and 16-bit grey keep their full range, colour becomes luma, transparency becomes black.
    The centre square is cut out and resized (box filter down, bicubic up), which keeps the aspect
    ratio. Raises ValueError or OSError for what cannot be decoded, decompression bombs included.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode.startswith("I"):
                grey = np.asarray(image).astype(np.float32)
                if grey.min() < 0 or grey.max() > 65535:
                    raise ValueError("32-bit values, not an 8-bit or 16-bit image")
                grey /= 65535
            elif image.mode == "F":
                raise ValueError("floating-point image, its black and white are unknown")
            else:
                if image.has_transparency_data:
                    image = image.convert("RGBA")
                    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
                    image = Image.alpha_composite(black, image)
                if image.mode != "L":
                    image = image.convert("RGB").convert("L")
                grey = np.asarray(image, dtype=np.float32) / 255
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise ValueError(f"too many pixels: {e}") from e
    except (SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError, MemoryError,
            ZeroDivisionError) as e:  # what Pillow's parsers raise on damaged files
        raise ValueError(f"{type(e).__name__}: {e}") from e
    height, width = grey.shape
    side = min(height, width)
    if side < 8:
        raise ValueError(f"{width}x{height} pixels are too few")
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(grey[top:top + side, left:left + side])
    if side != img_size:
        method = Image.Resampling.BOX if side > img_size else Image.Resampling.BICUBIC
        square = square.resize((img_size, img_size), method)
    return (np.asarray(square).clip(0, 1) * 65535 + 0.5).astype(np.uint16)


def to_float(rows):
    """What `decode` made, uint16 [B, S, S], as float32 [B, 1, S, S] in [-1, 1]."""
    return (torch.from_numpy(rows.astype(np.float32)) / 32767.5 - 1)[:, None]


# --- caches -------------------------------------------------------------------------------------


class CachedArray(NamedTuple):
    """Rows in a .npy file. They are read through a map that lives for one call, so that memory
    stays flat."""

    path: str
    shape: tuple
    meta: dict

    def rows(self, indices):
        """Copy of some rows."""
        return np.asarray(np.lib.format.open_memmap(self.path, "r")[indices])


def _open_cached(path, shape, dtype):
    """CachedArray at `path`, without reading its rows; ValueError and others if it is not whole."""
    stored = json.loads(path.with_suffix(".json").read_text())
    array = np.lib.format.open_memmap(path, mode="r")
    if not array.shape == tuple(stored["shape"]) == shape or array.dtype != dtype:
        raise ValueError(f"holds {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}")
    if array.offset + array.nbytes != path.stat().st_size:
        raise ValueError("has another size than its header says")
    return CachedArray(str(path), shape, dict(stored["meta"]))


def cached_array(folder, name, shape, dtype, blocks):
    """CachedArray `name` of this shape and dtype in `folder`, built where it is missing or damaged.

    blocks(meta) yields arrays [n, ...] that add up to shape[0] rows, and may fill the dict `meta`
    with JSON values. The file NAME.json is put in place last: where it is, NAME.npy is whole,
    whoever was killed and however many build at once.
    """
    path = pathlib.Path(folder, f"{name}.npy")
    if path.with_suffix(".json").exists():
        try:
            return _open_cached(path, shape, dtype)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
            notice(f"cache {path} is damaged ({experiment.first_line(e)}): building it again")
    experiment.make_folder(folder)
    for stale in path.parent.glob(f".{name}*.tmp"):
        if time.time() - stale.stat().st_mtime > 86400:  # left by a process that was killed
            stale.unlink(missing_ok=True)
    meta = {}

    def write(f):
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False,
                  "shape": shape}
        np.lib.format.write_array_header_1_0(f, header)
        for block in blocks(meta):
            f.write(np.ascontiguousarray(block, dtype).data)

    experiment.write_atomic(path, write)
    try:
        experiment.write_json(path.with_suffix(".json"), {"shape": shape, "meta": meta})
    except BaseException:
        path.unlink(missing_ok=True)  # on a full disk it would be in the way
        raise
    return _open_cached(path, shape, dtype)


# --- images -------------------------------------------------------------------------------------


@dataclasses.dataclass
class ImageSet:
    """Decoded images of one split."""

    cache: CachedArray
    rows: np.ndarray  # which rows of the cache belong to it
    labels: np.ndarray  # class index of each
    class_names: list
    key: str  # fingerprint of files and image size

    def __len__(self):
        return len(self.rows)

    def images(self, indices):
        """float32 [B, 1, S, S] in [-1, 1]."""
        return to_float(self.cache.rows(self.rows[indices]))

    def subset(self, indices):
        """ImageSet of some of them."""
        return dataclasses.replace(self, rows=self.rows[indices], labels=self.labels[indices])


def open_images(args, procs, split, optional=False):
    """ImageSet of a split, decoded on first use into OUTPUT_ROOT/cache.

    args: the flags of args.add_data_arguments. With `optional`, a missing split is None. Ends the
    program, naming all files that cannot be decoded, unless args.skip_bad_images. Rank 0 alone
    looks at files, and of a cache that is there it reads no row.
    """
    return experiment.on_main(procs, lambda: _open_images(args, procs, split, optional))


def _open_images(args, procs, split, optional):
    root = args.data_root or phantom.phantom_root(args.output_root, args.img_size)
    where = f"{root}/{args.task}/{split}"
    listing = scan(root, args.task, split, optional)
    if listing is None:
        notice(f"no split {split!r} for task {args.task} in {root}: validation is skipped")
        return None
    names = listing.class_names
    if args.class_filter >= len(names):
        if optional:
            notice(f"no class {args.class_filter} in {where}: validation is skipped")
            return None
        there = ", ".join(f"{i} = {n}" for i, n in enumerate(names))
        fail(f"--class_filter={args.class_filter}, but the classes are {there}")
    if len(names) == 1 and args.class_filter != 0 and not optional:
        fail(f"only one class, {names[0]!r}, in {where}; the model needs two to tell apart. Check "
             "the folders, or give --class_filter=0 to train on this class alone")
    key = fingerprint(listing, args.img_size)
    shape = (len(listing.paths), args.img_size, args.img_size)
    cache = cached_array(pathlib.Path(args.output_root, "cache"), f"images_{key[:16]}", shape,
                         np.uint16, lambda meta: _decode_all(listing, args, procs, where, meta))
    bad = cache.meta.get("bad", [])
    if bad:
        _refuse_or_notice(bad, len(listing.paths), args.skip_bad_images, where)
    labels = np.array(listing.labels)
    keep = (labels == args.class_filter) | (args.class_filter < 0)
    keep[[position for position, _, _ in bad]] = False
    rows = np.flatnonzero(keep)
    if len(rows) == 0:
        fail(f"no image is left in {where}")
    return ImageSet(cache, rows, labels[rows], names, key)


def fingerprint(listing, img_size):
    """Hex digest of what a cache of images depends on: their names, sizes and times, and how they
    are decoded. One `stat` per file."""
    digest = hashlib.sha256(f"decoder 2 {img_size}".encode())
    for path in listing.paths:
        stat = path.stat()
        digest.update(os.fsencode(path.relative_to(listing.root)))
        digest.update(f" {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _decode_all(listing, args, procs, where, meta):
    """Blocks for cached_array: a row for each path, black where it cannot be decoded.

    meta["bad"]: [position, name, reason] of those.
    """
    def decode_or_reason(path):
        try:
            return decode(path, args.img_size)
        except (OSError, ValueError) as e:
            return str(e) or type(e).__name__

    bad = meta["bad"] = []
    count = len(listing.paths)
    progress = experiment.Progress(procs, f"decoding {where}", count)
    with ThreadPoolExecutor(max(1, args.num_workers)) as pool:
        for start in range(0, count, 256):
            paths = listing.paths[start:start + 256]
            block = np.zeros((len(paths), args.img_size, args.img_size), np.uint16)
            for i, image in enumerate(pool.map(decode_or_reason, paths)):
                if isinstance(image, str):
                    name = os.fsencode(paths[i].relative_to(listing.root))
                    bad.append([start + i, name.decode("utf-8", "replace"), image])
                else:
                    block[i] = image
            yield block
            progress.update(start + len(paths))
    progress.clear()
    if bad and not args.skip_bad_images:  # nothing is stored: it may pass, as on a network disk
        _refuse_or_notice(bad, count, False, where)


def _refuse_or_notice(bad, count, skip, where):
    lines = [f"\n  {name}: {reason}" for _, name, reason in bad[:20]]
    names = "".join(lines) + (f"\n  and {len(bad) - 20} more" if len(bad) > 20 else "")
    if not skip:
        fail(f"{len(bad)} of {count} images in {where} cannot be decoded; repair or remove them, "
             f"or leave them out with --skip_bad_images:{names}")
    notice(f"{len(bad)} images that cannot be decoded are left out:{names}")


def overfit_indices(labels, k):
    """k positions that take the classes in turn, first images first. Ends the program if there are
    fewer."""
    if k > len(labels):
        fail(f"overfitting on {k} images, but there are only {len(labels)}")
    by_class = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    turns = [(turn, c, i) for c, members in enumerate(by_class) for turn, i in enumerate(members)]
    return np.array([i for _, _, i in sorted(turns)[:k]])


# --- latents ------------------------------------------------------------------------------------


class LatentSet:
    """Posterior means and log-variances of an ImageSet, from the cache or encoded on the fly."""

    def __init__(self, images, vae, vae_sha256, folder, procs, use_cache=True, batch_size=16):
        """vae: AutoencoderKL on procs.device. The cache is keyed by VAE, data and image size, and
        shared by all runs below `folder`."""
        self.images, self.vae, self.device = images, vae, procs.device
        self.cache = self.resident = None
        if not use_cache:
            return
        key = hashlib.sha256(f"{vae_sha256} {images.key}".encode()).hexdigest()
        total = images.cache.shape[0]  # all rows: a subset or one class shares the cache

        def blocks(meta):
            progress = experiment.Progress(procs, "encoding latents", total)
            whole = dataclasses.replace(images, rows=np.arange(total))
            for start in range(0, total, batch_size):
                index = np.arange(start, min(start + batch_size, total))
                posterior = self._encode(whole.images(index))
                yield torch.stack(posterior, 1).cpu().numpy()  # [B, 2, C, h, w]
                progress.update(index[-1] + 1)
            progress.clear()

        shape = (total, 2, *vae.latent_shape)
        self.cache = experiment.on_main(procs, lambda: cached_array(
            folder, f"latents_{key[:16]}", shape, np.float32, blocks))
        if procs.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(procs.device)
            if len(images) * 4 * np.prod(shape[1:]) < 0.1 * free:
                self.resident = torch.from_numpy(self.cache.rows(images.rows)).to(procs.device)

    @torch.no_grad()
    def _encode(self, x):
        # In float32 and without autocast, so that cached and fresh latents are the same.
        return self.vae.encode(x.to(self.device))

    def posterior(self, indices):
        """(mean, logvar), each float32 [B, C, h, w] on the device."""
        if self.resident is not None:
            both = self.resident[torch.from_numpy(indices).to(self.device)]
        elif self.cache is not None:
            both = torch.from_numpy(self.cache.rows(self.images.rows[indices])).to(self.device)
        else:
            return tuple(self._encode(self.images.images(indices)))
        return both[:, 0], both[:, 1]
