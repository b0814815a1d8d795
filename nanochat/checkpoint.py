"""
Checkpoints, as folders of a run:

    <run>/model_<step>/         model.safetensors, config.json, tokenizer.json, meta.json and one
                                optim_rank<r>.safetensors per rank
    <run>/deepencoder_<step>/   model.safetensors, config.json, meta.json: the stage-1 encoder alone

Each is written under a temporary name and renamed at the end, so a folder with the final name is
always complete. Nothing here is ever unpickled.
"""
import json
import os
import re
import shutil

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanochat.common import barrier, dist_info, read_json, write_json
from nanochat.config import ModelConfig
from nanochat.model import DeepseekOCR
from nanochat.tokenizer import Tokenizer

# -----------------------------------------------------------------------------
# Which checkpoints there are

def checkpoint_dir(run_dir, step, prefix="model"):
    return os.path.join(run_dir, f"{prefix}_{step:06d}")


def steps_of(run_dir, prefix="model"):
    """Steps that have a complete checkpoint, ascending."""
    if not os.path.isdir(run_dir):
        return []
    steps = []
    for name in os.listdir(run_dir):
        match = re.fullmatch(rf"{prefix}_(\d+)", name)
        if match:
            steps.append(int(match[1]))
    return sorted(steps)


def resolve(path, prefix="model"):
    """A checkpoint folder, or a run folder (then its last checkpoint) -> checkpoint folder."""
    if os.path.exists(os.path.join(path, "model.safetensors")):
        return path
    steps = steps_of(path, prefix)
    if not steps:
        raise FileNotFoundError(
            f"{path}: no {prefix}_<step> checkpoint there; train one first (bash speedrun.sh)")
    return checkpoint_dir(path, steps[-1], prefix)


def resuming(args):
    """Whether this run continues from a checkpoint of its own: published weights are then not needed."""
    return args.resume and bool(steps_of(os.path.join(args.checkpoints, args.model_tag)))


# -----------------------------------------------------------------------------
# Writing

def save_checkpoint(run_dir, step, model, tokenizer, optimizer, meta):
    """Full checkpoint. Every rank must call this: each writes its own optimizer state. -> its folder."""
    rank, _, _ = dist_info()
    final = checkpoint_dir(run_dir, step)
    temporary = final + ".tmp"
    weights = contiguous(model.state_dict())
    state = optimizer.state_tensors()

    if rank == 0:
        # Twice the size: room for the other ranks' optimizer states as well.
        need_disk_space(run_dir, 2 * (size_of(weights) + size_of(state)) + 10_000_000)
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
        save_file(weights, os.path.join(temporary, "model.safetensors"))
        write_json(os.path.join(temporary, "config.json"), model.cfg.to_dict())
        write_json(os.path.join(temporary, "meta.json"), dict(meta, step=step))
        tokenizer.save(temporary)

    # The folder must be there before the other ranks write, and all must be done before the rename.
    barrier()
    save_file(state, os.path.join(temporary, f"optim_rank{rank}.safetensors"))
    barrier()
    if rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
    barrier()
    return final


def save_encoder(run_dir, step, model, meta):
    """The encoder alone (SAM, compressor, statistics, CLIP), which stage 2 starts from. -> its folder."""
    final = checkpoint_dir(run_dir, step, "deepencoder")
    temporary = final + ".tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    write_encoder(temporary, model, dict(meta, step=step))
    shutil.rmtree(final, ignore_errors=True)
    os.rename(temporary, final)
    return final


def write_encoder(folder, model, meta):
    """Writes the three files of an encoder alone into an empty folder."""
    weights = contiguous(model.encoder.state_dict())
    save_file(weights, os.path.join(folder, "model.safetensors"))
    write_json(os.path.join(folder, "config.json"), model.cfg.to_dict())
    write_json(os.path.join(folder, "meta.json"), meta)


def contiguous(tensors):
    """safetensors writes contiguous tensors only; convolution weights may be channels-last."""
    return {name: t.contiguous() for name, t in tensors.items()}


def size_of(tensors):
    """Bytes of a dict of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def need_disk_space(folder, bytes_needed):
    free = shutil.disk_usage(folder).free
    if free < bytes_needed:
        raise OSError(f"a checkpoint needs {bytes_needed / 1e6:.0f} MB, {folder} has "
                      f"{free / 1e6:.0f} MB free: make room and --resume")


def prune(run_dir, keep, prefix="model"):
    """Deletes checkpoints whose step is not in `keep`, and what a killed run left half-written."""
    for name in os.listdir(run_dir):
        match = re.fullmatch(rf"{prefix}_(\d+)(\.tmp)?", name)
        if not match:
            continue
        step = int(match[1])
        unfinished = match[2] is not None
        if unfinished or step not in keep:
            shutil.rmtree(os.path.join(run_dir, name))


# -----------------------------------------------------------------------------
# Loading

def read_tensors(path):
    """{name: tensor} of a safetensors file; a damaged one is a ValueError that names it."""
    try:
        return load_file(path)
    except SafetensorError as e:
        raise ValueError(f"{path} is not a complete safetensors file ({e}): delete its folder and "
                         f"--resume from an earlier one") from e


def load_weights(module, tensors, where):
    """
    Loads `tensors` into `module`, all or nothing. Both must have the same keys and shapes, and every
    value must be finite; ValueError otherwise. where: names the source in errors.
    """
    # Statistics are kept per grid of tokens, and a file may know other grids than this model does.
    if hasattr(module, "adopt_grids"):
        module.adopt_grids(tensors)

    own = module.state_dict()
    missing = sorted(set(own) - set(tensors))
    unknown = sorted(set(tensors) - set(own))
    shapes = []
    for key in own:
        if key in tensors and tensors[key].shape != own[key].shape:
            theirs = tuple(tensors[key].shape)
            shapes.append(f"{key}: file {theirs}, model {tuple(own[key].shape)}")
    if missing or unknown or shapes:
        raise ValueError(
            f"{where} does not fit the model: {len(missing)} keys missing {missing[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}, {len(shapes)} of another shape {shapes[:3]}; "
            f"it was written for another config")

    for key, t in tensors.items():
        if t.is_floating_point() and not torch.isfinite(t).all():
            raise ValueError(f"{where}: {key} has values that are not finite")
    module.load_state_dict(tensors)


def load_model(path, device, kind=DeepseekOCR):
    """-> (model in eval mode, tokenizer, meta) from a checkpoint or run folder."""
    path = resolve(path)
    cfg = ModelConfig.from_dict(read_json(os.path.join(path, "config.json")))
    model = kind(cfg)
    load_weights(model, read_tensors(os.path.join(path, "model.safetensors")), path)
    model.tokenizer = Tokenizer.load(path)
    model.meta = read_json(os.path.join(path, "meta.json"))
    return model.to(device).eval(), model.tokenizer, model.meta


def load_encoder(path, model):
    """Loads a stage-1 encoder into `model`, which must have the same sizes. -> the encoder's meta."""
    path = resolve(path, "deepencoder")
    theirs = ModelConfig.from_dict(read_json(os.path.join(path, "config.json")))

    # The decoder may be another; what the encoder consists of may not. Compared as JSON would show
    # it, so that tuples and lists are the same.
    for part in ("sam", "second_stage", "standardize"):
        trained_with = json.loads(json.dumps(theirs.to_dict()[part]))
        wanted = json.loads(json.dumps(model.cfg.to_dict()[part]))
        if trained_with != wanted:
            raise ValueError(f"{path} was trained with {part}={trained_with}, this run has {wanted}: "
                             f"use the same preset")

    load_weights(model.encoder, read_tensors(os.path.join(path, "model.safetensors")), path)
    return read_json(os.path.join(path, "meta.json"))


def load_training_state(run_dir, step, model, optimizer):
    """Loads weights and this rank's optimizer state of a full checkpoint, in place. -> its meta."""
    rank, _, world = dist_info()
    path = checkpoint_dir(run_dir, step)
    meta = read_json(os.path.join(path, "meta.json"))
    if meta["world_size"] != world:
        raise ValueError(f"{path} was written by {meta['world_size']} processes, this run has {world}: "
                         f"resume with the same number")
    load_weights(model, read_tensors(os.path.join(path, "model.safetensors")), path)
    state = read_tensors(os.path.join(path, f"optim_rank{rank}.safetensors"))
    optimizer.load_state_tensors(state)
    return meta
