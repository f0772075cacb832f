"""A procedural chest radiograph that stands in for data, and a script that writes a set of them.

    python -m lib.phantom --out=phantom --num_train=64 --num_val=16 --img_size=128

writes PNG files laid out as a data root of your own would be: OUT/TB/SPLIT/CLASS/*.png. Classes are
`normal`, `tb`, `effusion` and `tb+effusion`, which has both; the first two are the default. Every
image is a function of (seed, split, class, number).
"""
import contextlib
import os
import pathlib
import sys
import tempfile

import numpy as np
from PIL import Image, ImageFilter

from lib.args import Parser, at_least, file_path
from lib.files import fail, make_folder, notice, writing

# --- the image ----------------------------------------------------------------------------------


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


def draw_phantom(rng: np.random.Generator, class_name: str, img_size: int) -> np.ndarray:
    """One frontal chest image, uint8 [img_size, img_size]: bone white, air 0, heart on the right.

    A sum of densities over smooth implicit shapes in patient coordinates (-1 to 1, y down), at any
    img_size. Findings and noise have generators of their own: a seed is one patient in all classes.
    """
    seeds, names = rng.integers(2**63, size=2), class_name.split("+")
    lesion_rng, noise_rng, fluid_rng = map(np.random.default_rng, (*seeds, seeds))
    uni = rng.uniform
    n = max(img_size, 128)  # small images are averaged down from 128 so that ribs do not alias
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
    bubble = np.hypot((x - uni(0.2, 0.35)) / uni(0.08, 0.18), (y - dome - 0.13) / 0.07)
    bubble = soft_step(1 - bubble, 0.12)
    belly = 0.3 * soft_step(lung_w - u, 0.05) * (1 - np.exp(-depth / 0.15)) - uni(0, 0.2) * bubble

    # --- mediastinum: right atrium; aortic knob, pulmonary trunk and ventricle on the left ---
    right_edge = uni(0.09, 0.12) + uni(0.02, 0.07) * np.exp(-(((t - 0.82) / 0.22) ** 2))
    knob = np.exp(-(((t - uni(0.3, 0.36)) / 0.08) ** 2))
    pulmonary = np.exp(-(((t - 0.53) / 0.1) ** 2))
    heart = uni(0.2, 0.36) * soft_step(t - uni(0.68, 0.78), 0.085)
    heart = heart * (1 - 0.35 * np.clip(t - 0.9, 0, 1))
    left_edge = uni(0.08, 0.11) + uni(0.03, 0.08) * knob + uni(0, 0.06) * pulmonary + heart
    inside = right_edge + left * (left_edge - right_edge) - u
    middle = soft_step(inside, 0.014)
    middle_density = middle * (0.28 - 0.14 * np.exp(-np.maximum(inside, 0) / 0.1))
    middle_density = middle_density * (0.3 + 0.7 * above * soft_step(y - apex - 0.05, 0.05))
    trachea = soft_step(0.035 - u, 0.008) * soft_step(apex + 0.4 - y, 0.05)

    vessels = draw_vessels(rng, x, y - apex - 0.52 * (base - apex))

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
    clavicle = soft_step(0.032 - np.abs(y - line), 0.008)
    clavicle = clavicle * soft_step(0.325 - np.abs(u - 0.395), 0.015)
    bones = 0.06 * spine + 0.095 * ribs + 0.12 * clavicle

    # --- findings ---
    lesion = draw_lesions(lesion_rng, x, y - apex, lung_w, base - apex) if "tb" in names else 0.0
    fluid = draw_effusion(fluid_rng, x, y - base, v, base - apex) if "effusion" in names else 0.0

    # --- sum and film response ---
    gas = lung * (1 - middle) * (0.8 + 0.2 * t) * (uni(0.38, 0.44) - 0.32 * lesion - 0.12 * vessels)
    gas = gas * (1 - fluid)
    density = body * (tissue + (1 - above) * belly + middle_density + bones - 0.05 * trachea - gas)
    film = 1 - np.exp(-((np.maximum(density, 0) * uni(1.5, 2.1)) ** uni(1.2, 1.7)))
    return expose(rng, noise_rng, film, body, film_x, film_y, img_size)


def draw_vessels(rng, x, y):
    """The hila and the vessels that fan out from them, like x [n, n]; y is 0 at the hila."""
    uni, wiggle, vessels = rng.uniform, cloud(rng, 12, len(x)), 0
    for side in (-1, 1):
        rx = side * x - 0.12
        r, theta = np.hypot(rx, y), np.arctan2(y, rx) + 0.2 * wiggle
        vessels = vessels + 0.7 * np.exp(-((r / 0.12) ** 2))
        for angle in (np.linspace(-1.4, 1.4, 9) + uni(-0.15, 0.15, 9)).tolist():
            across = r * (theta - angle - uni(-1, 1) * r) / (0.006 + 0.012 * np.exp(-r / 0.15))
            vessels = vessels + np.exp(-(across**2) - r / 0.25) * soft_step(r - 0.06, 0.015)
    return vessels


def draw_lesions(rng, x, y, lung_w, lung_h):
    """Tuberculosis: fluffy upper-zone opacities, some with a cavity, 0 to about 1 like x [n, n]. y
    is 0 at the apex of the lung."""
    uni, n, lesion = rng.uniform, len(x), np.zeros_like(x)
    for _ in range(rng.integers(1, 5)):
        level = uni(0.16, 0.48)
        side = 1 if uni() < 0.5 else -1
        dx = x - side * uni(0.45, 0.75) * lung_w * min(1, level + 0.6)
        at = np.hypot(dx, (y - level * lung_h) * uni(0.8, 1.25))
        ragged = cloud(rng, 12, n)
        patch = soft_step(1 - at / uni(0.14, 0.24) + 0.4 * ragged, 0.15)
        patch = uni(0.75, 1.05) * patch * np.clip(0.85 + 0.22 * cloud(rng, 32, n), 0, 1.2)
        if uni() < 0.25:
            shell = at / uni(0.08, 0.13) + 0.2 * ragged
            rim = 0.8 * np.exp(-(((shell - 1) / 0.4) ** 2))
            patch = np.maximum(patch * soft_step(shell - 0.9, 0.08), rim)
        lesion = np.maximum(lesion, patch)
    return lesion


def draw_effusion(rng, x, y, v, lung_h):
    """Pleural effusion: fluid at the base of one lung, 0 to about 1 like x [n, n]. Its level rises
    towards the chest wall, the meniscus. y is 0 at the diaphragm, v is 1 at the wall."""
    side = 1 if rng.uniform() < 0.5 else -1
    level = -rng.uniform(0.1, 0.4) * lung_h - rng.uniform(0.1, 0.25) * np.clip(v, 0, 1) ** 5
    return rng.uniform(0.8, 0.95) * soft_step(y - level, 0.012) * soft_step(side * x, 0.02)


def expose(rng, noise_rng, film, body, film_x, film_y, img_size):
    """What the detector makes of a film: blur, noise, the collimator's blades, 8 bits."""
    uni, n = rng.uniform, len(film)
    film = Image.fromarray((255 * film).astype(np.uint8)).filter(ImageFilter.GaussianBlur(n / 400))
    film = np.asarray(film, np.float32) / 255
    noise = noise_rng.standard_normal((n, n), dtype=np.float32) * noise_rng.uniform(0.005, 0.014)
    film = (film + noise * np.sqrt(film)) * body
    field = (film_x > uni(-1.08, -0.94)) & (film_x < uni(0.94, 1.08)) & (film_y < uni(0.94, 1.08))
    field &= film_x**6 + film_y**6 < uni(1.1, 1.35)  # rounded blades: the corners are true black
    film = Image.fromarray((255 * np.clip(1.01 * film - 0.01, 0, 1) * field).astype(np.uint8))
    return np.array(film if n == img_size else film.resize((img_size, img_size), Image.BOX))


# --- sets of them -------------------------------------------------------------------------------

CLASSES = ("normal", "tb", "effusion", "tb+effusion")


def write_phantoms(folder, num_train, num_val, img_size, seed=0, classes=CLASSES[:2]):
    """Write folder/TB/{train,val}/CLASS/*.png, num_train and num_val images per class."""
    for split, count in (("train", num_train), ("val", num_val)):
        for label, name in ((CLASSES.index(name), name) for name in classes):
            target = make_folder(pathlib.Path(folder, "TB", split, name))
            for i in range(count):
                rng = np.random.default_rng([seed, split == "val", label, i])
                with writing(path := target / f"{i:05d}.png"):
                    Image.fromarray(draw_phantom(rng, name, img_size)).save(path)


def phantom_root(output_root, img_size):
    """Data root of the set that stands in where none is given, written on first use: 64 training
    and 16 validation images per class. It appears in one step: nobody takes half a set for one."""
    folder = make_folder(pathlib.Path(output_root, "cache")) / f"phantom_{img_size}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(prefix=".phantom_", dir=folder.parent) as temporary:
            write_phantoms(f"{temporary}/set", 64, 16, img_size)
            with contextlib.suppress(OSError):  # another process was faster
                os.rename(f"{temporary}/set", folder)
    notice(f"no --data_root: using the phantom set in {folder}")
    return folder


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", type=file_path, required=True, help="folder to write TB/SPLIT/CLASS/*.png below")
    add("--num_train", type=at_least(1), default=64, help="training images per class")
    add("--num_val", type=at_least(0), default=16, help="validation images per class")
    add("--img_size", type=at_least(16), default=128, help="side in pixels")
    add("--seed", type=at_least(0), default=0, help="of the set")
    add("--classes", nargs="+", choices=CLASSES, default=CLASSES[:2], help="to draw")
    args = parser.parse(sys.argv[1:])
    if pathlib.Path(args.out, "TB").exists():
        fail(f"{args.out}/TB exists: give another --out, so that no phantom joins real images")
    write_phantoms(args.out, args.num_train, args.num_val, args.img_size, args.seed,
                   args.classes)
    print(f"wrote {args.out}: use it with --data_root={args.out} --img_size={args.img_size}")


if __name__ == "__main__":
    main()
