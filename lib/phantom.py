"""Procedural chest radiographs that stand in for data, and a program that writes a set of them.

    python -m lib.phantom --out=phantom --num_train=64 --num_val=16 --img_size=128

writes PNG files laid out as your own data would be: OUT/TB/SPLIT/CLASS/*.png. The classes are
`normal` and `tb`; every image is a function of (seed, split, class, number).
"""
import pathlib
import secrets
import shutil
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from lib.args import Parser, at_least
from lib.files import fail, make_folder, notice, write_atomic

# --- one image: densities over smooth implicit shapes -------------------------------------------


def soft_step(distance, width):
    """Sigmoid edge: 0 for distance << 0, 1 for distance >> 0."""
    return 0.5 + 0.5 * np.tanh(distance / (2 * width))


def bump(x, center, width):
    """Gaussian bell of height 1."""
    return np.exp(-(((x - center) / width) ** 2))


def cloud(rng, cells, n):
    """Smooth random field [n, n] of zero mean, about `cells` bumps across."""
    grid = rng.standard_normal((cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((n, n), Image.BICUBIC))


class Chest(NamedTuple):
    """A patient: coordinates [n, n] from -1 to 1, y downwards, and what all organs are placed by."""

    x: np.ndarray
    y: np.ndarray
    u: np.ndarray  # distance from the midline, |x|
    t: np.ndarray  # height in the lung: 0 at its apex, 1 at the dome of the diaphragm
    lung_width: float
    apex: float
    wall: np.ndarray  # distance of the lung's outer edge from the midline
    above: np.ndarray  # 1 above the diaphragm, 0 below it


def pose_chest(uniform, film_x, film_y):
    """Chest on a film with coordinates [n, n]; the right dome is higher than the left."""
    tilt, scale = uniform(-0.05, 0.05), uniform(0.95, 1.25)
    x = (film_x + tilt * film_y - uniform(-0.1, 0.1)) / scale
    y = (film_y - tilt * film_x - uniform(-0.2, 0.06)) / scale
    u = np.abs(x)
    lung_width, apex, base = uniform(0.5, 0.64), uniform(-0.74, -0.64), uniform(0.12, 0.4)
    t = np.clip((y - apex) / (base - apex), 0, 1.3)
    wall = 0.1 + (lung_width - 0.1) * (1 - (1 - np.minimum(t, 1)) ** 2.6) ** 0.6
    off_top = u - uniform(0.4, 0.55) * lung_width
    dome = base + (x > 0) * uniform(0.02, 0.09) + 1.1 * off_top**2 * (1 + (off_top > 0))
    return Chest(x, y, u, t, lung_width, apex, wall, soft_step(dome - y, 0.012))


def trunk(uniform, chest):
    """(outline, density) of neck, shoulders, trunk and arms."""
    x, y, u, lung_width = chest.x, chest.y, chest.u, chest.lung_width
    neck, shoulder = uniform(0.16, 0.24) - u, y + uniform(0.8, 0.88) - uniform(0.1, 0.4) * u**2
    side = lung_width + uniform(0.1, 0.28) + 0.04 * np.cos(3 * (y - 0.2)) - u
    arm = uniform(-0.25, 0.1) + uniform(0, 2.5) * (u - lung_width - 0.15) - y
    upper = 0.07 * np.logaddexp(neck / 0.07, shoulder / 0.07)  # a maximum with a rounded corner
    skin = np.minimum(upper, np.maximum(side, arm))
    depth = np.maximum(skin, 0)
    belly = 0.3 * soft_step(lung_width - u, 0.05) * (1 - np.exp(-depth / 0.15))
    density = 0.25 + 0.37 * (1 - np.exp(-depth / 0.12)) + (1 - chest.above) * belly
    return soft_step(skin, 0.008), density


def mediastinum(uniform, chest):
    """(outline, density) of heart and great vessels: right atrium on one side; aortic knob,
    pulmonary trunk and left ventricle on the other."""
    t = chest.t
    right = uniform(0.09, 0.12) + uniform(0.02, 0.07) * bump(t, 0.82, 0.22)
    heart = uniform(0.2, 0.36) * soft_step(t - uniform(0.68, 0.78), 0.085)
    heart = heart * (1 - 0.35 * np.clip(t - 0.9, 0, 1))
    knob = uniform(0.03, 0.08) * bump(t, uniform(0.3, 0.36), 0.08)
    left = uniform(0.08, 0.11) + knob + uniform(0, 0.06) * bump(t, 0.53, 0.1) + heart
    inside = np.where(chest.x > 0, left, right) - chest.u
    outline = soft_step(inside, 0.014)
    lit = chest.above * soft_step(chest.y - chest.apex - 0.05, 0.05)
    density = (0.28 - 0.14 * np.exp(-np.maximum(inside, 0) / 0.1)) * (0.3 + 0.7 * lit)
    return outline, outline * density


def bones(uniform, chest):
    """Density of the spine and of the ribs: down and out behind, down and in in front."""
    y, u = chest.y, chest.u
    spine = soft_step(0.08 - u, 0.012) * (0.8 + 0.2 * np.cos(2 * np.pi * y / uniform(0.1, 0.12)))
    v, sag, drop = u / chest.wall, uniform(0.14, 0.26), uniform(0.25, 0.4)
    spacing, first, ribs = uniform(0.125, 0.155), uniform(0, 0.1), 0
    back, front = soft_step(v - 0.1, 0.04), 0.5 * soft_step(v - 0.5, 0.08)
    for weight, curve in ((back, sag * v**2.2), (front, sag + drop * (1 - v))):
        phase = (y - first - curve) / spacing
        ribs = ribs + weight * np.exp(-(((phase - np.round(phase)) / 0.27) ** 4))
    ribs = ribs * soft_step(1.06 - v, 0.02) * soft_step(y - chest.apex, 0.02)
    return 0.06 * spine + 0.095 * ribs * (0.15 + 0.85 * chest.above)


def lesions(rng, chest):
    """Opacity from 0 to 1 of tuberculosis: one to four fluffy patches in the upper zones, some
    with a cavity."""
    uniform, n, opacity = rng.uniform, len(chest.x), np.zeros_like(chest.x)
    for _ in range(rng.integers(1, 5)):
        level, side = uniform(0.16, 0.48), rng.choice((-1, 1))
        across = chest.x - side * uniform(0.45, 0.75) * chest.lung_width * min(1, level + 0.6)
        r = np.hypot(across, (chest.t - level) * uniform(0.8, 1.25))
        ragged = cloud(rng, 12, n)
        patch = soft_step(1 - r / uniform(0.14, 0.24) + 0.4 * ragged, 0.15)
        patch = uniform(0.75, 1.05) * patch * np.clip(0.85 + 0.22 * cloud(rng, 32, n), 0, 1.2)
        if uniform() < 0.25:
            shell = r / uniform(0.08, 0.13) + 0.2 * ragged
            patch = np.maximum(patch * soft_step(shell - 0.9, 0.08), 0.8 * bump(shell, 1, 0.4))
        opacity = np.maximum(opacity, patch)
    return opacity


def draw_phantom(rng: np.random.Generator, has_tb: bool, img_size: int) -> np.ndarray:
    """One frontal chest image, uint8 [img_size, img_size]: bone white, air 0, heart on the right.

    Lesions and noise have generators of their own, so a seed is one patient in both classes.
    """
    lesion_rng, noise_rng = (np.random.default_rng(s) for s in rng.integers(2**63, size=2))
    uniform = rng.uniform
    n = max(img_size, 128)  # small images are averaged down from 128 so that ribs do not alias
    axis = ((np.arange(n) + 0.5) * 2 / n - 1).astype(np.float32)
    film_x, film_y = np.meshgrid(axis, axis)

    # --- anatomy ---
    chest = pose_chest(uniform, film_x, film_y)
    body, tissue = trunk(uniform, chest)
    middle, middle_density = mediastinum(uniform, chest)
    lung = soft_step(chest.wall - chest.u, 0.012) * chest.above * (1 - middle)
    lung = lung * soft_step(chest.y - chest.apex, 0.015) * (0.8 + 0.2 * chest.t)
    air = uniform(0.36, 0.42) - 0.01 * cloud(rng, 24, n)  # vessels
    if has_tb:
        air = air - 0.32 * lesions(lesion_rng, chest)
    density = body * (tissue + middle_density + bones(uniform, chest) - lung * air)

    # --- film response, detector noise, and the collimator's rounded blades ---
    film = 1 - np.exp(-((np.maximum(density, 0) * uniform(1.5, 2.1)) ** uniform(1.2, 1.7)))
    film = Image.fromarray((255 * film).astype(np.uint8)).filter(ImageFilter.GaussianBlur(n / 400))
    film = np.asarray(film, np.float32) / 255
    noise = noise_rng.standard_normal((n, n), dtype=np.float32) * noise_rng.uniform(0.005, 0.014)
    film = (film + noise * np.sqrt(film)) * body
    edges = np.array([uniform(0.94, 1.08) for _ in range(3)])
    field = (film_x > -edges[0]) & (film_x < edges[1]) & (film_y < edges[2])
    field &= film_x**6 + film_y**6 < uniform(1.1, 1.35)
    film = Image.fromarray((255 * np.clip(1.01 * film - 0.01, 0, 1) * field).astype(np.uint8))
    return np.array(film if n == img_size else film.resize((img_size, img_size), Image.BOX))


# --- sets of them -------------------------------------------------------------------------------


def write_phantoms(folder, num_train, num_val, img_size, seed=0):
    """Write folder/TB/{train,val}/{normal,tb}/*.png, num_train and num_val images per class."""
    for split, count in (("train", num_train), ("val", num_val)):
        for label, name in enumerate(("normal", "tb")):
            target = make_folder(pathlib.Path(folder, "TB", split, name))
            for i in range(count):
                rng = np.random.default_rng([seed, split == "val", label, i])
                image = Image.fromarray(draw_phantom(rng, bool(label), img_size))
                write_atomic(target / f"{i:05d}.png", lambda f, image=image: image.save(f, "PNG"))


def phantom_root(output_root, img_size):
    """Data root of the set that stands in if none is given, written on first use.

    64 training and 16 validation images per class. The folder appears in one step, so that a run
    that starts at the same moment, or after a kill, never takes half a set for one.
    """
    folder = pathlib.Path(output_root, "cache", f"phantom_{img_size}")
    if not folder.exists():
        make_folder(folder.parent)
        temporary = folder.with_name(f".{folder.name}_{secrets.token_hex(4)}")
        try:
            write_phantoms(temporary, 64, 16, img_size)
            temporary.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    notice(f"no --data_root: using the phantom set in {folder}")
    return folder


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", required=True, help="folder to write TB/SPLIT/CLASS/*.png below")
    add("--num_train", type=at_least(1), default=64, help="training images per class")
    add("--num_val", type=at_least(0), default=16, help="validation images per class")
    add("--img_size", type=at_least(16), default=128, help="side in pixels")
    add("--seed", type=at_least(0), default=0, help="of the set")
    args = parser.parse(argv)
    folder = pathlib.Path(args.out, "TB")
    if any(path.is_file() for path in folder.rglob("*")):
        fail(f"{folder} holds files already, which are not overwritten: give another --out")
    write_phantoms(args.out, args.num_train, args.num_val, args.img_size, args.seed)
    print(f"wrote {args.out}: use it with --data_root={args.out} --img_size={args.img_size}")


if __name__ == "__main__":
    main()
