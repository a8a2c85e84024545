"""The words that all rooms share: names of bands, and the label of a pixel that has none."""

# the names of bands that mean the same; "B2" is another band of other satellites: see
# datasets.formats.meanings
SAME_BAND = {"b02": "B", "b03": "G", "b04": "R", "b08": "NIR"}
SAME_BAND |= {"blue": "B", "green": "G", "red": "R", "nir": "NIR"}
SAME_BAND |= {"b": "B", "g": "G", "r": "R", "n": "NIR", "nearinfrared": "NIR"}

IGNORE = -1  # the ignored label in every Task, whatever the files call it
