"""
Published weights in, our own out.

in    facebook/sam-vit-base, openai/clip-vit-large-patch14, deepseek-ai/DeepSeek-OCR as safetensors
      with config.json; nanochat's model_*.pt through torch.load(weights_only=True), meta_*.json,
      and tokenizer.pkl through an unpickler that admits a single name. No other file is opened.
out   `save`: a folder of our own (safetensors, JSON, model card); `save_encoder`: the encoder
      alone; `export_deepseek`: encoder and projector under DeepSeek-OCR's key names.

Weights are matched key by key. Every key that a part expects must be in the file, with the right
shape and finite values, and every key under that part's prefix must be used. All of it is checked
before the first value is copied: a wrong prefix, another architecture or a damaged file is an
error, never a half-loaded model.

A source is a hub name or a local folder. The key maps are those of transformers' SamModel and
CLIPModel, and of DeepSeek-OCR's own checkpoint.
"""
import fnmatch
import os
import pickle
import re

import torch
from safetensors import SafetensorError, safe_open

from nanochat import checkpoint as ckpt
from nanochat.common import print0, write_json
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

    # The file is opened anew for each tensor: pages that a memory map has touched count as memory
    # as long as it is open, and would add up to the whole file.
    def read(self):
        try:
            with safe_open(self.path, "pt") as f:
                return f.get_tensor(self.key)
        except SafetensorError as e:  # of a type that torch does not have
            raise ValueError(f"{self.path}: {self.key} cannot be read ({e})") from e

    def shape(self):
        """Known from the file's header, without reading the tensor."""
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
    """{key: StoredTensor} of a hub name or folder: of its one file, or of all shards it has."""
    files = list_files(source)
    if name in files:
        return stored_tensors(download(source, name))

    index_name = name + ".index.json"
    if index_name not in files:
        raise FileNotFoundError(f"{source} has neither {name} nor {index_name}; only safetensors "
                                f"are read. It has {files[:10]}")

    # The keys are taken from the shards themselves; the index only says which shards there are.
    shard_of = read_index(source, index_name)
    found = {}
    for shard in sorted(set(shard_of.values())):
        tensors = stored_tensors(download(source, shard))
        twice = sorted(set(tensors) & set(found))
        if twice:
            raise ValueError(f"{source}: {len(twice)} keys are in two shards: {twice[:3]}")
        found.update(tensors)

    # A download that stopped between two shards must not pass for a smaller model.
    missing = sorted(set(shard_of) - set(found))
    if missing:
        raise ValueError(f"{source}: its index names {len(missing)} keys that no shard has: "
                         f"{missing[:3]}")
    return found


def read_index(source, index_name):
    """{key: file name of its shard} of a sharded checkpoint."""
    path = download(source, index_name)
    folder, file_name = os.path.split(path)
    shard_of = ckpt.read_record(folder, file_name, keys=["weight_map"])["weight_map"]
    if not isinstance(shard_of, dict):
        raise ValueError(f"{path}: weight_map is a {type(shard_of).__name__}, need an object")
    for key, shard in shard_of.items():
        # A path in place of a name could lead anywhere on this machine.
        if not isinstance(shard, str) or os.path.basename(shard) != shard or not shard:
            raise ValueError(f"{path}: the shard of {key} is {shard!r}, need the name of a file "
                             f"beside the index")
    return shard_of


def matches_any(key, patterns):
    return any(fnmatch.fnmatch(key, pattern) for pattern in patterns)


def match_keys(module, source_keys, found, where, ours_only, theirs_only):
    """-> {own key: source keys} for `fill`; ValueError unless both sides match completely."""
    wanted = {}
    for key in module.state_dict():
        if not matches_any(key, ours_only):
            wanted[key] = source_keys(key)

    # Unknown keys count as much as missing ones: they belong to parts that our network lacks.
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


def read_pieces(found, keys):
    """The tensors of several source keys."""
    pieces = []
    for key in keys:
        t = found[key]
        pieces.append(t.read() if isinstance(t, StoredTensor) else t)
    return pieces


def check_piece(piece, n_pieces, own_key, own, where):
    """ValueError unless `piece` is one of n equal parts of the tensor `own` along dimension 0."""
    expected = tuple(own.shape)
    if n_pieces > 1:  # q, k and v each have a third of the rows of (3C, C)
        expected = (own.size(0) // n_pieces, *own.shape[1:])
    if tuple(piece.shape) != expected:
        raise ValueError(f"{where} has the shape {tuple(piece.shape)}, the model's {own_key} needs "
                         f"{expected}; nothing was loaded")
    ckpt.check_values(piece, own.dtype, where)


@torch.no_grad()
def fill(module, source_keys, found, where, ours_only=(), theirs_only=()):
    """
    Fills parameters and buffers of `module` in place, all or nothing. -> number of tensors used.

    source_keys   function: own key -> list of keys of the source, to be joined along dimension 0
    found         {source key: StoredTensor or tensor}
    where         names the source in errors
    ours_only     patterns of own keys that keep their values
    theirs_only   patterns of source keys that may stay unused
    """
    own = module.state_dict()
    wanted = match_keys(module, source_keys, found, where, ours_only, theirs_only)

    # Every tensor is read twice, first to be checked, then to be copied. So nothing is changed
    # before all have been seen, and no more than one is in memory at a time.
    for key, keys in wanted.items():
        for source_key, piece in zip(keys, read_pieces(found, keys)):
            check_piece(piece, len(keys), key, own[key], f"{where}: {source_key}")
    for key, keys in wanted.items():
        pieces = read_pieces(found, keys)
        own[key].copy_(torch.cat(pieces) if len(pieces) > 1 else pieces[0])
    return sum(len(keys) for keys in wanted.values())


# -----------------------------------------------------------------------------
# Encoder

# Our names of SAM's parameters, which are DeepSeek-OCR's -> those of transformers' SamModel.
SAM_RENAMES = (
    (r"^blocks\.", "layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"^patch_embed\.proj\.", "patch_embed.projection."),
    (r"^neck\.0\.", "neck.conv1."),
    (r"^neck\.1\.", "neck.layer_norm1."),
    (r"^neck\.2\.", "neck.conv2."),
    (r"^neck\.3\.", "neck.layer_norm2."),
)
# The promptable part of SAM: what turns clicks and boxes into masks.
SAM_UNUSED = ("prompt_encoder.*", "mask_decoder.*", "shared_image_embedding.*")
# The text tower, and what follows the features in the vision tower. position_ids is a buffer that
# older versions of transformers saved.
CLIP_UNUSED = ("text_model.*", "logit_scale", "visual_projection.*", "text_projection.*",
               "vision_model.post_layernorm.*", "vision_model.embeddings.position_ids")
# DeepSeek-OCR's decoder, which ours replaces, by the names of its own code and of transformers.
DEEPSEEK_DECODER = ("model.layers.*", "model.embed_tokens.*", "model.norm.*", "lm_head.*",
                    "model.language_model.*")
# Neither is ever used. The published file has the first, DeepSeek's own code saves both, and
# transformers none.
PATCH_EMBEDDING = "vision_model.embeddings.patch_embedding.weight"
DEEPSEEK_UNUSED = ("model.vision_model.embeddings.position_ids", "model." + PATCH_EMBEDDING)
# What lies between encoder and decoder, and is as wide as the decoder.
BETWEEN = ("projector.layers.weight", "projector.layers.bias", "image_newline", "view_seperator")

# What a source's config.json must say besides the sizes, because our code has it built in.
SAM_FIXED = {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "num_channels": 3, "qkv_bias": True,
             "use_abs_pos": True, "use_rel_pos": True}
CLIP_FIXED = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_channels": 3}
# What a config.json means by leaving something out: the defaults of SamVisionConfig and
# CLIPVisionConfig in transformers.
SAM_DEFAULTS = {**SAM_FIXED, "hidden_size": 768, "output_channels": 256, "num_hidden_layers": 12,
                "mlp_dim": 3072, "num_attention_heads": 12, "image_size": 1024, "patch_size": 16,
                "window_size": 14, "global_attn_indexes": [2, 5, 8, 11]}
CLIP_DEFAULTS = {**CLIP_FIXED, "hidden_size": 768, "intermediate_size": 3072,
                 "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224,
                 "patch_size": 32}


def sam_sizes(cfg):
    """Our SAM, without the compressor, in the names of transformers' SamVisionConfig."""
    sam = cfg.sam
    return {
        "hidden_size": sam.width,
        "output_channels": sam.neck,
        "num_hidden_layers": sam.depth,
        "mlp_dim": 4 * sam.width,
        "num_attention_heads": sam.n_head,
        "image_size": sam.image_size,
        "patch_size": sam.patch_size,
        "window_size": sam.window,
        "global_attn_indexes": list(sam.global_blocks),
        **SAM_FIXED,
    }


def clip_sizes(cfg):
    """Our CLIP in the names of transformers' CLIPVisionConfig."""
    clip = cfg.second_stage
    if clip.kind != "clip":
        raise ValueError(f"the second stage of this encoder is {clip.kind}: CLIP's weights and "
                         f"config do not apply")
    patch_size = clip.patch_size or 14  # without one, any value will do: only the grid counts
    return {
        "hidden_size": clip.width,
        "intermediate_size": clip.ffn,
        "num_hidden_layers": clip.depth,
        "num_attention_heads": clip.n_head,
        "image_size": patch_size * clip.grid,
        "patch_size": patch_size,
        **CLIP_FIXED,
    }


def vision_config(cfg):
    """The encoder's sizes in the names of transformers' UnlimitedOcrVisionConfig."""
    compressor = {"downsample_channels": [cfg.sam.net_2, cfg.sam.net_3]}
    return {"sam_config": sam_sizes(cfg) | compressor, "encoder_config": clip_sizes(cfg)}


def check_network(theirs, ours, defaults, where):
    """
    ValueError unless a config of transformers describes our network. Weights alone do not tell:
    another activation, eps or number of heads has the same shapes, loads, and computes otherwise.
    """
    if not isinstance(theirs, dict):
        raise ValueError(f"{where} is a {type(theirs).__name__}, need an object with sizes")
    differences = []
    for name, value in ours.items():
        their_value = theirs.get(name, defaults[name])
        if their_value != value:
            differences.append(f"{name} is {their_value!r}, this model's {value!r}")
    if differences:
        raise ValueError(f"{where} describes another network: {'; '.join(differences)}; nothing "
                         f"was loaded")


def vision_config_of(source):
    """-> (path of a source's config.json, the part of it that is about vision)."""
    path = download(source, "config.json")
    config = ckpt.read_record(*os.path.split(path))
    # The config of a vision tower alone is not nested.
    return path, config.get("vision_config", config)


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
    """SAM's ViT and neck from a transformers SamModel. The compressor (net_2, net_3) stays new."""
    def source_keys(key):
        return ["vision_encoder." + sam_key(key)]
    print0(f"loading SAM from {source}")
    found = find_tensors(source)
    path, theirs = vision_config_of(source)
    check_network(theirs, sam_sizes(model.cfg), SAM_DEFAULTS, path)
    # The compressor is not SAM's: only DeepSeek-OCR has trained weights of it.
    n = fill(model.encoder.sam_model, source_keys, found, source,
             ours_only=["net_[23].weight"], theirs_only=SAM_UNUSED)
    print0(f"SAM: {n} tensors of {source}; the compressor (net_2, net_3) is new")


def load_clip(model, source=CLIP):
    """CLIP's ViT from a transformers CLIPModel, without its last norm."""
    def source_keys(key):
        return ["vision_model." + name for name in clip_keys(key)]
    if model.encoder.kind != "clip":
        raise ValueError(f"--clip={source}: the second stage of this encoder is "
                         f"{model.encoder.kind}, not clip")
    print0(f"loading CLIP from {source}")
    found = find_tensors(source)
    path, theirs = vision_config_of(source)
    check_network(theirs, clip_sizes(model.cfg), CLIP_DEFAULTS, path)
    n = fill(model.encoder.vision_model, source_keys, found, source, theirs_only=CLIP_UNUSED)
    print0(f"CLIP: {n} tensors of {source}")


def load_deepseek(model, source=DEEPSEEK):
    """
    DeepSeek-OCR's encoder; also its projector, newline and separator if our decoder is as wide as
    DeepSeek's (1280). Otherwise those stay new, and a line says so. Reads the checkpoint as
    published, as saved again by DeepSeek's own code, and as saved again by transformers.
    """
    cfg = model.cfg
    print0(f"loading the encoder of {source}")
    check_deepseek_config(cfg, source)
    vision = {}
    for key, t in find_tensors(source).items():
        if not matches_any(key, DEEPSEEK_DECODER):
            vision[key] = t

    def source_keys(key):
        return ["model." + key.removeprefix("encoder.")]
    ours_only = ["gpt.*"]
    theirs_only = list(DEEPSEEK_UNUSED)
    if "model." + PATCH_EMBEDDING not in vision:  # saved again by transformers
        ours_only.append("encoder." + PATCH_EMBEDDING)

    # One call of `fill` for everything, so that all is checked before anything is copied.
    width = decoder_width(vision, model.projector.layers.in_features, source)
    n_embd = cfg.gpt.n_embd
    if width != n_embd:
        ours_only.extend(BETWEEN)
        theirs_only.extend("model." + key for key in BETWEEN)
    n = fill(model, source_keys, vision, source, ours_only, theirs_only)
    if width == n_embd:
        print0(f"encoder, projector, newline and separator: {n} tensors of {source}")
    else:
        print0(f"encoder: {n} tensors of {source}; its decoder is {width} wide, this one {n_embd}: "
               f"projector, newline and separator are NEW")


def decoder_width(vision, encoder_width, source):
    """
    Width that a DeepSeek-OCR's projector gives. ValueError unless projector, newline and separator
    are there, whether or not they are to be used: a file without them is damaged, or another model.
    """
    missing = [key for key in BETWEEN if "model." + key not in vision]
    if missing:
        raise ValueError(f"{source}: {len(missing)} expected keys are missing: {missing}; nothing "
                         f"was loaded")
    shape = vision["model.projector.layers.weight"].shape()  # (decoder's width, encoder's width)
    if len(shape) != 2 or shape[1] != encoder_width:
        raise ValueError(f"{source}: the projector has the shape {shape}, the encoder gives "
                         f"{encoder_width} channels; nothing was loaded")
    return shape[0]


def check_deepseek_config(cfg, source):
    """
    ValueError if a config.json of transformers' port describes another encoder. DeepSeek's own
    format is not checked: there is one published model of it.
    """
    if "config.json" not in list_files(source):
        return
    path, theirs = vision_config_of(source)
    if isinstance(theirs, dict) and "sam_config" in theirs and "encoder_config" in theirs:
        check_network(theirs["sam_config"], sam_sizes(cfg), SAM_DEFAULTS, f"{path}: sam_config")
        check_network(theirs["encoder_config"], clip_sizes(cfg), CLIP_DEFAULTS,
                      f"{path}: encoder_config")


# -----------------------------------------------------------------------------
# nanochat's decoder and tokenizer

HEAD_DIM = 128  # of every published nanochat model
LARGEST_DECODER = 20_000_000_000  # parameters; the largest published one has a tenth of it


class EncodingState:
    """Stands in for tiktoken's Encoding in a pickle: keeps its state and runs none of its code."""
    def __setstate__(self, state):
        self.state = state


class OneNameUnpickler(pickle.Unpickler):
    """Refuses every name but tiktoken's Encoding, so that a pickle can call nothing."""
    def find_class(self, module, name):
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise ValueError(f"the pickle names {module}.{name}; only tiktoken.core.Encoding is "
                             f"admitted, nothing was run")
        return EncodingState


def by_id(ids, kind, what):
    """{token: id} -> the tokens in the order of their ids. TypeError unless all are of `kind`."""
    for token, i in ids.items():
        if not isinstance(token, kind) or type(i) is not int:
            raise TypeError(f"{what} has {token!r}: {i!r}")
    return sorted(ids, key=ids.get)


def tokenizer_of_encoding(state):
    """
    The pickled state of a tiktoken Encoding -> our Tokenizer. <|image|> is added as the last token
    if it has none.
    """
    ranks = by_id(state["mergeable_ranks"], bytes, "mergeable_ranks")
    special = by_id(state["special_tokens"], str, "special_tokens")

    # Our Tokenizer numbers tokens by their place, special ones last; the ids must be those.
    ids = [*state["mergeable_ranks"].values(), *state["special_tokens"].values()]
    if sorted(ids) != list(range(len(ids))):
        raise ValueError("its token ids are not 0, 1, 2, ...")
    if max(state["mergeable_ranks"].values()) >= len(ranks):
        raise ValueError("its special tokens are not the last ones")

    if IMAGE_TOKEN not in special:
        special.append(IMAGE_TOKEN)
    return Tokenizer(ranks, state["pat_str"], special)


def read_tokenizer_pkl(path):
    """nanochat's tokenizer.pkl, a pickled tiktoken Encoding -> our Tokenizer."""
    try:
        with open(path, "rb") as f:
            content = OneNameUnpickler(f).load()
        tokenizer = tokenizer_of_encoding(content.state)
        ckpt.check_tokenizer(tokenizer, path)
    except (pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError,
            MemoryError, OverflowError, RecursionError) as e:
        # All that damaged pickles were seen to raise; a length bomb is a MemoryError.
        reason = str(e)[:300] or type(e).__name__
        raise ValueError(f"{path} is not a nanochat tokenizer: {reason}") from e
    return tokenizer


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
    path = download(source, newest(list_files(source), "meta_*.json", source))
    sizes = ckpt.read_record(*os.path.split(path), keys=["model_config"])["model_config"]
    ckpt.check_sizes(GPTConfig, sizes, f"{path}: model_config")

    # A later nanochat has more in its config (window_pattern, ...), and another network behind it.
    names = set(GPTConfig.__dataclass_fields__)
    if set(sizes) != names:
        raise ValueError(f"{path}: model_config has {sorted(sizes)}, need {sorted(names)}: another "
                         f"nanochat than October 2025's")
    if min(sizes.values()) < 1:
        raise ValueError(f"{path}: model_config has a size of zero: {sizes}")
    cfg = GPTConfig(**sizes)
    check_decoder(cfg, path)

    tokenizer = read_tokenizer_pkl(download(source, "tokenizer.pkl"))
    published = tokenizer.get_vocab_size() - 1  # <|image|> is ours
    if published > cfg.vocab_size:
        raise ValueError(f"{source}: the tokenizer has {published} tokens, the model "
                         f"{cfg.vocab_size}")
    # The model may have more rows than the tokenizer has tokens, as padding.
    cfg.vocab_size = max(cfg.vocab_size, tokenizer.get_vocab_size())
    return cfg, tokenizer


def check_decoder(cfg, where):
    """ValueError unless the sizes are plausible for a published nanochat."""
    # Weights of another number of heads have the same shapes: they would load, and attend wrongly.
    if cfg.n_embd != HEAD_DIM * cfg.n_head:
        raise ValueError(f"{where}: n_embd {cfg.n_embd} / n_head {cfg.n_head} is not {HEAD_DIM}, "
                         f"as in every published nanochat")
    if cfg.n_head % cfg.n_kv_head:
        raise ValueError(f"{where}: n_head {cfg.n_head} is not a multiple of n_kv_head "
                         f"{cfg.n_kv_head}")
    # The model is built before its weights are opened, so absurd sizes must be found here.
    # 12 = 4 (q, k, v and output projections) + 8 (two matrices of the MLP).
    parameters = 12 * cfg.n_layer * cfg.n_embd ** 2 + 2 * cfg.vocab_size * cfg.n_embd
    if parameters > LARGEST_DECODER:
        raise ValueError(f"{where} describes a decoder of {parameters:.1e} parameters, more than "
                         f"any published nanochat has")


def choose_decoder(cfg, args):
    """
    Sets cfg's decoder and image token: from --gpt (a nanochat checkpoint, which brings its own
    tokenizer) or from --tokenizer, with room for --max-seq-len positions. -> Tokenizer.
    """
    if args.gpt:
        cfg.gpt, tokenizer = nanochat_config(args.gpt)
    else:
        tokenizer = Tokenizer.load(args.tokenizer)  # of scripts.tok_train
        ckpt.check_tokenizer(tokenizer, args.tokenizer)
        cfg.gpt.vocab_size = tokenizer.get_vocab_size()
    # Rotary positions have no parameters, so a longer sequence needs no new weights.
    cfg.gpt.sequence_len = max(cfg.gpt.sequence_len, args.max_seq_len)
    cfg.image_token_id = tokenizer.image_token_id
    return tokenizer


def read_pt(path):
    """{key: tensor} of a nanochat model_*.pt, memory-mapped, without torch.compile's prefix."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # torch.load raises anything on a damaged file; none of it is run
        reason = (str(e) or type(e).__name__).splitlines()[0][:300]
        raise ValueError(f"{path} is not a plain file of tensors ({reason}): refused") from e
    if not isinstance(state, dict):
        raise ValueError(f"{path} has a {type(state).__name__}, need a dict of tensors")

    # weights_only keeps code out, but not strings, nested dicts or tensors without data.
    tensors = {}
    for key, t in state.items():
        if not isinstance(key, str) or not isinstance(t, torch.Tensor):
            raise ValueError(f"{path} has a {type(t).__name__} under the key {key!r}: need tensors "
                             f"under names")
        if t.layout != torch.strided or t.is_nested or t.device.type != "cpu":
            raise ValueError(f"{path}: {key} is not a dense tensor with data, but {t.layout} on "
                             f"{t.device}")
        name = key.removeprefix("_orig_mod.")  # torch.compile's
        if name in tensors:  # which of the two is the model's?
            raise ValueError(f"{path} has {name} twice, with and without _orig_mod. in front")
        tensors[name] = t
    return tensors


def grow_vocabulary(state, vocab_size, n_embd):
    """
    Adds the row of <|image|> to embedding and head, in place, where they are one row short of
    vocab_size; `fill` refuses any other size. The new token starts as the mean embedding, and with
    zeros in the head, so that it is neither odd to read nor likely to be said.
    """
    for key in ("transformer.wte.weight", "lm_head.weight"):
        table = state.get(key)
        # The shape comes first: a hostile one could make the mean below take all memory.
        if table is None or table.shape != (vocab_size - 1, n_embd):
            continue
        if table.dtype not in ckpt.FLOATS:
            continue
        new = table.float().mean(0, keepdim=True)  # (1, n_embd)
        if key == "lm_head.weight":
            new = torch.zeros_like(new)
        state[key] = torch.cat([table, new.to(table.dtype)])  # (vocab_size, n_embd)


@torch.no_grad()
def load_nanochat(gpt, source):
    """Fills a GPT that was built from `nanochat_config`."""
    def source_keys(key):
        return [key]
    print0(f"loading the decoder from {source}")
    path = download(source, newest(list_files(source), "model_*.pt", source))
    state = read_pt(path)
    grow_vocabulary(state, gpt.cfg.vocab_size, gpt.cfg.n_embd)
    n = fill(gpt, source_keys, state, path)
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

{parameters:,} parameters in {dtype}, image modes {modes}; {stage}, step {step}, \
commit {commit}, seed {seed}.{windows}
{command}
{results}
{usage}
"""

MODEL_USAGE = """\
```python
from nanochat.reader import NanoDeepseekOCR
model = NanoDeepseekOCR.from_pretrained("NAME")
print(model.read(image))
```"""

ENCODER_USAGE = ("The encoder alone: "
                 "`python -m scripts.vis_mid_train --encoder=NAME`.")

# Of model.meta, which every checkpoint has and a model built by hand has not.
CARD_META = ("stage", "step", "commit", "user_config")
CARD_FIGURES = ("samples", "one_minus_ned", "ci95", "cer", "f1", "chars_per_vision_token")


def card_cell(value):
    """A figure, or an interval [low, high], as the model card shows it."""
    if isinstance(value, (list, tuple)):
        return "-".join(f"{end:.3f}" for end in value)
    return "" if value is None else f"{value:.4g}"


def results_table(results):
    """Markdown table of {task: summary of scripts.vision_eval}, a row per task."""
    rows = []
    for task, summary in (results or {}).items():
        if not isinstance(summary, dict):  # what holds for all tasks, such as the checkpoint
            continue
        cells = []  # empty where a task has no such figure
        for figure in CARD_FIGURES:
            cells.append(card_cell(summary[figure]) if figure in summary else "")
        if summary.get("of", 0) > summary.get("samples", 0):  # a number of a part is no benchmark's
            cells[0] += f" of {summary['of']}"
        rows.append(f"| {task} | {' | '.join(cells)} |\n")
    if not rows:
        return "Not measured.\n"
    header = f"| task | {' | '.join(CARD_FIGURES)} |\n"
    rule = "|" + "---|" * (len(CARD_FIGURES) + 1) + "\n"
    return header + rule + "".join(rows)


def model_card(model, usage, name, results=None, dtype="float32", command=None):
    """
    README.md of a saved model: what it is, what was measured, how to load it (`usage`) by its name.
    results: {task: summary of scripts.vision_eval}; dtype: of the parameters in the file; command:
    how the model was made. ValueError if model.meta does not say how the model was trained.
    """
    meta = model.meta or {}
    missing = [key for key in CARD_META if key not in meta]
    if missing:
        raise ValueError(f"model.meta lacks {', '.join(missing)}, which a saved model tells its "
                         f"users: load the model with from_pretrained, or set model.meta")
    # Four backticks: a command may hold three, in a comment for example.
    shown = f"\nMade by\n\n````bash\n{command.strip()}\n````\n" if command else ""
    windows = ""
    if "windows" in meta:
        smallest, largest = meta["windows"]["print_px"]
        fewest, most = meta["windows"]["chars"]
        windows = (f"\nPages of other sizes are read in windows of print of {smallest} to "
                   f"{largest} px and {fewest} to {most} characters.")
    return CARD.format(
        parameters=model.num_params(), dtype=dtype, command=shown, windows=windows,
        modes=", ".join(model.cfg.modes),
        stage=meta["stage"], step=meta["step"], commit=meta["commit"],
        seed=meta["user_config"].get("seed", "unknown"),
        results=results_table(results), usage=usage.replace("NAME", name))


def folder_to_share(folder):
    """As `checkpoint.new_folder`, for a folder that must not exist."""
    if os.path.exists(folder):
        raise FileExistsError(f"{folder} exists: choose another name, or delete it")
    return ckpt.new_folder(folder)


def write_text(folder, name, text):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
        f.write(text)


# Of the weights in a saved file. Loaded, they are fp32 again.
SAVED_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def weights_to_save(model, dtype):
    """{key: tensor} of a model, in `dtype`, a name of SAVED_DTYPES."""
    if dtype not in SAVED_DTYPES:
        raise ValueError(f"dtype {dtype!r}: must be one of {', '.join(SAVED_DTYPES)}")
    weights = ckpt.contiguous(model.state_dict())
    return {name: weight.to(SAVED_DTYPES[dtype]) for name, weight in weights.items()}


def save(model, folder, results=None, dtype="float32", command=None, name=None):
    """
    Writes a new folder that `NanoDeepseekOCR.from_pretrained` reads: safetensors, config.json,
    tokenizer.json, meta.json, README.md, sha256.json. FileExistsError if the folder exists.
    dtype: of the weights, a name of SAVED_DTYPES; results, command and name: for the model card;
    the name is that of the repository, default the folder.
    """
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer: set model.tokenizer, or load the model with "
                         "from_pretrained")
    weights = weights_to_save(model, dtype)
    # May refuse, so before there is a folder.
    card = model_card(model, MODEL_USAGE, name or str(folder), results, dtype, command)
    with folder_to_share(folder) as temporary:
        ckpt.write_model(temporary, weights, model.cfg, model.meta)
        model.tokenizer.save(temporary)
        write_text(temporary, "README.md", card)


def save_encoder(model, folder, name=None):
    """
    Writes the encoder alone, which stage 2 starts from, as a new folder with a model card. name: as
    for `save`.
    """
    card = model_card(model, ENCODER_USAGE, name or str(folder))
    with folder_to_share(folder) as temporary:
        weights = ckpt.contiguous(model.encoder.state_dict())
        ckpt.write_model(temporary, weights, model.cfg, model.meta)
        write_text(temporary, "README.md", card)


def push(folder, repo, private=False):
    """Uploads a saved folder to the hub, as repository `repo` (HF_TOKEN from the environment)."""
    if not online():
        raise ConnectionError(f"cannot push to {repo}: the hub ({endpoint()}) does not answer, or "
                              f"HF_HUB_OFFLINE is set")
    from huggingface_hub import create_repo, upload_folder

    # Functions, so that `asked` can turn every failure of the network into one line.
    def create():
        return create_repo(repo, private=private, exist_ok=True)

    def upload():
        return upload_folder(repo_id=repo, folder_path=folder)
    asked(f"push to {repo}", create)
    return asked(f"push to {repo}", upload)


def find(source, prefix="model"):
    """
    Folder of a "model" or a "deepencoder" that the user named: a local one (a run folder stands for
    its last checkpoint), or the download of a hub name.
    """
    if os.path.exists(source):
        return ckpt.resolve(source, prefix)
    parent = os.path.dirname(source)
    looks_like_hub_name = re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) and not os.path.isdir(parent)
    # The defaults, such as "checkpoints/stage2", look like hub names too. Before anything is
    # trained, the hub would be asked for them, and its answer would tell a newcomer nothing.
    if not looks_like_hub_name or parent == "checkpoints":
        raise FileNotFoundError(f"no such folder {source}; "
                                f"train first (bash speedrun.sh) or name a checkpoint")
    try:
        return download_checkpoint(source, prefix)
    except (FileNotFoundError, ConnectionError) as error:
        raise type(error)(f"no such folder {source}, and as a hub name: {error}") from error


def download_checkpoint(source, prefix):
    """Folder of the "model" or "deepencoder" in a hub repository, downloaded or from the cache."""
    names = [ckpt.CONFIG, ckpt.META, ckpt.WEIGHTS]
    if prefix == "model":
        names.append(ckpt.TOKENIZER)
    if ckpt.SUMS in list_files(source):  # without it, nothing is verified
        names.append(ckpt.SUMS)
    for name in names:
        path = download(source, name)
    return os.path.dirname(path)


def export_deepseek(model, folder):
    """
    Writes encoder, projector, newline and separator under DeepSeek-OCR's key names, with the config
    that transformers' UnlimitedOcrModel reads.
    """
    cfg = model.cfg
    # DeepSeek-OCR's names are ours behind "model.", with the encoder's modules at the top.
    tensors = {}
    for key, t in model.state_dict().items():
        if not key.startswith("gpt."):
            tensors["model." + key.removeprefix("encoder.")] = t.contiguous()

    config = {"model_type": "unlimited_ocr", "vision_config": vision_config(cfg)}
    with folder_to_share(folder) as temporary:
        ckpt.write_tensors(temporary, ckpt.WEIGHTS, tensors)
        write_json(os.path.join(temporary, ckpt.CONFIG), config)
