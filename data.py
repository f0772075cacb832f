"""Chest radiographs from folders, decoded once into a cache; VAE latents in another; and a phantom data set.

    python data.py --out phantom --num_train=64 --num_val=16 --img_size=128

writes the phantom set as PNG files, laid out as a data root of your own would be:
DATA_ROOT/TASK/SPLIT/CLASS/*.png
"""
import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter

import experiment
from experiment import fail, notice

# For Pillow an image of up to 179 megapixels is only worth a warning.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif"}

# --- folders -----------------------------------------------------------------------------------------------


class Listing(NamedTuple):
    """The image files of one split: paths below root, one class index each."""

    root: pathlib.Path
    paths: list
    labels: list
    class_names: list


def _image_files(folder):
    return sorted(p for p in folder.iterdir()
                  if p.suffix.lower() in EXTENSIONS and p.is_file() and not p.name.startswith("."))


def _split_files(folder):
    """[(path, class name)] of one TASK/SPLIT folder, and its class names."""
    class_folders = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if class_folders:
        return [(p, c.name) for c in class_folders for p in _image_files(c)], [c.name for c in class_folders]
    files = [(p, "tb" if p.name.startswith("TB.") else "normal") for p in _image_files(folder)]
    return files, sorted({name for _, name in files})


def scan(root, task, split, optional=False):
    """Listing of DATA_ROOT/TASK/SPLIT; task ALL_CXR without such a folder joins all tasks.

    Ends the program, naming what is there, where root, task or split is missing; None for a missing split if
    `optional`.
    """
    root = pathlib.Path(root)
    if not root.is_dir():
        fail(f"no folder --data_root={root}")
    tasks = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
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
        splits = sorted({p.name for t in asked for p in (root / t).iterdir() if p.is_dir()})
        fail(f"no split {split!r} for task {task} in {root}; there: {', '.join(splits) or 'none'}")
    files, names = [], set()
    for member in members:
        member_files, member_names = _split_files(root / member / split)
        files += member_files
        names |= set(member_names)
    class_names = sorted(names)
    if not files:
        fail(f"no images in {root}/{task}/{split} (looked for {' '.join(sorted(EXTENSIONS))})")
    labels = [class_names.index(name) for _, name in files]
    empty = [name for i, name in enumerate(class_names) if i not in labels]
    if empty:
        fail(f"no images of class {', '.join(empty)} in {root}/{task}/{split}")
    return Listing(root, [p for p, _ in files], labels, class_names)


# --- decoding ----------------------------------------------------------------------------------------------


def decode(path, img_size):
    """One image file as uint16 [img_size, img_size], 0 black to 65535 white.

    8-bit and 16-bit grey keep their full range, colour becomes luma, transparency becomes black. The centre
    square is cut out and resized (box filter down, bicubic up), which keeps the aspect ratio. Raises ValueError
    or OSError for what cannot be decoded, decompression bombs included.
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
                    image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
                if image.mode != "L":
                    image = image.convert("RGB").convert("L")
                grey = np.asarray(image, dtype=np.float32) / 255
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise ValueError(f"too many pixels: {e}") from e
    except (SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError, MemoryError, ZeroDivisionError) as e:
        raise ValueError(f"{type(e).__name__}: {e}") from e  # what Pillow's parsers raise on damaged files
    height, width = grey.shape
    side = min(height, width)
    if side < 8:
        raise ValueError(f"{width}x{height} pixels are too few")
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(grey[top:top + side, left:left + side])
    if side != img_size:
        smaller = side > img_size
        square = square.resize((img_size, img_size), Image.Resampling.BOX if smaller else Image.Resampling.BICUBIC)
    return (np.asarray(square).clip(0, 1) * 65535 + 0.5).astype(np.uint16)


def to_float(rows):
    """What `decode` made, uint16 [B, S, S], as float32 [B, 1, S, S] in [-1, 1]."""
    return (torch.from_numpy(rows.astype(np.float32)) / 32767.5 - 1)[:, None]


# --- caches ------------------------------------------------------------------------------------------------


class CachedArray(NamedTuple):
    """A file of equal rows. Rows are read through a map that lives for one call, so that memory stays flat."""

    path: pathlib.Path
    shape: tuple
    dtype: str
    meta: dict

    def rows(self, indices):
        return np.asarray(np.memmap(self.path, self.dtype, "r", shape=self.shape)[indices])


def _described(index):
    """What an index says about its data file, as bytes that its checksum covers too."""
    return json.dumps([index["shape"], index["dtype"], index["meta"]]).encode()


def cached_array(folder, name, blocks):
    """CachedArray `name` in `folder`; where missing or damaged, built from blocks().

    blocks() yields arrays [n, ...] of one dtype and finally a dict of JSON values, kept as `meta`. The index file
    NAME.json is put in place last and names its data file, so that two processes that build at once, or a kill at
    any moment, leave either nothing or a whole cache.
    """
    index_path = pathlib.Path(folder) / f"{name}.json"
    if index_path.exists():
        try:
            index = json.loads(index_path.read_text())
            path = index_path.with_name(index["file"])
            crc = 0
            with open(path, "rb") as f:
                while chunk := f.read(1 << 22):
                    crc = zlib.crc32(chunk, crc)
            if zlib.crc32(_described(index), crc) != index["crc32"]:
                raise ValueError("checksum does not match")
            return CachedArray(path, tuple(index["shape"]), index["dtype"], index["meta"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
            notice(f"cache {index_path} is damaged ({e}): building it again")
    experiment.make_folder(folder)
    for stale in pathlib.Path(folder).glob(f".{name}*.tmp"):
        if time.time() - stale.stat().st_mtime > 86400:  # left by a process that was killed
            stale.unlink(missing_ok=True)
    index = {"file": f"{name}_{secrets.token_hex(4)}.bin", "crc32": 0, "shape": [0], "dtype": "uint16", "meta": {}}

    def write(f):
        for block in blocks():
            if isinstance(block, dict):
                index["meta"] = block
                continue
            data = np.ascontiguousarray(block)
            f.write(data.data)
            index["crc32"] = zlib.crc32(data.data, index["crc32"])
            index["shape"] = [index["shape"][0] + len(data), *data.shape[1:]]
            index["dtype"] = data.dtype.name
    path = index_path.with_name(index["file"])
    experiment.write_atomic(path, write)
    index["crc32"] = zlib.crc32(_described(index), index["crc32"])
    try:
        experiment.write_json(index_path, index)
    except BaseException:
        path.unlink(missing_ok=True)  # no index will ever name it
        raise
    return CachedArray(path, tuple(index["shape"]), index["dtype"], index["meta"])


@dataclasses.dataclass
class ImageSet:
    """Decoded images of one split. rows: which rows of the cache belong to it; labels: class index of each."""

    cache: CachedArray
    rows: np.ndarray
    labels: np.ndarray
    class_names: list
    key: str  # fingerprint of files and image size

    def __len__(self):
        return len(self.rows)

    def images(self, indices):
        """float32 [B, 1, S, S] in [-1, 1]."""
        return to_float(self.cache.rows(self.rows[indices]))

    def subset(self, indices):
        return dataclasses.replace(self, rows=self.rows[indices], labels=self.labels[indices])


def list_bad(bad):
    """'\\n  NAME: REASON' for the first twenty of [name, reason] pairs, and how many more."""
    lines = [f"\n  {name}: {reason}" for name, reason in bad[:20]]
    return "".join(lines) + (f"\n  and {len(bad) - 20} more" if len(bad) > 20 else "")


def open_images(args, procs, split, optional=False):
    """ImageSet of a split, decoded on first use into OUTPUT_ROOT/cache; None for a missing split if `optional`.

    Ends the program, naming all files that cannot be decoded, unless args.skip_bad_images.
    """
    root = args.data_root or phantom_root(args, procs)
    listing = scan(root, args.task, split, optional)
    if listing is None:
        notice(f"no split {split!r} for task {args.task} in {root}: validation is skipped")
        return None
    names = listing.class_names
    if optional and args.class_filter >= len(names):
        notice(f"no class {args.class_filter} in {root}/{args.task}/{split}: validation is skipped")
        return None
    if args.class_filter >= len(names):
        fail(f"--class_filter={args.class_filter}, but the classes are "
             + ", ".join(f"{i} = {n}" for i, n in enumerate(names)))
    if len(names) == 1 and args.class_filter != 0 and not optional:
        fail(f"only one class, {names[0]!r}, in {root}/{args.task}/{split}; the model needs two to tell apart. "
             "Check the folders, or give --class_filter=0 to train on this class alone")

    digest = hashlib.sha256(f"decoder 1 {args.img_size}".encode())
    for path in listing.paths:
        stat = path.stat()
        digest.update(os.fsencode(path.relative_to(listing.root)) + f" {stat.st_size} {stat.st_mtime_ns}\n".encode())
    key = digest.hexdigest()

    def decode_or_reason(path):
        try:
            return decode(path, args.img_size)
        except (OSError, ValueError) as e:
            return str(e) or type(e).__name__

    def blocks():
        good, bad = [], []
        progress = experiment.Progress(procs, f"decoding {args.task}/{split}", len(listing.paths))
        with ThreadPoolExecutor(max(1, args.num_workers)) as pool:
            for start in range(0, len(listing.paths), 256):
                chunk = []
                for i, image in enumerate(pool.map(decode_or_reason, listing.paths[start:start + 256]), start):
                    if isinstance(image, str):
                        name = os.fsencode(listing.paths[i].relative_to(listing.root)).decode("utf-8", "replace")
                        bad.append([name, image])
                    else:
                        good.append(i)
                        chunk.append(image)
                if chunk:
                    yield np.stack(chunk)
                progress.update(start + len(chunk))
        progress.clear()
        refuse(bad)  # before anything is stored: the cause may be passing, such as a network disk
        yield {"good": good, "bad": bad}

    def refuse(bad):
        if bad and not args.skip_bad_images:
            fail(f"{len(bad)} of {len(listing.paths)} images in {root}/{args.task}/{split} cannot be decoded; "
                 f"repair or remove them, or leave them out with --skip_bad_images:{list_bad(bad)}")

    with experiment.main_first(procs):
        cache = cached_array(pathlib.Path(args.output_root) / "cache", f"images_{key[:16]}", blocks)
    bad = cache.meta["bad"]
    refuse(bad)
    if bad:
        notice(f"{len(bad)} images that cannot be decoded are left out:{list_bad(bad)}")
    labels = np.array(listing.labels)[cache.meta["good"]]
    rows = np.flatnonzero((labels == args.class_filter) | (args.class_filter < 0))
    if len(rows) == 0:
        fail(f"no image is left in {root}/{args.task}/{split}")
    return ImageSet(cache, rows, labels[rows], names, key)


def overfit_indices(labels, k):
    """k positions that take the classes in turn, first images first. Ends the program if there are fewer."""
    if k > len(labels):
        fail(f"overfitting on {k} images, but there are only {len(labels)}")
    by_class = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    turns = [(turn, c, i) for c, members in enumerate(by_class) for turn, i in enumerate(members)]
    return np.array([i for _, _, i in sorted(turns)[:k]])


class LatentSet:
    """Posterior means and log-variances of an ImageSet, from the cache or encoded on the fly."""

    def __init__(self, images, vae, vae_sha256, folder, procs, use_cache=True, batch_size=16):
        """vae: AutoencoderKL on procs.device. The cache is keyed by VAE, data and image size, and shared."""
        self.images, self.vae, self.device = images, vae, procs.device
        self.cache = self.resident = None
        if not use_cache:
            return
        key = hashlib.sha256(f"{vae_sha256} {images.key}".encode()).hexdigest()

        def blocks():
            total = images.cache.shape[0]  # all rows: runs on a subset or on one class share the cache
            progress = experiment.Progress(procs, "encoding latents", total)
            whole = dataclasses.replace(images, rows=np.arange(total))
            for start in range(0, total, batch_size):
                index = np.arange(start, min(start + batch_size, total))
                yield torch.stack(self._encode(whole.images(index)), 1).cpu().numpy()  # [B, 2, C, h, w]
                progress.update(index[-1] + 1)
            progress.clear()

        with experiment.main_first(procs):
            self.cache = cached_array(folder, f"latents_{key[:16]}", blocks)
        if procs.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(procs.device)
            if len(images) * 4 * np.prod(self.cache.shape[1:]) < 0.1 * free:
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


# --- phantom -----------------------------------------------------------------------------------------------


def soft_step(distance, width):
    """Sigmoid edge: 0 where distance << 0, 1 where distance >> 0."""
    return 0.5 + 0.5 * np.tanh(distance / (2 * width))


def soft_max(a, b, round_by):
    """Maximum with a rounded corner, for joining outlines without a crease."""
    return 0.5 * (a + b + np.sqrt((a - b) ** 2 + round_by))


def cloud(rng, cells, n):
    """Smooth random field [n, n], zero mean, about `cells` bumps across."""
    grid = rng.standard_normal((cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((n, n), Image.BICUBIC))


def draw_phantom(rng: np.random.Generator, has_tb: bool, img_size: int) -> np.ndarray:
    """
    One procedural frontal chest film, uint8 [img_size, img_size]: bone white, air 0, heart on the right.

    A sum of densities over smooth implicit shapes in patient coordinates (-1 to 1, y down) at any img_size.
    Lesions and noise have generators of their own: one seed is one patient in both classes.
    """
    lesion_rng, noise_rng = (np.random.default_rng(s) for s in rng.integers(2**63, size=2))
    uni = rng.uniform
    n = max(img_size, 128)  # small films are averaged down from 128 so that ribs do not alias
    axis = ((np.arange(n) + 0.5) * 2 / n - 1).astype(np.float32)
    film_x, film_y = np.meshgrid(axis, axis)

    # --- pose ---
    tilt, scale = rng.normal(0, 0.03), uni(0.95, 1.25)
    x = (film_x + tilt * film_y - uni(-0.1, 0.1)) / scale
    y = (film_y - tilt * film_x - uni(-0.2, 0.06)) / scale
    u, left = np.abs(x), soft_step(x, 0.02)  # distance from the midline; 1 on the patient's left

    # --- body: neck and shoulders above, trunk and arms at the sides ---
    lung_w, apex, base = uni(0.5, 0.64), uni(-0.74, -0.64), uni(0.12, 0.4)
    neck, shoulder = uni(0.16, 0.24) - u, y - uni(-0.88, -0.8) - uni(0.1, 0.4) * u**2
    trunk = lung_w + uni(0.1, 0.28) + 0.04 * np.cos(3 * (y - 0.2)) - u
    arm = uni(-0.25, 0.1) + uni(0, 2.5) * (u - lung_w - 0.15) - y
    skin = -soft_max(-soft_max(neck, shoulder, 0.04), -soft_max(trunk, arm, 0.01), 0.01)
    body, depth = soft_step(skin, 0.008), np.maximum(skin, 0)
    tissue = 0.25 + 0.37 * (1 - np.exp(-depth / 0.12))

    # --- lungs over the diaphragm domes, the right dome higher ---
    t = np.clip((y - apex) / (base - apex), 0, 1.3)  # 0 at the apex of the lung, 1 at the dome
    wall = 0.1 + (lung_w - 0.1) * (1 - (1 - np.minimum(t, 1)) ** 2.6) ** 0.6
    off_top = u - uni(0.4, 0.55) * lung_w
    dome = base + left * uni(0.02, 0.09) + uni(0.7, 1.6) * off_top**2 * (1 + (off_top > 0))
    above = soft_step(dome - y, 0.012)
    lung = soft_step(wall - u, 0.012) * above * soft_step(y - apex, 0.015)
    bubble = soft_step(1 - np.hypot((x - uni(0.2, 0.35)) / uni(0.08, 0.18), (y - dome - 0.13) / 0.07), 0.12)
    belly = 0.3 * soft_step(lung_w - u, 0.05) * (1 - np.exp(-depth / 0.15)) - uni(0, 0.2) * bubble

    # --- mediastinum: right atrium; aortic knob, pulmonary trunk and ventricle on the left ---
    right_edge = uni(0.09, 0.12) + uni(0.02, 0.07) * np.exp(-(((t - 0.82) / 0.22) ** 2))
    knob, pulmonary = np.exp(-(((t - uni(0.3, 0.36)) / 0.08) ** 2)), np.exp(-(((t - 0.53) / 0.1) ** 2))
    heart = uni(0.2, 0.36) * soft_step(t - uni(0.68, 0.78), 0.085) * (1 - 0.35 * np.clip(t - 0.9, 0, 1))
    left_edge = uni(0.08, 0.11) + uni(0.03, 0.08) * knob + uni(0, 0.06) * pulmonary + heart
    inside = right_edge + left * (left_edge - right_edge) - u
    middle = soft_step(inside, 0.014)
    middle_density = middle * (0.28 - 0.14 * np.exp(-np.maximum(inside, 0) / 0.1))
    middle_density = middle_density * (0.3 + 0.7 * above * soft_step(y - apex - 0.05, 0.05))
    trachea = soft_step(0.035 - u, 0.008) * soft_step(apex + 0.4 - y, 0.05)

    # --- hila and the vessels that fan out from them ---
    wiggle, vessels = cloud(rng, 12, n), 0
    for side in (-1, 1):
        rx, ry = side * x - 0.12, y - apex - 0.52 * (base - apex)
        r, theta = np.hypot(rx, ry), np.arctan2(ry, rx) + 0.2 * wiggle
        vessels = vessels + 0.7 * np.exp(-((r / 0.12) ** 2))
        for angle in (np.linspace(-1.4, 1.4, 9) + uni(-0.15, 0.15, 9)).tolist():
            across = r * (theta - angle - uni(-1, 1) * r) / (0.006 + 0.012 * np.exp(-r / 0.15))
            vessels = vessels + np.exp(-(across**2) - r / 0.25) * soft_step(r - 0.06, 0.015)

    # --- bones: spine, ribs (down and out behind, then down and in in front), clavicles ---
    spine = soft_step(0.08 - u, 0.012) * (0.8 + 0.2 * np.cos(2 * np.pi * y / uni(0.1, 0.12)))
    v, sag, drop = u / wall, uni(0.14, 0.26), uni(0.25, 0.4)
    spacing, first, ribs = uni(0.125, 0.155), uni(0, 0.1), 0
    back, front = soft_step(v - 0.1, 0.04), 0.5 * soft_step(v - 0.5, 0.08)
    for weight, curve in ((back, sag * v**2.2), (front, sag + drop * (1 - v))):
        phase = (y - first - curve) / spacing
        ribs = ribs + weight * np.exp(-(((phase - np.round(phase)) / 0.27) ** 4))
    ribs = ribs * soft_step(1.06 - v, 0.02) * soft_step(y - apex, 0.02) * (0.15 + 0.85 * above)
    line = apex + uni(0.16, 0.26) - uni(0.1, 0.35) * (u - 0.1) - 0.03 * np.sin(8 * u)
    clavicle = soft_step(0.032 - np.abs(y - line), 0.008) * soft_step(0.325 - np.abs(u - 0.395), 0.015)
    bones = 0.06 * spine + 0.095 * ribs + 0.12 * clavicle

    # --- tuberculosis: fluffy upper-zone opacities, some with a cavity ---
    lesion = np.zeros_like(x)
    for _ in range(lesion_rng.integers(1, 5) if has_tb else 0):
        luni, level = lesion_rng.uniform, lesion_rng.uniform(0.16, 0.48)
        side = 1 if luni() < 0.5 else -1
        dx = x - side * luni(0.45, 0.75) * lung_w * min(1, level + 0.6)
        at = np.hypot(dx, (y - apex - level * (base - apex)) * luni(0.8, 1.25))
        ragged = cloud(lesion_rng, 12, n)
        patch = soft_step(1 - at / luni(0.14, 0.24) + 0.4 * ragged, 0.15)
        patch = luni(0.75, 1.05) * patch * np.clip(0.85 + 0.22 * cloud(lesion_rng, 32, n), 0, 1.2)
        if luni() < 0.25:
            shell = at / luni(0.08, 0.13) + 0.2 * ragged
            rim = 0.8 * np.exp(-(((shell - 1) / 0.4) ** 2))
            patch = np.maximum(patch * soft_step(shell - 0.9, 0.08), rim)
        lesion = np.maximum(lesion, patch)

    # --- sum, film response, detector ---
    gas = lung * (1 - middle) * (0.8 + 0.2 * t) * (uni(0.38, 0.44) - 0.32 * lesion - 0.12 * vessels)
    density = body * (tissue + (1 - above) * belly + middle_density + bones - 0.05 * trachea - gas)
    film = 1 - np.exp(-((np.maximum(density, 0) * uni(1.5, 2.1)) ** uni(1.2, 1.7)))
    film = Image.fromarray((255 * film).astype(np.uint8)).filter(ImageFilter.GaussianBlur(n / 400))
    film = np.asarray(film, np.float32) / 255
    noise = noise_rng.standard_normal((n, n), dtype=np.float32) * noise_rng.uniform(0.005, 0.014)
    film = (film + noise * np.sqrt(film)) * body
    field = (film_x > uni(-1.08, -0.94)) & (film_x < uni(0.94, 1.08)) & (film_y < uni(0.94, 1.08))
    field &= film_x**6 + film_y**6 < uni(1.1, 1.35)  # rounded blades: the four corners are true black
    film = Image.fromarray((255 * np.clip(1.01 * film - 0.01, 0, 1) * field).astype(np.uint8))
    return np.array(film if n == img_size else film.resize((img_size, img_size), Image.BOX))


def write_phantoms(folder, num_train, num_val, img_size, seed=0):
    """Write folder/TB/{train,val}/{normal,tb}/*.png, num_train and num_val images a class."""
    for split, count in (("train", num_train), ("val", num_val)):
        for label, name in enumerate(("normal", "tb")):
            target = experiment.make_folder(pathlib.Path(folder, "TB", split, name))
            for i in range(count):
                rng = np.random.default_rng([seed, split == "val", label, i])
                film = Image.fromarray(draw_phantom(rng, bool(label), img_size))
                experiment.write_atomic(target / f"{i:05d}.png", lambda f, film=film: film.save(f, "PNG"))


def phantom_root(args, procs):
    """The phantom set that stands in where no data root is given: 64 + 64 training and 16 + 16 validation images."""
    folder = pathlib.Path(args.output_root, "cache", f"phantom_{args.img_size}")
    with experiment.main_first(procs):
        if not folder.exists():
            experiment.make_folder(folder.parent)
            temporary = folder.with_name(f".{folder.name}_{secrets.token_hex(4)}")
            try:
                write_phantoms(temporary, 64, 16, args.img_size)
                with contextlib.suppress(OSError):  # another process was faster
                    temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    notice(f"no --data_root: using the phantom set in {folder}")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the phantom chest radiographs as PNG files.")
    parser.add_argument("--out", required=True, help="folder to write TB/SPLIT/CLASS/*.png below")
    parser.add_argument("--num_train", type=experiment.at_least(1), default=64, help="training images a class")
    parser.add_argument("--num_val", type=experiment.at_least(0), default=16, help="validation images a class")
    parser.add_argument("--img_size", type=experiment.at_least(16), default=128, help="side in pixels")
    parser.add_argument("--seed", type=experiment.at_least(0), default=0)
    args = parser.parse_args()
    experiment.make_folder(args.out)
    write_phantoms(args.out, args.num_train, args.num_val, args.img_size, args.seed)
    print(f"wrote {args.out}: use it with --data_root={args.out} --task=TB --img_size={args.img_size}")
