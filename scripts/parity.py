"""
Is our network the published one? DeepEncoder and projector against transformers' UnlimitedOcr (the same network as DeepSeek-OCR's), the
decoder against transformers' NanoChat, with the same random weights in fp32. Needs transformers; full size takes some minutes and 8 GB.

    python -m scripts.parity                          # full size at 512, 640 and 1024 px
    python -m scripts.parity --preset=tiny --sizes=64

The last line is JSON: largest absolute difference per part and size, next to the largest value compared.
"""
import argparse

import torch

from nanochat.common import git_commit, json_line, print0, run_main
from nanochat.config import PRESETS
from nanochat.gpt import EPS, GPT
from nanochat.model import DeepseekOCR
from nanochat.pretrained import clip_keys, sam_key, vision_config

LIMIT = 1e-4
GPT_KEYS = (("transformer.wte", "model.embed_tokens"), ("transformer.h", "model.layers"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
            ("attn.c_proj", "self_attn.o_proj"), ("attn.c_q", "self_attn.q_proj"), ("attn.c_k", "self_attn.k_proj"),
            ("attn.c_v", "self_attn.v_proj"))


def transformers_encoder(encoder, cfg):
    """transformers' UnlimitedOcrVisionModel with the weights of our DeepEncoder (built from cfg, standardisation off)."""
    from transformers.models.unlimited_ocr.configuration_unlimited_ocr import UnlimitedOcrVisionConfig
    from transformers.models.unlimited_ocr.modeling_unlimited_ocr import UnlimitedOcrVisionModel
    theirs = UnlimitedOcrVisionModel(UnlimitedOcrVisionConfig(**vision_config(cfg))).eval()
    state = {}
    for name, t in encoder.sam_model.state_dict().items():
        state["sam_encoder." + sam_key(name).replace("net_2", "proj.conv1").replace("net_3", "proj.conv2")] = t
    for name, t in encoder.vision_model.state_dict().items():
        names = clip_keys(name)
        state.update(zip(["vision_encoder." + n for n in names], t.chunk(len(names))))
    state.pop("vision_encoder.embeddings.patch_embedding.weight", None)  # CLIP's own patch convolution: published, never run
    theirs.load_state_dict(state)
    return theirs


def transformers_gpt(gpt):
    """transformers' NanoChatForCausalLM with the weights of our GPT. Its default eps is another: 4.8e-4 off."""
    from transformers import NanoChatConfig, NanoChatForCausalLM
    c = gpt.cfg
    theirs = NanoChatForCausalLM(NanoChatConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=4 * c.n_embd, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, max_position_embeddings=c.sequence_len,
        rms_norm_eps=EPS, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})).eval()
    state = {}
    for name, t in gpt.state_dict().items():
        for ours, other in GPT_KEYS:
            name = name.replace(ours, other)
        state[name] = t
    theirs.load_state_dict(state)
    return theirs


def randomise(module):
    """Every parameter random, so that nothing hides behind a zero: matrices by fan-in, vectors small, norm weights near one."""
    for name, p in module.named_parameters():
        fan_in = p[0].numel() if p.ndim > 1 else 1
        torch.nn.init.normal_(p, std=0.02 if p.ndim == 1 or "embed" in name or "rel_pos" in name else fan_in ** -0.5)
        if p.ndim == 1 and "norm" in name and name.endswith("weight") or name.endswith(("neck.1.weight", "neck.3.weight")):
            with torch.no_grad():
                p += 1


def compare(record, part, ours, theirs):
    record[part] = {"max_abs_diff": (ours - theirs).abs().max().item(), "max_abs": theirs.abs().max().item()}
    print0(f"{part:24s} max |difference| {record[part]['max_abs_diff']:.2e}   max |value| {record[part]['max_abs']:.2f}")


@torch.inference_mode()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--preset", default="base", choices=sorted(PRESETS), help="sizes of the model (nanochat/config.py)")
    parser.add_argument("--sizes", default="512,640,1024", help="px, with commas")
    parser.add_argument("--positions", type=int, default=64, help="decoder positions compared")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    cfg = PRESETS[args.preset]()
    cfg.standardize = "none"
    gpt_sizes, cfg.gpt = cfg.gpt, type(cfg.gpt)(n_layer=0, n_embd=cfg.gpt.n_embd, n_head=cfg.gpt.n_head, n_kv_head=cfg.gpt.n_kv_head, vocab_size=1)
    torch.manual_seed(args.seed)
    with torch.inference_mode(False):
        model = DeepseekOCR(cfg).eval()
        randomise(model)
        theirs = transformers_encoder(model.encoder, cfg)
        projector = torch.nn.Linear(model.encoder.width, cfg.gpt.n_embd)
        projector.load_state_dict(model.projector.layers.state_dict())
    count = {part: sum(p.numel() for p in module.parameters()) for part, module in
             (("sam", model.encoder.sam_model), ("clip", model.encoder.vision_model), ("projector", model.projector))}
    record = {}
    for size in map(int, args.sizes.split(",")):
        x = torch.rand(1, 3, size, size) * 2 - 1
        taps = {}
        features = model.encoder(x, taps)
        sam = theirs.sam_encoder(x).last_hidden_state
        expected = theirs(x).last_hidden_state
        compare(record, f"sam+compressor {size}", taps["compressor"], sam)
        compare(record, f"encoder {size}", features, expected)
        compare(record, f"projector {size}", model.projector(features), projector(expected))
    del model, theirs

    with torch.inference_mode(False):
        gpt = GPT(gpt_sizes).eval()
        randomise(gpt)
        theirs = transformers_gpt(gpt)
    ids = torch.randint(gpt_sizes.vocab_size, (1, args.positions))
    compare(record, "gpt logits", gpt.logits(gpt(gpt.transformer.wte(ids))), theirs(ids).logits)
    count["gpt"] = sum(p.numel() for p in gpt.parameters())
    worst = max(r["max_abs_diff"] for r in record.values())
    json_line({"parity": record, "max_abs_diff": worst, "limit": LIMIT, "ok": worst <= LIMIT, "parameters": count, "preset": args.preset,
               "seed": args.seed, "commit": git_commit()})
    if not worst <= LIMIT:
        raise ValueError(f"largest difference {worst:.2e} is over {LIMIT}")


if __name__ == "__main__":
    run_main(main)
