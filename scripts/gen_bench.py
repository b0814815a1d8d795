"""
How fast a checkpoint generates: batched against one by one, cached against uncached, and (optional) against transformers.

    OMP_NUM_THREADS=2 python -m scripts.gen_bench --checkpoint=checkpoints/stage2 --max-new-tokens=512
    OMP_NUM_THREADS=2 python -m scripts.gen_bench --checkpoint=checkpoints/stage2 --transformers     # same weights, same batch

Stopping is off, so that every row says --max-new-tokens tokens; images are encoded once in each. The last line is JSON: tokens
per second, their ratios, and whether the greedy texts are the same.
"""
import argparse
import time
from functools import partial

import torch

from nanochat.common import compute_init, json_line, print0, run_main, synchronize
from nanochat.reader import add_arguments, load_engine
from nanochat.gpt import rotary_tables
from scripts.parity import transformers_gpt
from tasks.synthdoc import SynthDoc


@torch.inference_mode()
def uncached(engine, conversations, n):
    """Texts by plain decoding: the whole sequence anew for each token. Prompts must be of one length."""
    gpt, x, said = engine.model.gpt, engine.model.embed(engine.prompt_batch(conversations)[0]), []
    for _ in range(n):
        logits = gpt.logits(gpt(x)[:, -1])
        logits[:, engine.banned] = float("-inf")
        said.append(logits.argmax(-1))
        x = torch.cat([x, gpt.transformer.wte(said[-1])[:, None].to(x.dtype)], 1)
    return [engine.tokenizer.decode(ids) for ids in torch.stack(said, 1).tolist()]


@torch.inference_mode()
def by_transformers(engine, twin, conversations, n):
    batch, _ = engine.prompt_batch(conversations)
    ids = twin.generate(inputs_embeds=engine.model.embed(batch), attention_mask=torch.ones_like(batch.ids), max_new_tokens=n,
                        min_new_tokens=n, do_sample=False, suppress_tokens=engine.banned, eos_token_id=None)
    return [engine.tokenizer.decode(row) for row in ids.tolist()]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=16, help="rows of the large batch")
    parser.add_argument("--transformers", action="store_true", help="compare with transformers' generate (pip install transformers)")
    parser.set_defaults(dtype="float32", max_new_tokens=512)
    args = parser.parse_args(argv)
    n, args.max_new_tokens, device = args.max_new_tokens, 1, compute_init(args.device_type)
    engine, _ = load_engine(args, device)
    gpt = engine.model.gpt
    pages = list(SynthDoc("heldout", args.batch_size, image_size=engine.model.cfg.sam.image_size, chars=(24, 32), seed=2))
    engine.banned.append(engine.end)  # stopping off
    gpt.cfg.sequence_len = engine.prompt_batch(pages[:1])[1][0] + n  # a nano decoder has 512 positions
    gpt.cos, gpt.sin = (table.to(device) for table in rotary_tables(gpt.cfg.sequence_len, gpt.cfg.n_embd // gpt.cfg.n_head))

    def cached(pages, n):
        return [result.text for result in engine.generate(pages, n)]
    cases = {"cached": (cached, pages), "cached_one_row": (cached, pages[:1]),
             "uncached": (partial(uncached, engine), pages), "uncached_one_row": (partial(uncached, engine), pages[:1])}
    if args.transformers:
        cases["transformers"] = (partial(by_transformers, engine, transformers_gpt(gpt).to(device, engine.model.dtype)), pages)
    rate, texts = {}, {}
    for name, (read, rows) in cases.items():
        read(rows, 4)  # warm
        synchronize(device)
        start = time.perf_counter()
        texts[name] = read(rows, n)
        synchronize(device)
        rate[name] = len(rows) * n / (time.perf_counter() - start)
        print0(f"{name}: {len(rows)} x {n} tokens, {rate[name]:.0f} tokens/s")
    ratios = {"batched_over_one_row": ("cached", "cached_one_row"), "cached_over_uncached": ("cached", "uncached"),
              "cached_over_uncached_one_row": ("cached_one_row", "uncached_one_row"), "over_transformers": ("cached", "transformers")}
    json_line({"bench": "generation", "params": engine.model.num_params(), "dtype": str(engine.model.dtype),
               "threads": torch.get_num_threads(), "new_tokens": n, "batch_size": args.batch_size, "tokens_per_sec": rate,
               **{name: rate[a] / rate[b] for name, (a, b) in ratios.items() if b in rate},
               "same_text": all(texts[name] == texts["cached"][:len(texts[name])] for name in cases)})


if __name__ == "__main__":
    run_main(main)
