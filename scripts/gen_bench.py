"""
How fast a checkpoint generates: batched against one by one, cached against uncached, and (optional) against transformers.

    OMP_NUM_THREADS=2 python -m scripts.gen_bench --checkpoint=checkpoints/stage2 --max-new-tokens=512
    OMP_NUM_THREADS=2 python -m scripts.gen_bench --checkpoint=checkpoints/stage2 --transformers     # same weights, same batch

Stopping is off, so that every row says --max-new-tokens tokens; images are encoded once in each. The last line is JSON: tokens
per second, their ratios, and whether the greedy texts are the same.
"""
import argparse
import time

import torch

from nanochat.common import compute_init, json_line, print0, run_main, synchronize
from nanochat.engine import add_arguments, load_engine
from nanochat.gpt import EPS, rotary_tables
from tasks.synthdoc import SynthDoc


@torch.inference_mode()
def uncached(engine, conversations, n):
    """Texts by plain decoding: the whole sequence anew for each token. Prompts must be of one length."""
    model, gpt, (batch, lengths) = engine.model, engine.model.gpt, engine.prompt_batch(conversations)
    assert len(set(lengths)) == 1
    x, said = model.embed(batch), []
    for _ in range(n):
        logits = gpt.logits(gpt(x)[:, -1])
        logits[:, engine.banned] = float("-inf")
        said.append(logits.argmax(-1))
        x = torch.cat([x, gpt.transformer.wte(said[-1])[:, None].to(x.dtype)], 1)
    return [engine.tokenizer.decode(ids) for ids in torch.stack(said, 1).tolist()]


def transformers_twin(gpt, dtype):
    """transformers' NanoChatForCausalLM with the weights of our decoder. Its default epsilon is not nanochat's."""
    from transformers import NanoChatConfig, NanoChatForCausalLM
    c = gpt.cfg
    twin = NanoChatForCausalLM(NanoChatConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=4 * c.n_embd, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, max_position_embeddings=c.sequence_len, rms_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}))
    names = {"transformer.wte": "model.embed_tokens", "transformer.h": "model.layers", "attn.c_proj": "self_attn.o_proj", "attn.c_": "self_attn.",
             "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2", "self_attn.q.": "self_attn.q_proj.", "self_attn.k.": "self_attn.k_proj.",
             "self_attn.v.": "self_attn.v_proj."}
    weights = {}
    for name, tensor in gpt.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        weights[name] = tensor
    twin.load_state_dict(weights)
    return twin.to(gpt.lm_head.weight.device, dtype).eval()


@torch.inference_mode()
def by_transformers(engine, twin, conversations, n):
    batch, _ = engine.prompt_batch(conversations)
    ids = twin.generate(inputs_embeds=engine.model.embed(batch), attention_mask=torch.ones_like(batch.ids), max_new_tokens=n, min_new_tokens=n,
                        do_sample=False, suppress_tokens=engine.banned, eos_token_id=None)
    return [engine.tokenizer.decode(row) for row in ids.tolist()]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=16, help="rows of the large batch")
    parser.add_argument("--transformers", action="store_true", help="compare with transformers' generate (pip install transformers)")
    parser.set_defaults(dtype="float32", max_new_tokens=256)
    args = parser.parse_args(argv)
    n, args.max_new_tokens = args.max_new_tokens, 1  # the decoder's context is made long enough below
    device = compute_init(args.device_type)
    engine, meta = load_engine(args, device)
    gpt, size = engine.model.gpt, engine.model.cfg.sam.image_size
    engine.banned.append(engine.end)
    pages = list(SynthDoc("heldout", args.batch_size, image_size=size, chars=(24, 32), seed=2))
    gpt.cfg.sequence_len = engine.prompt_batch(pages[:1])[1][0] + n
    gpt.cos, gpt.sin = (table.to(device) for table in rotary_tables(gpt.cfg.sequence_len, gpt.cfg.n_embd // gpt.cfg.n_head))
    twin = transformers_twin(gpt, engine.model.dtype) if args.transformers else None

    cases = {"cached": (lambda c, k: [r.text for r in engine.generate(c, k)], pages), "cached_one_row": (lambda c, k: [engine.generate(c, k)[0].text], pages[:1]),
             "uncached": (lambda c, k: uncached(engine, c, k), pages), "uncached_one_row": (lambda c, k: uncached(engine, c, k), pages[:1])}
    if twin:
        cases["transformers"] = (lambda c, k: by_transformers(engine, twin, c, k), pages)
    rate, texts = {}, {}
    for name, (read, rows) in cases.items():
        read(rows, 4)  # warm
        synchronize(device)
        start = time.perf_counter()
        texts[name] = read(rows, n)
        synchronize(device)
        rate[name] = len(rows) * n / (time.perf_counter() - start)
        print0(f"{name}: {len(rows)} x {n} tokens, {rate[name]:.0f} tokens/s")
    json_line({"bench": "generation", "params": engine.model.num_params(), "dtype": str(engine.model.dtype), "threads": torch.get_num_threads(),
               "new_tokens": n, "batch_size": args.batch_size, "tokens_per_sec": rate,
               "batched_over_one_row": rate["cached"] / rate["cached_one_row"], "cached_over_uncached": rate["cached"] / rate["uncached"],
               "cached_over_uncached_one_row": rate["cached_one_row"] / rate["uncached_one_row"],
               **({"over_transformers": rate["cached"] / rate["transformers"]} if twin else {}),
               "same_text": all(texts[name] == texts["cached"][:len(texts[name])] for name in cases)})


if __name__ == "__main__":
    run_main(main)
