"""Procedural landscapes, imaged by two sensors: paired GeoTIFFs with labels, without a download.

    python -m imagery.scenes OUT --scenes 24 --size 256 --seed 0

writes OUT/hr/scene_000.tif (5 m), OUT/mr/scene_000.tif (10 m), both uint16 reflectance x 10000 in
the bands B, G, R, NIR; OUT/masks/scene_000.tif (10 m, uint8 class ids); and OUT/classes.txt, one
name per line, the line number (from 0) being the id. Every scene lies elsewhere in UTM zone 35 N.

What is simulated
- Ground, drawn at 2.5 m. Roads cut the land into districts, each ploughed in a direction of its
  own and cut into parcels of about 420 m x 280 m with a grassy margin. Over them lie woods, lakes,
  and a winding river with trees along it.
- Cover. A pixel mixes plants with what lies between them. A parcel draws its amounts, its plants
  (tree, crop and grass spectra in a mixture), its ground (bare to straw) and its brightness from
  ranges that overlap between classes, and soil patches of some 50 m vary the cover inside it. So
  one pixel's colour tells water and forest apart, but not orchard, row crop, strip crop and meadow.
- Texture tells these: trees on a grid of 22-30 m, rows 15-18 m apart, strips of 26-34 m, mottled
  grass; furrows of 16-20 m in bare soil; houses on plots along streets. HR resolves all of it, MR
  the strips and the grid well and the rows hardly: a tenth of their contrast is left.
- Sensors. Reflectance is averaged over pixels, blurred by a Gaussian point spread (2 m and 4 m),
  and given a gain and an offset per image and band, and noise, separately for HR and MR.
- Labels: the commonest class of the 4 x 4 ground cells in an MR pixel. Roads are built-up.

    python -m imagery.scenes OUT --kind rows

draws a ground on which nothing but texture tells the classes apart, in one band P (panchromatic):
parcels of some 240 m x 170 m, each with rows of a period of 12, 17, 24 or 34 m in a direction of
its own, or without rows, under a brightness drawn for the parcel alone. HR keeps 0.94 to 0.66 of
the contrast of a wave as long as such a period, 34 m to 12 m; MR's blur leaves 0.66, 0.44, 0.19 and
0.03: a weak residue that a supervised model of MR images can use.

It is deterministic: scene k is a function of (kind, seed, k, size) alone.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from imagery import raster

GROUND, HR, MR = 2.5, 5.0, 10.0  # metres per pixel: drawing, the two sensors
BANDS = ("B", "G", "R", "NIR")
EPSG = 32635  # WGS 84 / UTM zone 35 N
# share of the parcels, mean plant cover, and what the plants lean to: tree, crop, grass
CLASSES = {
    "water": (0.00, 0.00, (0, 0, 1)),
    "forest": (0.10, 0.75, (1, 0, 0)),
    "orchard": (0.17, 0.46, (1, 0, 0)),
    "row crop": (0.17, 0.50, (0, 1, 0)),
    "strip crop": (0.17, 0.50, (0, 0.6, 0.4)),
    "meadow": (0.17, 0.58, (0, 0, 1)),
    "bare soil": (0.13, 0.10, (0, 1, 0)),
    "built-up": (0.09, 0.50, (0, 0, 1)),
}
WATER, FOREST, ORCHARD, ROWS, STRIPS, MEADOW, SOIL, BUILT = range(8)
# surface reflectance in B, G, R, NIR
PLANTS = np.float32(
    [[0.022, 0.042, 0.026, 0.330], [0.028, 0.066, 0.036, 0.400], [0.036, 0.076, 0.052, 0.340]]
)
STRAW = np.float32([0.062, 0.092, 0.112, 0.270])
BARE = np.float32([0.072, 0.100, 0.138, 0.210])
LAKE = np.float32([0.050, 0.045, 0.030, 0.020])
TAR = np.float32([0.085, 0.092, 0.100, 0.125])
ROOF = np.float32([0.090, 0.110, 0.180, 0.250])
PARCELS = 4096  # parcels drawn per scene; a large scene uses them again, far apart
PERIODS = {f"rows {period} m": period for period in (12, 17, 24, 34)} | {"no rows": np.inf}


# ---- drawing the ground ------------------------------------------------------------------------


def gaussian(at, nodes, sigma):
    """(len(at), len(nodes)) float32 weights of the nodes at each position; rows sum to 1."""
    weight = np.exp(-0.5 * ((at[:, None] - nodes) / sigma) ** 2)
    return (weight / weight.sum(1, keepdims=True)).astype(np.float32)


def field(rng, n, scale):
    """Smooth Gaussian noise (n, n), mean 0, deviation 1, with features of about `scale` metres."""
    nodes = np.arange(-2 * scale, n * GROUND + 2 * scale, scale)
    spread = gaussian((np.arange(n) + 0.5) * GROUND, nodes, 0.6 * scale)
    noise = spread @ rng.standard_normal((len(nodes), len(nodes)), dtype=np.float32) @ spread.T
    return (noise - noise.mean()) / noise.std()


def rotate(x, y, angle):
    cos, sin = np.cos(angle), np.sin(angle)
    return x * cos + y * sin, y * cos - x * sin


def bricks(rng, u, v, length, width):
    """Cut the plane into rows of uneven bricks, about length x width metres.

    Returns the brick of each point, an id in 0..1023 (the wall repeats after 32 bricks), and its
    distance to the nearest cut, metres.
    """
    cuts = rng.uniform(0.2, 0.8, (33, 32)).astype(np.float32)  # the last row cuts v, the others u
    v, u = v / width, u / length
    row, col = np.floor(v).astype(np.int32), np.floor(u).astype(np.int32)
    beyond_v = v - row - cuts[32, row % 32]
    row = (row + (beyond_v > 0)) % 32
    beyond_u = u - col - cuts[row, col % 32]
    col = (col + (beyond_u > 0)) % 32
    return row * 32 + col, np.minimum(np.abs(beyond_v) * width, np.abs(beyond_u) * length)


def stripes(wave, cover):
    """Plant cover of stripes where `wave` runs from -1 to 1 as a cosine, about `cover` of it."""
    return np.clip(0.5 + 1.5 * (wave - np.cos(np.pi * cover)), 0, 1)


def landscape(rng, size):
    """A landscape of size x size MR pixels, drawn in n x n cells of GROUND metres.

    Returns reflectance (4, n, n) float32 and class ids (n, n) uint8.
    """
    n = size * round(MR / GROUND)
    side = np.float32(n * GROUND)
    y, x = np.mgrid[:n, :n].astype(np.float32) * GROUND
    bent_x, bent_y = x + 12 * field(rng, n, 350), y + 12 * field(rng, n, 350)

    # districts between roads, parcels within each, in coordinates along its direction
    u, v = rotate(bent_x, bent_y, np.float32(rng.uniform(0, np.pi)))
    district, to_road = bricks(rng, u, v, 1500, 1000)
    angle, *shift = rng.uniform(0, [[np.pi], [1e4], [1e4]], (3, 1024)).astype(np.float32)
    u, v = rotate(bent_x, bent_y, angle[district])
    u, v = u + shift[0][district], v + shift[1][district]
    parcel, to_margin = bricks(rng, u, v, 420, 280)
    parcel = (parcel + 37 * district) % PARCELS

    # what each parcel is, and what grows on it: ranges that overlap between the classes
    share, amount, lean = (np.float32(column) for column in zip(*CLASSES.values(), strict=True))
    kind = rng.choice(len(CLASSES), PARCELS, p=share / share.sum())
    amount = amount[kind] + 0.05 * rng.standard_normal(PARCELS, dtype=np.float32)
    plants = (rng.dirichlet((2, 2, 2), PARCELS) + lean[kind]).astype(np.float32) / 2 @ PLANTS
    straw = rng.uniform(0.25, 0.75, (PARCELS, 1)).astype(np.float32)
    brightness = 1 + 0.04 * rng.standard_normal((PARCELS, 1), dtype=np.float32)
    plants, bare = plants * brightness, (straw * STRAW + (1 - straw) * BARE) * brightness
    period = rng.uniform(0, 1, PARCELS).astype(np.float32)
    along = rng.choice([0, np.pi / 2], PARCELS) + 0.03 * rng.standard_normal(PARCELS)
    r, s = rotate(u, v, along.astype(np.float32)[parcel])  # along and across the parcel's rows

    # woods, lakes and the river know no parcels
    label = kind.astype(np.uint8)[parcel]
    wild = field(rng, n, 450)
    label[(wild > 1) & (label != BUILT)] = FOREST
    label[field(rng, n, 350) > 1.9] = WATER
    a, b = rotate(x - side / 2, y - side / 2, np.float32(rng.uniform(0, np.pi)))
    for length in (700, 1300, 2600):
        b += np.float32(rng.uniform(20, 90)) * np.sin(
            a * np.float32(2 * np.pi / length) + np.float32(rng.uniform(0, 2 * np.pi))
        )
    to_river = np.abs(b - side * np.float32(rng.uniform(-0.35, 0.35)))
    bank = np.float32(rng.uniform(20, 50))
    label[to_river < bank + 25 + 20 * wild] = FOREST
    label[to_river < bank] = WATER

    # plant cover: a mean per parcel, patches in it, and the pattern of the class around that
    patches, mottle = field(rng, n, 50), field(rng, n, 8)
    cover = np.clip(amount[parcel] + 0.18 * patches, 0.03, 0.97)
    shade = 1 + 0.06 * mottle
    at = [label == k for k in range(len(CLASSES))]

    def cosine(position, shortest, longest, where):
        spacing = shortest + (longest - shortest) * period[parcel[where]]
        return np.cos(2 * np.pi * position[where] / spacing)

    cover[at[FOREST]] = np.clip(0.75 + 0.25 * field(rng, n, 11)[at[FOREST]], 0.1, 1)
    trees = cosine(r, 22, 30, at[ORCHARD]) + cosine(s, 22, 30, at[ORCHARD])
    cover[at[ORCHARD]] = stripes(trees / 2, 0.15 + 0.7 * cover[at[ORCHARD]])
    cover[at[ROWS]] = stripes(cosine(s, 15, 18, at[ROWS]), cover[at[ROWS]])
    cover[at[STRIPS]] = stripes(cosine(s, 26, 34, at[STRIPS]), cover[at[STRIPS]])
    cover[at[MEADOW]] += 0.06 * mottle[at[MEADOW]]
    cover[at[SOIL]] *= 0.5
    shade[at[SOIL]] += 0.12 * cosine(s, 16, 20, at[SOIL])

    plants, bare = plants.T[:, parcel], bare.T[:, parcel]  # (4, n, n)
    plants[:, at[FOREST]] = PLANTS[0, :, None]
    bare[:, at[FOREST]] = 0.4 * PLANTS[0, :, None]  # the dark between the crowns
    withered = 0.1 * field(rng, n, 50) * ~at[FOREST]
    plants += withered * (STRAW[:, None, None] - plants)
    ground = cover * plants + (1 - cover) * bare

    # what people build, then tracks between the parcels, then water over everything but bridges
    house = (np.abs(r % 28 - 14) < 7) & (np.abs(s % 36 - 10) < 5.5) & at[BUILT]
    street = ((s % 72 < 8) | (r % 196 < 8)) & at[BUILT]
    track = (to_margin < 3) & (at[ORCHARD] | at[ROWS] | at[STRIPS] | at[MEADOW] | at[SOIL])
    road = to_road < 6
    label[road] = BUILT
    covers = (track, PLANTS[2]), (house, ROOF), (street, TAR), (at[WATER], LAKE), (road, TAR)
    for where, reflectance in covers:
        ground[:, where] = reflectance[:, None]
    return ground * shade, label


def rows(rng, size):
    """Parcels of rows, of size x size MR pixels: as `landscape`, reflectance (1, n, n)."""
    n = size * round(MR / GROUND)
    y, x = np.mgrid[:n, :n].astype(np.float32) * GROUND
    parcel, _ = bricks(rng, *rotate(x, y, np.float32(rng.uniform(0, np.pi))), 240, 170)
    kind = rng.integers(0, len(PERIODS), 1024)
    period = np.array([*PERIODS.values()])[kind] * (1 + 0.05 * rng.standard_normal(1024))
    angle, phase = rng.uniform(0, [[np.pi], [2 * np.pi]], (2, 1024))
    brightness = 0.15 + 0.03 * rng.standard_normal(1024)
    # waves per metre along x and y, and what a row adds: nothing to parcels without
    wave = 2 * np.pi / period * np.stack([np.cos(angle), np.sin(angle)])
    contrast = np.where(np.isfinite(period), 0.05, 0)
    east, north, phase, brightness, contrast = (
        table.astype(np.float32)[parcel] for table in (*wave, phase, brightness, contrast)
    )
    ground = brightness + contrast * np.sign(np.sin(x * east + y * north + phase))
    return ground[None], kind.astype(np.uint8)[parcel]


# what can be drawn: the ground, the names of its bands and of its classes
KINDS = {"landscape": (landscape, BANDS, [*CLASSES]), "rows": (rows, ("P",), [*PERIODS])}


# ---- the two sensors ---------------------------------------------------------------------------


def sample(truth, factor, blur):
    """Average reflectance (C, n, n) over pixels of factor x factor cells, blurred by a Gaussian.

    blur: deviation of the point spread in cells, 0 for none. Returns (C, n / factor, n / factor).
    """
    cells = np.arange(truth.shape[-1])
    view = np.repeat(np.eye(len(cells) // factor, dtype=np.float32), factor, axis=1) / factor
    if blur:
        view = view @ gaussian(cells, cells, blur)
    return view @ truth @ view.T


def record(rng, reflectance):
    """What a sensor stores of it: gain and offset per band, noise, uint16 reflectance x 10000."""
    bands = len(reflectance)
    gain = 1 + 0.02 * rng.standard_normal((bands, 1, 1), dtype=np.float32)
    offset = 0.003 * rng.standard_normal((bands, 1, 1), dtype=np.float32)
    noise = 0.003 * rng.standard_normal(reflectance.shape, dtype=np.float32)
    return np.rint((reflectance * gain + offset + noise).clip(1e-4, 6.5535) * 1e4).astype(np.uint16)


def scene(seed, k, size, kind="landscape"):
    """Scene k of a seed: hr (C, 2 size, 2 size) uint16, mr (C, size, size) uint16, label
    (size, size) uint8. A function of its arguments alone."""
    rng = np.random.default_rng((seed, k))
    draw, _, classes = KINDS[kind]
    ground, label = draw(rng, size)
    truth = ground.reshape(len(ground), 2 * size, 2, 2 * size, 2).mean((2, 4))  # at HR's pixels
    hr = record(rng, sample(truth, 1, 2 / HR))
    mr = record(rng, sample(truth, 2, 4 / HR))
    votes = [(label == k).reshape(size, 4, size, 4).sum((1, 3)) for k in range(len(classes))]
    return hr, mr, np.argmax(votes, axis=0).astype(np.uint8)


# ---- files -------------------------------------------------------------------------------------


def corner(k, size):
    """Easting and northing of scene k's top-left corner: ten to a row, one scene's width apart."""
    step = 2 * size * MR
    return 300_000 + k % 10 * step, 5_500_000 - k // 10 * step


def check_output(out):
    """Raise ValueError if `out` is a file or a folder that holds anything."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out} exists; remove it, or name a new folder to write the scenes to")


def write_scenes(out, scenes, size, seed, kind="landscape", hr_shift=0):
    """Write the folders and files of the module's docstring; all of them appear, or none.

    hr_shift: HR pixels that the content of HR lies east of where its georeference says, as in a
    badly registered image; what leaves a scene in the east enters in the west.
    Raises ValueError as `check_output` does.
    """
    check_output(out)
    _, bands, classes = KINDS[kind]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as partial:
        new = Path(partial) / "scenes"
        for folder in ("hr", "mr", "masks"):
            (new / folder).mkdir(parents=True)
        (new / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
        for k in tqdm(range(scenes), desc="scenes", unit="scene"):
            hr, mr, label = scene(seed, k, size, kind)
            hr = np.roll(hr, hr_shift, axis=-1)
            x, y = corner(k, size)
            for folder, array, gsd, names in (
                ("hr", hr, HR, bands),
                ("mr", mr, MR, bands),
                ("masks", label, MR, ("class",)),
            ):
                raster.write(
                    new / folder / f"scene_{k:03d}.tif",
                    array,
                    transform=(gsd, 0, x, 0, -gsd, y),
                    crs=EPSG,
                    band_names=names,
                )
        if out.exists():
            out.rmdir()  # it is empty
        os.replace(new, out)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m imagery.scenes",
        description="Write procedural landscapes as paired GeoTIFFs with labels.",
        allow_abbrev=False,
    )
    # fmt: off
    add = parser.add_argument
    add("out", type=Path, help="new folder to write")
    add("--kind", choices=KINDS, default="landscape",
        help="fields, woods and towns in four bands, or parcels that differ in texture alone "
        "(default: landscape)")
    add("--scenes", type=int, default=24, help="number of scenes (default: 24)")
    add("--size", type=int, default=256,
        help="side of a scene, MR pixels of 10 m (default: 256)")
    add("--seed", type=int, default=0, help="random seed, 0 or more (default: 0)")
    add("--hr-shift", type=int, default=0,
        help="HR pixels of 5 m that HR lies beside its georeference, to the east: misregistration "
        "on purpose (default: 0)")
    # fmt: on
    args = parser.parse_args(argv)
    try:
        for flag, least in (("scenes", 1), ("size", 16), ("seed", 0)):
            if getattr(args, flag) < least:
                raise ValueError(f"--{flag} {getattr(args, flag)} is below {least}")
        write_scenes(args.out, args.scenes, args.size, args.seed, args.kind, args.hr_shift)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
