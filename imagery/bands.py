"""The words that all rooms share: names of bands, and the label of a pixel that has none.

B02, Blue and B are one band. A bare B2 is Sentinel-2's blue only where something says that the
names are Sentinel-2's: of Landsat 5 and 7 it is green, and Landsat's B8 is no near infrared.
"""

IGNORE = -1  # the ignored label in every Task, whatever the files call it

# the names that mean the same, in lower case, without blanks, hyphens and underscores
SAME_BAND = {"b02": "B", "b03": "G", "b04": "R", "b08": "NIR"}
SAME_BAND |= {"blue": "B", "green": "G", "red": "R", "nir": "NIR"}
SAME_BAND |= {"b": "B", "g": "G", "r": "R", "n": "NIR", "nearinfrared": "NIR"}

BARE = {f"b{n}": f"b0{n}" for n in range(1, 10)}  # as Sentinel-2's bands are often written


def is_sentinel(names):
    """Whether names are Sentinel-2's: one is its alone (B8A, or with a zero: B02), or three are of
    B2, B3, B4 and B8 and none is B1, B5, B6 or B7, which Landsat has too."""
    lower = {name.lower() for name in names}
    return bool(lower & {"b8a", *BARE.values()}) or (
        len(lower & {"b2", "b3", "b4", "b8"}) >= 3 and not lower & {"b1", "b5", "b6", "b7"}
    )


def meanings(names, sentinel=False):
    """The names of one file's bands, those that mean the same in one spelling, else in lower case.

    sentinel: whether a bare B2 is Sentinel-2's although the names do not tell (`is_sentinel`).
    """
    lower = [name.lower() for name in names]
    if sentinel or is_sentinel(names):
        lower = [BARE.get(name, name) for name in lower]
    plain = (name.translate({ord(sign): None for sign in " _-"}) for name in lower)
    return [SAME_BAND.get(short, name) for short, name in zip(plain, lower, strict=True)]


def positions(wanted, names, sentinel=False):
    """Where the wanted bands of a file are among its names, -1 for those that are not.

    wanted: positions from 0 as text, or names, which are found as they are, or else by what they
    mean: of a file of Sentinel-2's names B2 is B02. sentinel: of `meanings`.
    """
    sentinel = sentinel or is_sentinel(names)
    known = dict(zip(meanings(names, sentinel)[::-1], range(len(names))[::-1], strict=True))
    exact = {name.lower(): band for band, name in enumerate(names)}
    return [
        int(w) if w.isdecimal() else exact.get(w.lower(), known.get(meant, -1))
        for w, meant in zip(wanted, meanings(wanted, sentinel), strict=True)
    ]
