"""Encoders in and out: ours, official I-JEPA and Latent MIM, and timm, MAE and DINO ViTs.

`save_encoder` writes what `load_encoder` reads back with all that is known of its data;
`load_encoder` reads a `ViT` off any of these families' weights and says what it recognised;
`fit_bands` makes it read other bands; `to_timm` gives it to timm. Nothing in a file is run: no
pickle, no code.
"""

import contextlib
import hashlib
import json
import math
import pickle
import re
import shlex
from pathlib import Path

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from files import NO_DIGEST, check_digest, load_sealed, seal_tensors, write_atomic
from imagery.bands import meanings
from model import SIZES, ViT, position_table

# (width, depth) of published ViTs -> attention heads, which no weight shows
HEADS = {(dim, depth): heads for dim, depth, heads in SIZES.values()} | {(1408, 40): 16}


def save_encoder(encoder, path, **meta):
    """Write a `ViT` (without projection head) to a safetensors file, atomically.

    meta: JSON-able facts that travel with the weights, such as bands, mean and std; `load_encoder`
    returns them as `encoder.meta`.
    """
    state = {k: v.contiguous() for k, v in encoder.state_dict().items() if k[:5] != "head."}
    write_tensors(path, state, {"config": encoder.config, "meta": meta})


def to_timm(encoder, grid):
    """The weights of a `ViT` for timm's VisionTransformer, which holds one grid's position table.

    grid: (rows, cols) of tokens. Returns a state dict that loads strictly, with the tokens of
    `encoder.encode` from `forward_features`, into
        VisionTransformer(img_size=(rows * patch, cols * patch), patch_size=patch, in_chans=bands,
            embed_dim=dim, depth=depth, num_heads=heads, mlp_ratio=mlp_ratio, num_classes=0,
            class_token=class_token, global_pool="token" if class_token else "", fc_norm=False)
    (`encoder.config` has the values; timm's own LayerNorm has our epsilon). `load_encoder` reads it
    back, but for the heads, which no weight shows.
    """
    state = {k: v.detach().clone() for k, v in encoder.state_dict().items() if k[:5] != "head."}
    with torch.no_grad():
        table = encoder.position(tuple(grid), 1.0, encoder.norm.weight.device)[None]
    if encoder.class_token:  # timm adds a position to it too: none
        table = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
    return state | {"pos_embed": table.clone()}


def write_tensors(path, state, facts):
    """Write tensors by name and JSON-able facts to a safetensors file, atomically; the reverse of
    `read_tensors`. Its metadata hold a digest of the whole file, taken with zeros in its place."""
    metadata = {"crossscale": json.dumps(facts), "sha256": NO_DIGEST}
    # as bytes: safetensors' own writer lets nobody but the owner read the file
    write_atomic(Path(path), seal_tensors(save(state, metadata=metadata)))


def weights_hash(encoder):
    """12 hex digits of a SHA-256 over the names and values of all weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


RESAVE = (
    "import torch; c = torch.load({path!r}, map_location='cpu', weights_only=False); "
    "c = c.state_dict() if hasattr(c, 'state_dict') else c; "
    "torch.save({{k: v for k, v in c.items() if torch.is_tensor(v) or isinstance(v, dict) "
    "and all(map(torch.is_tensor, v.values()))}}, {weights!r})"
)


def read_tensors(path):
    """All tensors of a .safetensors or torch file: (nested dict, crossscale facts or None).

    The facts of our exports are a dict with the dicts config and meta in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such encoder; give a run directory or a weights file")
    if path.suffix == ".safetensors":
        check_digest(path)
        try:
            with safe_open(path, framework="pt") as file:
                facts = (file.metadata() or {}).get("crossscale")
                state = {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
        if facts is None:
            return state, None
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
            facts = json.loads(facts)
            if isinstance(facts["config"], dict) and isinstance(facts["meta"], dict):
                return state, facts
        raise ValueError(
            f"{path}: its crossscale metadata is no JSON object with the objects config and meta; "
            "export or fetch it again"
        )
    try:
        return load_sealed(path), None
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:
            raise ValueError(f"{path}: not a readable torch checkpoint; fetch it again") from None
        weights = path.with_name(path.stem + "-weights.pt")
        command = RESAVE.format(path=str(path), weights=str(weights))
        raise ValueError(
            f"{path}: holds more than tensors (a {found[1]}), and reading that could run code; if "
            f"you trust its source, re-save the weights alone: python -c {shlex.quote(command)}"
        ) from None
    except Exception as error:  # whatever a damaged or foreign file provokes, in one sentence
        reason = str(error).removeprefix(f"{path}: ").splitlines() or ["it ends too soon"]
        raise ValueError(f"{path}: not a readable torch checkpoint ({reason[0]})") from None


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
    # a checkpoint may hold several: I-JEPA's own evaluation reads the target encoder, Latent MIM's,
    # MoCo v3's and ours the student; ViTs trained by DINO the teacher
    order = [
        r"objective\.student\.",
        r"target_encoder\.(module\.)?",
        r"(state_dict\.)?(module\.)?(base_)?encoder\.(module\.)?",
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


def load_encoder(path, heads=None, grid=None):
    """Read a pretrained encoder from a run directory or a weights file -> `ViT` in eval mode.

    Understands our exports and checkpoints, official I-JEPA and Latent MIM files, and timm, MAE,
    DINO and MoCo v3 ViT state dicts, as .safetensors or as torch files (`weights_only=True`:
    nothing in them is run). Width, depth, patch and bands are read off the weights. heads: needed
    where they cannot be known, which is for sizes that no published family has, and where two have
    the same (`known_heads`). grid: (rows, cols) of learned positions, where it is no square.
    `encoder.meta` holds what the export says of its data, {} for other files. Prints what was
    recognised and what was left out. Raises FileNotFoundError or ValueError.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "encoder.safetensors"
    tree, facts = read_tensors(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: holds a {type(tree).__name__}, not a dict of weights")
    try:
        return parse_encoder(tree, facts, path, heads, grid)
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, ValueError) as e:
        if str(e).startswith(f"{path}:"):
            raise
        reason = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
        raise ValueError(f"{path}: not the weights of a plain ViT ({reason})") from None


def known_heads(config, table, found_at):
    """The attention heads of a foreign ViT by what tells its family, None where nothing does.

    table: its position table as in the file, None without. found_at: the keys' prefix.
    """
    dim, sines = config["dim"], None
    if config.get("pos") == "learned" and dim % 4 == 0:
        sines = position_table(config["pos_grid"], dim, "ijepa").roll(dim // 2, dims=1)
    # MoCo v3, also where its names were shortened: sines of the row come before the column's
    moco = "base_encoder." in found_at or "momentum_encoder." in found_at
    if moco or (sines is not None and torch.allclose(table, sines, atol=1e-4)):
        return {384: 12}.get(dim, HEADS.get((dim, config["depth"])))
    if dim == 768 and not config["class_token"] and config.get("pos") in (None, "learned"):
        return None  # SigLIP has 12 heads, timm's vit_base_patch16_gap_224 16
    return HEADS.get((dim, config["depth"]))


def parse_encoder(tree, facts, path, heads=None, grid=None):
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
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        class_token="cls_token" in state,
    )
    claims = sum(weight.numel() * weight.element_size() for weight in state.values())
    if claims > path.stat().st_size:  # a few bytes may claim to be seen as any number of them
        raise ValueError(
            f"{path}: {path.stat().st_size} bytes that claim to be {claims} of weights"
        )
    if facts is not None:  # they say what no weight shows
        config |= {key: facts["config"][key] for key in ("heads", "pos", "pos_grid")}
        if config["pos"] == "learned" and table is None:
            raise ValueError(f"{path}: it lacks its learned positions; export it again")
        if heads and heads != config["heads"]:
            raise ValueError(
                f"{path}: says that it has {config['heads']} heads, not {heads}; leave them out"
            )
        named = facts["meta"].get("bands") or []
        text = isinstance(named, list) and all(isinstance(band, str) for band in named)
        if not text or len(named) not in (0, bands):
            raise ValueError(f"{path}: {bands} bands, its metadata say {named}; export it again")
    if table is not None:
        table = table.reshape(-1, dim).float()
        side = math.isqrt(len(table))
        grid = tuple(config.get("pos_grid") or grid or (side, side))
        if config["class_token"] and len(table) == grid[0] * grid[1] + 1:
            state["cls_token"] = state["cls_token"] + table[0]  # its position, for good
            table = table[1:]
        if grid[0] * grid[1] != len(table):
            raise ValueError(
                f"{path}: a position table of {len(table)} rows is no grid of {grid[0]} x "
                f"{grid[1]} tokens; give its grid=(rows, cols) to load_encoder"
            )
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
    if facts is None:
        config["heads"] = heads or known_heads(config, table, found_at)
        if config["heads"] is None:
            raise ValueError(
                f"{path}: nothing tells how many attention heads a ViT of width {dim} and depth "
                f"{config['depth']} has; give heads=, to a script --heads (--hr-teacher-heads)"
            )
    if "norm.weight" not in state and "fc_norm.weight" in state:
        raise ValueError(
            f"{path}: its last LayerNorm is behind the pooling (fc_norm), so that its tokens have "
            "none; a plain ViT has one (norm)"
        )

    encoder = ViT(**config)
    wanted = encoder.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    wrong = sorted(k for k in wanted.keys() & state.keys() if wanted[k].shape != state[k].shape)
    extra = sorted(state.keys() - wanted.keys())
    # what would change the tokens; a head or a predictor beside the encoder would not
    other = r"blocks\.|norm_pre|patch_embed\.|rope|.*(reg|dist|storage)\w*_token"
    blocking = [key for key in extra if re.match(other, key)]
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


def bands_of(encoder):
    """The names of the bands that an encoder reads, [] where they are not known: what its file says
    (`encoder.meta`), R, G, B of the published 3-band ViTs, whose files say nothing."""
    return encoder.meta.get("bands", ["R", "G", "B"] if encoder.in_channels == 3 else [])


def fit_bands(encoder, bands, name="encoder"):
    """The encoder for images of `bands`, a list of names such as ["B", "G", "R", "NIR"].

    Bands that it knows (`bands_of`), in whatever spelling, keep their weights in their new place.
    Those that it does not know get the mean of its own, and then all are scaled by its number of
    bands over theirs, so that a patch which is equal in all bands gives the same token as before.
    Bands that the images lack are left out, which is to see them at their mean, 0. Where no name
    tells, as many bands are taken in their order, and others only by weights of 3 bands.

    Prints what became of each band, after `name`, the flag and file of the encoder. Returns
    `encoder` itself where nothing changes. Raises ValueError where neither names nor number fit.
    """
    own, count, said = bands_of(encoder), encoder.in_channels, ",".join(bands)
    ours = meanings(own)
    at = [ours.index(band) if band in ours else -1 for band in meanings(bands)]
    has = f"{count} bands ({','.join(own) or 'unnamed'})"
    if max(at) < 0 and count == len(bands):
        print(f"{name}: its {has} read {said} in this order, as no names tell")
        return encoder
    if at == list(range(count)):
        print(f"{name}: its {has} read {said}")
        return encoder
    if max(at) < 0 and count != 3:
        raise ValueError(
            f"{name}: reads {has}, the data has {len(bands)} ({said}), none of the same name; only "
            "3-band weights can be inflated"
        )
    kernels = encoder.patch_embed.proj.weight.data.unbind(1)
    mean, scale = sum(kernels) / count, count / len(bands) if -1 in at else 1.0
    parts = [f"{band} as {own[k]}" if k >= 0 else f"{band} as the mean of all"
             for band, k in zip(bands, at, strict=True)]  # fmt: skip
    parts += [f"{band} left out" for k, band in enumerate(own) if k not in at]
    print(f"{name}: {', '.join(parts)}" + (f"; all x {scale:.3g}" if scale != 1 else ""))
    fitted = ViT(**{**encoder.config, "in_channels": len(bands)})
    weight = torch.stack([kernels[k] if k >= 0 else mean for k in at], dim=1) * scale
    fitted.load_state_dict({**encoder.state_dict(), "patch_embed.proj.weight": weight})
    fitted.meta = {"bands": list(bands)}
    if -1 not in at:  # the statistics go with the bands
        statistics = {k: encoder.meta[k] for k in ("mean", "std") if k in encoder.meta}
        fitted.meta |= {key: [values[k] for k in at] for key, values in statistics.items()}
    return fitted.train(encoder.training)
