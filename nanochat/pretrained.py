"""
Published weights in, by key, and ours out. Every key a part expects must be there in the right shape and finite, and every key of the
file under that part's prefix must be used: a wrong prefix or another architecture is an error, never a half-loaded model.

in    facebook/sam-vit-base, openai/clip-vit-large-patch14, deepseek-ai/DeepSeek-OCR (safetensors); nanochat's model_*.pt through
      torch.load(weights_only=True), its tokenizer.pkl through an unpickler that admits one name. Nothing else is opened.
out   `save`: our own folder (safetensors + JSON + model card); `export_deepseek`: the encoder under DeepSeek-OCR's key names.

A source is a hub name or a local folder. Key maps: transformers' SamModel and CLIPModel, DeepSeek-OCR's own checkpoint.
"""
import fnmatch
import json
import os
import pickle
import re

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanochat import checkpoint as ckpt
from nanochat.config import GPTConfig
from nanochat.common import print0, read_json, write_json
from nanochat.hub import download, list_files
from nanochat.tokenizer import IMAGE_TOKEN, Tokenizer

SAM, CLIP, DEEPSEEK = "facebook/sam-vit-base", "openai/clip-vit-large-patch14", "deepseek-ai/DeepSeek-OCR"
HEAD_DIM = 128  # of every published nanochat model

# -----------------------------------------------------------------------------
# By key

def keys_of(path):
    """{key: path} of a safetensors file."""
    try:
        with safe_open(path, "pt") as f:
            return dict.fromkeys(f.keys(), path)
    except SafetensorError as e:
        raise ValueError(f"{path} is not a whole safetensors file ({e}): delete it and download it again") from e


def safetensors_of(source, name="model.safetensors"):
    """{key: path} over the one file, or all shards of the index, of a hub name or folder."""
    if name not in (files := list_files(source)):
        if name + ".index.json" not in files:
            raise FileNotFoundError(f"{source} has neither {name} nor {name}.index.json; only safetensors are read. It holds {files[:10]}")
        index = read_json(download(source, name + ".index.json"))["weight_map"]
        paths = {shard: download(source, shard) for shard in sorted(set(index.values()))}
        found = {key: path for path in paths.values() for key in keys_of(path)}
        if missing := sorted(set(index) - set(found)):
            raise ValueError(f"{source}: its index names {len(missing)} keys that no shard has: {missing[:3]}")
        return found
    return keys_of(download(source, name))


def read(path, key):
    with safe_open(path, "pt") as f:  # opened for each key: the pages a map has touched count as memory while it is open
        return f.get_tensor(key)


@torch.no_grad()
def fill(module, wanted, found, where, ours_only=(), theirs_only=()):
    """
    Fills the parameters of `module` in place, one at a time. wanted(own key) -> list of keys of the source, joined along dimension 0.
    found: {source key: path, or tensor}. ours_only, theirs_only: patterns of keys that may stay new, and that may stay unused.
    """
    def matches(key, patterns):
        return any(fnmatch.fnmatch(key, p) for p in patterns)
    own = module.state_dict()
    plan = {key: wanted(key) for key in own if not matches(key, ours_only)}
    used = {k for keys in plan.values() for k in keys}
    missing = sorted(used - set(found))
    extra = sorted(k for k in found if k not in used and not matches(k, theirs_only))
    if missing or extra:
        raise ValueError(f"{where}: {len(missing)} expected keys are missing {missing[:3]}, {len(extra)} are unknown {extra[:3]}: "
                         f"another architecture or prefix; nothing was loaded")
    for key, keys in plan.items():
        pieces = [found[k] if torch.is_tensor(found[k]) else read(found[k], k) for k in keys]
        t = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if t.shape != own[key].shape:
            raise ValueError(f"{where}: {keys[0]} has the shape {tuple(t.shape)}, the model's {key} is {tuple(own[key].shape)}")
        if not torch.isfinite(t).all():
            raise ValueError(f"{where}: {keys[0]} holds numbers that are not finite")
        own[key].copy_(t)
    return len(used)


# -----------------------------------------------------------------------------
# Encoder

def sam_key(key):
    """Our name of a SAM parameter -> transformers' SamModel."""
    for ours, theirs in ((r"^blocks\.", "layers."), (r"\.norm([12])\.", r".layer_norm\1."), (r"^patch_embed\.proj\.", "patch_embed.projection."),
                         (r"^neck\.0\.", "neck.conv1."), (r"^neck\.1\.", "neck.layer_norm1."), (r"^neck\.2\.", "neck.conv2."),
                         (r"^neck\.3\.", "neck.layer_norm2.")):
        key = re.sub(ours, theirs, key)
    return key


def clip_keys(key):
    """Our name of a CLIP parameter -> transformers' names: fused q, k, v are three there."""
    key = key.replace("transformer.layers.", "encoder.layers.")
    return [key.replace("qkv_proj", part) for part in ("q_proj", "k_proj", "v_proj")] if "qkv_proj" in key else [key]


def load_sam(model, source=SAM):
    """SAM's ViT and neck of a transformers SamModel; net_2 and net_3, the compressor, stay as initialised."""
    n = fill(model.encoder.sam_model, lambda k: ["vision_encoder." + sam_key(k)], safetensors_of(source), source, ours_only=("net_[23].weight",),
             theirs_only=("prompt_encoder.*", "mask_decoder.*", "shared_image_embedding.*"))
    print0(f"SAM: {n} tensors of {source}; the compressor (net_2, net_3) is new")


def load_clip(model, source=CLIP):
    """CLIP's ViT of a transformers CLIPModel, without its last norm."""
    n = fill(model.encoder.vision_model, lambda k: ["vision_model." + name for name in clip_keys(k)], safetensors_of(source), source,
             theirs_only=("text_model.*", "logit_scale", "visual_projection.*", "text_projection.*", "vision_model.post_layernorm.*",
                          "vision_model.embeddings.position_ids"))
    print0(f"CLIP: {n} tensors of {source}")


def load_deepseek(model, source=DEEPSEEK):
    """DeepSeek-OCR's encoder; its projector, newline and separator too where the decoder is 1280 wide, else they stay new, and it says so."""
    if model.cfg.standardize != "none":
        raise ValueError(f"{source} was trained without standardisation, this model has standardize={model.cfg.standardize}: use --standardize=none")
    found = safetensors_of(source)
    vision = {k: v for k, v in found.items() if not k.startswith(("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head."))}
    around = ("model.projector.*", "model.image_newline", "model.view_seperator")
    n = fill(model.encoder, lambda k: ["model." + k], vision, source, theirs_only=around)
    key = "model.projector.layers.weight"
    width = shape(vision[key], key)[0] if key in vision else None
    if width == model.cfg.gpt.n_embd:
        n += fill(model, lambda k: ["model." + k], vision, source, ours_only=("encoder.*", "gpt.*"),
                  theirs_only=("model.sam_model.*", "model.vision_model.*"))
        print0(f"encoder, projector, newline and separator: {n} tensors of {source}")
    else:
        print0(f"encoder: {n} tensors of {source}; its projector gives {width} channels, the decoder has {model.cfg.gpt.n_embd}: "
               f"projector, newline and separator are NEW")


def shape(path, key):
    with safe_open(path, "pt") as f:
        return f.get_slice(key).get_shape()


# -----------------------------------------------------------------------------
# nanochat's decoder and tokenizer

class EncodingState:
    """Stands in for tiktoken's Encoding in a pickle: it keeps what the pickle says and runs none of it."""
    def __setstate__(self, state):
        self.state = state


class OneNameUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise ValueError(f"the pickle names {module}.{name}; only tiktoken.core.Encoding is admitted, nothing was run")
        return EncodingState


def read_tokenizer_pkl(path):
    """nanochat's tokenizer.pkl, a pickled tiktoken Encoding -> our Tokenizer, with <|image|> added at the end if it has none."""
    try:
        with open(path, "rb") as f:
            content = OneNameUnpickler(f).load()
        state = content.state if isinstance(content, EncodingState) else None
        ranks = sorted(state["mergeable_ranks"].items(), key=lambda pair: pair[1])
        special = sorted(state["special_tokens"].items(), key=lambda pair: pair[1])
        pattern = state["pat_str"]
        if [i for _, i in ranks + special] != list(range(len(ranks) + len(special))):
            raise ValueError("its token ids are not 0, 1, 2, ... with the special ones last")
    except (pickle.UnpicklingError, EOFError, AttributeError, KeyError, TypeError, IndexError, ValueError) as e:
        raise ValueError(f"{path} is not a nanochat tokenizer: {e}") from e
    names = [name for name, _ in special]
    return Tokenizer([token for token, _ in ranks], pattern, names + ([] if IMAGE_TOKEN in names else [IMAGE_TOKEN]))


def newest(files, pattern, source):
    found = sorted(fnmatch.filter(files, pattern))
    if not found:
        raise FileNotFoundError(f"{source} has no {pattern}: it holds {files[:10]}")
    return found[-1]


def nanochat_config(source):
    """-> (GPTConfig, Tokenizer) of a nanochat checkpoint. Sizes are its meta file's; the vocabulary has grown by <|image|>."""
    meta = read_json(download(source, newest(list_files(source), "meta_*.json", source)))
    if "model_config" not in meta:
        raise ValueError(f"{source}: its meta file has no model_config, only {sorted(meta)}; sizes are never guessed")
    sizes = meta["model_config"]
    names = set(GPTConfig.__dataclass_fields__)
    if set(sizes) != names:
        raise ValueError(f"{source}: model_config has {sorted(sizes)}, need {sorted(names)}: another nanochat than October 2025's")
    cfg = GPTConfig(**sizes)
    if cfg.n_embd != HEAD_DIM * cfg.n_head:
        raise ValueError(f"{source}: n_embd {cfg.n_embd} / n_head {cfg.n_head} is not {HEAD_DIM}, as in every published nanochat: with "
                         f"another number of heads the weights would load and attend wrongly")
    tokenizer = read_tokenizer_pkl(download(source, "tokenizer.pkl"))
    if tokenizer.get_vocab_size() - 1 > cfg.vocab_size:
        raise ValueError(f"{source}: the tokenizer has {tokenizer.get_vocab_size() - 1} tokens, the model {cfg.vocab_size}")
    cfg.vocab_size = max(cfg.vocab_size, tokenizer.get_vocab_size())
    return cfg, tokenizer


def choose_decoder(cfg, args):
    """Settles cfg's decoder and image token from --gpt (a nanochat checkpoint) or --tokenizer, and --max-seq-len. -> Tokenizer."""
    if args.gpt:
        cfg.gpt, tokenizer = nanochat_config(args.gpt)
    else:
        tokenizer = Tokenizer.load(args.tokenizer)
        cfg.gpt.vocab_size = tokenizer.get_vocab_size()
    cfg.gpt.sequence_len = max(cfg.gpt.sequence_len, args.max_seq_len)  # rotary positions have no parameters
    cfg.image_token_id = tokenizer.image_token_id
    return tokenizer


@torch.no_grad()
def load_nanochat(gpt, source):
    """Fills a GPT built from `nanochat_config`. Rows the vocabulary grew by: the mean embedding, and zeros in the head."""
    files = list_files(source)
    path = download(source, newest(files, "model_*.pt", source))
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as e:
        raise ValueError(f"{path} is no plain file of tensors ({str(e).splitlines()[0]}): refused") from e
    state = {k.removeprefix("_orig_mod."): t for k, t in state.items()}
    for key, grow in (("transformer.wte.weight", lambda t: t.float().mean(0)), ("lm_head.weight", lambda t: torch.zeros(t.size(1)))):
        if key in state and 0 < (new := gpt.cfg.vocab_size - state[key].size(0)) <= 64:
            state[key] = torch.cat([state[key], grow(state[key]).to(state[key].dtype).expand(new, -1)])
    print0(f"decoder: {fill(gpt, lambda k: [k], state, source)} tensors of {source}")


# -----------------------------------------------------------------------------
# Out

def model_card(model, meta, usage, results=None):
    """README.md of a saved model: what it is and what was measured; results: {task: summary} of scripts.vision_eval; usage: how to load it."""
    figures = ("samples", "one_minus_ned", "cer", "f1", "chars_per_vision_token")
    rows = "".join(f"| {task} | " + " | ".join(f"{r[k]:.4g}" if k in r else "" for k in figures) + " |\n"
                   for task, r in (results or {}).items() if isinstance(r, dict))
    table = f"| task | {' | '.join(figures)} |\n|{'---|' * (len(figures) + 1)}\n{rows}" if rows else "Not measured.\n"
    return (f"---\nlibrary_name: nano-deepseek-ocr\nlicense: mit\npipeline_tag: image-text-to-text\ntags: [ocr, deepencoder]\n---\n"
            f"# A nano-deepseek-ocr model\n\n{model.num_params():,} parameters, image modes {', '.join(model.cfg.modes)}, standardisation "
            f"{model.cfg.standardize}; {meta['stage']}, step {meta['step']}, commit {meta['commit']}, seed {meta['user_config']['seed']}.\n\n"
            f"{table}\n{usage}\n")


def save(model, folder, results=None):
    """A folder `NanoDeepseekOCR.from_pretrained` reads: safetensors, config.json, tokenizer.json, meta.json, README.md. It must be new."""
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer: set model.tokenizer, or load the model with from_pretrained")
    os.makedirs(folder)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, os.path.join(folder, "model.safetensors"))
    write_json(os.path.join(folder, "config.json"), model.cfg.to_dict())
    write_json(os.path.join(folder, "meta.json"), model.meta)
    model.tokenizer.save(folder)
    with open(os.path.join(folder, "README.md"), "w") as f:
        f.write(model_card(model, model.meta, "```python\nfrom nanochat.reader import NanoDeepseekOCR\n"
                           "model = NanoDeepseekOCR.from_pretrained(\"THIS REPOSITORY\")\nprint(model.read(image))\n```", results))


def push(folder, repo, private=False):
    """Uploads a saved folder to the hub, as repository `repo` (HF_TOKEN from the environment)."""
    from nanochat.hub import asked, endpoint, online
    if not online():
        raise ConnectionError(f"cannot push to {repo}: the hub ({endpoint()}) does not answer, or HF_HUB_OFFLINE is set")
    from huggingface_hub import create_repo, upload_folder
    asked(f"push to {repo}", lambda: create_repo(repo, private=private, exist_ok=True))
    return asked(f"push to {repo}", lambda: upload_folder(repo_id=repo, folder_path=folder))


def save_encoder(model, folder):
    """The encoder alone, which stage 2 starts from, as a new folder: safetensors, config.json, meta.json, README.md."""
    os.makedirs(folder)
    ckpt.write_encoder(folder, model, model.meta)
    with open(os.path.join(folder, "README.md"), "w") as f:
        f.write(model_card(model, model.meta, "The encoder alone: `python -m scripts.vis_mid_train --encoder=THIS REPOSITORY`."))


def fetch(source, prefix="model"):
    """Folder of a model or "deepencoder": a local one (a run folder stands for its last checkpoint), or a hub repository's, downloaded."""
    if os.path.isdir(source) or source.count("/") != 1 or os.path.isdir(os.path.dirname(source)):
        return ckpt.resolve(source, prefix)
    names = ["config.json", "meta.json", *["tokenizer.json"] * (prefix == "model"), "model.safetensors"]
    return os.path.dirname([download(source, name) for name in names][-1])


def export_deepseek(model, folder):
    """
    Encoder, projector, newline and separator under DeepSeek-OCR's key names, with the config transformers' UnlimitedOcrModel reads.
    ValueError with standardisation on: that layer has no place there, and without it the features would be others.
    """
    cfg = model.cfg
    if cfg.standardize != "none":
        raise ValueError(f"cannot export: this encoder standardises the compressor's output (standardize={cfg.standardize}), which DeepSeek-OCR "
                         f"has no layer for; without it the features would be others. Train with --standardize=none to export")
    os.makedirs(folder)
    tensors = {"model." + k.removeprefix("encoder."): v.contiguous() for k, v in model.state_dict().items() if not k.startswith("gpt.")}
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump({"model_type": "unlimited_ocr", "vision_config": vision_config(cfg)}, f, indent=1)


def vision_config(cfg):
    """The encoder's sizes in the names of transformers' UnlimitedOcrVisionConfig."""
    s, c = cfg.sam, cfg.second_stage
    patch = c.patch_size or 14
    return {"sam_config": {"hidden_size": s.width, "output_channels": s.neck, "num_hidden_layers": s.depth, "mlp_dim": 4 * s.width,
                           "num_attention_heads": s.n_head, "image_size": s.image_size, "patch_size": s.patch_size, "window_size": s.window,
                           "global_attn_indexes": list(s.global_blocks), "downsample_channels": [s.net_2, s.net_3]},
            "encoder_config": {"hidden_size": c.width, "intermediate_size": c.ffn, "num_hidden_layers": c.depth,
                               "num_attention_heads": c.n_head, "image_size": patch * c.grid, "patch_size": patch}}
