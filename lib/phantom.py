"""A procedural chest radiograph that stands in for data, and a script that writes a set of them.

    python -m lib.phantom --out=phantom --num_train=64 --num_val=16 --img_size=128

writes PNG files in the layout of a data root: OUT/TB/SPLIT/CLASS/*.png. The classes are `normal`
and `tb`; every image is a function of (seed, split, class, number).
"""
import os
import pathlib
import secrets
import shutil
import sys

import numpy as np
from PIL import Image, ImageFilter

from lib.args import Parser, at_least, file_path
from lib.files import fail, make_folder, notice, write_atomic

# --- the image ----------------------------------------------------------------------------------


def step(distance, width):
    """Soft edge: 0 where distance << 0, 1 where distance >> 0."""
    return 0.5 + 0.5 * np.tanh(distance / (2 * width))


def bump(distance):
    """1 at distance 0, falling to 0 within 2."""
    return np.exp(-(distance**2))


def cloud(rng, cells, n):
    """Smooth random field [n, n], zero mean, about `cells` bumps across."""
    grid = rng.standard_normal((cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((n, n), Image.BICUBIC))


def draw_chest(rng, x, y, width, apex, base):
    """(body, which is 1 inside the skin; its density without air; how much air is in it), each
    like x: of a patient whose lungs reach from y = apex to base and `width` to each side."""
    uni, u, left = rng.uniform, np.abs(x), step(x, 0.02)
    t = np.clip((y - apex) / (base - apex), 0, 1.3)
    wall = 0.1 + (width - 0.1) * (1 - (1 - np.minimum(t, 1)) ** 2.6) ** 0.6
    off_top = u - uni(0.4, 0.55) * width
    dome = base + left * uni(0.02, 0.09) + uni(0.7, 1.6) * off_top**2 * (1 + (off_top > 0))
    above = step(dome - y, 0.012)  # the diaphragm

    neck, shoulder = uni(0.16, 0.24) - u, y - uni(-0.88, -0.8) - uni(0.1, 0.4) * u**2
    skin = np.minimum(np.maximum(neck, shoulder), width + uni(0.1, 0.4) - u - 0.1 * y)
    body, depth = step(skin, 0.008), np.maximum(skin, 0)
    belly = (1 - above) * step(width - u, 0.05) * (1 - np.exp(-depth / 0.15))
    tissue = 0.25 + 0.37 * (1 - np.exp(-depth / 0.12)) + 0.3 * belly

    # Right atrium; aortic knob and ventricle on the left.
    right_edge = uni(0.09, 0.12) + uni(0.02, 0.07) * bump((t - 0.82) / 0.22)
    left_edge = uni(0.08, 0.11) + uni(0.03, 0.08) * bump((t - uni(0.3, 0.36)) / 0.08)
    left_edge = left_edge + uni(0.2, 0.36) * step(t - uni(0.68, 0.78), 0.085)
    inside = right_edge + left * (left_edge - right_edge) - u
    heart = step(inside, 0.014) * (0.28 - 0.14 * np.exp(-np.maximum(inside, 0) / 0.1))

    # Ribs go down and out behind, then down and in in front.
    v, sag, drop = u / wall, uni(0.14, 0.26), uni(0.25, 0.4)
    spacing, first, ribs = uni(0.125, 0.155), uni(0, 0.1), 0
    for weight, curve in ((step(v - 0.1, 0.04), sag * v**2.2),
                          (0.5 * step(v - 0.5, 0.08), sag + drop * (1 - v))):
        phase = (y - first - curve) / spacing
        ribs = ribs + weight * np.exp(-(((phase - np.round(phase)) / 0.27) ** 4))
    ribs = ribs * step(1.06 - v, 0.02) * step(y - apex, 0.02)
    spine = step(0.08 - u, 0.012) * (0.8 + 0.2 * np.cos(2 * np.pi * y / uni(0.1, 0.12)))
    density = tissue + (0.3 + 0.7 * above) * heart + (0.015 + 0.08 * above) * ribs + 0.06 * spine
    air = step(wall - u, 0.012) * above * step(y - apex, 0.015) * step(-inside, 0.014)
    return body, body * density, body * air * (0.8 + 0.2 * t)


def draw_lesions(rng, x, y, width, apex, base):
    """Tuberculosis, from 0 to about 1: fluffy opacities in the upper zones, some with a cavity."""
    uni, lesions = rng.uniform, np.zeros_like(x)
    for _ in range(rng.integers(1, 5)):
        level, side = uni(0.16, 0.48), rng.choice((-1, 1))
        dx = x - side * uni(0.45, 0.75) * width * min(1, level + 0.6)
        dy = y - apex - level * (base - apex)
        radius = np.hypot(dx, uni(0.8, 1.25) * dy) / uni(0.14, 0.24)
        patch = step(1 - radius + 0.4 * cloud(rng, 12, len(x)), 0.15)
        if uni() < 0.25:
            patch = patch * step(radius - 0.4, 0.08)
        lesions = np.maximum(lesions, uni(0.6, 0.9) * patch * (1 + 0.2 * cloud(rng, 32, len(x))))
    return lesions


def draw_phantom(rng: np.random.Generator, has_tb: bool, img_size: int) -> np.ndarray:
    """One frontal chest image, uint8 [img_size, img_size]: bone white, air 0, heart on the right.

    A sum of densities over smooth implicit shapes in patient coordinates. Lesions and noise have
    generators of their own: a seed is one patient in both classes.
    """
    lesion_rng, noise_rng = (np.random.default_rng(s) for s in rng.integers(2**63, size=2))
    uni, n = rng.uniform, max(img_size, 128)  # small images are averaged down: ribs would alias
    axis = ((np.arange(n) + 0.5) * 2 / n - 1).astype(np.float32)
    film_x, film_y = np.meshgrid(axis, axis)
    tilt, scale = rng.normal(0, 0.03), uni(0.95, 1.25)
    x = (film_x + tilt * film_y - uni(-0.1, 0.1)) / scale
    y = (film_y - tilt * film_x - uni(-0.2, 0.06)) / scale
    lungs = uni(0.5, 0.64), uni(-0.74, -0.64), uni(0.12, 0.4)  # width, apex, base
    body, density, air = draw_chest(rng, x, y, *lungs)
    gas = uni(0.38, 0.44) - 0.05 * np.abs(cloud(rng, 24, n))  # vessels
    if has_tb:
        gas = gas - 0.32 * draw_lesions(lesion_rng, x, y, *lungs)
    density = np.maximum(density - gas * air, 0)

    film = 1 - np.exp(-((density * uni(1.5, 2.1)) ** uni(1.2, 1.7)))
    film = Image.fromarray((255 * film).astype(np.uint8)).filter(ImageFilter.GaussianBlur(n / 400))
    film = np.asarray(film, np.float32) / 255
    noise = noise_rng.standard_normal((n, n), dtype=np.float32) * noise_rng.uniform(0.005, 0.014)
    film = (film + noise * np.sqrt(film)) * body
    field = film_x**6 + film_y**6 < uni(1.1, 1.35)  # rounded blades: the corners are true black
    film = Image.fromarray((255 * np.clip(1.01 * film - 0.01, 0, 1) * field).astype(np.uint8))
    return np.array(film.resize((img_size, img_size), Image.BOX))


# --- sets of them -------------------------------------------------------------------------------


def write_phantoms(folder, num_train, num_val, img_size, seed=0):
    """Write folder/TB/{train,val}/{normal,tb}/*.png, num_train and num_val images per class.

    The folder appears in one step, complete. OSError if there is one that holds something.
    """
    folder = pathlib.Path(os.path.abspath(folder))
    temporary = folder.with_name(f".{folder.name}_{secrets.token_hex(4)}")
    make_folder(folder.parent)
    try:
        for split, count in (("train", num_train), ("val", num_val)):
            for label, name in enumerate(("normal", "tb")):
                target = make_folder(temporary / "TB" / split / name)
                for i in range(count):
                    rng = np.random.default_rng([seed, split == "val", label, i])
                    image = Image.fromarray(draw_phantom(rng, bool(label), img_size))
                    write_atomic(target / f"{i:05d}.png",
                                 lambda f, image=image: image.save(f, "PNG"))
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def phantom_root(output_root, img_size):
    """Data root of the set that stands in if none is given, written on first use: 64 training and
    16 validation images per class."""
    folder = pathlib.Path(output_root, "cache", f"phantom_{img_size}")
    if not folder.exists():
        try:
            write_phantoms(folder, 64, 16, img_size)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
    notice(f"no --data_root: using the phantom set in {folder}")
    return folder


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", type=file_path, required=True, help="new folder for TB/SPLIT/CLASS/*.png")
    add("--num_train", type=at_least(1), default=64, help="training images per class")
    add("--num_val", type=at_least(0), default=16, help="validation images per class")
    add("--img_size", type=at_least(16), default=128, help="side in pixels")
    add("--seed", type=at_least(0), default=0, help="of the set")
    args = parser.parse(sys.argv[1:])
    if os.path.isdir(args.out) and os.listdir(args.out):
        fail(f"{args.out} is not empty: give a new folder as --out, so that no phantom replaces or "
             "joins other images")
    write_phantoms(args.out, args.num_train, args.num_val, args.img_size, args.seed)
    print(f"wrote {args.out}: use it with --data_root={args.out} --img_size={args.img_size}")


if __name__ == "__main__":
    main()
