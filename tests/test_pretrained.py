"""
Proves that published weights of all five sources load by key through the hub's real client (against tests/hub_server.py), that anything
missing, unknown, misshapen, not finite or executable is refused by name, and that what goes out comes back.

python -m pytest tests/test_pretrained.py
"""
import json
import os
import pickle
import subprocess
import sys
import time

import pytest
import tiktoken
import torch
from safetensors.torch import load_file, save_file

from nanochat import checkpoint as ckpt
from nanochat import pretrained
from nanochat.config import CLIPConfig, GPTConfig, ModelConfig, SAMConfig
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.image_modes import MODES
from nanochat.reader import NanoDeepseekOCR
from nanochat.tokenizer import SPECIAL_TOKENS
from tests.hub_server import HubServer

RANKS = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257}
NAMES = [name for name in SPECIAL_TOKENS if name != "<|image|>"]
VOCAB = len(RANKS) + len(NAMES)  # of the published model; ours has one more
SOURCES = {"sam": "facebook/sam-vit-base", "clip": "openai/clip-vit-large-patch14", "deepseek": "deepseek-ai/DeepSeek-OCR",
           "d20": "nanochat-students/base-d20", "d32": "karpathy/nanochat-d32"}


def small(standardize="none", n_embd=256):
    """A model of the published shape in small: CLIP's dead patch convolution included, heads of 128."""
    return ModelConfig(sam=SAMConfig(image_size=64, patch_size=8, width=32, depth=2, n_head=2, window=5, global_blocks=(1,), neck=16, net_2=24, net_3=32),
                       second_stage=CLIPConfig(grid=2, width=32, depth=1, n_head=2, ffn=64, patch_size=14),
                       gpt=GPTConfig(sequence_len=128, vocab_size=VOCAB + 1, n_layer=1, n_head=2, n_kv_head=2, n_embd=n_embd),
                       standardize=standardize, modes=("test",), image_token_id=VOCAB)


def random_model(seed, **kw):
    model = NanoDeepseekOCR(small(**kw)).init_weights(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return model.eval()


def published(model, folder):
    """Writes `model`'s parts into <folder>/models/ as the five repositories hold theirs."""
    def repo(name):
        path = os.path.join(folder, "models", *SOURCES[name].split("/"))
        os.makedirs(path)
        return path
    sam, clip = model.encoder.sam_model.state_dict(), model.encoder.vision_model.state_dict()
    save_file({"vision_encoder." + pretrained.sam_key(k): t for k, t in sam.items() if "net_" not in k}
              | {"mask_decoder.x": torch.zeros(2)}, repo("sam") + "/model.safetensors")
    fused = {"vision_model." + n: c.clone() for k, t in clip.items() for names in [pretrained.clip_keys(k)] for n, c in zip(names, t.chunk(len(names)))}
    save_file(fused | {"vision_model.embeddings.position_ids": torch.arange(5)[None], "vision_model.post_layernorm.weight": torch.ones(3),
                       "text_model.y": torch.zeros(2), "logit_scale": torch.zeros(1)}, repo("clip") + "/model.safetensors")
    ours = {"model." + k.removeprefix("encoder."): t.bfloat16() for k, t in model.state_dict().items() if not k.startswith("gpt.")}
    shard, path = "model-00001-of-000001.safetensors", repo("deepseek")
    everything = ours | {"model.layers.0.x": torch.zeros(2), "model.embed_tokens.weight": torch.zeros(2), "model.norm.weight": torch.zeros(2),
                         "lm_head.weight": torch.zeros(2)}
    save_file(everything, os.path.join(path, shard))
    with open(os.path.join(path, "model.safetensors.index.json"), "w") as f:
        json.dump({"weight_map": dict.fromkeys(everything, shard)}, f)
    for name, prefix in (("d20", "_orig_mod."), ("d32", "")):
        path = repo(name)
        gpt = {k: (t[:VOCAB] if t.size(0) == VOCAB + 1 else t).bfloat16() for k, t in model.gpt.state_dict().items()}
        torch.save({prefix + k: t for k, t in gpt.items()}, path + "/model_000650.pt")
        with open(path + "/meta_000650.json", "w") as f:
            json.dump({"step": 650, "model_config": {**model.cfg.gpt.__dict__, "vocab_size": VOCAB}}, f)
        enc = tiktoken.Encoding("x", pat_str=r"\w+|\W", mergeable_ranks=RANKS, special_tokens={n: 258 + i for i, n in enumerate(NAMES)})
        with open(path + "/tokenizer.pkl", "wb") as f:
            pickle.dump(enc, f)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """(folder of the repositories, the model they were written from)."""
    folder, model = tmp_path_factory.mktemp("hub"), random_model(0)
    published(model, folder)
    return folder, model


def at(hub, name):
    return os.path.join(hub[0], "models", *SOURCES[name].split("/"))


CLIENT = """
import sys, time, torch
sys.path.insert(0, ".")
from tests.test_pretrained import SOURCES, random_model
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
ours.tokenizer, ours.meta = tokenizer, {"mode": "test", "stage": "stage 2", "step": 1, "commit": "x", "user_config": {"seed": 0}}
ours.save_pretrained(sys.argv[1], {"heldout": {"samples": 2, "one_minus_ned": 0.5}})
pretrained.push(sys.argv[1], "me/mine")
again = NanoDeepseekOCR.from_pretrained("me/mine")
assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again.state_dict().values()))
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
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], env=env, capture_output=True, text=True, timeout=120)


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
        started = time.time()
        done = run(FAIL, server.env(tmp_path / "cache2"), SOURCES["sam"])
        assert done.returncode and "broke off" in done.stderr
        gone = {**env, "HF_ENDPOINT": "http://127.0.0.1:9"}  # nothing listens there
        assert run(FAIL, gone, SOURCES["sam"]).returncode == 0  # cached
        done = run(FAIL, {**gone, "HF_HOME": str(tmp_path / "cache3")}, SOURCES["sam"])
        assert done.returncode and "does not answer" in done.stderr and "not cached" in done.stderr
        assert time.time() - started < 60  # three processes


# -----------------------------------------------------------------------------
# What is refused, from local copies

def broken(hub, name, tmp_path, change):
    """A copy of a one-file repository whose tensors went through `change`."""
    tensors = load_file(os.path.join(at(hub, name), "model.safetensors"))
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    return str(tmp_path)


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("vision_encoder.neck.conv2.weight"), "1 expected keys are missing"),
    (lambda t: t.update({"vision_encoder.extra": torch.zeros(1)}), r"1 are unknown \['vision_encoder.extra'\]"),
    (lambda t: [t.update({k.replace("vision_encoder", "image_encoder"): t.pop(k)}) for k in list(t)], "another architecture or prefix"),
    (lambda t: t["vision_encoder.neck.conv2.weight"].fill_(float("nan")), "neck.conv2.weight holds numbers that are not finite"),
    (lambda t: t.update({"vision_encoder.pos_embed": torch.zeros(1, 4, 4, 32)}), "pos_embed has the shape"),
])
def test_wrong_weights_are_refused(hub, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        pretrained.load_sam(random_model(1), broken(hub, "sam", tmp_path, change))


def test_projector_of_another_width_stays_new_and_says_so(hub, capsys):
    model = random_model(1, n_embd=512)
    before = model.projector.layers.weight.clone()
    pretrained.load_deepseek(model, at(hub, "deepseek"))
    assert "projector, newline and separator are NEW" in capsys.readouterr().out and torch.equal(before, model.projector.layers.weight)


def test_published_encoder_wants_no_standardisation(hub):
    with pytest.raises(ValueError, match="--standardize=none"):
        pretrained.load_deepseek(random_model(1, standardize="channel"), at(hub, "deepseek"))


def test_only_safetensors(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="only safetensors are read"):
        pretrained.load_sam(random_model(1), str(tmp_path))


def nanochat_copy(hub, tmp_path, **sizes):
    source = at(hub, "d20")
    for name in os.listdir(source):
        (tmp_path / name).write_bytes(open(os.path.join(source, name), "rb").read())
    meta = json.loads((tmp_path / "meta_000650.json").read_text())
    meta["model_config"].update(sizes)
    (tmp_path / "meta_000650.json").write_text(json.dumps(meta))
    return str(tmp_path)


def test_wrong_head_size(hub, tmp_path):
    with pytest.raises(ValueError, match="n_embd 256 / n_head 4 is not 128"):
        pretrained.nanochat_config(nanochat_copy(hub, tmp_path, n_head=4))


def test_nanochat_of_another_vocabulary(hub, tmp_path):
    source = nanochat_copy(hub, tmp_path)
    cfg, _ = pretrained.nanochat_config(source)
    cfg.vocab_size += 100
    with pytest.raises(ValueError, match="has the shape"):
        pretrained.load_nanochat(GPT(cfg), source)


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_hostile_pickles_do_not_run(hub, tmp_path):
    source, marker = nanochat_copy(hub, tmp_path), tmp_path / "it_ran"
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(Hostile(marker)))
    with pytest.raises(ValueError, match="only tiktoken.core.Encoding is admitted"):
        pretrained.nanochat_config(source)
    torch.save({"transformer.wte.weight": Hostile(marker)}, tmp_path / "model_000650.pt")
    with pytest.raises(ValueError, match="refused"):
        pretrained.load_nanochat(random_model(1).gpt, source)
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(tiktoken.Encoding("x", pat_str=".", mergeable_ranks=RANKS, special_tokens={}))[:-20])
    with pytest.raises(ValueError, match="is not a nanochat tokenizer"):
        pretrained.nanochat_config(source)
    assert not marker.exists()


def test_tokenizer_of_nanochat_says_the_same(hub):
    cfg, tokenizer = pretrained.nanochat_config(at(hub, "d20"))
    assert cfg.vocab_size == VOCAB + 1 == tokenizer.get_vocab_size() and tokenizer.image_token_id == VOCAB
    assert tokenizer.encode("the <|image|>")[0] == 257 and VOCAB not in tokenizer.encode("the <|image|>")
    assert tokenizer.get_bos_token_id() == 258


# -----------------------------------------------------------------------------
# Out

def test_round_trip_reads_the_same(model, tokenizer, pages, tmp_path):
    model.eval()
    model.tokenizer, model.meta = tokenizer, {"mode": "test", "stage": "stage 2", "step": 1, "commit": "x", "user_config": {"seed": 0}}
    model.save_pretrained(tmp_path / "saved")
    again = NanoDeepseekOCR.from_pretrained(str(tmp_path / "saved"))
    texts = [[r.text for r in Engine(m, m.tokenizer, MODES["test"]).generate(pages[:4], 20)] for m in (model, again)]
    assert texts[0] == texts[1] and any(texts[0])
    with pytest.raises(FileExistsError):
        model.save_pretrained(tmp_path / "saved")


def test_export_loads_into_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "UnlimitedOcrVisionModel") and not hasattr(transformers, "UnlimitedOcrModel"):
        pytest.skip("this transformers has no UnlimitedOcr")
    from transformers.models.unlimited_ocr import modeling_unlimited_ocr as port
    model = random_model(0)
    pretrained.export_deepseek(model, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    text = dict(hidden_size=256, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=300,
                moe_intermediate_size=16, n_routed_experts=2, num_experts_per_tok=1, n_shared_experts=1)
    theirs, info = port.UnlimitedOcrModel.from_pretrained(
        tmp_path / "out", config=port.UnlimitedOcrConfig(vision_config=config["vision_config"], text_config=text), output_loading_info=True)
    assert all(k.startswith("language_model.") for k in info["missing_keys"]) and not info["mismatched_keys"]
    assert all("patch_embedding" in k for k in info["unexpected_keys"])
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        ours = model.projector(model.encoder(x))
        expected = theirs.multi_modal_projector(theirs.vision_tower.eval()(x).last_hidden_state)
        assert (ours - expected).abs().max() < 1e-5 and torch.equal(theirs.view_separator, model.view_seperator)


def test_export_refuses_standardisation(tmp_path):
    with pytest.raises(ValueError, match="cannot export"):
        pretrained.export_deepseek(random_model(0, standardize="position"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -----------------------------------------------------------------------------
# Less memory, the same numbers

def test_recomputation_and_chunked_loss_change_nothing(make_model, make_batch, pages, monkeypatch):
    batch, grads = make_batch(pages), []
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
    model.freeze(["sam-core", "clip", "gpt"])
    model(make_batch(pages))["text"][0].backward()
    learns = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learns == {"encoder.sam_model.net_2.weight", "encoder.sam_model.net_3.weight", "projector.layers.weight", "projector.layers.bias",
                      "image_newline", "view_seperator"}
    assert not model.encoder.standardize.frozen
    with pytest.raises(ValueError, match="must be of sam-core, clip, gpt"):
        model.freeze(["sam"])


def test_an_encoder_alone_goes_out_and_comes_back(make_model, tokenizer, tmp_path):
    model = make_model(0)
    model.meta = {"user_config": {"seed": 0}, "tokenizer": tokenizer.fingerprint(), "stage": "stage 1", "step": 1, "commit": "x"}
    pretrained.save_encoder(model, tmp_path / "encoder")
    other = make_model(1)
    assert ckpt.load_encoder(pretrained.fetch(str(tmp_path / "encoder"), "deepencoder"), other)["stage"] == "stage 1"
    assert all(torch.equal(a, b) for a, b in zip(model.encoder.state_dict().values(), other.encoder.state_dict().values()))
