"""
Published weights in, our own out.

in    facebook/sam-vit-base, openai/clip-vit-large-patch14, deepseek-ai/DeepSeek-OCR as safetensors;
      nanochat's model_*.pt through torch.load(weights_only=True), and its tokenizer.pkl through an
      unpickler that admits a single name. No other file is opened.
out   `save`: a folder of our own (safetensors, JSON, model card); `save_encoder`: the encoder alone;
      `export_deepseek`: encoder and projector under DeepSeek-OCR's key names.

Weights are matched key by key. Every key that a part expects must be in the file, with the right
shape and finite values, and every key under that part's prefix must be used: a wrong prefix or
another architecture is an error, never a half-loaded model.

A source is a hub name or a local folder. The key maps are those of transformers' SamModel and
CLIPModel, and of DeepSeek-OCR's own checkpoint.
"""
import fnmatch
import os
import pickle
import re

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanochat import checkpoint as ckpt
from nanochat.common import print0, read_json, write_json
from nanochat.config import GPTConfig
from nanochat.hub import asked, download, endpoint, list_files, online
from nanochat.tokenizer import IMAGE_TOKEN, Tokenizer

SAM = "facebook/sam-vit-base"
CLIP = "openai/clip-vit-large-patch14"
DEEPSEEK = "deepseek-ai/DeepSeek-OCR"

# -----------------------------------------------------------------------------
# Tensors by key

class StoredTensor:
    """A tensor that is still in its safetensors file."""
    def __init__(self, path, key):
        self.path = path
        self.key = key

    def read(self):
        # Opened anew for each key: pages that a memory map has touched count as memory while it is open.
        with safe_open(self.path, "pt") as f:
            return f.get_tensor(self.key)

    def shape(self):
        with safe_open(self.path, "pt") as f:
            return tuple(f.get_slice(self.key).get_shape())


def stored_tensors(path):
    """{key: StoredTensor} of a safetensors file."""
    try:
        with safe_open(path, "pt") as f:
            keys = list(f.keys())
    except SafetensorError as e:
        raise ValueError(f"{path} is not a complete safetensors file ({e}): delete it and download "
                         f"it again") from e
    return {key: StoredTensor(path, key) for key in keys}


def find_tensors(source, name="model.safetensors"):
    """{key: StoredTensor} of a hub name or folder: of its one file, or of all shards of its index."""
    files = list_files(source)
    if name in files:
        return stored_tensors(download(source, name))

    index_name = name + ".index.json"
    if index_name not in files:
        raise FileNotFoundError(f"{source} has neither {name} nor {index_name}; only safetensors are "
                                f"read. It has {files[:10]}")
    shard_of = read_json(download(source, index_name))["weight_map"]
    found = {}
    for shard in sorted(set(shard_of.values())):
        found.update(stored_tensors(download(source, shard)))

    missing = sorted(set(shard_of) - set(found))
    if missing:
        raise ValueError(f"{source}: its index names {len(missing)} keys that no shard has: "
                         f"{missing[:3]}")
    return found


def matches_any(key, patterns):
    return any(fnmatch.fnmatch(key, pattern) for pattern in patterns)


def read_joined(found, keys):
    """The tensors of `keys`, joined along dimension 0."""
    pieces = []
    for key in keys:
        t = found[key]
        pieces.append(t.read() if isinstance(t, StoredTensor) else t)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def match_keys(module, source_keys, found, where, ours_only, theirs_only):
    """-> {own key: source keys} for `fill`; ValueError unless both sides match completely."""
    wanted = {}
    for key in module.state_dict():
        if not matches_any(key, ours_only):
            wanted[key] = source_keys(key)

    used = set()
    for keys in wanted.values():
        used.update(keys)
    missing = sorted(used - set(found))
    unknown = sorted(key for key in set(found) - used if not matches_any(key, theirs_only))
    if missing or unknown:
        raise ValueError(
            f"{where}: {len(missing)} expected keys are missing {missing[:3]}, {len(unknown)} are "
            f"unknown {unknown[:3]}: another architecture or prefix; nothing was loaded")
    return wanted


@torch.no_grad()
def fill(module, source_keys, found, where, ours_only=(), theirs_only=()):
    """
    Fills the parameters and buffers of `module` in place. -> number of tensors used.

    source_keys   function: own key -> list of keys of the source, to be joined along dimension 0
    found         {source key: StoredTensor or tensor}
    where         names the source in errors
    ours_only     patterns of own keys that keep their values
    theirs_only   patterns of source keys that may stay unused
    """
    own = module.state_dict()
    wanted = match_keys(module, source_keys, found, where, ours_only, theirs_only)
    for key, keys in wanted.items():
        t = read_joined(found, keys)
        if t.shape != own[key].shape:
            raise ValueError(f"{where}: {keys[0]} has the shape {tuple(t.shape)}, the model's {key} "
                             f"is {tuple(own[key].shape)}")
        if not torch.isfinite(t).all():
            raise ValueError(f"{where}: {keys[0]} has values that are not finite")
        own[key].copy_(t)
    return sum(len(keys) for keys in wanted.values())


# -----------------------------------------------------------------------------
# Encoder

# Our names of SAM's parameters, which are DeepSeek-OCR's -> transformers' SamModel
SAM_RENAMES = (
    (r"^blocks\.", "layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"^patch_embed\.proj\.", "patch_embed.projection."),
    (r"^neck\.0\.", "neck.conv1."),
    (r"^neck\.1\.", "neck.layer_norm1."),
    (r"^neck\.2\.", "neck.conv2."),
    (r"^neck\.3\.", "neck.layer_norm2."),
)
SAM_UNUSED = ("prompt_encoder.*", "mask_decoder.*", "shared_image_embedding.*")
CLIP_UNUSED = ("text_model.*", "logit_scale", "visual_projection.*", "text_projection.*",
               "vision_model.post_layernorm.*", "vision_model.embeddings.position_ids")
# Of DeepSeek-OCR: its decoder, which is not ours, and what lies between encoder and decoder
DEEPSEEK_DECODER = ("model.layers.*", "model.embed_tokens.*", "model.norm.*", "lm_head.*")
DEEPSEEK_BETWEEN = ("model.projector.*", "model.image_newline", "model.view_seperator")


def sam_key(key):
    """Our name of a SAM parameter -> transformers' name."""
    for pattern, replacement in SAM_RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def clip_keys(key):
    """Our name of a CLIP parameter -> transformers' names: our fused q, k, v are three there."""
    key = key.replace("transformer.layers.", "encoder.layers.")
    if "qkv_proj" not in key:
        return [key]
    return [key.replace("qkv_proj", part) for part in ("q_proj", "k_proj", "v_proj")]


def load_sam(model, source=SAM):
    """SAM's ViT and neck from a transformers SamModel; the compressor (net_2, net_3) keeps its values."""
    def source_keys(key):
        return ["vision_encoder." + sam_key(key)]
    n = fill(model.encoder.sam_model, source_keys, find_tensors(source), source,
             ours_only=("net_[23].weight",), theirs_only=SAM_UNUSED)
    print0(f"SAM: {n} tensors of {source}; the compressor (net_2, net_3) is new")


def load_clip(model, source=CLIP):
    """CLIP's ViT from a transformers CLIPModel, without its last norm."""
    def source_keys(key):
        return ["vision_model." + name for name in clip_keys(key)]
    n = fill(model.encoder.vision_model, source_keys, find_tensors(source), source,
             theirs_only=CLIP_UNUSED)
    print0(f"CLIP: {n} tensors of {source}")


def load_deepseek(model, source=DEEPSEEK):
    """
    DeepSeek-OCR's encoder; also its projector, newline and separator if our decoder is as wide as
    DeepSeek's (1280). Otherwise those stay new, and a line says so.
    """
    standardize = model.cfg.standardize
    if standardize != "none":
        raise ValueError(f"{source} was trained without standardization, this model has "
                         f"standardize={standardize}: use --standardize=none")

    def source_keys(key):
        return ["model." + key]
    vision = {}
    for key, t in find_tensors(source).items():
        if not matches_any(key, DEEPSEEK_DECODER):
            vision[key] = t
    n = fill(model.encoder, source_keys, vision, source, theirs_only=DEEPSEEK_BETWEEN)

    projector = vision.get("model.projector.layers.weight")
    width = projector.shape()[0] if projector is not None else None
    n_embd = model.cfg.gpt.n_embd
    if width == n_embd:
        n += fill(model, source_keys, vision, source, ours_only=("encoder.*", "gpt.*"),
                  theirs_only=("model.sam_model.*", "model.vision_model.*"))
        print0(f"encoder, projector, newline and separator: {n} tensors of {source}")
    else:
        print0(f"encoder: {n} tensors of {source}; its projector gives {width} channels, the decoder "
               f"has {n_embd}: projector, newline and separator are NEW")


# -----------------------------------------------------------------------------
# nanochat's decoder and tokenizer

HEAD_DIM = 128  # of every published nanochat model
# The loader may add rows to the vocabulary's tables for new tokens, but no more than these: a larger
# difference means that file and config are of different models.
MAX_NEW_ROWS = 64


class EncodingState:
    """Stands in for tiktoken's Encoding in a pickle: it keeps the pickled state and runs none of it."""
    def __setstate__(self, state):
        self.state = state


class OneNameUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise ValueError(f"the pickle names {module}.{name}; only tiktoken.core.Encoding is "
                             f"admitted, nothing was run")
        return EncodingState


def by_id(ids):
    """{token: id} -> [(token, id), ...] in the order of the ids."""
    return sorted(ids.items(), key=lambda pair: pair[1])


def read_tokenizer_pkl(path):
    """
    nanochat's tokenizer.pkl, a pickled tiktoken Encoding -> our Tokenizer. <|image|> is added as the
    last token if it has none.
    """
    try:
        with open(path, "rb") as f:
            content = OneNameUnpickler(f).load()
        state = content.state
        ranks = by_id(state["mergeable_ranks"])
        special = by_id(state["special_tokens"])
        pattern = state["pat_str"]
        ids = [i for _, i in ranks + special]
        if ids != list(range(len(ids))):
            raise ValueError("its token ids are not 0, 1, 2, ... with the special ones last")
    except (pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError) as e:
        raise ValueError(f"{path} is not a nanochat tokenizer: {e}") from e

    names = [name for name, _ in special]
    if IMAGE_TOKEN not in names:
        names.append(IMAGE_TOKEN)
    return Tokenizer([token for token, _ in ranks], pattern, names)


def newest(files, pattern, source):
    """The last of `files` that match; steps are zero-padded in their names."""
    found = sorted(fnmatch.filter(files, pattern))
    if not found:
        raise FileNotFoundError(f"{source} has no {pattern}: it has {files[:10]}")
    return found[-1]


def nanochat_config(source):
    """
    -> (GPTConfig, Tokenizer) of a nanochat checkpoint. Sizes are those of its meta file; the
    vocabulary is larger by <|image|>.
    """
    meta = read_json(download(source, newest(list_files(source), "meta_*.json", source)))
    if "model_config" not in meta:
        raise ValueError(f"{source}: its meta file has no model_config, only {sorted(meta)}; sizes "
                         f"are never guessed")
    sizes = meta["model_config"]
    names = set(GPTConfig.__dataclass_fields__)
    if set(sizes) != names:
        raise ValueError(f"{source}: model_config has {sorted(sizes)}, need {sorted(names)}: another "
                         f"nanochat than October 2025's")
    cfg = GPTConfig(**sizes)

    # Weights of another number of heads have the same shapes: they would load, and attend wrongly.
    if cfg.n_embd != HEAD_DIM * cfg.n_head:
        raise ValueError(f"{source}: n_embd {cfg.n_embd} / n_head {cfg.n_head} is not {HEAD_DIM}, as "
                         f"in every published nanochat")

    tokenizer = read_tokenizer_pkl(download(source, "tokenizer.pkl"))
    published = tokenizer.get_vocab_size() - 1  # without <|image|>
    if published > cfg.vocab_size:
        raise ValueError(f"{source}: the tokenizer has {published} tokens, the model {cfg.vocab_size}")
    cfg.vocab_size = max(cfg.vocab_size, tokenizer.get_vocab_size())
    return cfg, tokenizer


def choose_decoder(cfg, args):
    """
    Sets cfg's decoder and image token: from --gpt (a nanochat checkpoint, which brings its own
    tokenizer) or from --tokenizer, with room for --max-seq-len positions. -> Tokenizer.
    """
    if args.gpt:
        cfg.gpt, tokenizer = nanochat_config(args.gpt)
    else:
        tokenizer = Tokenizer.load(args.tokenizer)
        cfg.gpt.vocab_size = tokenizer.get_vocab_size()
    # Rotary positions have no parameters, so a longer sequence needs no new weights.
    cfg.gpt.sequence_len = max(cfg.gpt.sequence_len, args.max_seq_len)
    cfg.image_token_id = tokenizer.image_token_id
    return tokenizer


def read_pt(path):
    """{key: tensor} of a nanochat model_*.pt, memory-mapped, without torch.compile's prefix."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as e:
        reason = str(e).splitlines()[0]
        raise ValueError(f"{path} is not a plain file of tensors ({reason}): refused") from e
    return {key.removeprefix("_orig_mod."): t for key, t in state.items()}


def grow_vocabulary(state, vocab_size):
    """
    Adds rows for new tokens to embedding and head, in place. A new token starts as the mean
    embedding, and with zeros in the head, so that it is neither odd to read nor likely to be said.
    """
    embedding = state.get("transformer.wte.weight")
    head = state.get("lm_head.weight")
    if embedding is not None and 0 < vocab_size - embedding.size(0) <= MAX_NEW_ROWS:
        new = embedding.float().mean(0).to(embedding.dtype)
        new = new.expand(vocab_size - embedding.size(0), -1)
        state["transformer.wte.weight"] = torch.cat([embedding, new])
    if head is not None and 0 < vocab_size - head.size(0) <= MAX_NEW_ROWS:
        new = head.new_zeros(vocab_size - head.size(0), head.size(1))
        state["lm_head.weight"] = torch.cat([head, new])


@torch.no_grad()
def load_nanochat(gpt, source):
    """Fills a GPT that was built from `nanochat_config`."""
    path = download(source, newest(list_files(source), "model_*.pt", source))
    state = read_pt(path)
    grow_vocabulary(state, gpt.cfg.vocab_size)

    def source_keys(key):
        return [key]
    n = fill(gpt, source_keys, state, source)
    print0(f"decoder: {n} tensors of {source}")


# -----------------------------------------------------------------------------
# Out

CARD = """\
---
library_name: nano-deepseek-ocr
license: mit
pipeline_tag: image-text-to-text
tags: [ocr, deepencoder]
---
# A nano-deepseek-ocr model

{parameters:,} parameters, image modes {modes}, standardization {standardize}; {stage}, step {step}, \
commit {commit}, seed {seed}.

{results}
{usage}
"""

MODEL_USAGE = """\
```python
from nanochat.reader import NanoDeepseekOCR
model = NanoDeepseekOCR.from_pretrained("THIS REPOSITORY")
print(model.read(image))
```"""

ENCODER_USAGE = ("The encoder alone: "
                 "`python -m scripts.vis_mid_train --encoder=THIS REPOSITORY`.")

CARD_FIGURES = ("samples", "one_minus_ned", "cer", "f1", "chars_per_vision_token")


def results_table(results):
    """Markdown table of {task: summary of scripts.vision_eval}, a row per task."""
    rows = []
    for task, summary in (results or {}).items():
        if not isinstance(summary, dict):
            continue
        cells = []
        for figure in CARD_FIGURES:
            cells.append(f"{summary[figure]:.4g}" if figure in summary else "")
        rows.append(f"| {task} | {' | '.join(cells)} |\n")
    if not rows:
        return "Not measured.\n"
    header = f"| task | {' | '.join(CARD_FIGURES)} |\n"
    rule = "|" + "---|" * (len(CARD_FIGURES) + 1) + "\n"
    return header + rule + "".join(rows)


def model_card(model, meta, usage, results=None):
    """
    README.md of a saved model: what it is, what was measured, how to load it (`usage`).
    results: {task: summary of scripts.vision_eval}.
    """
    return CARD.format(
        parameters=model.num_params(), modes=", ".join(model.cfg.modes),
        standardize=model.cfg.standardize, stage=meta["stage"], step=meta["step"],
        commit=meta["commit"], seed=meta["user_config"]["seed"], results=results_table(results),
        usage=usage)


def write_text(path, text):
    with open(path, "w") as f:
        f.write(text)


def save(model, folder, results=None):
    """
    Writes a new folder that `NanoDeepseekOCR.from_pretrained` reads: safetensors, config.json,
    tokenizer.json, meta.json, README.md. FileExistsError if the folder exists.
    """
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer: set model.tokenizer, or load the model with "
                         "from_pretrained")
    os.makedirs(folder)
    weights = ckpt.contiguous(model.state_dict())
    save_file(weights, os.path.join(folder, "model.safetensors"))
    write_json(os.path.join(folder, "config.json"), model.cfg.to_dict())
    write_json(os.path.join(folder, "meta.json"), model.meta)
    model.tokenizer.save(folder)
    card = model_card(model, model.meta, MODEL_USAGE, results)
    write_text(os.path.join(folder, "README.md"), card)


def save_encoder(model, folder):
    """Writes the encoder alone, which stage 2 starts from, as a new folder with a model card."""
    os.makedirs(folder)
    ckpt.write_encoder(folder, model, model.meta)
    card = model_card(model, model.meta, ENCODER_USAGE)
    write_text(os.path.join(folder, "README.md"), card)


def push(folder, repo, private=False):
    """Uploads a saved folder to the hub, as repository `repo` (HF_TOKEN from the environment)."""
    if not online():
        raise ConnectionError(f"cannot push to {repo}: the hub ({endpoint()}) does not answer, or "
                              f"HF_HUB_OFFLINE is set")
    from huggingface_hub import create_repo, upload_folder

    def create():
        return create_repo(repo, private=private, exist_ok=True)

    def upload():
        return upload_folder(repo_id=repo, folder_path=folder)
    asked(f"push to {repo}", create)
    return asked(f"push to {repo}", upload)


def fetch(source, prefix="model"):
    """
    Folder of a "model" or a "deepencoder": a local one (a run folder stands for its last
    checkpoint), or the download of a hub repository.
    """
    is_local = os.path.isdir(source) or os.path.isdir(os.path.dirname(source))
    if is_local or source.count("/") != 1:
        return ckpt.resolve(source, prefix)
    names = ["config.json", "meta.json", "model.safetensors"]
    if prefix == "model":
        names.append("tokenizer.json")
    for name in names:
        path = download(source, name)
    return os.path.dirname(path)


def export_deepseek(model, folder):
    """
    Writes encoder, projector, newline and separator under DeepSeek-OCR's key names, with the config
    that transformers' UnlimitedOcrModel reads. ValueError with standardization on: DeepSeek-OCR has
    no such layer, and without it the features would be others.
    """
    cfg = model.cfg
    if cfg.standardize != "none":
        raise ValueError(f"cannot export: this encoder standardizes the compressor's output "
                         f"(standardize={cfg.standardize}), which DeepSeek-OCR has no layer for. Train "
                         f"with --standardize=none to export")
    tensors = {}
    for key, t in model.state_dict().items():
        if not key.startswith("gpt."):
            tensors["model." + key.removeprefix("encoder.")] = t.contiguous()

    os.makedirs(folder)
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    config = {"model_type": "unlimited_ocr", "vision_config": vision_config(cfg)}
    write_json(os.path.join(folder, "config.json"), config)


def vision_config(cfg):
    """The encoder's sizes in the names of transformers' UnlimitedOcrVisionConfig."""
    sam = cfg.sam
    clip = cfg.second_stage
    patch_size = clip.patch_size or 14  # the published one; it only matters as a divisor of image_size
    sam_config = {
        "hidden_size": sam.width,
        "output_channels": sam.neck,
        "num_hidden_layers": sam.depth,
        "mlp_dim": 4 * sam.width,
        "num_attention_heads": sam.n_head,
        "image_size": sam.image_size,
        "patch_size": sam.patch_size,
        "window_size": sam.window,
        "global_attn_indexes": list(sam.global_blocks),
        "downsample_channels": [sam.net_2, sam.net_3],
    }
    encoder_config = {
        "hidden_size": clip.width,
        "intermediate_size": clip.ffn,
        "num_hidden_layers": clip.depth,
        "num_attention_heads": clip.n_head,
        "image_size": patch_size * clip.grid,
        "patch_size": patch_size,
    }
    return {"sam_config": sam_config, "encoder_config": encoder_config}
