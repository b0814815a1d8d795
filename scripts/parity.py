"""
Is our network the published one? Compares it with transformers' ports of it, weights the same.

DeepEncoder and projector are compared with transformers' UnlimitedOcr (the same network as
DeepSeek-OCR's), the decoder with transformers' NanoChat, in fp32 and with random weights. Needs
transformers; full size takes some minutes and 8 GB.

    python -m scripts.parity                          # full size at 512, 640 and 1024 px
    python -m scripts.parity --preset=tiny --sizes=64

The last line is JSON: the largest absolute difference per part and size, next to the largest value.
"""
import torch
import torch.nn.functional as F

from nanochat.common import ArgumentParser, git_commit, json_line, print0, run_main
from nanochat.config import PRESETS, GPTConfig
from nanochat.gpt import EPS, GPT
from nanochat.model import DeepseekOCR
from nanochat.pretrained import clip_keys, sam_key, vision_config

LIMIT = 1e-4     # fp32 rounding; measured differences are about 2e-5
POSITIONS = 64   # of the decoder that are compared

# Our names of the decoder's parameters -> transformers' NanoChat
GPT_RENAMES = (
    ("transformer.wte", "model.embed_tokens"),
    ("transformer.h", "model.layers"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
    ("attn.c_proj", "self_attn.o_proj"),
    ("attn.c_q", "self_attn.q_proj"),
    ("attn.c_k", "self_attn.k_proj"),
    ("attn.c_v", "self_attn.v_proj"),
)

# -----------------------------------------------------------------------------
# The same weights in transformers' modules

def transformers_encoder(encoder, cfg):
    """
    transformers' UnlimitedOcrVisionModel with the weights of our DeepEncoder, which was built from
    cfg.
    """
    from transformers.models.unlimited_ocr import configuration_unlimited_ocr as configuration
    from transformers.models.unlimited_ocr import modeling_unlimited_ocr as modeling
    config = configuration.UnlimitedOcrVisionConfig(**vision_config(cfg))
    theirs = modeling.UnlimitedOcrVisionModel(config).eval()

    # The compressor is a module of its own there.
    state = {}
    for name, t in encoder.sam_model.state_dict().items():
        name = sam_key(name).replace("net_2", "proj.conv1").replace("net_3", "proj.conv2")
        state["sam_encoder." + name] = t
    # Our fused q, k, v are three matrices there.
    for name, t in encoder.vision_model.state_dict().items():
        names = clip_keys(name)
        for their_name, piece in zip(names, t.chunk(len(names))):
            state["vision_encoder." + their_name] = piece

    # CLIP's own patch convolution is published but never run, and transformers leaves it out.
    state.pop("vision_encoder.embeddings.patch_embedding.weight", None)
    theirs.load_state_dict(state)
    return theirs


def transformers_gpt(gpt):
    """transformers' NanoChatForCausalLM with the weights of our GPT."""
    from transformers import NanoChatConfig, NanoChatForCausalLM
    c = gpt.cfg
    config = NanoChatConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=4 * c.n_embd,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head,
        max_position_embeddings=c.sequence_len,
        rms_norm_eps=EPS,  # its default of 1e-6 is not nanochat's, and makes a difference of 4.8e-4
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    theirs = NanoChatForCausalLM(config).eval()

    state = {}
    for name, t in gpt.state_dict().items():
        for ours, their_name in GPT_RENAMES:
            name = name.replace(ours, their_name)
        state[name] = t
    theirs.load_state_dict(state)
    return theirs


# -----------------------------------------------------------------------------
# Comparison

@torch.no_grad()
def randomize(module):
    """
    Makes every parameter random, so that nothing hides behind a zero: matrices by fan-in, vectors
    and tables small, norm weights near one.
    """
    for name, p in module.named_parameters():
        if p.ndim == 1 or "embed" in name or "rel_pos" in name:
            torch.nn.init.normal_(p, std=0.02)  # tables are added, so their fan-in means nothing
        else:
            fan_in = p[0].numel()
            torch.nn.init.normal_(p, std=fan_in ** -0.5)

        # The neck's norms carry numbers, not names.
        in_neck = name.endswith(("neck.1.weight", "neck.3.weight"))
        if in_neck or (p.ndim == 1 and "norm" in name and name.endswith("weight")):
            p += 1


def compare(record, part, ours, theirs):
    difference = (ours - theirs).abs().max().item()
    largest = theirs.abs().max().item()
    record[part] = {"max_abs_diff": difference, "max_abs": largest}
    print0(f"{part:24s} max |difference| {difference:.2e}   max |value| {largest:.2f}")


def compare_encoder(record, cfg, sizes):
    """SAM with compressor, the whole encoder and the projector at each size in px."""
    model = DeepseekOCR(cfg).eval()
    randomize(model)
    theirs = transformers_encoder(model.encoder, cfg)
    for size in sizes:
        x = torch.rand(1, 3, size, size) * 2 - 1
        taps = {}
        with torch.inference_mode():
            features = model.encoder(x, taps)
            sam = theirs.sam_encoder(x).last_hidden_state
            expected = theirs(x).last_hidden_state
            projected = model.projector(features)
            # Theirs is a plain linear layer; ours casts its weights to the compute dtype first.
            linear = model.projector.layers
            expected_projected = F.linear(expected, linear.weight, linear.bias)
        compare(record, f"sam+compressor {size}", taps["compressor"], sam)
        compare(record, f"encoder {size}", features, expected)
        compare(record, f"projector {size}", projected, expected_projected)


def compare_decoder(record, cfg):
    """The decoder's logits on random tokens."""
    gpt = GPT(cfg).eval()
    randomize(gpt)
    theirs = transformers_gpt(gpt)
    ids = torch.randint(cfg.vocab_size, (1, POSITIONS))
    with torch.inference_mode():
        logits = gpt.logits(gpt(gpt.transformer.wte(ids)))
        compare(record, "gpt logits", logits, theirs(ids).logits)


def main(argv=None):
    parser = ArgumentParser(__doc__)
    parser.add_argument("--preset", default="base", choices=sorted(PRESETS),
                        help="sizes of the model (nanochat/config.py)")
    parser.add_argument("--sizes", default="512,640,1024", help="px, with commas")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    sizes = args.sizes.split(",")
    stride = PRESETS[args.preset]().token_stride
    if not all(size.isdecimal() and int(size) and int(size) % stride == 0 for size in sizes):
        raise ValueError(f"--sizes={args.sizes}: give px with commas, multiples of the token "
                         f"stride {stride}")

    # Two models one after the other, to save memory: the encoder with an empty decoder of the right
    # width, then the decoder.
    cfg = PRESETS[args.preset]()
    gpt_cfg = cfg.gpt
    cfg.gpt = GPTConfig(n_layer=0, n_embd=gpt_cfg.n_embd, n_head=gpt_cfg.n_head,
                        n_kv_head=gpt_cfg.n_kv_head, vocab_size=1)
    record = {}
    compare_encoder(record, cfg, [int(size) for size in sizes])
    compare_decoder(record, gpt_cfg)

    worst = max(part["max_abs_diff"] for part in record.values())
    json_line({"parity": record, "max_abs_diff": worst, "limit": LIMIT, "ok": worst <= LIMIT,
               "preset": args.preset, "commit": git_commit()})
    if not worst <= LIMIT:  # a NaN, too
        raise ValueError(f"the largest difference {worst:.2e} is over {LIMIT}")


if __name__ == "__main__":
    run_main(main)
