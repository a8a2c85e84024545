import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import ROOT, gradient_norms, refused
from stores import edit_store, write_store
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import figures
import model
import run as runs
import train
from affinity import gram_loss, hr_index, pool_to_mr, token_mse
from data import Chips, Store, draw_crops, open_chips, resample, sample_order
from imagery.scenes import write_scenes
from model import IJEPA, MAE, LatentMIM, ViT, take_patches
from weights import load_encoder, save_encoder

TINY = (
    "--dim 16 --depth 1 --patch 4 --heads 2 --global-batch 4 --log-every 1 --lr 1e-3 --device cpu"
)
DECODER = "--decoder-dim 16 --decoder-depth 1 --decoder-heads 2"
OWN = {  # 6 x 6 tokens
    "ijepa": "--mr-size 24 --predictor-dim 16 --predictor-depth 1 --targets 2 "
    "--target-scale 0.08 0.12",
    "latentmim": f"--mr-size 36 --head-dim 16 --gap 2 --visible 10 {DECODER}",
    "mae": f"--mr-size 24 {DECODER}",
}
every_objective = pytest.mark.parametrize("objective", OWN)
others_slowly = pytest.mark.parametrize(
    "objective", ["ijepa", *(pytest.param(o, marks=pytest.mark.slow) for o in ("latentmim", "mae"))]
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store") / "pairs")


CPU = torch.device("cpu")


def command(store, out, objective="ijepa", steps=2, **flags):
    stores = store if isinstance(store, list) else [store]
    words = [*TINY.split(), *OWN[objective].split(), "--out", out, "--objective", objective]
    words += ["--steps", steps, "--store", *stores, "--precision", "float32"]  # on any CPU
    if "init" in flags:  # it brings its own architecture
        words = words[8:]
    for name, value in flags.items():
        words.append("--" + name.replace("_", "-"))
        words += value if isinstance(value, list) else [] if value is True else [value]
    return [str(word) for word in words]


def run(*args, **flags):
    train.main(train.parse_args(command(*args, **flags)))


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights_of(out):
    return torch.load(out / "ckpt.pt", weights_only=True)["objective"]


def same_weights(a, b):
    assert a.keys() == b.keys()
    assert all(a[key].equal(b[key]) for key in a)


# ---- runs


@every_objective
@pytest.mark.parametrize("variant", train.VARIANTS)
def test_variants(store, tmp_path, objective, variant, capsys):
    out = tmp_path / "run"
    run(store, out, objective, variant=variant)
    log, config = log_of(out), json.loads((out / "config.json").read_text())
    assert [entry["step"] for entry in log] == [1, 2]
    assert all(math.isfinite(v) for e in log for v in e.values() if v is not None)
    # the regulariser's teacher starts as the student, and sees what it sees
    least = 1e-9 if objective == "ijepa" else 0
    assert (log[0]["affinity"] > least) == variant.startswith(("sa", "mse"))
    assert (log[1]["affinity"] > 0) == (train.VARIANTS[variant].loss is not None)
    assert log[0]["rank"] > 2
    assert config["args"]["variant"] == variant and "torch" in config["versions"]
    encoder = load_encoder(out)
    weights = weights_of(out)
    assert encoder.norm.weight.equal(weights["student.norm.weight"])
    sensor = "hr" if variant == "hr" else "mr"
    assert encoder.meta["std"] == Store(store).meta["std"][sensor]
    assert config["encoder"] == encoder.config
    assert encoder.meta["variant"] == variant and encoder.meta["step"] == 2
    assert encoder.meta["seed"] == 0 and encoder.meta["store"] == [store.name]
    files = {"config.json", "log.jsonl", "ckpt.pt", "encoder.safetensors", "tokens.png", "run.lock"}
    assert {p.name for p in out.iterdir()} - {"edits.diff"} == files
    assert (out / "edits.diff").exists() == config["dirty"]
    assert "step 00002/2 | loss" in capsys.readouterr().out
    # the teacher moved, and not as far as the student
    run(store, tmp_path / "start", objective, variant=variant, stop_at=1, lr=0, start_lr=0,
        final_lr=0, weight_decay=0)  # fmt: skip
    before = weights_of(tmp_path / "start")
    key = "blocks.0.mlp.fc1.weight"
    moved = [(weights[f"{who}.{key}"] - before[f"{who}.{key}"]).norm() for who in
             ("teacher", "student")]  # fmt: skip
    assert 0 < moved[0] < 0.1 * moved[1]


OPTIONS = {
    "ijepa": [
        dict(affinity_index="block"),
        dict(pos="ground"),
        dict(ratio=3),
        dict(context_cut="last"),
        dict(precision="bfloat16"),
        dict(compile=False, affinity_weight=0.5),
    ],
    "latentmim": [
        dict(affinity_index="block"),
        dict(affinity_on="trunk"),
        dict(pos="ground"),
        dict(gap_offset="paper"),
        dict(ratio=1, precision="bfloat16"),
        dict(gap=0, mr_size=24),
    ],
}


@pytest.mark.parametrize("objective, flags", [(o, f) for o, fs in OPTIONS.items() for f in fs])
def test_options_train_and_matter(store, tmp_path, objective, flags):
    if flags.pop("compile", None) is False:
        flags["no_compile"] = True
    run(store, tmp_path / "a", objective)
    run(store, tmp_path / "b", objective, **flags)
    a, b = log_of(tmp_path / "a"), log_of(tmp_path / "b")
    assert math.isfinite(b[-1]["loss"]) and b[-1]["affinity"] > 0
    assert abs(a[-1]["loss"] - b[-1]["loss"]) > 1e-5


@every_objective
def test_losses_fall(store, tmp_path, objective):
    run(store, tmp_path / "run", objective, steps=30, lr=3e-3)
    log = log_of(tmp_path / "run")
    first, last = log[:5], log[-5:]
    for key in ("ssl", "affinity"):
        assert sum(e[key] for e in last) < sum(e[key] for e in first)


@every_objective
def test_resume_is_bit_for_bit(store, tmp_path, objective):
    flags = dict(steps=4, affinity_index="block")
    run(store, tmp_path / "whole", objective, **flags)
    run(store, tmp_path / "parts", objective, **flags, stop_at=2)
    assert len(log_of(tmp_path / "parts")) == 2
    # a line of a step after the checkpoint and half a line, as a killed run leaves them
    with open(tmp_path / "parts" / "log.jsonl", "a") as log:
        log.write(json.dumps({"step": 3, "loss": 99}) + '\n{"step": 4, "lo')
    run(store, tmp_path / "parts", objective, **flags, resume=True)
    same_weights(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))
    a, b = log_of(tmp_path / "whole"), log_of(tmp_path / "parts")
    assert [e["loss"] for e in a] == [e["loss"] for e in b]
    assert (tmp_path / "parts" / "ckpt.previous.pt").is_file()
    # the seed is the run: another one differs
    run(store, tmp_path / "other", objective, **flags, seed=1)
    assert log_of(tmp_path / "other")[0]["loss"] != a[0]["loss"]


def test_gradients_are_clipped_where_it_is_asked_for(store, tmp_path, monkeypatch):
    norms = gradient_norms(monkeypatch)
    run(store, tmp_path / "free")
    free, norms[:] = norms[:], []
    small = min(free) / 2
    run(store, tmp_path / "clipped", clip=small)
    assert norms == pytest.approx([small, small], rel=1e-4)
    assert log_of(tmp_path / "clipped")[0]["grad_norm"] == pytest.approx(free[0])  # as it was
    norms[:] = []
    run(store, tmp_path / "large", clip=max(free) * 10)
    assert norms == free


def spawn(words, ranks):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run(
        [sys.executable, *launcher, str(ROOT / "train.py"), *words],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@others_slowly
def test_any_number_of_ranks_trains_the_same_run(store, tmp_path, objective):
    """1 rank, 1 rank with accumulation, 2 ranks, 2 ranks with accumulation."""
    flags = dict(steps=5, affinity_index="block") if objective == "latentmim" else dict(steps=5)
    run(store, tmp_path / "one", objective, **flags)
    run(store, tmp_path / "parts", objective, **flags, device_batch=1)
    for name, more in (("two", {}), ("four", dict(device_batch=1))):
        done = spawn(command(store, tmp_path / name, objective, **flags, **more), 2)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("step 00001/5") == 1  # one rank speaks
    one = log_of(tmp_path / "one")
    for name in ("parts", "two", "four"):
        for a, b in zip(one, log_of(tmp_path / name), strict=True):
            for key in ("loss", "ssl", "affinity", "rank", "place", "target_var", "grad_norm"):
                assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-6), (name, key)
        for key, value in weights_of(tmp_path / name).items():
            if key.endswith("bias"):
                continue  # some have no gradient but rounding, which Adam blows up
            torch.testing.assert_close(
                value, weights_of(tmp_path / "one")[key], rtol=1e-3, atol=1e-4
            )


@every_objective
def test_all_of_a_steps_randomness_depends_on_seed_and_step(store, objective):
    flags = dict(gap_offset="paper") if objective == "latentmim" else {}

    def draw(seed, step):
        args = parsed(store, objective, affinity_index="block", global_batch=8, seed=seed, **flags)
        built = train.build_objective(args, ["B", "G", "R", "NIR"])
        masks, crops = train.draw_step(args, built, step)
        return masks | {"crops": torch.from_numpy(crops)}

    draws = [draw(seed, step) for seed in (0, 1, 2**40) for step in (3, 4)]
    again = draw(2**40, 4)
    expected = {"context", "target", "crops", "block"}
    assert set(again) - expected == ({"offset", "hr_offset"} if flags else set())
    for key, value in again.items():
        assert value.equal(draws[-1][key])
        for i, a in enumerate(draws):
            for b in draws[:i]:
                assert a[key].shape != b[key].shape or not a[key].equal(b[key]), key


def parsed(store, objective, **flags):
    return train.parse_args(command(store, "unused", objective, **flags))


def step_of(args, chips, objective_, teacher=None, device_batch=None):
    """The prepared micro-batches of step 0 of one rank."""
    teacher = teacher or train.build_teacher(args, objective_, chips.bands, CPU)
    ranks = runs.Ranks(0, 1, CPU)
    batch = device_batch or args.global_batch
    return train.prepare(args, chips, objective_, teacher, ranks, batch, 0)


@every_objective
@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_the_teacher_sees_the_ground_of_the_students_tokens(tmp_path, objective, ratio):
    """HR pixels of each MR token, averaged, are its MR pixels, at any ratio and offset."""
    args = parsed(None, objective, ratio=ratio, crop_scale=["1", "1"])
    store = Store(write_store(tmp_path / "s", 4, args.mr_size, ratio))
    for sensor in ("mr", "hr"):
        store.meta["mean"][sensor], store.meta["std"][sensor] = [0.0] * 4, [1.0] * 4
    ids = np.array([[0, 0], [0, 1], [0, 2], [0, 3]])
    chips = Chips([store], ids, np.ones(4, bool), "", store.meta["bands"])
    objective_ = train.build_objective(args, chips.bands["mr"])
    (part,) = step_of(args, chips, objective_)
    mr, hr = data.render(part["student"]), data.render(part["teacher"])
    seen = {}

    def affinity(tokens, index, hr, grid):
        seen.update(index=index, hr=hr, grid=grid)
        return tokens.sum()

    affinity.patch = 4
    context = part["masks"]["context"]
    train.affinity_of(objective_, affinity, part, mr, hr, torch.zeros(4, 10, 16), context)
    if objective == "latentmim":
        mr = objective_.patches(mr, part["masks"])
    torch.testing.assert_close(F.avg_pool2d(seen["hr"], ratio), mr, atol=1.0, rtol=0)
    assert seen["grid"] == (6, 6) and seen["index"].equal(context)


def test_defaults_are_the_papers(store):
    words = ["--store", str(store)]
    args = train.parse_args(words)
    assert (args.objective, args.patch, args.mr_size, args.lr) == ("ijepa", 14, 224, 1e-3)
    assert (args.start_lr, args.final_lr, args.weight_decay) == (2e-4, 1e-6, 0.04)
    assert args.out == Path("out/ijepa-sa-s0")
    args = train.parse_args([*words, "--lr", "5e-4"])  # start and end keep their shares of it
    assert (args.start_lr, args.final_lr) == pytest.approx((1e-4, 5e-7))
    args = train.parse_args([*words, "--objective", "mae"])
    assert (args.patch, args.mr_size, args.global_batch, args.lr) == (14, 224, 1024, 6e-4)
    assert (args.beta2, args.weight_decay) == (0.95, 0.05)
    assert (args.mask_share, args.decoder_dim, args.decoder_depth) == (0.75, 512, 8)
    args = train.parse_args([*words, "--objective", "latentmim"])
    assert (args.patch, args.mr_size, args.global_batch, args.lr) == (16, 280, 512, 3e-4)
    assert (args.start_lr, args.beta2, args.momentum) == (7.5e-5, 0.95, 0.99)
    args = train.parse_args([*words, "--objective", "latentmim", "--lr", "8e-4"])
    assert (args.lr, args.start_lr, args.final_lr) == (8e-4, 2e-4, 2e-4)


# ---- chips without HR, several stores


@pytest.fixture(scope="module")
def partial(tmp_path_factory):
    """Two stores of other sizes, ratios and statistics: one partly paired, one of MR alone."""
    folder = tmp_path_factory.mktemp("partial")
    return [
        write_store(folder / "some", size=16, pairs=[0, 3, 4, 10, 12]),
        write_store(folder / "none", size=20, ratio=3, pairs=[], seed=1),
    ]


@every_objective
@pytest.mark.parametrize("index", ["visible", "block"])
def test_chips_with_and_without_hr_in_one_batch(partial, objective, index):
    """The losses of a mixed batch of two stores are the means of its chips' own: SSL over all,
    affinity over the pairs; without any pair there is nothing to compare."""
    torch.manual_seed(0)
    args = parsed(partial, objective, global_batch=12, affinity_index=index)
    chips = open_chips(args.store, pairs=1)
    built = train.build_objective(args, chips.bands["mr"])
    teacher = train.build_teacher(args, built, chips.bands, CPU)
    affinity = train.build_affinity(args, teacher)

    def losses(device_batch):
        parts = step_of(args, chips, built, teacher, device_batch)
        for part in parts:
            mr = data.render(part["student"])
            ssl, tokens, index = built(mr, part["masks"])
            term = torch.zeros(())
            if part["teacher"]:
                hr = data.render(part["teacher"])
                term = train.affinity_of(built, affinity, part, mr, hr, tokens, index)
            yield ssl, term, part["share"], bool(part["teacher"])

    ((ssl, term, share, _),) = losses(12)
    single = list(losses(1))
    count = sum(paired for *_, paired in single)
    assert share == 1 and 0 < count < 12
    torch.testing.assert_close(ssl, torch.stack([each[0] for each in single]).mean())
    torch.testing.assert_close(term, sum(each[1] for each in single) / count)
    # each micro-batch's share makes of its mean over pairs a mean over the global batch's
    weighted = sum(each[1] * each[2] for each in single) / 12
    torch.testing.assert_close(weighted, term)


@others_slowly
def test_any_number_of_ranks_trains_the_same_run_on_partial_pairs(partial, tmp_path, objective):
    """The affinity is a mean over the pairs of the global batch, whatever share each rank gets."""
    flags = dict(steps=6, global_batch=6)
    run(partial, tmp_path / "one", objective, **flags)
    run(partial, tmp_path / "parts", objective, **flags, device_batch=1)
    done = spawn(command(partial, tmp_path / "two", objective, **flags, device_batch=1), 2)
    assert done.returncode == 0, done.stderr
    one = log_of(tmp_path / "one")
    assert any(entry["affinity"] > 0 for entry in one)
    for name in ("parts", "two"):
        for a, b in zip(one, log_of(tmp_path / name), strict=True):
            for key in ("loss", "ssl", "affinity", "rank", "place", "target_var", "grad_norm"):
                assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-6), (name, key)


@pytest.mark.parametrize("variant", ["mr", "hr", "sa", "sa-interp"])
def test_variants_of_partial_stores(partial, tmp_path, variant):
    store = partial[:1] if variant == "hr" else partial
    run(store, tmp_path / "run", variant=variant)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["args"]["store"] == [str(path) for path in store]
    assert (tmp_path / "run" / "tokens.png").is_file()
    if variant == "mr":  # MR alone first: a picture without HR
        run(store[::-1], tmp_path / "again", variant=variant)
        assert (tmp_path / "again" / "tokens.png").is_file()


@pytest.mark.parametrize("variant", ["hr", "sa", "sa-interp"])
def test_hr_with_fewer_bands(tmp_path, variant):
    bands = ["B", "G", "R", "RE1", "NIR"]
    path = write_store(tmp_path / "s", bands=bands, hr_bands=["B", "G", "R", "NIR"])
    run(path, tmp_path / "run", variant=variant)
    encoder = load_encoder(tmp_path / "run")
    assert encoder.meta["bands"] == (["B", "G", "R", "NIR"] if variant == "hr" else bands)
    assert encoder.in_channels == len(encoder.meta["mean"]) == len(encoder.meta["bands"])


@pytest.fixture(scope="module")
def radar(tmp_path_factory):
    """A store of radar MR with optical HR, and an encoder that was trained on its HR."""
    folder = tmp_path_factory.mktemp("radar")
    store = write_store(folder / "pairs", bands=["VV", "VH"], hr_bands=["B", "G", "R", "NIR"])
    run(store, folder / "hr", variant="hr")
    return store, folder / "hr"


@every_objective
def test_hr_with_bands_that_mr_has_not(radar, tmp_path, objective, monkeypatch):
    """A teacher of the student's weights cannot read them, one that was trained on them can."""
    store, teacher = radar
    assert load_encoder(teacher).meta["bands"] == ["B", "G", "R", "NIR"]
    for variant in ("sa", "sa-mse", "sa-shuffled"):
        rejects(
            [store, "B,G,R,NIR", "VV,VH", "--hr-teacher"],
            *(store, tmp_path / "no", objective),
            variant=variant,
        )
    assert not (tmp_path / "no").exists()
    drawn, composite = [], figures.composite

    def seen(images, bands):
        drawn.append((images.shape[1], bands))
        return composite(images, bands)

    monkeypatch.setattr(figures, "composite", seen)
    run(store, tmp_path / "run", objective, hr_teacher=teacher)
    assert all(entry["affinity"] > 0 for entry in log_of(tmp_path / "run"))
    encoder = load_encoder(tmp_path / "run")
    assert encoder.meta["bands"] == ["VV", "VH"] and encoder.in_channels == 2
    assert drawn == [(4, ["B", "G", "R", "NIR"]), (2, ["VV", "VH"])]
    assert (tmp_path / "run" / "tokens.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("variant", ["mr", "hr", "sa-interp"])
def test_variants_that_need_no_common_band(radar, tmp_path, variant):
    run(radar[0], tmp_path / "run", variant=variant)
    seen = ["B", "G", "R", "NIR"] if variant == "hr" else ["VV", "VH"]
    assert load_encoder(tmp_path / "run").meta["bands"] == seen
    assert (tmp_path / "run" / "tokens.png").is_file()


def test_hr_share_leaves_hr_to_that_share(store, tmp_path):
    with refused(ValueError, store, "--hr-share 0.0001"):
        open_chips([store], pairs=1, hr_share=0.0001)
    some, all_ = (open_chips([store], pairs=1, hr_share=share) for share in (0.25, 1))
    assert len(some.ids) == len(all_.ids) == 14 and some.digest != all_.digest
    assert some.has_hr.sum() == round(14 * 0.25) and all_.has_hr.all()
    run(store, tmp_path / "run", hr_share=0.25, steps=3)
    assert any(entry["affinity"] > 0 for entry in log_of(tmp_path / "run"))


def test_skip_flagged(tmp_path):
    path = write_store(tmp_path / "pairs")
    (path / "flags.csv").write_text("chip,reason\n3,shift\n7,shift\n")
    for skip, expected in ((False, {3}), (True, set())):
        chips = open_chips([path], skip_flagged=skip)
        assert {3, 7} & set(chips.ids[:, 1].tolist()) == expected  # 7 is no training chip
    (path / "flags.csv").write_text("chip,reason\n" + "".join(f"{i},x\n" for i in range(16)))
    rejects([path, "flagged"], path, tmp_path / "run", skip_flagged=True)


def test_stores_that_do_not_go_together(store, tmp_path):
    other = write_store(tmp_path / "rgb", bands=["R", "G", "B"])
    rejects([other, store, "R,G,B", "B,G,R,NIR"], [store, other], tmp_path / "run")
    bare = write_store(tmp_path / "bare", pairs=[])
    rejects([bare, "no training chip has HR"], bare, tmp_path / "run")
    rejects([bare, "HR"], bare, tmp_path / "run", variant="hr")
    single = write_store(tmp_path / "single", pairs=[2])
    rejects([single, "2 must"], single, tmp_path / "run", variant="sa-shuffled")


def test_resume_notices_other_chips(tmp_path):
    path = write_store(tmp_path / "pairs")
    run(path, tmp_path / "run", steps=3, stop_at=1, skip_flagged=True)
    (path / "flags.csv").write_text("chip,reason\n3,shift\n")
    rejects([tmp_path / "run", "chips"], path, tmp_path / "run", steps=3, resume=True,
            skip_flagged=True)  # fmt: skip
    (path / "flags.csv").unlink()
    run(path, tmp_path / "run", steps=3, resume=True, skip_flagged=True)
    assert len(log_of(tmp_path / "run")) == 3


# ---- a probe on the way


def test_probe_during_training_changes_no_step(store, tmp_path):
    write_scenes(tmp_path / "scenes", scenes=8, size=64, seed=0)
    task = ["geotiff", tmp_path / "scenes"]
    run(store, tmp_path / "plain", steps=5)
    run(store, tmp_path / "run", steps=5, probe_task=task, probe_every=2)
    plain, log = log_of(tmp_path / "plain"), log_of(tmp_path / "run")
    assert [entry["step"] for entry in log if "probe_miou" in entry] == [2, 4, 5]
    assert all(0 < entry["probe_miou"] < 1 for entry in log if "probe_miou" in entry)
    assert [entry["loss"] for entry in plain] == [entry["loss"] for entry in log]
    same_weights(weights_of(tmp_path / "plain"), weights_of(tmp_path / "run"))
    done = spawn(command(store, tmp_path / "two", steps=5, probe_task=task, probe_every=5), 2)
    assert done.returncode == 0 and done.stdout.count("probe 0.") == 1, done.stderr
    found = log_of(tmp_path / "two")[-1]["probe_miou"]
    assert found == pytest.approx(log[-1]["probe_miou"], abs=0.02)
    rejects(["potatoes"], store, tmp_path / "no", probe_task=["potatoes", "x"])
    assert not (tmp_path / "no").exists()


# ---- what train.py wires together, against a plain loop


def plain_loop(objective_name, variant, store, steps, seed=0):
    """Sample order, crops, objective, affinity, AdamW, schedules and EMA, spelt out for the flags
    of `command`: the weights that train.py must reach."""
    store, batch = Store(store), 4
    torch.manual_seed(seed)
    name = objective_name
    shape = dict(in_channels=4, patch_size=4, dim=16, depth=1, heads=2)
    if name == "ijepa":
        side, encoder = 24, ViT(**shape)
        objective = IJEPA(encoder, (6, 6), 16, 1, targets=2, target_scale=(0.08, 0.12))
        start, peak, final, warmup, beta2 = 2e-4, 1e-3, 1e-6, 40, 0.999
    elif name == "latentmim":
        side, encoder = 36, ViT(**shape, class_token=True, pos="latentmim")
        objective = LatentMIM(encoder, (6, 6), 2, 10, 16, 16, 1, 2)
        start, peak, final, warmup, beta2 = 2.5e-4, 1e-3, 2.5e-4, 30, 0.95
    else:
        side, encoder = 24, ViT(**shape)
        objective = MAE(encoder, (6, 6), 0.75, 16, 1, 2)
        start, peak, final, warmup, beta2 = 0, 1e-3, 0, 30, 0.95
    student, teacher, losses = objective.student, objective.teacher, []
    named = [(n, p) for n, p in objective.named_parameters() if not n.startswith("teacher.")]

    def decays(name, p):
        if objective_name == "latentmim":
            return not re.search("bias|norm|embed", name)
        return p.ndim > 1 and not name.endswith("bias")

    groups = [[p for n, p in named if decays(n, p) == yes] for yes in (True, False)]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], peak, (0.9, beta2))
    warmup = round(steps * warmup / 300)
    train_chips = store.split("train")

    def view(sensor, chips, crops, size):
        pixels = store.batch(chips)[sensor]
        scale = torch.tensor(pixels.shape[-2:] * 2)  # every HR chip is exactly its MR chip's ground
        images = resample(pixels, torch.from_numpy(crops) * scale, (size, size))
        mean, std = (torch.tensor(store.meta[k][sensor])[:, None, None] for k in ("mean", "std"))
        return (images - mean) / std

    for step in range(steps):
        chips = train_chips[sample_order(seed, step, batch, len(train_chips))]
        crops = draw_crops(seed, step, batch, (0.3 if name == "ijepa" else 0.2, 1.0))
        number = np.random.SeedSequence((seed, step, 2)).generate_state(1)[0]
        masks = objective.draw(batch, torch.Generator().manual_seed(int(number)))
        mr = view("hr" if variant == "hr" else "mr", chips, crops, side)
        loss, tokens, index = objective(mr, masks)
        if variant != "hr":
            hr = view("hr", chips, crops, 2 * side)
            if name == "latentmim":
                hr = take_patches(hr, 8, 4, 2 * masks["offset"])
            with torch.no_grad():
                seen = teacher(hr, hr_index(index, (6, 6), 2))
                seen = teacher.head(seen)  # nothing but in Latent MIM
            term = token_mse if variant == "sa-mse" else gram_loss
            loss = loss + term(tokens, pool_to_mr(seen, 2))

        s = step + 1 if name == "ijepa" else step
        if s < warmup:
            lr = start + (peak - start) * s / warmup
        else:
            phase = math.pi * (s - warmup) / (steps - warmup)
            lr = final + (peak - final) * (1 + math.cos(phase)) / 2
        weight_decay = 20 - 10 * (1 + math.cos(math.pi * s / steps)) / 2
        if name == "latentmim":
            momentum = 1 - 0.5 * (1 + math.cos(math.pi * step / steps)) / 2
        else:
            momentum = 0.5 + 0.5 * step / steps
        for group, w in zip(optimizer.param_groups, (weight_decay, 0), strict=True):
            group["lr"], group["weight_decay"] = lr, w
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for t, p in zip(teacher.parameters(), student.parameters(), strict=True):
                t.mul_(momentum).add_(p, alpha=1 - momentum)
        losses.append(float(loss.detach()))
    return objective.state_dict(), losses


@every_objective
@pytest.mark.parametrize("variant", ["sa", "sa-mse", "hr"])
def test_train_is_the_plain_loop(store, tmp_path, objective, variant):
    # large enough that a decayed bias and another momentum show within 5 steps
    flags = dict(weight_decay=10, final_weight_decay=20, momentum=0.5)
    weights, losses = plain_loop(objective, variant, store, steps=5)
    run(store, tmp_path / "run", objective, steps=5, variant=variant, **flags)
    assert [e["loss"] for e in log_of(tmp_path / "run")] == pytest.approx(losses, rel=1e-4)
    found = weights_of(tmp_path / "run")
    assert found.keys() == weights.keys()
    for key in weights:
        # Adam divides by the gradient's size: where that is zero but for rounding (the bias of
        # attention's keys, those before InfoNCE's standardisation) a weight moves at random: the
        # middle one of each tensor is compared
        if key in ("decoder.norm.bias", "decoder.head.bias"):
            continue
        difference = (found[key] - weights[key]).abs()
        assert float(difference.median()) < 1e-6, key


def test_epochs_and_warmup_without_steps(store, tmp_path):
    """14 chips, 8 epochs, batches of 4: 28 steps; 75 of 300 epochs of warm-up are a quarter."""
    words = command(store, tmp_path / "run", steps="STEPS", epochs=8, warmup_epochs=75, stop_at=9)
    at = words.index("STEPS")
    run_words = words[: at - 1] + words[at + 1 :]
    train.main(train.parse_args(run_words))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["steps"] == 28
    expected = [2e-4 + 8e-4 * s / 7 for s in range(1, 8)]  # I-JEPA counts its rates from 1
    expected += [1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi * s / 21)) / 2 for s in (1, 2)]
    assert [e["lr"] for e in log_of(tmp_path / "run")] == pytest.approx(expected)


@every_objective
def test_float16_scales_its_gradients_and_logs_them_unscaled(store, tmp_path, objective):
    """On the CPU as on a GPU: a loss scale of 65536 must leave no trace in norms and weights."""
    run(store, tmp_path / "a", objective, steps=3)
    run(store, tmp_path / "b", objective, steps=3, precision="float16")
    state = torch.load(tmp_path / "b" / "ckpt.pt", weights_only=True)
    assert state["scaler"]["scale"] == 65536
    for a, b in zip(log_of(tmp_path / "a"), log_of(tmp_path / "b"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-2)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=0.1)
    a, b = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    key = "student.blocks.0.mlp.fc1.weight"
    assert float((a[key] - b[key]).abs().max()) < 3e-3 and not a[key].equal(b[key])


# One seeded run each, recorded before the code was taken apart: a change that moves them says why.
STORED = {
    "ijepa": [0.4543775, 0.4516622, 0.4382586, 0.4453687, 0.4268021, 0.4334702],
    "mae": [1.331569, 1.313935, 1.280397, 1.27873, 1.249246, 1.244898],
    "latentmim": [1.387624, 1.4145, 1.45014, 1.326444, 1.361502, 1.37591],
}


@pytest.mark.parametrize("objective", STORED)
def test_losses_are_the_recorded_ones(store, tmp_path, objective):
    run(store, tmp_path / "run", objective, steps=6, affinity_index="block", pos="ground")
    losses = [entry["loss"] for entry in log_of(tmp_path / "run")]
    assert losses == pytest.approx(STORED[objective], rel=1e-5)


def test_profile_writes_a_trace_of_some_steps(store, tmp_path):
    run(store, tmp_path / "run", steps=5, profile=2, log_every=10)
    (path,) = (tmp_path / "run").glob("trace*")
    assert path.name == "trace-0.json"
    events = json.loads(path.read_text())["traceEvents"]
    steps = {e["name"] for e in events if e.get("name", "").startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#2", "ProfilerStep#3"}
    assert sum(e.get("name") == "aten::_fused_adamw_" for e in events) == 4  # of two groups


# ---- a run from a file, a run from nothing, an objective from elsewhere


def test_config_repeats_a_run(store, tmp_path):
    flags = dict(objective="latentmim", gap_offset="paper", vicreg=0.5, steps=3)
    run(store, tmp_path / "a", **flags)
    config = tmp_path / "a" / "config.json"
    args = train.parse_args(["--config", str(tmp_path / "a"), "--out", str(tmp_path / "b")])
    train.main(args)
    same_weights(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))
    before = json.loads(config.read_text())["args"]
    after = json.loads((tmp_path / "b" / "config.json").read_text())["args"]
    assert {k for k in before if before[k] != after[k]} == {"out", "config"}
    # what is typed wins; what would do nothing is refused all the same
    args = train.parse_args(["--config", str(config), "--tau", "0.1"])
    assert args.tau == 0.1 and args.visible == 10 and args.out == Path("out/latentmim-sa-s0")
    with refused(SystemExit, "--predictor-dim"):
        train.parse_args(["--config", str(config), "--predictor-dim", "8"])
    for text in ("", "[]", '{"args": {"banana": 3}, "steps": 1, "precision": "", "chips": ""}'):
        (tmp_path / "x.json").write_text(text)
        with refused((SystemExit, ValueError)):
            train.parse_args(["--config", str(tmp_path / "x.json")])


def test_what_is_typed_wins_over_a_config_and_its_derived_rates(store, tmp_path, monkeypatch):
    run(store, tmp_path / "a", steps=2)
    run(store, tmp_path / "l", "latentmim", steps=2)
    # both runs took TINY's lr; as if the second had taken its objective's own for its batch of 4
    path = tmp_path / "l" / "config.json"
    config = json.loads(path.read_text())
    rates = dict(lr=4 * 1.5e-4 / 256, start_lr=1.5e-4 / 256, final_lr=1.5e-4 / 256)
    path.write_text(json.dumps(config | {"args": config["args"] | rates}))

    def again(name, *words):
        return train.parse_args(["--config", str(tmp_path / name), *words])

    args = again("a", "--lr", "1e-5")
    assert (args.lr, args.start_lr, args.final_lr) == pytest.approx((1e-5, 2e-6, 1e-8))
    args = again("a", "--lr", "1e-5", "--start-lr", "3e-6")
    assert args.start_lr == 3e-6
    args = again("l", "--global-batch", "8")
    assert (args.lr, args.start_lr) == pytest.approx((8 * 1.5e-4 / 256, 2 * 1.5e-4 / 256))
    assert again("a", "--global-batch", "8").lr == 1e-3  # I-JEPA's is not per image
    assert again("a").steps == 2 and again("a", "--epochs", "3").steps is None
    assert again("a", "--init", "w.pt").heads is None and again("a").heads == 2
    with refused(ValueError, "--objective mae", tmp_path / "a"):
        again("a", "--objective", "mae")
    # and over the flags of a trial
    monkeypatch.chdir(tmp_path)
    trial = train.parse_args(["--device", "cpu"])
    assert (trial.trial, trial.steps, trial.heads) == (True, 500, 4)
    trial = train.parse_args(["--device", "cpu", "--epochs", "0.1", "--init", "w.pt"])
    assert (trial.steps, trial.epochs, trial.heads) == (None, 0.1, None)
    assert not train.parse_args(["--store", "out/scenes/pairs"]).trial


def test_weights_without_a_checkpoint_are_not_overwritten(store, tmp_path):
    out = tmp_path / "run"
    run(store, out, steps=2)
    (out / "ckpt.pt").unlink()
    before = (out / "encoder.safetensors").read_bytes()
    for flags in ({}, dict(resume=True), dict(seed=3)):
        rejects([out, "--init"], store, out, steps=2, **flags)
    assert (out / "encoder.safetensors").read_bytes() == before


def test_resume_notices_another_hr_teacher(store, tmp_path):
    for seed, name in ((0, "a"), (1, "b")):
        torch.manual_seed(seed)
        save_encoder(ViT(4, 4, 24, 1, 4), tmp_path / f"{name}.safetensors")
    teacher = tmp_path / "hr.safetensors"
    shutil.copy(tmp_path / "a.safetensors", teacher)
    flags = dict(hr_teacher=teacher, steps=3)
    run(store, tmp_path / "run", **flags, stop_at=1)
    shutil.copy(tmp_path / "b.safetensors", teacher)
    rejects([tmp_path / "run", "hr_teacher"], store, tmp_path / "run", **flags, resume=True)
    shutil.copy(tmp_path / "a.safetensors", teacher)
    # a store that was moved is the same one
    moved = tmp_path / "moved"
    shutil.copytree(store, moved)
    run(moved, tmp_path / "run", **flags, resume=True)
    assert [e["step"] for e in log_of(tmp_path / "run")] == [1, 2, 3]
    rejects(["sa-mse", teacher, "24", "16"], store, tmp_path / "mse", variant="sa-mse",
            hr_teacher=teacher)  # fmt: skip
    assert not (tmp_path / "mse").exists()


def test_resume_of_what_is_done_says_so(store, tmp_path, capsys):
    run(store, tmp_path / "run", steps=3)
    before = weights_of(tmp_path / "run")
    for flags in ({}, dict(stop_at=1)):
        capsys.readouterr()
        run(store, tmp_path / "run", steps=3, resume=True, **flags)
        said = capsys.readouterr().out
        assert "done already" in said and "stopped after" not in said
    same_weights(before, weights_of(tmp_path / "run"))


def test_runs_are_plotted_with_seeds_as_a_band(store, tmp_path, monkeypatch, capsys):
    drawn = {}
    monkeypatch.setattr(train, "draw_curves", lambda path, logs: drawn.update({path: logs}))
    runs = [tmp_path / name for name in ("a-s0", "a-s1", "b")]
    for run_ in runs:
        run_.mkdir()
        (run_ / "log.jsonl").write_text('{"step": 1, "ssl": 0.5}\n{"step": 2}\n')
    train.main(train.parse_args(["--plot", *map(str, runs)]))
    logs = drawn[runs[0] / "curves.png"]
    assert {name: len(seeds) for name, seeds in logs.items()} == {"a": 2, "b": 1}
    assert logs["b"] == [[{"step": 1, "ssl": 0.5}]] and "a, b" in capsys.readouterr().out
    with refused(ValueError, "--plot", "log.jsonl"):
        train.main(train.parse_args(["--plot", str(tmp_path)]))


@pytest.mark.slow
def test_no_flags_train_on_scenes(tmp_path):
    """As a stranger's first command, with two ranks: both wait for the scenes of the first."""
    launcher = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    words = [sys.executable, *launcher, str(ROOT / "train.py"), "--device", "cpu", "--stop-at", "2"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert "out/scenes/pairs" in first and "data.py pack" in first and done.stdout.count(first) == 1
    assert "--model tiny" in done.stdout
    assert [e["step"] for e in log_of(tmp_path / "out" / "ijepa-sa-s0")] == [1, 2]


class Colour(model.Objective):
    """Predict the mean colour of hidden patches from the visible ones: a forker's objective."""

    defaults = model.MAE.defaults
    flags = {"hidden": ("patches that are hidden", 1)}

    def __init__(self, student, grid, hidden=9, ratio=2):
        super().__init__(student, grid, ratio)
        self.hidden, self.guess = hidden, torch.nn.Linear(student.dim, student.in_channels)

    def draw(self, batch, generator):
        order = torch.rand(batch, self.grid[0] * self.grid[1], generator=generator).argsort(1)
        return {"context": order[:, self.hidden :], "target": order[:, : self.hidden]}

    def target_tokens(self, images, masks):
        colours = F.avg_pool2d(images, self.student.patch_size).flatten(2).mT
        return model.take(colours, masks["target"])

    def forward(self, images, masks):
        tokens = self.student(images, masks["context"])
        target = self.target_tokens(images, masks).mean(1)
        return F.mse_loss(self.guess(tokens.mean(1)), target), tokens, masks["context"]


@pytest.mark.parametrize("variant", ["mr", "hr", "sa", "sa-shuffled"])
def test_a_fourth_objective_is_a_class_and_an_entry(store, tmp_path, monkeypatch, variant):
    monkeypatch.setitem(model.OBJECTIVES, "colour", Colour)
    monkeypatch.setitem(OWN, "colour", "--mr-size 24 --hidden 12")
    run(store, tmp_path / "whole", "colour", steps=4, variant=variant, vicreg=1)
    run(store, tmp_path / "run", "colour", steps=4, variant=variant, vicreg=1, stop_at=2)
    run(store, tmp_path / "run", "colour", steps=4, variant=variant, vicreg=1, resume=True)
    same_weights(weights_of(tmp_path / "whole"), weights_of(tmp_path / "run"))
    assert load_encoder(tmp_path / "run").meta["objective"] == "colour"
    with refused(SystemExit, "--hidden"):
        train.parse_args(["--store", str(store), "--objective", "mae", "--hidden", "3"])


def test_pretraining_needs_no_library_that_reads_imagery(store, tmp_path):
    """And without matplotlib it says that there is no picture."""
    code = (
        "import sys; sys.modules['matplotlib'] = sys.modules['matplotlib.figure'] = None\n"
        "import train; train.main(train.parse_args())\n"
        "assert not {'tifffile', 'imagecodecs', 'h5py', 'rasterio'} & set(sys.modules)"
    )
    words = [sys.executable, "-c", code, *command(store, tmp_path / "run")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no tokens.png without matplotlib" in done.stdout


@every_objective
def test_compile_changes_no_loss_and_compiles_the_teacher_too(
    store, tmp_path, monkeypatch, objective
):
    made = []

    def compile(function):  # what inductor would make is not at stake
        made.append(function)
        return eager(function, backend="aot_eager")

    eager = torch.compile
    monkeypatch.setattr(torch, "compile", compile)
    torch._dynamo.reset()
    flags = dict(steps=4, affinity_index="block")
    run(store, tmp_path / "a", objective, **flags)
    run(store, tmp_path / "b", objective, **flags, compile=True)
    assert len(made) == 2
    for a, b in zip(log_of(tmp_path / "a"), log_of(tmp_path / "b"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


# ---- HR teachers


def test_the_frozen_teacher_is_the_student_as_it_was_drawn(store, tmp_path):
    """As a run whose --hr-teacher is the encoder of a run that learnt nothing; and it stays so when
    the run goes on."""
    run(store, tmp_path / "drawn", variant="hr", lr=0, weight_decay=0, final_weight_decay=0)
    flags = dict(steps=4, momentum=0.5, lr=1e-2)
    given = dict(variant="sa", hr_teacher=tmp_path / "drawn", **flags)
    run(store, tmp_path / "given", **given)
    run(store, tmp_path / "frozen", variant="sa-frozen", **flags)
    same_weights(weights_of(tmp_path / "given"), weights_of(tmp_path / "frozen"))
    run(store, tmp_path / "again", variant="sa-frozen", stop_at=2, **flags)
    run(store, tmp_path / "again", variant="sa-frozen", resume=True, **flags)
    same_weights(weights_of(tmp_path / "frozen"), weights_of(tmp_path / "again"))
    run(store, tmp_path / "ema", variant="sa", **flags)
    assert log_of(tmp_path / "ema")[-1]["affinity"] != log_of(tmp_path / "frozen")[-1]["affinity"]
    with refused(SystemExit, "--hr-teacher", "as it was drawn"):
        train.parse_args(command(store, tmp_path / "x", variant="sa-frozen", hr_teacher="y"))


def test_the_regulariser_sees_no_hr(store, tmp_path):
    args = parsed(store, "ijepa", variant="regulariser")
    assert args.ratio == 1
    chips = open_chips(args.store, "mr", 1, 1.0, 0, False)
    built = train.build_objective(args, chips.bands["mr"])
    for part in step_of(args, chips, built):
        seen, taught = data.render(part["student"]), data.render(part["teacher"])
        assert taught.equal(seen if part["pairs"] is None else seen[part["pairs"]])
    with refused(SystemExit, "--ratio", "what the student sees"):
        train.parse_args(command(store, tmp_path / "x", variant="regulariser", ratio=2))


@every_objective
@pytest.mark.parametrize("variant", ["sa", "sa-interp", "sa-shuffled", "sa-mse"])
def test_the_recipe_of_a_frozen_hr_teacher(store, tmp_path, objective, variant):
    """Two commands: a teacher trained on native HR pixels, then frozen, for each control."""
    run(store, tmp_path / "hr", objective, variant="hr", crop_scale=["0.25", "0.25"], vicreg=1)
    before = (tmp_path / "hr" / "encoder.safetensors").read_bytes()
    flags = dict(hr_teacher=tmp_path / "hr", affinity_centre="image", affinity_weight=20, vicreg=1)
    run(store, tmp_path / "sa", objective, variant=variant, steps=3, **flags)
    log = log_of(tmp_path / "sa")
    assert all(e["affinity"] > 0 and e["vicreg"] > 0 for e in log)
    parts = log[0]["ssl"] + 20 * log[0]["affinity"] + log[0]["vicreg"]
    assert log[0]["loss"] == pytest.approx(parts)
    assert (tmp_path / "hr" / "encoder.safetensors").read_bytes() == before


def test_a_teacher_takes_bands_that_the_store_spells_otherwise(tmp_path, capsys):
    """By name, with its own statistics; what it does not find is said with flag and file."""
    names = ["Blue", "Green", "Red", "B08"]
    store, path = write_store(tmp_path / "pairs", bands=names), tmp_path / "x.safetensors"
    meta = dict(bands=["NIR", "R", "B"], mean=[3.0, 2.0, 1.0], std=[6.0, 5.0, 4.0])
    other = ViT(3, 4, 16, 1, 2)
    save_encoder(other, path, **meta)
    args = parsed(store, "ijepa", hr_teacher=path)
    built = train.build_objective(args, names)
    teacher = train.build_teacher(args, built, {"mr": names, "hr": names}, CPU)
    assert teacher.bands == ["B08", "Red", "Blue"]
    assert teacher.statistics == ((1.0, 0.0, 2.0, 3.0), (4.0, 1.0, 5.0, 6.0))
    # more bands than HR has: those that it has are chosen, with their statistics
    seen = ["B04", "B08"]
    teacher = train.build_teacher(args, built, {"mr": names, "hr": seen}, CPU)
    assert teacher.bands == seen and teacher.statistics == ((2.0, 3.0), (5.0, 6.0))
    assert f"--hr-teacher {path}: B04 as R, B08 as NIR, B left out" in capsys.readouterr().out
    save_encoder(ViT(2, 4, 16, 1, 2), path, bands=["VV", "VH"])
    with refused(ValueError, f"--hr-teacher {path}", "VV,VH", "Blue,Green"):
        train.build_teacher(args, built, {"mr": names, "hr": names}, CPU)


def test_heads_of_foreign_teachers_and_starts(store, tmp_path):
    """Each file has a flag of its own: the student's heads are not the teacher's."""
    torch.save(ViT(4, 4, 16, 1, 2).state_dict(), tmp_path / "a.pt")
    torch.save(ViT(4, 4, 32, 1, 8).state_dict(), tmp_path / "b.pt")
    flags = dict(init=tmp_path / "a.pt", hr_teacher=tmp_path / "b.pt")
    rejects(["a.pt", "--heads"], store, tmp_path / "no", **flags)
    rejects(["b.pt", "--hr-teacher-heads"], store, tmp_path / "no", heads=2, **flags)
    run(store, tmp_path / "run", heads=2, hr_teacher_heads=8, steps=1, **flags)
    assert load_encoder(tmp_path / "run").config["heads"] == 2
    with refused(SystemExit, "--hr-teacher-heads", "EMA"):
        run(store, tmp_path / "no", hr_teacher_heads=8)


@every_objective
def test_a_teacher_of_another_width_patch_and_bands(store, tmp_path, objective, capsys):
    """RGB weights, 24 wide, patch 6: HR is resampled to its patches, its bands are chosen by name;
    tokens and loss against a plain computation."""
    torch.manual_seed(1)
    other = ViT(3, 6, 24, 1, 4, class_token=True)
    meta = dict(bands=["R", "G", "B"], mean=[3000.0, 2500.0, 2000.0], std=[500.0, 400.0, 300.0])
    save_encoder(other, tmp_path / "rgb.safetensors", **meta)
    run(store, tmp_path / "run", objective, hr_teacher=tmp_path / "rgb.safetensors", steps=1)
    assert "its own statistics" in capsys.readouterr().out
    assert (tmp_path / "run" / "tokens.png").is_file()

    args = parsed(store, objective, hr_teacher=tmp_path / "rgb.safetensors")
    chips = open_chips(args.store, pairs=1)
    torch.manual_seed(0)
    built = train.build_objective(args, chips.bands["mr"])
    teacher = train.build_teacher(args, built, chips.bands, CPU)
    (part,) = step_of(args, chips, built, teacher)
    _, tokens, index = built(data.render(part["student"]), part["masks"])
    order = sample_order(0, 0, 4, 14)
    crops = torch.from_numpy(draw_crops(0, 0, 4, tuple(args.crop_scale)))
    pixels = chips.stores[0].batch(chips.ids[order, 1])["hr"][:, [2, 1, 0]]
    side = 2 * 6 * 6 if objective != "latentmim" else 2 * 36
    hr = resample(pixels, crops * 32, (side, side))
    hr = (hr - torch.tensor(meta["mean"])[:, None, None]) / torch.tensor(meta["std"])[:, None, None]
    if objective == "latentmim":  # cut 8 px patches, two tokens of 6 px a side from each
        hr = take_patches(hr, 8, 4, 2 * part["masks"]["offset"])
        cells = [F.interpolate(row.contiguous(), (12, 12), mode="bicubic", antialias=True)
                 for line in hr.split(8, 2) for row in line.split(8, 3)]  # fmt: skip
        hr = torch.cat([torch.cat(cells[6 * i : 6 * i + 6], 3) for i in range(6)], 2)
    with torch.no_grad():
        seen = other(hr, hr_index(index, (6, 6), 2))
    expected = gram_loss(tokens.detach().double(), seen.double(), backend="eager")
    assert log_of(tmp_path / "run")[0]["affinity"] == pytest.approx(float(expected), rel=1e-4)


def test_shuffled_hr_is_the_next_pairs(store, tmp_path):
    """The affinity of sa-shuffled is that of sa with the HR chips moved on, and ranks share it."""
    args = parsed(store, "ijepa", variant="sa-shuffled")
    chips = open_chips(args.store, pairs=2)
    built = train.build_objective(args, chips.bands["mr"])
    (part,) = step_of(args, chips, built)
    order = sample_order(0, 0, 5, 14)  # the fifth is the first of the next step
    hr = chips.stores[0].batch(chips.ids[order, 1], {"hr"})["hr"]
    assert part["teacher"][0]["images"].equal(hr[1:])
    assert part["student"][0]["images"].equal(chips.stores[0].batch(chips.ids[order[:4], 1])["mr"])
    run(store, tmp_path / "one", variant="sa-shuffled", steps=3)
    done = spawn(command(store, tmp_path / "two", variant="sa-shuffled", steps=3), 2)
    assert done.returncode == 0, done.stderr
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


# ---- what a GPU would wait for, traced without one


class Watch(TorchDispatchMode):
    """Notes, from the first step on, copies from the CPU and operators that CUDA lacks."""

    on, faults = False, ()

    def note(self, what):
        frames = [f for f in traceback.extract_stack() if Path(f.filename).parent == ROOT]
        self.faults += (f"{frames[-1].name}: {what}" if frames else what,)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if self.on:
            tensors = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
            results = [x for x in tree_leaves(out) if torch.is_tensor(x) and x.is_meta]
            # a number of no dimension travels in the launch itself
            if results and any(x.device.type == "cpu" and x.ndim for x in tensors):
                self.note(f"{function} of a CPU tensor")
            allowed = ("_to_copy", "view", "slice", "alias", "detach", "select")
            wide = any(x.dtype == torch.uint16 for x in tensors)
            if wide and not any(word in str(function) for word in allowed):
                self.note(f"{function} of uint16")
        return out


class Calls(torch.overrides.TorchFunctionMode):
    """Notes torch.tensor(..., device=), which copies from the CPU inside."""

    def __init__(self, watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = function in (torch.tensor, torch.as_tensor)
        if self.watch.on and made and str(kwargs.get("device")) == "meta":
            self.watch.note("torch.tensor(device=)")
        return function(*args, **kwargs)


class Unfused(torch.optim.AdamW):
    """AdamW for device meta, which has no fused one."""

    def __init__(self, *groups, **options):
        super().__init__(*groups, **options | {"fused": False})

    def step(self):
        self.found_inf = None
        super().step()


def trace(store, tmp_path, monkeypatch, objective, **flags):
    """Three steps of train.main on device meta, where every read by the host raises: the faults."""
    args = parsed(store, objective, steps=9, stop_at=3, **flags)
    args.out = tmp_path / "run"
    watch, meta = Watch(), torch.device("meta")
    rates = model.OBJECTIVES[objective].rates

    def first(*values):
        watch.on = True
        return rates(*values)

    monkeypatch.setattr(model.OBJECTIVES[objective], "rates", first)
    monkeypatch.setattr(train, "start_ranks", lambda device: runs.Ranks(0, 1, meta))
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    for when in ("logs", "saves"):  # what syncs on purpose
        monkeypatch.setattr(runs.Run, when, lambda run, step: False)
    monkeypatch.setattr(torch.optim, "AdamW", Unfused)
    # a copy that nobody waits for, and the read a step later
    monkeypatch.setattr(runs.Stop, "fetch", lambda stops, told: (torch.zeros(2), False))
    with watch, Calls(watch):
        train.main(args)
    assert watch.on
    return set(watch.faults)


TRACED = [
    {}, dict(affinity_index="block", vicreg=1, affinity_centre="image"), dict(variant="sa-interp"),
    dict(variant="hr"), dict(variant="sa-mse", pos="ground", device_batch=2),
]  # fmt: skip


@every_objective
@pytest.mark.parametrize("flags", TRACED)
def test_a_step_waits_for_nothing(partial, tmp_path, monkeypatch, objective, flags):
    """Of two stores of uint16, partly paired: no copy but the prepared batch's, no answer waited
    for, no operator that CUDA has not."""
    stores = partial[:1] if flags.get("variant") == "hr" else partial
    assert trace(stores, tmp_path, monkeypatch, objective, **flags) == set()


@pytest.mark.parametrize("fault", ["item", "tensor", "index", "copy"])
def test_the_trace_sees_what_it_is_for(partial, tmp_path, monkeypatch, fault):
    plant = {
        "item": lambda x: x.sum().item(),
        "tensor": lambda x: torch.tensor([1.0], device=x.device),
        "index": lambda x: torch.empty(3, dtype=torch.uint16, device=x.device)[x[0, 0].long()],
        "copy": lambda x: torch.ones(3).to(x.device),
    }[fault]
    regularise = model.regularise
    monkeypatch.setattr(train, "regularise", lambda x: plant(x) is None or regularise(x))
    if fault == "item":
        with pytest.raises((RuntimeError, NotImplementedError)):
            trace(partial, tmp_path, monkeypatch, "mae", vicreg=1)
    else:
        assert trace(partial, tmp_path, monkeypatch, "mae", vicreg=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_objective
def test_a_gpu_trains_resumes_and_never_waits(partial, tmp_path, monkeypatch, objective):
    flags = dict(device="cuda", steps=6, affinity_index="block", vicreg=1)
    run(partial, tmp_path / "whole", objective, **flags)
    run(partial, tmp_path / "run", objective, **flags, stop_at=3)
    run(partial, tmp_path / "run", objective, **flags, resume=True)
    a, b = log_of(tmp_path / "whole"), log_of(tmp_path / "run")
    assert [e["loss"] for e in a] == pytest.approx([e["loss"] for e in b], rel=1e-2)
    rates = model.OBJECTIVES[objective].rates

    def strict(*values):  # the first call is a warm-up: libraries and allocators start
        torch.cuda.set_sync_debug_mode("error" if values[1] > 1 else 0)
        return rates(*values)

    monkeypatch.setattr(model.OBJECTIVES[objective], "rates", strict)
    for when in ("logs", "saves"):
        monkeypatch.setattr(runs.Run, when, lambda run, step: False)
    try:
        run(partial, tmp_path / "quiet", objective, **flags | dict(steps=9, stop_at=6))
    finally:
        torch.cuda.set_sync_debug_mode(0)


def test_every_flag_of_the_recipe_is_wired(store, tmp_path):
    """Each changes what it is for: terms that are logged must be trained, too."""
    run(store, tmp_path / "plain", steps=4)
    plain = log_of(tmp_path / "plain")
    for name, flags, first in (
        ("vicreg", dict(vicreg=1), ()),
        ("weight", dict(affinity_weight=20), ()),
        ("centre", dict(affinity_centre="image"), ("affinity",)),
        ("gain", dict(patch_gain=3), ("ssl", "affinity", "place")),
    ):
        run(store, tmp_path / name, steps=4, **flags)
        log = log_of(tmp_path / name)
        for key in ("ssl", "affinity", "place"):  # after some updates all of them differ
            assert (log[0][key] != plain[0][key]) == (key in first), (name, key)
            assert [e[key] for e in log[1:]] != [e[key] for e in plain[1:]], (name, key)
    args = parsed(store, "ijepa", hr_teacher=tmp_path / "plain", affinity_centre="image")
    chips = open_chips(args.store, pairs=1)
    teacher = train.build_teacher(args, None, chips.bands, CPU)
    affinity = train.build_affinity(args, teacher)
    assert affinity.exact and affinity.centre and affinity.patch == 4
    assert not any(p.requires_grad for p in teacher.tokens.parameters())


# ---- starting from other weights


def test_init_from_rgb_weights(store, tmp_path, capsys):
    encoder = ViT(3, 4, 32, 1, 4, class_token=True)
    save_encoder(encoder, tmp_path / "rgb.safetensors")
    run(store, tmp_path / "run", steps=1, init=tmp_path / "rgb.safetensors", lr=0, start_lr=0,
        final_lr=0)  # fmt: skip
    assert "rgb.safetensors: B as B, G as G, R as R, NIR as the mean" in capsys.readouterr().out
    loaded = load_encoder(tmp_path / "run")
    assert loaded.class_token and loaded.in_channels == 4
    torch.testing.assert_close(loaded.norm.weight, encoder.norm.weight)
    run(store, tmp_path / "again", "latentmim", steps=1, init=tmp_path / "run")
    assert log_of(tmp_path / "again")[0]["rank"] > 2


# ---- bad input, before any work


def rejects(mentions, *args, **flags):
    """A run of these flags ends before its first step, with one line that names the mentions."""
    with refused((ValueError, FileNotFoundError, SystemExit), *mentions):
        run(*args, **flags)


@pytest.mark.parametrize(
    "mentions, flags",
    [
        (["--global-batch 10", "4", "8 or 12"], dict(global_batch=10, device_batch=4)),
        (["--mr-size 30", "32"], dict(mr_size=30)),
        (["--mr-size 40", "42"], dict(objective="latentmim", mr_size=40)),
        (["--target-scale", "4 x 4"], dict(mr_size=16, target_scale=["0.6", "0.6"])),
        (["--visible", "40"], dict(objective="latentmim", visible=40)),
        (["20", "8"], dict(heads=8, predictor_dim=20)),
        (["18"], dict(dim=18)),
        (["18"], dict(predictor_dim=18)),
        (["18"], dict(objective="mae", decoder_dim=18)),
        (["nothing.pt"], dict(init="nothing.pt")),
        (["nothing.pt"], dict(hr_teacher="nothing.pt")),
        (["--device cuda"], dict(device="cuda")),
    ],
)
def test_bad_flags(store, tmp_path, mentions, flags):
    if flags.get("device") and torch.cuda.is_available():
        pytest.skip("this machine has what the flag asks for")
    rejects(mentions, store, tmp_path / "run", **flags)
    assert not (tmp_path / "run").exists()


def test_bad_stores_and_weights(store, tmp_path):
    rejects([tmp_path / "nowhere"], tmp_path / "nowhere", tmp_path / "run")
    save_encoder(ViT(2, 4, 192, 1, 3), tmp_path / "two.safetensors")
    rejects(["2 bands", "B,G,R,NIR"], store, tmp_path / "run", init=tmp_path / "two.safetensors")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words, flag",
    [
        ("--objective ijepa --tau 0.5", "--tau"),
        ("--objective mae --gap 2", "--gap"),
        ("--variant mr --affinity-weight 7", "--affinity-weight"),
        ("--variant hr --objective latentmim --gap-offset paper", "--gap-offset"),
        ("--variant mr --hr-share 0.5", "--hr-share"),
        ("--variant mr --hr-teacher w.pt", "--hr-teacher"),
        ("--init w --dim 64", "--dim"),
        ("--init w --model tiny", "--model"),
        ("--init w --patch-gain 2", "--patch-gain"),
        ("--steps 3 --epochs 2", "--epochs"),
        ("--probe-every 3", "--probe-every"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(store, words, flag):
    with refused(SystemExit, flag):
        train.parse_args(["--store", str(store), *words.split()])


@pytest.mark.parametrize(
    "words, flag",
    [
        ("--steps 0", "--steps"),
        ("--ratio -2", "--ratio"),
        ("--crop-scale 0 1", "--crop-scale"),
        ("--crop-scale 1 0.3", "--crop-scale"),
        ("--target-scale 0.3 0.2", "--target-scale"),
        ("--seed -1", "--seed"),
        ("--seed 99999999999999999999", "--seed"),
        ("--lr inf", "--lr"),
        ("--epochs inf", "--epochs"),
        ("--objective latentmim --tau 0", "--tau"),
        ("--objective latentmim --gap -1", "--gap"),
        ("--lr nan", "--lr"),
        ("--momentum 2", "--momentum"),
        ("--objective simclr", "--objective"),
        ("--banana", "--banana"),
    ],
)
def test_absurd_numbers(store, words, flag):
    with refused(SystemExit, flag):
        train.parse_args(["--store", str(store), *words.split()])


def test_store_without_training_chips(tmp_path):
    path = edit_store(write_store(tmp_path / "pairs"), rows=lambda chip: {"split": "test"})
    rejects([path], path, tmp_path / "run")


def test_run_directory_is_never_overwritten(store, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    rejects([tmp_path / "photos"], store, tmp_path / "photos")
    rejects([tmp_path / "photos2", "--resume"], store, tmp_path / "photos2", resume=True)
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.png"]
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text("{}")
    rejects([tmp_path / "theirs"], store, tmp_path / "theirs")
    out = tmp_path / "run"
    run(store, out, steps=3, save_every=1, stop_at=2)
    rejects([out, "--dim 16", "32", "--fresh"], store, out, steps=3, dim=32)
    rejects([out, "--objective"], store, out, "latentmim", steps=3, resume=True)
    whole = (out / "ckpt.pt").read_bytes()
    (out / "ckpt.pt").write_bytes(whole[: len(whole) // 2])
    rejects([out / "ckpt.pt", f"mv {out / 'ckpt.previous.pt'}"], store, out, steps=3,
            resume=True)  # fmt: skip
    os.replace(out / "ckpt.previous.pt", out / "ckpt.pt")
    run(store, out, steps=3, resume=True)  # the remedy works
    assert [e["step"] for e in log_of(out)] == [1, 2, 3]


def test_a_run_without_a_checkpoint_may_start_again(store, tmp_path):
    out = tmp_path / "run"
    run(store, out, steps=2)
    for name in ("ckpt.pt", "encoder.safetensors"):
        (out / name).unlink()
    run(store, out, steps=3, global_batch=2)
    assert [e["step"] for e in log_of(out)] == [1, 2, 3]


def test_device_batch_fits_unless_set(store, tmp_path):
    run(store, tmp_path / "run", steps=1, global_batch=34)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["accumulation"] == (34 // 2 if not torch.cuda.is_available() else 1)


def test_damaged_run_directories(store, tmp_path):
    out = tmp_path / "run"
    run(store, out, steps=3, stop_at=2)
    config = (out / "config.json").read_text()
    for text in ("", "[]", "{}", '{"args": {}}', config[:50]):
        (out / "config.json").write_text(text)
        rejects([out / "config.json"], store, out, steps=3, resume=True)
    (out / "config.json").write_text(config.replace('"precision": "float32"', '"precision": "x"'))
    rejects([out, "--precision"], store, out, steps=3, resume=True)
    (out / "config.json").write_text(config)
    state = torch.load(out / "ckpt.pt", weights_only=True)
    for damaged in (
        torch.ones(3),
        {"step": 1},
        {**state, "objective": {}},
        {**state, "step": "soon"},
    ):
        torch.save(damaged, out / "ckpt.pt")
        rejects([out / "ckpt.pt"], store, out, steps=3, resume=True)
    torch.save(state, out / "ckpt.pt")
    (out / "log.jsonl").unlink()
    run(store, out, steps=3, resume=True)
    assert [e["step"] for e in log_of(out)] == [3]


def test_a_store_that_is_damaged_while_a_run_trains_on_it_ends_it(tmp_path):
    path = write_store(tmp_path / "pairs")
    shard = max(path.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1  # of the pixels: opening it sees nothing
    shard.write_bytes(content)
    last = len(data.Store(path)) - 1
    rejects([f"{shard}: chip {last} ", "--fresh"], path, tmp_path / "run", steps=200)


def test_weights_that_are_not_finite_are_never_saved(store, tmp_path):
    rejects(["step 1", tmp_path / "run", "--lr"], store, tmp_path / "run", lr=1e30,
            weight_decay=1e30, steps=2, save_every=1)  # fmt: skip
    assert not (tmp_path / "run" / "ckpt.pt").exists()


def test_a_kill_between_two_renames_loses_one_checkpoint_not_the_run(store, tmp_path):
    out = tmp_path / "run"
    run(store, out, steps=3, save_every=1, stop_at=2)
    (out / "ckpt.pt").rename(out / "ckpt.new.pt")
    run(store, out, steps=3, resume=True)
    assert [e["step"] for e in log_of(out)] == [1, 2, 3]
    run(store, tmp_path / "whole", steps=3)
    same_weights(weights_of(out), weights_of(tmp_path / "whole"))


def test_a_loss_that_is_not_finite_stops_the_run(store, tmp_path):
    path = write_store(tmp_path / "pairs")
    std = Store(path).meta["std"] | {"mr": [1e-38] * 4}
    edit_store(path, {"std": std})
    rejects(["step 2", "nan", "2 steps in a row", f"of {path}"], path, tmp_path / "run")
    assert not (tmp_path / "run" / "ckpt.pt").exists()


def test_the_script_says_one_sentence(store, tmp_path):
    bad = command(store, tmp_path / "run", mr_size=30)
    for words in (bad, [*bad, "--steps", "none"]):
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *words], capture_output=True, text=True
        )
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("train.py: ") and done.stderr.count("\n") == 1


def test_store_is_smooth_and_paired(store):
    """The fixture itself: HR averages to MR, or the tests above mean nothing."""
    batch = Store(store).batch(np.arange(4))
    pooled = F.avg_pool2d(batch["hr"].float(), 2)
    torch.testing.assert_close(pooled, batch["mr"].float(), atol=1.0, rtol=0)


# ---- trust: nothing lost, nothing silent


def asked_to_stop_in(monkeypatch, step):
    """Someone asks for the end while that step, from 0, is computed."""
    rates = model.IJEPA.rates

    def ask(objective, at, *values):
        if at == step:
            runs.Stop.ask("SIGTERM")
        return rates(objective, at, *values)

    monkeypatch.setattr(model.IJEPA, "rates", ask)


def test_a_run_that_is_asked_to_stop_goes_on_bit_for_bit(store, tmp_path, monkeypatch):
    monkeypatch.setattr(runs.Stop, "asked", None)  # and so it is again behind this test
    run(store, tmp_path / "whole", steps=5)
    with monkeypatch.context() as patch:
        asked_to_stop_in(patch, 1)
        run(store, tmp_path / "run", steps=5)
    runs.Stop.ask(None)
    assert (tmp_path / "run" / "stopped").read_text() == "asked to by SIGTERM\n"
    # all ranks know of it a step later
    assert torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"] == 3
    run(store, tmp_path / "run", steps=5)
    assert not (tmp_path / "run" / "stopped").exists()
    same_weights(weights_of(tmp_path / "whole"), weights_of(tmp_path / "run"))


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(store, tmp_path, monkeypatch, fault, capsys):
    saved, rates, now = {}, model.IJEPA.rates, []
    save = runs.save_checkpoint

    def keep(path, state):
        saved[state["step"]] = state
        save(path, state)

    monkeypatch.setattr(runs, "save_checkpoint", keep)
    monkeypatch.setattr(model.IJEPA, "rates", lambda o, s, *v: now.append(s) or rates(o, s, *v))
    affinity_of = train.affinity_of

    def planted(*values):
        loss = affinity_of(*values)
        if now[-1] != 1:
            return loss
        # an infinite loss with finite gradients; a finite one with infinite gradients
        return loss + math.inf if fault == "loss" else loss + (0 * loss).sqrt()

    monkeypatch.setattr(train, "affinity_of", planted)
    run(store, tmp_path / "run", steps=3, save_every=1)
    for part in ("objective", "optimizer"):
        one, two, three = (tree_leaves(saved[step][part]) for step in (1, 2, 3))
        tensors = [k for k, x in enumerate(one) if torch.is_tensor(x)]
        assert all(one[k].equal(two[k]) for k in tensors)
        assert not all(one[k].equal(three[k]) for k in tensors)
    log = log_of(tmp_path / "run")
    assert [e["step"] for e in log] == [1, 3] and log[1]["skipped"] == 1
    assert "step 2: skipped" in capsys.readouterr().out


@pytest.mark.parametrize("good", [None, 6])
def test_ten_bad_steps_in_a_row_stop_a_run(store, tmp_path, monkeypatch, good, capsys):
    """A good one in between counts from 0 again; the run learns of a step one step later."""
    now, rates, affinity_of = [], model.IJEPA.rates, train.affinity_of
    monkeypatch.setattr(model.IJEPA, "rates", lambda o, s, *v: now.append(s) or rates(o, s, *v))
    monkeypatch.setattr(
        train, "affinity_of", lambda *v: affinity_of(*v) + (0 if now[-1] == good else math.inf)
    )
    last = train.PATIENCE + (0 if good is None else good + 1)
    rejects([f"step {last}:", "10 steps in a row", "affinity inf", "lr "], store, tmp_path / "run",
            steps=40, log_every=100)  # fmt: skip
    assert now == list(range(last + 1))
    said = capsys.readouterr().out
    assert said.count("skipped, its loss") == last - (good is not None)


def test_the_encoder_and_the_picture_are_made_again_where_they_are_not_the_checkpoints(
    store, tmp_path
):
    out = tmp_path / "run"
    run(store, out, steps=3, save_every=1)
    whole = (out / "encoder.safetensors").read_bytes()
    for damage in (lambda p: p.unlink(), lambda p: p.write_bytes(whole[:-1] + b"?")):
        damage(out / "encoder.safetensors")
        (out / "tokens.png").unlink()
        run(store, out, steps=3)
        made = safetensors.torch.load_file(out / "encoder.safetensors")
        same_weights(made, safetensors.torch.load(whole))
        assert (out / "tokens.png").is_file()


def test_a_picture_that_fails_is_a_warning(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "draw_picture", lambda *a: 1 / 0)
    run(store, tmp_path / "run")
    assert "warning: no tokens.png" in capsys.readouterr().out


def test_checkpointed_activations_change_no_loss(store, tmp_path):
    run(store, tmp_path / "a")
    run(store, tmp_path / "b", checkpoint_activations=True)
    same_weights(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))


def test_the_same_line_goes_on_and_another_one_does_not(store, tmp_path):
    out = tmp_path / "run"
    run(store, out, steps=4, stop_at=2)
    rejects([out, "--lr 0.001, now 0.002", "--override"], store, out, steps=4, lr=2e-3)
    run(store, out, steps=4, lr=2e-3, override=["lr", "start_lr", "final_lr"], stop_at=3)
    assert json.loads((out / "config.json").read_text())["overrides"][0]["lr"] == [0.001, 0.002]
    run(store, out, steps=4, lr=2e-3)
    assert [e["step"] for e in log_of(out)] == [1, 2, 3, 4]
    run(store, out, steps=2, fresh=True)
    assert [e["step"] for e in log_of(tmp_path / "run-2")] == [1, 2]
