"""
Proves that published weights of all five sources load by key through the hub's real client (against
tests/hub_server.py), also as others save them again; that anything missing, unknown, misshapen, not
finite, of another network or executable is refused by name before the first value is copied; and
that what goes out comes back.

python -m pytest tests/test_pretrained.py
"""
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import tiktoken
import torch
from safetensors.torch import load_file, save_file

from nanochat import checkpoint as ckpt
from nanochat import pretrained, reader
from nanochat.config import CLIPConfig, GPTConfig, ModelConfig, SAMConfig
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.image_modes import MODES
from nanochat.reader import NanoDeepseekOCR
from nanochat.tokenizer import SPECIAL_TOKENS
from tests.hub_server import HubServer

RANKS = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257}
NAMES = [name for name in SPECIAL_TOKENS if name != "<|image|>"]
SPECIAL_IDS = {name: len(RANKS) + i for i, name in enumerate(NAMES)}
VOCAB = len(RANKS) + len(NAMES)  # of the published model; ours has one more
SOURCES = {
    "sam": "facebook/sam-vit-base",
    "clip": "openai/clip-vit-large-patch14",
    "deepseek": "deepseek-ai/DeepSeek-OCR",
    "d20": "nanochat-students/base-d20",
    "d32": "karpathy/nanochat-d32",
}
META = {"mode": "64px", "stage": "stage 2", "step": 1, "commit": "x", "user_config": {"seed": 0}}


def small(n_embd=256):
    """A small model of the published shape: CLIP's unused patch convolution, heads of 128."""
    sam = SAMConfig(image_size=64, patch_size=8, width=32, depth=2, n_head=2, window=5,
                    global_blocks=(1,), neck=16, net_2=24, net_3=32)
    clip = CLIPConfig(grid=2, width=32, depth=1, n_head=2, ffn=64, patch_size=14)
    gpt = GPTConfig(sequence_len=128, vocab_size=VOCAB + 1, n_layer=1, n_head=2, n_kv_head=2,
                    n_embd=n_embd)
    return ModelConfig(sam=sam, second_stage=clip, gpt=gpt, modes=("64px",),
                       image_token_id=VOCAB)


def random_model(seed, **kw):
    model = NanoDeepseekOCR(small(**kw)).init_weights(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return model.eval()


def assert_equal(a, b):
    assert set(a) == set(b)
    for key in a:
        assert torch.equal(a[key], b[key]), key


# -----------------------------------------------------------------------------
# The five repositories

def write_json(folder, name, value):
    with open(os.path.join(folder, name), "w") as f:
        json.dump(value, f)


def publish_sam(model, folder):
    tensors = {"mask_decoder.x": torch.zeros(2)}
    for key, t in model.encoder.sam_model.state_dict().items():
        if "net_" not in key:  # the compressor is DeepSeek's
            tensors["vision_encoder." + pretrained.sam_key(key)] = t
    save_file(tensors, os.path.join(folder, "model.safetensors"))
    sizes = pretrained.sam_sizes(model.cfg)
    write_json(folder, "config.json", {"model_type": "sam", "vision_config": sizes})


def publish_clip(model, folder):
    tensors = {
        "vision_model.embeddings.position_ids": torch.arange(5)[None],
        "vision_model.post_layernorm.weight": torch.ones(3),
        "text_model.y": torch.zeros(2),
        "logit_scale": torch.zeros(1),
    }
    for key, t in model.encoder.vision_model.state_dict().items():
        names = pretrained.clip_keys(key)
        for name, piece in zip(names, t.chunk(len(names))):
            tensors["vision_model." + name] = piece.clone()
    save_file(tensors, os.path.join(folder, "model.safetensors"))
    sizes = pretrained.clip_sizes(model.cfg)
    write_json(folder, "config.json", {"model_type": "clip", "vision_config": sizes})


def deepseek_tensors(model):
    tensors = {}
    for key, t in model.state_dict().items():
        if not key.startswith("gpt."):
            tensors["model." + key.removeprefix("encoder.")] = t.bfloat16()
    for key in ("model.layers.0.x", "model.embed_tokens.weight", "model.norm.weight",
                "lm_head.weight"):
        tensors[key] = torch.zeros(2)
    return tensors


def publish_deepseek(model, folder):
    """One shard with an index, as on the hub, whose numbers have another width than the index's."""
    shard = "model-00001-of-000001.safetensors"
    tensors = deepseek_tensors(model)
    save_file(tensors, os.path.join(folder, shard))
    index = {"weight_map": dict.fromkeys(tensors, shard)}
    write_json(folder, "model.safetensors.index.json", index)
    width = {"clip-l-14-224": {"heads": 2}, "sam_vit_b": {"heads": 2}}  # DeepSeek's own format
    write_json(folder, "config.json", {"vision_config": {"model_type": "vision", "width": width}})


def publish_nanochat(model, folder, prefix):
    tensors = {}
    for key, t in model.gpt.state_dict().items():
        if t.size(0) == VOCAB + 1:  # without <|image|>
            t = t[:VOCAB]
        tensors[prefix + key] = t.bfloat16()
    torch.save(tensors, os.path.join(folder, "model_000650.pt"))
    sizes = {**model.cfg.gpt.__dict__, "vocab_size": VOCAB}
    write_json(folder, "meta_000650.json", {"step": 650, "model_config": sizes})
    encoding = tiktoken.Encoding("x", pat_str=r"\w+|\W", mergeable_ranks=RANKS,
                                 special_tokens=SPECIAL_IDS)
    with open(os.path.join(folder, "tokenizer.pkl"), "wb") as f:
        pickle.dump(encoding, f)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """(folder of the repositories, the model they were written from)."""
    folder = tmp_path_factory.mktemp("hub")
    model = random_model(0)
    for name in SOURCES:
        os.makedirs(at((folder, model), name))
    publish_sam(model, at((folder, model), "sam"))
    publish_clip(model, at((folder, model), "clip"))
    publish_deepseek(model, at((folder, model), "deepseek"))
    publish_nanochat(model, at((folder, model), "d20"), prefix="_orig_mod.")
    publish_nanochat(model, at((folder, model), "d32"), prefix="")
    return folder, model


def at(hub, name):
    """Local folder of a repository."""
    return os.path.join(hub[0], "models", *SOURCES[name].split("/"))


def copy_of(hub, name, tmp_path, **config):
    """A copy of a repository that may be changed. config: changes of its vision_config."""
    folder = str(tmp_path / name)
    shutil.copytree(at(hub, name), folder)
    if config:
        record = json.loads(open(os.path.join(folder, "config.json")).read())
        record["vision_config"].update(config)
        write_json(folder, "config.json", record)
    return folder


CLIENT = """
import sys, torch
sys.path.insert(0, ".")
from tests.test_pretrained import META, SOURCES, assert_equal, random_model
from nanochat import pretrained
from nanochat.gpt import GPT
from nanochat.reader import NanoDeepseekOCR
theirs, ours = random_model(0), random_model(1)
pretrained.load_sam(ours)
pretrained.load_clip(ours)
for part in ("encoder.sam_model.blocks", "encoder.sam_model.neck", "encoder.vision_model"):
    for k, t in ours.state_dict().items():
        assert not k.startswith(part) or torch.equal(t, theirs.state_dict()[k]), k
assert not torch.equal(ours.encoder.sam_model.net_2.weight, theirs.encoder.sam_model.net_2.weight)
ours = random_model(1)
pretrained.load_deepseek(ours)
for k, t in ours.state_dict().items():
    assert k.startswith("gpt.") or torch.equal(t, theirs.state_dict()[k].bfloat16().float()), k
for name in ("d20", "d32"):
    cfg, tokenizer = pretrained.nanochat_config(SOURCES[name])
    gpt = GPT(cfg)
    pretrained.load_nanochat(gpt, SOURCES[name])
    for k, t in gpt.state_dict().items():
        n = tokenizer.image_token_id
        assert torch.equal(t[:n], theirs.gpt.state_dict()[k].bfloat16().float()[:n]), k
ours.tokenizer = tokenizer
ours.meta = META
ours.save_pretrained(sys.argv[1], {"heldout": {"samples": 2, "one_minus_ned": 0.5}})
pretrained.push(sys.argv[1], "me/mine")
again = NanoDeepseekOCR.from_pretrained("me/mine")
assert_equal(ours.state_dict(), again.state_dict())
print("all loaded and pushed")
"""
FAIL = """
import sys
from nanochat import pretrained
from tests.test_pretrained import random_model
pretrained.load_sam(random_model(1), sys.argv[1])
"""


def run(code, env, *args):
    env = {**env, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_every_source_and_the_push_through_the_real_client(hub, tmp_path):
    pytest.importorskip("huggingface_hub")
    with HubServer(hub[0]) as server:
        env = server.env(tmp_path / "cache")
        done = run(CLIENT, env, tmp_path / "saved")
        assert "all loaded and pushed" in done.stdout, done.stderr
        assert "the compressor (net_2, net_3) is new" in done.stdout
        card = (hub[0] / "models/me/mine/README.md").read_text()
        assert "| heldout | 2 | 0.5 |" in card and "pipeline_tag: image-text-to-text" in card
        done = run(FAIL, env, "facebook/nothing")
        assert done.returncode and "facebook/nothing: not on the hub" in done.stderr
        server.truncate.add("model.safetensors")
        done = run(FAIL, server.env(tmp_path / "cache2"), SOURCES["sam"])
        assert done.returncode and "broke off" in done.stderr
        gone = {**env, "HF_ENDPOINT": "http://127.0.0.1:9"}  # nothing listens there
        assert run(FAIL, gone, SOURCES["sam"]).returncode == 0  # cached
        done = run(FAIL, {**gone, "HF_HOME": str(tmp_path / "cache3")}, SOURCES["sam"])
        assert done.returncode and "does not answer" in done.stderr and "not cached" in done.stderr


# -----------------------------------------------------------------------------
# As others save them again

def load_saved_again(model, tensors, folder):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    pretrained.load_deepseek(model, str(folder))


def test_deepseek_saved_again_by_its_own_code(hub, tmp_path):
    """With a buffer of CLIP's, or without the convolution that is never run."""
    published = random_model(1)
    pretrained.load_deepseek(published, at(hub, "deepseek"))

    tensors = deepseek_tensors(hub[1])
    tensors["model.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    ours = random_model(1)
    load_saved_again(ours, tensors, tmp_path / "position_ids")
    assert_equal(ours.state_dict(), published.state_dict())

    tensors = deepseek_tensors(hub[1])
    del tensors["model.vision_model.embeddings.patch_embedding.weight"]
    ours = random_model(2)
    load_saved_again(ours, tensors, tmp_path / "no_patch_embedding")
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        assert torch.equal(ours.encoder(x), published.encoder(x))


def unlimited_ocr(folder):
    """(transformers' port with the weights of a folder by export_deepseek, info of the loading)."""
    pytest.importorskip("transformers")
    port = pytest.importorskip("transformers.models.unlimited_ocr.modeling_unlimited_ocr")
    config = json.loads((folder / "config.json").read_text())
    text = dict(hidden_size=256, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=2, vocab_size=300, moe_intermediate_size=16, n_routed_experts=2,
                num_experts_per_tok=1, n_shared_experts=1)
    config = port.UnlimitedOcrConfig(vision_config=config["vision_config"], text_config=text)
    return port.UnlimitedOcrForConditionalGeneration.from_pretrained(
        folder, config=config, output_loading_info=True)


def test_export_loads_into_transformers_and_comes_back(tmp_path):
    model = random_model(0)
    pretrained.export_deepseek(model, tmp_path / "out")
    theirs, info = unlimited_ocr(tmp_path / "out")
    assert all("language_model." in key or key == "lm_head.weight" for key in info["missing_keys"])
    assert not info["mismatched_keys"]
    assert all("patch_embedding" in key for key in info["unexpected_keys"])

    theirs = theirs.model.eval()
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        ours = model.projector(model.encoder(x))
        expected = theirs.multi_modal_projector(theirs.vision_tower(x).last_hidden_state)
    assert (ours - expected).abs().max() < 1e-5
    assert torch.equal(theirs.view_separator, model.view_seperator)

    # Saved again by transformers: its own decoder with it, and no patch convolution.
    unlimited_ocr(tmp_path / "out")[0].save_pretrained(tmp_path / "again")
    again = random_model(1)
    pretrained.load_deepseek(again, str(tmp_path / "again"))
    with torch.no_grad():
        assert (again.projector(again.encoder(x)) - ours).abs().max() < 1e-6
    assert torch.equal(again.view_seperator, model.view_seperator)
    assert torch.equal(again.image_newline, model.image_newline)

    # Its config tells of another activation, which the weights would not.
    config = json.loads((tmp_path / "again/config.json").read_text())
    config["vision_config"]["encoder_config"]["hidden_act"] = "gelu"
    write_json(tmp_path / "again", "config.json", config)
    with pytest.raises(ValueError, match="hidden_act is 'gelu', this model's 'quick_gelu'"):
        pretrained.load_deepseek(again, str(tmp_path / "again"))


def test_projector_of_another_width_stays_new_and_says_so(hub, capsys):
    model = random_model(1, n_embd=512)
    before = model.projector.layers.weight.clone()
    pretrained.load_deepseek(model, at(hub, "deepseek"))
    assert "projector, newline and separator are NEW" in capsys.readouterr().out
    assert torch.equal(before, model.projector.layers.weight)


# -----------------------------------------------------------------------------
# What is refused, from local copies (tests/test_hostile_weights.py has more)

def broken(hub, name, tmp_path, change):
    """A copy of a one-file repository whose tensors went through `change`."""
    folder = copy_of(hub, name, tmp_path)
    path = os.path.join(folder, "model.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return folder


def rename_prefix(tensors):
    for key in list(tensors):
        tensors[key.replace("vision_encoder", "image_encoder")] = tensors.pop(key)


CONV2 = "vision_encoder.neck.conv2.weight"


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop(CONV2), "1 expected keys are missing"),
    (lambda t: t.update({"vision_encoder.extra": torch.zeros(1)}), r"1 are unknown \['vision_enc"),
    (rename_prefix, "another architecture or prefix"),
    (lambda t: t[CONV2].fill_(float("nan")), "neck.conv2.weight has values that are not finite"),
    (lambda t: t.update({"vision_encoder.pos_embed": torch.zeros(1, 4, 4, 32)}), "has the shape"),
])
def test_wrong_weights_are_refused(hub, tmp_path, change, message):
    model = random_model(1)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        pretrained.load_sam(model, broken(hub, "sam", tmp_path, change))
    assert_equal(model.state_dict(), before)


@pytest.mark.parametrize("name, change", [
    ("clip", {"hidden_act": "gelu"}),
    ("clip", {"layer_norm_eps": 1e-6}),
    ("clip", {"num_attention_heads": 4}),
    ("clip", {"image_size": 336}),
    ("sam", {"hidden_act": "relu"}),
    ("sam", {"num_attention_heads": 4}),
    ("sam", {"window_size": 7}),
    ("sam", {"global_attn_indexes": [0]}),
    ("sam", {"use_rel_pos": False}),
])
def test_another_network_with_the_same_shapes_is_refused(hub, tmp_path, name, change):
    """Weights alone do not tell: all of these would load, and compute something else."""
    model = random_model(1)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    load = {"clip": pretrained.load_clip, "sam": pretrained.load_sam}[name]
    key, = change
    with pytest.raises(ValueError, match=f"describes another network: {key} is "):
        load(model, copy_of(hub, name, tmp_path, **change))
    assert_equal(model.state_dict(), before)


def test_what_a_config_leaves_out_is_what_transformers_takes_for_it(hub, tmp_path):
    source = copy_of(hub, "clip", tmp_path)
    sizes = pretrained.clip_sizes(small())
    for name in pretrained.CLIP_FIXED:
        del sizes[name]
    write_json(source, "config.json", sizes)  # a vision model alone, so not nested either
    pretrained.load_clip(random_model(1), source)
    del sizes["num_attention_heads"]  # 12 by default
    write_json(source, "config.json", sizes)
    with pytest.raises(ValueError, match="num_attention_heads is 12, this model's 2"):
        pretrained.load_clip(random_model(1), source)


def test_the_defaults_are_transformers_own():
    transformers = pytest.importorskip("transformers")
    for name, defaults in (("SamVisionConfig", pretrained.SAM_DEFAULTS),
                           ("CLIPVisionConfig", pretrained.CLIP_DEFAULTS)):
        config = getattr(transformers, name)().to_dict()
        for key, value in defaults.items():
            assert config[key] == value, (name, key)


def test_only_safetensors(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="only safetensors are read"):
        pretrained.load_sam(random_model(1), str(tmp_path))


class Hostile:
    """Makes a folder when it is unpickled."""
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_hostile_pickles_do_not_run(hub, tmp_path):
    source = copy_of(hub, "d20", tmp_path)
    marker = tmp_path / "it_ran"
    with open(os.path.join(source, "tokenizer.pkl"), "wb") as f:
        pickle.dump(Hostile(marker), f)
    with pytest.raises(ValueError, match="only tiktoken.core.Encoding is admitted"):
        pretrained.nanochat_config(source)
    weights = {"transformer.wte.weight": Hostile(marker)}
    torch.save(weights, os.path.join(source, "model_000650.pt"))
    with pytest.raises(ValueError, match="refused"):
        pretrained.load_nanochat(random_model(1).gpt, source)
    assert not marker.exists()


def test_tokenizer_of_nanochat_says_the_same(hub):
    cfg, tokenizer = pretrained.nanochat_config(at(hub, "d20"))
    assert cfg.vocab_size == tokenizer.get_vocab_size() == VOCAB + 1
    assert tokenizer.image_token_id == VOCAB
    assert tokenizer.encode("the <|image|>")[0] == 257
    assert VOCAB not in tokenizer.encode("the <|image|>")
    assert tokenizer.get_bos_token_id() == 258


def test_new_row_of_the_vocabulary(hub):
    cfg, _ = pretrained.nanochat_config(at(hub, "d32"))
    gpt = GPT(cfg)
    pretrained.load_nanochat(gpt, at(hub, "d32"))
    wte = gpt.transformer.wte.weight
    torch.testing.assert_close(wte[-1], wte[:-1].mean(0), rtol=0, atol=1e-3)  # bf16 in the file
    assert not gpt.lm_head.weight[-1].any()


# -----------------------------------------------------------------------------
# Out

def test_round_trip_reads_the_same(model, tokenizer, pages, tmp_path):
    model.eval()
    model.tokenizer = tokenizer
    model.meta = META
    model.save_pretrained(tmp_path / "saved")
    again = NanoDeepseekOCR.from_pretrained(str(tmp_path / "saved"))
    texts = []
    for m in (model, again):
        results = Engine(m, m.tokenizer, MODES["64px"]).generate(pages[:4], 20)
        texts.append([result.text for result in results])
    assert texts[0] == texts[1]
    assert any(texts[0])
    with pytest.raises(FileExistsError):
        model.save_pretrained(tmp_path / "saved")


def test_a_model_on_a_gpu_has_the_settings_of_the_scripts(model, tokenizer, monkeypatch):
    """bf16, the decoder cast once, and the kernels that training takes; the model stays here."""
    called = []
    monkeypatch.setattr(reader, "load_model", lambda *args: (model, tokenizer, {}))
    monkeypatch.setattr(reader, "find_reader", lambda source: source)
    monkeypatch.setattr(reader, "set_cuda_defaults", lambda: called.append(True))
    monkeypatch.setattr("nanochat.common.has_bfloat16", lambda device: True)
    loaded = NanoDeepseekOCR.from_pretrained("somewhere", device="cuda")
    assert called and loaded.dtype == torch.bfloat16
    assert {p.dtype for p in loaded.gpt.parameters()} == {torch.bfloat16}


def test_what_a_model_card_needs_is_asked_for_before_there_is_a_folder(model, tokenizer, tmp_path):
    model.tokenizer = tokenizer
    model.meta = {**META, "user_config": {}}
    model.save_pretrained(tmp_path / "no_seed")
    assert "seed unknown" in (tmp_path / "no_seed/README.md").read_text()

    for meta, missing in ((None, "stage, step, commit, user_config"),
                          ({"stage": "stage 2", "step": 3}, "commit, user_config")):
        model.meta = meta
        for write in (pretrained.save, pretrained.save_encoder):
            with pytest.raises(ValueError, match=f"model.meta lacks {missing}"):
                write(model, tmp_path / "saved")
            assert not (tmp_path / "saved").exists()


def test_a_corrupted_download_is_named(model, tokenizer, tmp_path):
    model.tokenizer = tokenizer
    model.meta = META
    model.save_pretrained(tmp_path / "saved/")
    path = tmp_path / "saved/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors is corrupted.*by a good copy"):
        NanoDeepseekOCR.from_pretrained(str(tmp_path / "saved"))


def test_an_encoder_alone_goes_out_and_comes_back(make_model, tmp_path):
    model = make_model(0)
    model.meta = {**META, "stage": "stage 1"}
    pretrained.save_encoder(model, tmp_path / "encoder")
    other = make_model(1)
    folder = pretrained.find(str(tmp_path / "encoder"), "deepencoder")
    assert ckpt.load_encoder(folder, other)["stage"] == "stage 1"
    assert_equal(other.encoder.state_dict(), model.encoder.state_dict())


# -----------------------------------------------------------------------------
# Less memory, the same numbers

def test_recomputation_and_chunked_loss_change_nothing(make_model, make_batch, pages, monkeypatch):
    batch = make_batch(pages)
    grads = []
    for recompute, chunk in ((False, 1 << 26), (True, 1000)):
        monkeypatch.setattr("nanochat.model.LOSS_CHUNK", chunk)
        model = make_model(0).train()
        model.recompute(recompute)
        loss = model(batch)["text"][0]
        loss.backward()
        grads.append((loss, [p.grad for p in model.parameters()]))
    assert grads[0][0].item() == pytest.approx(grads[1][0].item(), rel=1e-5)
    for a, b in zip(grads[0][1], grads[1][1]):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_frozen_core_trains_the_compressor(make_model, make_batch, pages):
    model = make_model(0).train()
    model.freeze(["sam", "clip", "gpt"])
    model(make_batch(pages))["text"][0].backward()
    learns = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learns == {"encoder.sam_model.net_2.weight", "encoder.sam_model.net_3.weight",
                      "projector.layers.weight", "projector.layers.bias", "image_newline",
                      "view_seperator"}
    with pytest.raises(ValueError, match="must be of sam, compressor, clip"):
        model.freeze(["encoder"])
