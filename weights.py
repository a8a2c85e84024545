"""Encoders in and out: ours, official I-JEPA and Latent MIM, and timm, MAE and DINO ViTs.

`save_encoder` writes what `load_encoder` reads back with all that is known of its data;
`load_encoder` reads a `ViT` off any of these families' weights and says what it recognised;
`fit_bands` makes it read other bands. Nothing in a file is run: no pickle, no code.
"""

import json
import math
import os
import pickle
import re
from pathlib import Path

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from model import ViT, position_table

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}  # of published widths


def save_encoder(encoder, path, **meta):
    """Write a `ViT` (without projection head) to a safetensors file, atomically.

    meta: JSON-able facts that travel with the weights, such as bands, mean and std; `load_encoder`
    returns them as `encoder.meta`.
    """
    state = {k: v.contiguous() for k, v in encoder.state_dict().items() if k[:5] != "head."}
    write_tensors(path, state, {"config": encoder.config, "meta": meta})


def write_tensors(path, state, facts):
    """Write tensors by name and JSON-able facts to a safetensors file, atomically; the reverse of
    `read_tensors`."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    # as bytes: safetensors' own writer lets nobody but the owner read the file
    partial.write_bytes(save(state, metadata={"crossscale": json.dumps(facts)}))
    os.replace(partial, path)


RESAVE = (
    "python -c \"import torch; c = torch.load('{path}', map_location='cpu', weights_only=False); "
    "c = c.state_dict() if hasattr(c, 'state_dict') else c; "
    "torch.save({{k: v for k, v in c.items() if torch.is_tensor(v) or isinstance(v, dict) "
    "and all(map(torch.is_tensor, v.values()))}}, '{weights}')\""
)


def read_tensors(path):
    """All tensors of a .safetensors or torch file: (nested dict, crossscale facts or None).

    The facts of our exports are a dict with the dicts config and meta in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such encoder; give a run directory or a weights file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                facts = (file.metadata() or {}).get("crossscale")
                state = {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
        if facts is None:
            return state, None
        try:
            facts = json.loads(facts)
            fits = isinstance(facts["config"], dict) and isinstance(facts["meta"], dict)
        except (ValueError, LookupError, TypeError, RecursionError):
            fits = False
        if not fits:
            raise ValueError(
                f"{path}: its crossscale metadata is no JSON object with the objects config and "
                "meta; export or fetch it again"
            )
        return state, facts
    try:
        return torch.load(path, map_location="cpu", weights_only=True), None
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:
            raise ValueError(f"{path}: not a readable torch checkpoint; fetch it again") from None
        raise ValueError(
            f"{path}: holds more than tensors (a {found[1]}), and reading that could run code; if "
            f"you trust its source, re-save the weights alone: "
            + RESAVE.format(path=path, weights=path.with_name(path.stem + "-weights.pt"))
        ) from None
    except Exception as error:  # whatever a damaged or foreign file provokes, in one sentence
        reason = str(error).splitlines()[0] if str(error) else "it ends too soon"
        raise ValueError(f"{path}: not a readable torch checkpoint ({reason})") from None


def find_encoder(tree, path):
    """The ViT state dict in a checkpoint: (flat dict, where it was found)."""
    flat, stack = {}, [("", tree)]
    while stack:
        prefix, node = stack.pop()
        for key, value in node.items():
            if isinstance(value, dict):
                stack.append((f"{prefix}{key}.", value))
            elif torch.is_tensor(value):
                flat[f"{prefix}{key}"] = value
    ending = "blocks.0.attn.qkv.weight"
    found = [key[: -len(ending)] for key in flat if re.search(r"(^|\.)" + re.escape(ending), key)]
    # a checkpoint may hold several: I-JEPA's own evaluation reads the target encoder, Latent MIM's
    # and ours the student; ViTs trained by DINO the teacher
    order = [
        r"objective\.student\.",
        r"target_encoder\.(module\.)?",
        r"(state_dict\.)?(module\.)?encoder\.(module\.)?",
        r"teacher\..*",
        r"student\..*",
        r".*",
    ]
    for pattern in order:
        for prefix in sorted(found):
            if re.fullmatch(pattern, prefix):
                inside = [key for key in flat if key.startswith(prefix)]
                return {key[len(prefix) :]: flat[key] for key in inside}, prefix
    raise ValueError(
        f"{path}: no vision transformer found (no key ends in {ending}); "
        f"it holds {', '.join(sorted(flat)[:3]) or 'no tensors'} ..."
    )


def load_encoder(path, heads=None):
    """Read a pretrained encoder from a run directory or a weights file -> `ViT` in eval mode.

    Understands our exports and checkpoints, official I-JEPA and Latent MIM files, and timm, MAE and
    DINO ViT state dicts, as .safetensors or as torch files (`weights_only=True`: nothing in them is
    run). Width, depth, patch and bands are read off the weights; `heads` follows from the width for
    the published sizes. `encoder.meta` holds what the export says of its data, {} for other files.
    Prints what was recognised and what was left out. Raises FileNotFoundError or ValueError.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "encoder.safetensors"
    tree, facts = read_tensors(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: holds a {type(tree).__name__}, not a dict of weights")
    try:
        return parse_encoder(tree, facts, path, heads)
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, ValueError) as e:
        if str(e).startswith(f"{path}:"):
            raise
        reason = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
        raise ValueError(f"{path}: not the weights of a plain ViT ({reason})") from None


def parse_encoder(tree, facts, path, heads):
    """`load_encoder` for what `read_tensors` found."""
    state, found_at = find_encoder(tree, path)
    if facts is None and isinstance(tree.get("facts"), str):  # our ckpt.pt
        facts = json.loads(tree["facts"])
    notes = []

    # Latent MIM's names: embed.proj (D, row * col * channel), pos_embed.pos_embeds
    patches = state.pop("embed.proj.weight", None)
    if patches is not None:
        values = patches.shape[1]
        # 4 bands or 3 where the rest is a square, else the fewest that leave a square
        bands = next(
            c for c in (4, 3, *range(1, values + 1)) if values == c * math.isqrt(values // c) ** 2
        )
        side = math.isqrt(values // bands)
        state["patch_embed.proj.weight"] = rearrange(
            patches, "d (p q c) -> d c p q", p=side, q=side
        )
        state["patch_embed.proj.bias"] = state.pop("embed.proj.bias")
        notes.append("Latent MIM's flat patch weights")
    table = state.pop("pos_embed.pos_embeds", None)
    table = state.pop("pos_embed", None) if table is None else table

    # LayerScale multiplies a branch's output: the same as scaling its last linear map
    for key in [key for key in state if key.endswith((".ls1.gamma", ".ls2.gamma"))]:
        gamma = state.pop(key)
        last = key[: -len("ls1.gamma")] + ("attn.proj." if ".ls1." in key else "mlp.fc2.")
        state[last + "weight"] = state[last + "weight"] * gamma[:, None]
        state[last + "bias"] = state[last + "bias"] * gamma
        if "LayerScale folded in" not in notes:
            notes.append("LayerScale folded in")

    weight = state.get("patch_embed.proj.weight")
    if weight is None or weight.ndim != 4:
        raise ValueError(f"{path}: no patch embedding (patch_embed.proj.weight) beside the blocks")
    dim, bands, patch = weight.shape[:3]
    config = dict(
        in_channels=bands,
        patch_size=patch,
        dim=dim,
        depth=1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / dim
        if "blocks.0.mlp.fc1.weight" in state
        else 4.0,
        class_token="cls_token" in state,
    )
    if facts is not None:
        config = facts["config"]
    else:
        config["heads"] = heads or HEADS.get(dim)
        if config["heads"] is None:
            raise ValueError(f"{path}: width {dim} is no published size; give heads=")
    if table is not None:
        table = table.reshape(-1, dim).float()
        side = math.isqrt(len(table))
        grid = tuple(config.get("pos_grid") or (side, side))
        if config["class_token"] and len(table) == grid[0] * grid[1] + 1:
            state["cls_token"] = state["cls_token"] + table[0]  # its position, for good
            table = table[1:]
        if grid[0] * grid[1] != len(table):
            raise ValueError(f"{path}: a position table of {len(table)} rows is no square grid")
        for kind in ("ijepa", "latentmim"):
            if torch.allclose(position_table(grid, dim, kind), table, atol=1e-4):
                config["pos"] = kind
                notes.append(f"sine-cosine positions ({kind}) checked and dropped")
                break
        else:
            config["pos"], config["pos_grid"] = "learned", grid
            state["pos_embed"] = table[None]
            notes.append(f"learned positions of a {grid[0]} x {grid[1]} grid")
    elif facts is None:
        notes.append("no position table: I-JEPA's sine-cosine positions assumed")

    encoder = ViT(**config)
    wanted = encoder.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    wrong = sorted(k for k in wanted.keys() & state.keys() if wanted[k].shape != state[k].shape)
    extra = sorted(state.keys() - wanted.keys())
    # what would change the tokens; a head or a predictor beside the encoder would not
    blocking = [k for k in extra if re.match(r"blocks\.|norm_pre|.*(reg|dist|storage)\w*_token", k)]
    if missing or wrong or blocking:
        raise ValueError(
            f"{path}: another architecture than a plain ViT: "
            f"{len(missing)} weights missing, {len(wrong)} of another shape, {len(blocking)} "
            f"unknown (such as {(missing + wrong + blocking)[0]})"
        )
    broken = [key for key in wanted if not state[key].isfinite().all()]
    if broken:
        raise ValueError(f"{path}: {len(broken)} weights hold NaN or inf (such as {broken[0]})")
    encoder.load_state_dict({key: state[key].float() for key in wanted})
    encoder.meta = facts["meta"] if facts else {}
    left = sorted({key.split(".")[0] for key in extra})
    notes += [f"left out: {', '.join(left)}"] if left else []
    print(
        f"{path}: {'crossscale ' if facts else ''}ViT at {found_at or 'top level'}: "
        f"{encoder.in_channels} bands, patch {patch}, {dim} wide, {config['depth']} deep, "
        f"{config['heads']} heads" + "".join(f"; {note}" for note in notes)
    )
    return encoder.eval()


def fit_bands(encoder, bands):
    """The encoder for images of `bands`, a list of names such as ["B", "G", "R", "NIR"].

    Its own bands are those of `encoder.meta`, or R, G, B for 3-band weights without. Known bands
    keep their weights, in their new place; 3-band weights are inflated, every other band getting
    the mean of the three, and all scaled by 3 / len(bands), so that a patch which is equal in all
    bands gives the same token as before. Returns `encoder` itself where nothing changes, also where
    the number of bands fits and the names tell nothing. Raises ValueError if the number does not.
    """
    if encoder.in_channels not in (3, len(bands)):
        raise ValueError(
            f"the encoder reads {encoder.in_channels} bands, the data has {len(bands)} "
            f"({','.join(bands)}); only 3-band weights can be inflated"
        )
    own = encoder.meta.get("bands") or ["R", "G", "B"]
    same_count = encoder.in_channels == len(bands)
    if own == bands or (same_count and set(own) != set(bands)):
        return encoder
    weight = encoder.patch_embed.proj.weight.data
    kernels, mean = dict(zip(own, weight.unbind(1), strict=True)), weight.mean(1)
    weight = torch.stack([kernels.get(band, mean) for band in bands], dim=1)
    fitted = ViT(**{**encoder.config, "in_channels": len(bands)})
    state = {"patch_embed.proj.weight": weight * encoder.in_channels / len(bands)}
    fitted.load_state_dict({**encoder.state_dict(), **state})
    return fitted
