"""Damaged files to every reader of weights and checkpoints: each is read, or refused in a sentence.

    python tests/fuzz.py --seconds 60 --seed 0      as .ci/run does; hours by the flag

A seed gives the same files. What neither loads nor is refused by ValueError or FileNotFoundError in
one line, or takes over 10 s, ends the run with its seed and number, and the file is kept.
"""

import argparse
import contextlib
import io
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from files import save_sealed
from model import ViT
from run import Ranks, read_checkpoint, read_config
from segment import Segmenter, load_segmenter, save_segmenter
from weights import load_encoder, save_encoder

SLOW = 10  # seconds


def samples(folder):
    """Small whole files, {path: its reader}."""
    torch.manual_seed(0)
    encoder, alone = ViT(dim=8, depth=1, heads=2, patch_size=2), Ranks(0, 1, torch.device("cpu"))
    save_encoder(encoder, folder / "encoder.safetensors", bands=["B", "G", "R", "NIR"])
    torch.save(encoder.state_dict(), folder / "foreign.pt")
    save_sealed({"objective": encoder.state_dict(), "step": 1}, folder / "ckpt.pt")
    save_segmenter(
        folder / "model.safetensors", Segmenter(encoder, 2, 8), classes=["a", "b"], bands=[],
        positions=[0, 1, 2, 3], file_bands=4, mean=[0.0] * 4, std=[1.0] * 4, tile=8, gsd=None,
    )  # fmt: skip
    (folder / "config.json").write_text(
        '{"args": {"lr": 0.1}, "steps": 1, "precision": "float32", "chips": "a"}'
    )
    return {
        "encoder.safetensors": load_encoder,
        "foreign.pt": lambda path: load_encoder(path, heads=2),
        "ckpt.pt": lambda path: read_checkpoint(path, alone),
        "model.safetensors": load_segmenter,
        "config.json": read_config,
    }


def mutated(data, draw):
    """Bytes with a few changes: flips, cuts, repeats, numbers at the ends of their ranges."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        if not data:
            break
        at, kind = draw.randrange(len(data)), draw.randrange(6)
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at] = draw.randrange(256)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data[at:at] = data[at : at + draw.randrange(1, 64)]
        elif kind == 4:
            size = draw.choice((2, 4, 8))
            data[at : at + size] = draw.choice((b"\0", b"\xff", b"\x7f")) * size
        else:
            data[at:at] = b"[" * draw.choice((1, 5000))
    return bytes(data)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder, draw = Path(tempfile.mkdtemp(prefix="fuzz-")), random.Random(args.seed)
    readers = samples(folder)
    whole = {name: (folder / name).read_bytes() for name in readers}
    end, outcomes = time.monotonic() + args.seconds, {"read": 0, "refused": 0}
    while time.monotonic() < end:
        name = draw.choice(list(readers))
        path = folder / name
        path.write_bytes(mutated(whole[name], draw))
        start, count = time.monotonic(), sum(outcomes.values())
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                readers[name](path)
            outcomes["read"] += 1
        except (ValueError, FileNotFoundError) as error:
            if "\n" in str(error) or str(path) not in str(error):
                sys.exit(f"seed {args.seed}, file {count}, {path}: not one sentence: {error}")
            outcomes["refused"] += 1
        except Exception as error:
            sys.exit(f"seed {args.seed}, file {count}, {path}: {error!r}")
        if time.monotonic() - start > SLOW:
            sys.exit(f"seed {args.seed}, file {count}, {path}: took over {SLOW} s")
    print(f"seed {args.seed}: {outcomes}")


if __name__ == "__main__":
    main()
