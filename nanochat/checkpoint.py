"""
Checkpoints, as folders of a run:

    <run>/model_<step>/         model.safetensors, config.json, tokenizer.json, meta.json,
                                optim.safetensors
    <run>/deepencoder_<step>/   model.safetensors, config.json, meta.json: stage 1's encoder alone

Each also has sha256.json, a checksum per file, which every load verifies. A checkpoint is written
under a temporary name, flushed to disk and renamed, so a folder with the final name is always
complete, whenever a run is killed. Nothing here is ever unpickled.
"""
import errno
import hashlib
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import fields

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanochat import common
from nanochat.common import barrier, get_world_size, is_master, write_json
from nanochat.config import GPTConfig, ModelConfig, SAMConfig
from nanochat.image_modes import get_mode
from nanochat.model import DeepseekOCR
from nanochat.tokenizer import IMAGE_TOKEN, Tokenizer

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
META = "meta.json"
TOKENIZER = "tokenizer.json"
OPTIMIZER = "optim.safetensors"
SUMS = "sha256.json"

SMALL_FILES = 10_000_000    # bytes, a generous bound for all JSON files of a checkpoint
LARGEST_SIZE = 2 ** 20      # of any width, depth or length; more is a damaged or hostile config

# -----------------------------------------------------------------------------
# Which checkpoints there are

def checkpoint_dir(run_dir, step, prefix="model"):
    return os.path.join(run_dir, f"{prefix}_{step:06d}")


def steps_of(run_dir, prefix="model"):
    """Steps that have a complete checkpoint, ascending. prefix: "model" or "deepencoder"."""
    if not os.path.isdir(run_dir):
        return []
    steps = []
    for name in os.listdir(run_dir):
        match = re.fullmatch(rf"{prefix}_(\d{{6,}})", name)  # and no .tmp or .old behind it
        if match:
            steps.append(int(match[1]))
    return sorted(steps)


def resolve(path, prefix="model"):
    """A checkpoint folder, or a run folder (then its last checkpoint) -> checkpoint folder."""
    if os.path.exists(os.path.join(path, WEIGHTS)):
        return path
    steps = steps_of(path, prefix)
    if not steps:
        raise FileNotFoundError(
            f"{path}: no {prefix}_<step> checkpoint there; train one first (bash speedrun.sh)")
    last = checkpoint_dir(path, steps[-1], prefix)

    # Stage 2 must not silently start from an older encoder than the run's last.
    model_steps = steps_of(path)
    if prefix == "deepencoder" and model_steps and model_steps[-1] > steps[-1]:
        raise ValueError(f"{path} was trained to step {model_steps[-1]}, but its last encoder is "
                         f"of step {steps[-1]}: --resume that run to write the missing one, or "
                         f"name {last} to take the older one")
    return last


def resuming(args):
    """Whether this run goes on from its own checkpoint, and so needs no published weights."""
    return args.resume and bool(steps_of(os.path.join(args.checkpoints, args.model_tag)))


# -----------------------------------------------------------------------------
# Folders that are complete or absent

def sha256_of(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def flush(path):
    """Forces a file or folder to disk; else a power cut may keep a rename and lose the data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        # Some network file systems cannot flush a folder, and need not.
        if not (os.path.isdir(path) and e.errno == errno.EINVAL):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(final):
    """
    Yields a temporary folder to write files into. At the end of the block their checksums are
    added, all is flushed to disk, and the folder is renamed to `final`, in place of an older one.
    If the block fails, nothing remains; if the process is killed, `final` is as it was before.
    """
    final = os.path.abspath(final)
    temporary = final + ".tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # a killed run's
    os.makedirs(temporary)
    try:
        yield temporary
        seal(temporary)
    except (Exception, KeyboardInterrupt):
        # What is left of a failed write, on a full disk or after Ctrl-C, must not take room.
        shutil.rmtree(temporary, ignore_errors=True)
        raise

    # os.rename does not replace a folder that has files. A kill between these lines loses both
    # folders, but there only are two when a resumed run saves a step again, and it then does so
    # once more.
    if os.path.exists(final):
        discard(final)
    os.rename(temporary, final)
    flush(os.path.dirname(final))


def seal(folder):
    """Adds the checksums of a folder's files, and flushes everything to disk."""
    sums = {}
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        sums[name] = sha256_of(path)
        flush(path)
    path = os.path.join(folder, SUMS)
    write_json(path, sums)
    flush(path)
    flush(folder)


def discard(folder):
    """Deletes a folder. A kill in between leaves a .old folder, not an incomplete checkpoint."""
    condemned = folder + ".old"
    shutil.rmtree(condemned, ignore_errors=True)
    os.rename(folder, condemned)
    shutil.rmtree(condemned)


def clear_leftovers(run_dir):
    """Deletes what a killed run left half-written or half-deleted. Only one rank may call this."""
    if not os.path.isdir(run_dir):
        return
    for name in os.listdir(run_dir):
        if re.fullmatch(r"(model|deepencoder)_\d+\.(tmp|old)", name):
            shutil.rmtree(os.path.join(run_dir, name))


def prune(run_dir, keep, prefix="model"):
    """Deletes checkpoints whose step is not in `keep`."""
    for step in steps_of(run_dir, prefix):
        if step not in keep:
            discard(checkpoint_dir(run_dir, step, prefix))


# -----------------------------------------------------------------------------
# Writing

def save_checkpoint(run_dir, step, model, tokenizer, optimizer, meta):
    """
    Full checkpoint. -> its folder. Every rank must call this. Rank 0 alone writes: weights and
    optimizer state are equal on all ranks, since DDP gives every rank the same gradients, and
    Muon the same updates.
    """
    final = checkpoint_dir(run_dir, step)
    if is_master():
        weights = contiguous(model.state_dict())
        state = contiguous(optimizer.state_tensors())
        # Room is made before it is measured: a killed run's leftovers may be all that is missing.
        clear_leftovers(run_dir)
        need_disk_space(run_dir, size_of(weights) + size_of(state))
        with new_folder(final) as folder:
            write_model(folder, weights, model.cfg, dict(meta, step=step))
            write_tensors(folder, OPTIMIZER, state)
            tokenizer.save(folder)
    barrier()  # no rank starts the next step before this one is on disk
    return final


def save_encoder(run_dir, step, model, meta):
    """
    The encoder alone (SAM, compressor, CLIP), which stage 2 starts from. -> its folder.
    Rank 0 writes, other ranks do nothing; there is no barrier. Best called before save_checkpoint:
    a kill between the two then loses nothing, since a run resumes from the last full checkpoint and
    writes this encoder again.
    """
    final = checkpoint_dir(run_dir, step, "deepencoder")
    if is_master():
        weights = contiguous(model.encoder.state_dict())
        clear_leftovers(run_dir)
        need_disk_space(run_dir, size_of(weights))
        with new_folder(final) as folder:
            write_model(folder, weights, model.cfg, dict(meta, step=step))
    return final


def write_model(folder, weights, cfg, meta):
    """Writes weights {key: tensor}, config and meta into a folder."""
    write_tensors(folder, WEIGHTS, weights)
    write_json(os.path.join(folder, CONFIG), cfg.to_dict())
    write_json(os.path.join(folder, META), meta)


def write_tensors(folder, name, tensors):
    """A safetensors file; OSError if it cannot be written."""
    path = os.path.join(folder, name)
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as e:  # this is also what a full disk looks like
        raise OSError(f"cannot write {path} ({e}): make room and try again") from e
    # safetensors leaves a file that its owner alone may read; a folder to share needs more.
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def contiguous(tensors):
    """safetensors writes contiguous tensors only; convolution weights may be channels-last."""
    return {name: t.contiguous() for name, t in tensors.items()}


def size_of(tensors):
    """Bytes of a dict of tensors."""
    return sum(t.nbytes for t in tensors.values())


def need_disk_space(folder, tensor_bytes):
    needed = (tensor_bytes + SMALL_FILES) / 1e6
    free = shutil.disk_usage(folder).free / 1e6
    if free < needed:
        raise OSError(f"a checkpoint needs {needed:.0f} MB, {folder} has {free:.0f} MB free: make "
                      f"room and --resume")


# -----------------------------------------------------------------------------
# Reading files

def way_out(folder):
    """What to do about a damaged checkpoint, for the end of an error message."""
    run_dir, name = os.path.split(os.path.abspath(folder))
    match = re.fullmatch(r"(model|deepencoder)_(\d+)", name)
    if not match:
        return f"replace {folder} by a good copy"

    prefix = match[1]
    step = int(match[2])
    # Not "the last": the damaged one may not be the last itself.
    earlier = [other for other in steps_of(run_dir, prefix) if other < step]
    if not earlier:
        return f"there is no checkpoint before it: delete {folder} and train again"
    before = checkpoint_dir(run_dir, earlier[-1], prefix)
    return f"the checkpoint before it is {before}: name that one, or delete {folder} and --resume"


def verify(folder, names=None):
    """
    ValueError if a file of `names` (default: every file) is not what was written, by its sha256.
    A folder without checksums, as somebody's own script may write it, is taken as it is.
    """
    if not os.path.exists(os.path.join(folder, SUMS)):
        return
    sums = read_record(folder, SUMS, keys=names or ())
    for name in names or sums:
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path} is missing; {way_out(folder)}")
        if sha256_of(path) != sums[name]:
            raise ValueError(f"{path} is corrupted (its sha256 is not the one in {SUMS}; delete "
                             f"that file if the change was meant); {way_out(folder)}")


def read_record(folder, name, keys=()):
    """As common.read_record; the error also says what to do about the checkpoint."""
    try:
        return common.read_record(os.path.join(folder, name), keys)
    except ValueError as e:
        raise ValueError(f"{e}; {way_out(folder)}") from e


def read_tensors(folder, name):
    """{key: tensor} of a safetensors file; a damaged one is a ValueError that names it."""
    path = os.path.join(folder, name)
    try:
        return load_file(path)
    except SafetensorError as e:
        raise ValueError(f"{path} is not a complete safetensors file ({e}); "
                         f"{way_out(folder)}") from e


def check_sizes(kind, sizes, where):
    """ValueError unless every int field of the dataclass `kind` is a plausible int in `sizes`."""
    if not isinstance(sizes, dict):
        raise ValueError(f"{where} is {sizes!r}, need an object with the sizes of {kind.__name__}")
    for field in fields(kind):
        # Booleans are ints to isinstance, and missing keys are reported by whoever builds `kind`.
        if field.type is not int or field.name not in sizes:
            continue
        value = sizes[field.name]
        if type(value) is not int or not 0 <= value <= LARGEST_SIZE:
            raise ValueError(f"{where}: {field.name} is {value!r}, must be an integer from 0 to "
                             f"{LARGEST_SIZE}")


def read_config(folder):
    """ModelConfig of a checkpoint folder; ValueError that names file and key if it is damaged."""
    record = read_record(folder, CONFIG)
    try:
        check_sizes(SAMConfig, record["sam"], "sam")
        check_sizes(GPTConfig, record["gpt"], "gpt")
        cfg = ModelConfig.from_dict(record)
        # Only now is it known what kind of second stage it is, and so which sizes it has.
        check_sizes(type(cfg.second_stage), vars(cfg.second_stage), "second_stage")
        for name in cfg.modes:
            get_mode(name)
        return cfg
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as e:
        path = os.path.join(folder, CONFIG)
        raise ValueError(f"{path} is not a valid config ({type(e).__name__}: {e})") from e


# -----------------------------------------------------------------------------
# What a tokenizer and weights must be

# What a rendered conversation consists of. The tokens of a Python tool may be absent.
NEEDED_TOKENS = ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>",
                 "<|assistant_end|>", IMAGE_TOKEN)
# Integers and float8 would need a scale, which is not in these files.
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tokenizer(tokenizer, where):
    """ValueError unless the tokenizer encodes any text and has the tokens of a conversation."""
    missing = [name for name in NEEDED_TOKENS if name not in tokenizer.special_ids]
    if missing:
        raise ValueError(f"{where}: the tokenizer has no {', '.join(missing)}; its special tokens "
                         f"are {', '.join(tokenizer.special_tokens[:10])}")

    # At a byte without a token tiktoken panics, which no `except Exception` would catch.
    single_bytes = {bytes([value]) for value in range(256)}
    if set(tokenizer.ranks[:256]) != single_bytes:
        raise ValueError(f"{where}: the tokenizer does not begin with the 256 single bytes")
    if len(set(tokenizer.ranks)) != len(tokenizer.ranks):
        raise ValueError(f"{where}: the tokenizer has a token twice")


def check_tokenizer_fits(tokenizer, cfg, where):
    """ValueError unless config and tokenizer agree on the vocabulary and the image token's id."""
    vocab_size = tokenizer.get_vocab_size()
    image = tokenizer.image_token_id
    if vocab_size > cfg.gpt.vocab_size or image != cfg.image_token_id:
        raise ValueError(
            f"{where}: {TOKENIZER} has {vocab_size} tokens and {IMAGE_TOKEN} is {image}; {CONFIG} "
            f"has {cfg.gpt.vocab_size} and {cfg.image_token_id}: they are not of the same model")


def check_fingerprint(tokenizer, meta, path):
    """ValueError unless the weights in `path` were trained with this tokenizer."""
    # One of the same size would fit, load, and turn every answer into other words. Models built by
    # hand have no fingerprint.
    if "tokenizer" in meta and meta["tokenizer"] != tokenizer.fingerprint():
        raise ValueError(f"{os.path.join(path, TOKENIZER)} is not the tokenizer that this model "
                         f"was trained with (its fingerprint is not the one in {META}); "
                         f"{way_out(path)}")


def check_values(t, dtype, what):
    """ValueError unless the tensor `t` has numbers that stay finite in `dtype`. what: names it."""
    if t.dtype not in FLOATS:
        raise ValueError(f"{what} is of {t.dtype}, need 16 bits of floating point or more")
    if not torch.isfinite(t).all():
        raise ValueError(f"{what} has values that are not finite")
    if not torch.isfinite(t.to(dtype)).all():  # of fp64, beyond 3.4e38
        raise ValueError(f"{what} has values that are too large for {dtype}")


def check_keys(own, tensors, where):
    """ValueError unless `own` and `tensors`, both {key: tensor}, have the same keys and shapes."""
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


def check_outline(cfg, kind, tensors, where):
    """
    ValueError unless a model of class `kind` and config `cfg` has these keys and shapes. Takes no
    memory and little time, however large the sizes are that a damaged config asks for.
    """
    # Every block has several tensors; without this, a depth of a million would take minutes.
    blocks = cfg.sam.depth + cfg.gpt.n_layer + getattr(cfg.second_stage, "depth", 0)
    if blocks > len(tensors):
        raise ValueError(f"{where}: {CONFIG} describes {blocks} blocks, {WEIGHTS} has no more than "
                         f"{len(tensors)} tensors")
    with torch.device("meta"):  # shapes alone, nothing is allocated
        outline = kind(cfg)
    check_keys(outline.state_dict(), tensors, where)


# -----------------------------------------------------------------------------
# Loading

def load_weights(module, tensors, where):
    """
    Loads `tensors` into `module`, all or nothing. Both must have the same keys and shapes, and
    every value must be finite; ValueError otherwise. where: names the source in errors.
    """
    # All checks come before the first copy: a model is never half old and half new.
    own = module.state_dict()
    check_keys(own, tensors, where)
    for key, t in tensors.items():
        check_values(t, own[key].dtype, f"{where}: {key}")
    module.load_state_dict(tensors)


def load_model(path, device, kind=DeepseekOCR, needed=()):
    """
    -> (model of class `kind` in eval mode, tokenizer, meta) from a checkpoint or run folder.
    needed: keys of meta that the caller uses, as for read_record.
    """
    path = resolve(path)
    verify(path, [WEIGHTS, CONFIG, TOKENIZER, META])  # not the optimizer
    cfg = read_config(path)
    meta = read_record(path, META, needed)
    tokenizer = Tokenizer.load(path)
    check_tokenizer(tokenizer, path)
    check_tokenizer_fits(tokenizer, cfg, path)
    check_fingerprint(tokenizer, meta, path)
    tensors = read_tensors(path, WEIGHTS)
    check_outline(cfg, kind, tensors, path)

    # Nothing is allocated before config, tokenizer and weights are known to belong together.
    model = kind(cfg)
    load_weights(model, tensors, path)
    return model.to(device).eval(), tokenizer, meta


def load_encoder(path, model):
    """Loads a stage-1 encoder into `model`, which must have the same sizes. -> its meta."""
    path = resolve(path, "deepencoder")
    verify(path, [WEIGHTS, CONFIG, META])
    theirs = read_config(path)
    meta = read_record(path, META)

    # Decoder and image modes may be others; what the encoder consists of may not.
    for part in ("sam", "second_stage"):
        trained_with = getattr(theirs, part)
        wanted = getattr(model.cfg, part)
        if trained_with != wanted:
            raise ValueError(f"{path} was trained with {part}={trained_with}, this run has "
                             f"{wanted}: use the same preset")
    load_weights(model.encoder, read_tensors(path, WEIGHTS), path)
    return meta


def load_training_state(run_dir, step, model, optimizer, allow_other_world_size=False):
    """
    Loads weights and optimizer state of a full checkpoint, in place. -> its meta.

    A run may go on with another number of processes if allow_other_world_size is set. What then
    holds for its data:
    - A task with indices gives micro-batch k of rank r the samples from (k * world + r) *
      device_batch_size on. With the same device and total batch size, every later step therefore
      has the same samples in the same micro-batches, and only rounding differs.
    - With another device batch size every step still has the same samples, in other micro-batches.
    - A stream cannot go on, since meta has its state per rank.
    """
    world = get_world_size()
    path = checkpoint_dir(run_dir, step)
    verify(path, [WEIGHTS, CONFIG, TOKENIZER, META, OPTIMIZER])
    meta = read_record(path, META, keys=["world_size"])
    # By default refused: whoever allows it has thought about the data, as said above.
    if meta["world_size"] != world and not allow_other_world_size:
        raise ValueError(f"{path} was written by {meta['world_size']} processes, this run has "
                         f"{world}, and a stream's place is known for each of them: resume with "
                         f"the same number")

    # Both files are read before anything is changed.
    weights = read_tensors(path, WEIGHTS)
    state = read_tensors(path, OPTIMIZER)
    load_weights(model, weights, path)
    optimizer.load_state_tensors(state)
    return meta
