"""
Checkpoints: folders <run>/model_<step>/ with model.safetensors, config.json, tokenizer.json, meta.json and one
optim_rank<r>.safetensors per rank; the stage-1 encoder alone as <run>/deepencoder_<step>/. Each is written under a temporary
name and renamed, so that a folder with the final name is always whole. Nothing here is ever unpickled.
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


def steps_of(run_dir, prefix="model"):
    """Steps that have a whole checkpoint, ascending."""
    if not os.path.isdir(run_dir):
        return []
    return sorted(int(m[1]) for name in os.listdir(run_dir) if (m := re.fullmatch(rf"{prefix}_(\d+)", name)))


def resuming(args):
    """Whether this run goes on from a checkpoint of its own (so that published weights need not be fetched again)."""
    return args.resume and bool(steps_of(os.path.join(args.checkpoints, args.model_tag)))


def checkpoint_dir(run_dir, step, prefix="model"):
    return os.path.join(run_dir, f"{prefix}_{step:06d}")


def need_disk_space(folder, bytes_needed):
    free = shutil.disk_usage(folder).free
    if free < bytes_needed:
        raise OSError(f"a checkpoint needs {bytes_needed / 1e6:.0f} MB, {folder} has {free / 1e6:.0f} MB free: make room and --resume")


def save_checkpoint(run_dir, step, model, tokenizer, optimizer, meta):
    """Full checkpoint; every rank calls it (each writes its optimizer state)."""
    rank, _, _ = dist_info()
    final = checkpoint_dir(run_dir, step)
    temporary = final + ".tmp"
    state = optimizer.state_tensors()
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    if rank == 0:
        sizes = [t.numel() * t.element_size() for t in (*weights.values(), *state.values())]
        need_disk_space(run_dir, 2 * sum(sizes) + 10_000_000)
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
        save_file(weights, os.path.join(temporary, "model.safetensors"))
        write_json(os.path.join(temporary, "config.json"), model.cfg.to_dict())
        write_json(os.path.join(temporary, "meta.json"), dict(meta, step=step))
        tokenizer.save(temporary)
    barrier()
    save_file(state, os.path.join(temporary, f"optim_rank{rank}.safetensors"))
    barrier()
    if rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
    barrier()
    return final


def save_encoder(run_dir, step, model, meta):
    """The encoder alone (SAM, compressor, statistics, CLIP): what stage 2 starts from."""
    final = checkpoint_dir(run_dir, step, "deepencoder")
    temporary = final + ".tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    write_encoder(temporary, model, dict(meta, step=step))
    shutil.rmtree(final, ignore_errors=True)
    os.rename(temporary, final)
    return final


def write_encoder(folder, model, meta):
    """The three files of an encoder alone, into an empty folder."""
    save_file({k: v.contiguous() for k, v in model.encoder.state_dict().items()}, os.path.join(folder, "model.safetensors"))
    write_json(os.path.join(folder, "config.json"), model.cfg.to_dict())
    write_json(os.path.join(folder, "meta.json"), meta)


def prune(run_dir, keep, prefix="model"):
    """Deletes checkpoints whose step is not in `keep`, and what a killed run left half-written."""
    for name in os.listdir(run_dir):
        m = re.fullmatch(rf"{prefix}_(\d+)(\.tmp)?", name)
        if m and (m[2] or int(m[1]) not in keep):
            shutil.rmtree(os.path.join(run_dir, name))


def read_tensors(path):
    """{name: tensor} of a safetensors file; a broken one is a ValueError that names it."""
    try:
        return load_file(path)
    except SafetensorError as e:
        raise ValueError(f"{path} is not a whole safetensors file ({e}): delete its folder and --resume from an earlier one") from e


def load_weights(module, tensors, where):
    """Every key of the module and of the file must match, in shape too, and every number must be finite."""
    own = module.state_dict()
    missing, extra = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    shapes = [f"{k}: file {tuple(tensors[k].shape)}, model {tuple(own[k].shape)}" for k in own
              if k in tensors and tensors[k].shape != own[k].shape]
    if missing or extra or shapes:
        raise ValueError(f"{where} does not fit the model: {len(missing)} keys missing {missing[:3]}, {len(extra)} unknown {extra[:3]}, "
                         f"{len(shapes)} of another shape {shapes[:3]}; it was written for another config")
    for k, t in tensors.items():
        if t.is_floating_point() and not torch.isfinite(t).all():
            raise ValueError(f"{where}: {k} holds numbers that are not finite")
    module.load_state_dict(tensors)


def resolve(path, prefix="model"):
    """A checkpoint folder, or a run folder (then its last checkpoint) -> checkpoint folder."""
    if os.path.exists(os.path.join(path, "model.safetensors")):
        return path
    steps = steps_of(path, prefix)
    if not steps:
        raise FileNotFoundError(f"{path}: no {prefix}_<step> checkpoint there; train one first (bash speedrun.sh)")
    return checkpoint_dir(path, steps[-1], prefix)


def load_model(path, device, kind=DeepseekOCR):
    """-> (model in eval mode, tokenizer, meta) from a checkpoint or run folder."""
    path = resolve(path)
    cfg = ModelConfig.from_dict(read_json(os.path.join(path, "config.json")))
    model = kind(cfg)
    load_weights(model, read_tensors(os.path.join(path, "model.safetensors")), path)
    model.tokenizer, model.meta = Tokenizer.load(path), read_json(os.path.join(path, "meta.json"))
    return model.to(device).eval(), model.tokenizer, model.meta


def load_encoder(path, model):
    """Stage-1 encoder into `model`; its sizes must be the model's. -> its meta."""
    path = resolve(path, "deepencoder")
    theirs, ours = ModelConfig.from_dict(read_json(os.path.join(path, "config.json"))).to_dict(), model.cfg.to_dict()
    for part in ("sam", "second_stage", "standardize"):
        theirs_part, ours_part = json.loads(json.dumps(theirs[part])), json.loads(json.dumps(ours[part]))
        if theirs_part != ours_part:
            raise ValueError(f"{path} was trained with {part}={theirs_part}, this run has {ours_part}: use the same preset")
    load_weights(model.encoder, read_tensors(os.path.join(path, "model.safetensors")), path)
    return read_json(os.path.join(path, "meta.json"))


def load_training_state(run_dir, step, model, optimizer):
    """Weights and this rank's optimizer state of a full checkpoint, in place. -> meta."""
    rank, _, world = dist_info()
    path = checkpoint_dir(run_dir, step)
    meta = read_json(os.path.join(path, "meta.json"))
    if meta["world_size"] != world:
        raise ValueError(f"{path} was written by {meta['world_size']} processes, this run has {world}: resume with the same number")
    load_weights(model, read_tensors(os.path.join(path, "model.safetensors")), path)
    optimizer.load_state_tensors(read_tensors(os.path.join(path, f"optim_rank{rank}.safetensors")))
    return meta
