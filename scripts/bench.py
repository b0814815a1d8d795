"""
Where time and memory go: training steps, generation, data, and the comparison with transformers.

    python -m scripts.bench                            # nano, here: stage1, stage2, generate
    python -m scripts.bench --what=data --workers=2    # pages per CPU second, padding, data wait
    python -m scripts.bench --what=transformers --batch=16              # needs a trained checkpoint
    python -m scripts.bench --what=memory --preset=base --mode=1024px --batch=4 --seq=8192
    python -m scripts.bench --suite=checkpoints/bench.jsonl   # every benchmark for a new GPU

Prints one JSON line per measurement. MFU is the model's FLOPs (forward_flops, nanochat/model.py) as
a share of a matrix product's rate in the same run; recomputation does not count as work. Steps are
of the text loss alone, but for --what=syncs, which trains as stage 1 does.
"""
import gc
import json
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image

from nanochat.batch import IGNORE, Batch
from nanochat.common import (
    ArgumentParser, choose_compile, choose_dtype, compute_init, dtype_name, git_commit, integer,
    json_line, matmul_rate, positive_int, read_json_lines, replace_file, run_main, synchronize)
from nanochat.config import PRESETS
from nanochat.conversation import ocr_conversation
from nanochat.dataloader import Sampler, ahead, loader, workers_that_fit
from nanochat.engine import Engine, GraphMemory, LiveRows, TokenChoice
from nanochat.heads import LABELS, loss_weights, make_heads
from nanochat.image_modes import get_mode, plan
from nanochat.loop import train_step, training_flops, wrap_model
from nanochat.measure import (
    PeakMemory, flash_attention, median_and_range, median_seconds, memory_bandwidth)
from nanochat.model import DeepseekOCR
from nanochat.optim import Optimizer
from nanochat.reader import NanoDeepseekOCR, cast_decoder
from nanochat.tokenizer import Tokenizer
from scripts.parity import transformers_gpt
from tasks.synthdoc import SynthDoc
from tasks.synthpage import TEXT, SynthPage

MEASUREMENTS = ("stage1", "stage2", "generate", "data", "syncs", "memory", "transformers")

# The rows of --suite, cheapest first. Batch sizes are for 80 GB.
SUITE = (
    "--preset=nano --batch=256",
    "--preset=nano --batch=256 --what=stage1,stage2 --compile=no",
    "--preset=small --batch=64 --seq=768 --what=stage1,stage2",
    "--preset=small --batch=64 --seq=768 --what=stage1,stage2 --compile=no",
    "--preset=small --batch=64 --what=data --workers=-1",
    "--preset=nano --batch=64 --what=syncs",
    "--preset=small --batch=64 --what=syncs --pack=2 --workers=-1",
    "--preset=small --batch=64 --what=generate --new-tokens=1000",
    "--preset=base --mode=1024px --batch=64 --what=generate --new-tokens=1000",
    "--preset=base --mode=1024px --batch=8 --seq=1536 --what=memory,stage1 --optimizer=adamw",
    "--preset=base --mode=1024px --batch=4 --seq=8192 --what=memory,stage2 --optimizer=adamw",
    "--preset=base --mode=1024px --batch=4 --seq=8192 --pack=6 --what=stage2 --optimizer=adamw",
)

PROMPT_ROOM = 64  # decoder positions for the prompt's text, beside the page and what is generated


# -----------------------------------------------------------------------------
# What is measured: a model with random weights, and batches of the right shapes

def byte_tokenizer():
    """Every byte is a token, so nothing has to be trained before a measurement."""
    # 256 bytes and the special tokens fit every preset's vocabulary.
    return Tokenizer(bytes([i]) for i in range(256))


def page_plan(mode, stride):
    """The plan of a square page that is large enough for a tiled mode to cut it into tiles."""
    return plan(mode, 2 * mode.size, 2 * mode.size, stride)


def make_config(args, mode):
    cfg = PRESETS[args.preset]()
    cfg.image_token_id = byte_tokenizer().image_token_id  # a preset leaves it open
    if args.preset == "base":
        cfg.gpt.vocab_size += 1  # nanochat's decoder has no <|image|>; a row is added for it
    # The decoder gets as many positions as the flags ask for, whatever the preset says.
    generating = page_plan(mode, cfg.layout).positions + PROMPT_ROOM + args.new_tokens
    cfg.gpt.sequence_len = max(cfg.gpt.sequence_len, args.seq, generating)
    return cfg


def build(cfg, device, dtype):
    # A compiled model is a reference cycle: the one before would still hold its memory.
    gc.collect()
    with device:
        model = DeepseekOCR(cfg)
    # The head starts at zero, so a fresh model always generates token 0: quick to decode to text.
    model.init_weights(0)
    model.dtype = dtype
    return model


def make_batch(model, mode, rows, seq, pack=1):
    """
    A Batch of `rows` rows of `seq` positions, its pixels on the model's device. A row holds `pack`
    samples of equal length: a page of noise, and random text behind it, all of it supervised.
    """
    page = page_plan(mode, model.cfg.layout)
    length = seq // pack
    if page.positions >= length:
        raise ValueError(
            f"--seq={seq} --pack={pack} leaves {length} positions to a sample, and a page in mode "
            f"{mode.name} takes {page.positions} of them: raise --seq or lower --pack")
    image_token = model.cfg.image_token_id
    # Drawn on the host: every device then gets the same batch.
    rng = torch.Generator().manual_seed(0)

    # Text from the whole vocabulary, so that the embedding's gradient is spread as in training.
    ids = torch.randint(model.cfg.gpt.vocab_size, (rows, seq), generator=rng)  # (B, T)
    ids[ids == image_token] = 0
    for start in range(0, pack * length, length):
        ids[:, start:start + page.positions] = image_token

    # No position predicts a placeholder. The last one of a sample is followed by the page of the
    # next (the roll closes the circle), so it is unsupervised by the same rule.
    targets = ids.roll(-1, 1)
    targets[targets == image_token] = IGNORE
    targets[:, pack * length - 1:] = IGNORE  # what is left of the row is padding

    views = {}
    for side, n in page.views.items():
        shape = (rows * pack * n, 3, side, side)
        views[side] = torch.randint(256, shape, generator=rng, dtype=torch.uint8)
    plans = [page] * (rows * pack)
    batch = Batch(ids, targets, views, plans, features_per_row=[page.positions * pack] * rows)
    if pack > 1:
        batch.positions = (torch.arange(seq) % length).repeat(rows, 1)  # each sample counts from 0
        batch.lengths = [[length] * pack] * rows
    if model.device.type == "cuda":
        batch = batch.pin_memory()
    return next(ahead([batch], model.device))


class TrainingStep:
    """What a stage does with a batch: loss, gradients, clipping, update."""
    def __init__(self, args, model, stage):
        if stage == "stage2":
            model.freeze(["sam", "compressor"])
        model.train()
        model.recompute(args.recompute)
        self.model = model
        # Rates so low that training on noise cannot diverge.
        self.optimizer = Optimizer(
            model, args.optimizer, lr=1e-5, matrix_lr=1e-5, dtype=model.dtype)

    # The division by `supervised` makes a mean of the sum, as in the training loop.
    def forward_backward(self, batch):
        loss_sum, _count = self.model(batch)["text"]
        # In this thread, as the training loop does it: compiled parts know their settings there.
        with torch.autograd.set_multithreading_enabled(False):
            (loss_sum / batch.supervised()).backward()

    def __call__(self, batch):
        self.forward_backward(batch)
        self.optimizer.clip_grad_norm(1.0)
        self.optimizer.step(1.0)
        self.optimizer.zero_grad()


def step_flags(args):
    """The flags that decide how long a training step takes and how much memory."""
    names = ("seq", "pack", "recompute", "optimizer")
    return {name: getattr(args, name) for name in names}


# -----------------------------------------------------------------------------
# --what=stage1,stage2: a training step

def measure_training(args, cfg, device, mode, stage, peak):
    """Speed, MFU, memory and the shares of a step. peak: FLOP/s of a matrix product."""
    compiled = choose_compile(device, args.compile)
    model = build(cfg, device, choose_dtype(device, args.dtype))
    step = TrainingStep(args, model, stage)
    if compiled:
        model.compile_blocks()
    batch = make_batch(model, mode, args.batch, args.seq, args.pack)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # the peak is this model's own

    start = time.perf_counter()
    step(batch)
    synchronize(device)
    first_step = time.perf_counter() - start  # with compiling, and the optimizer's state made
    dt = median_seconds(device, lambda: step(batch), args.repeats)
    peak_gb = None
    if device.type == "cuda":
        peak_gb = torch.cuda.max_memory_allocated() / 1e9  # before the parts below add to it

    shares = {}
    for part, part_seconds in time_parts(step, batch, dt, args.repeats).items():
        shares[part] = round(part_seconds / dt, 3)
    return {
        **step_flags(args),
        "compiled": compiled,
        "first_step_seconds": first_step,
        "seconds": dt,  # median, all data on the device
        "images_per_sec": batch.images / dt,
        "tokens_per_sec": batch.ids.numel() / dt,
        "mfu": training_flops(model, batch) / dt / peak,
        "peak_gb": peak_gb,  # only on CUDA
        "share": shares,  # they add up to 1, but for noise
    }


def time_parts(step, batch, step_seconds, repeats):
    """{part of a step: seconds}. A part that cannot run alone is the rest of what contains it."""
    model = step.model
    device = model.device
    shape = (*batch.ids.shape, model.cfg.gpt.n_embd)
    embeddings = torch.randn(shape, device=device, dtype=model.dtype)  # (B, T, C)

    def encode():
        for pixels in batch.views.values():
            model.project(pixels)

    def decode():
        # Positions are left out: a packed row's rotary angles cost as much as any other's.
        model.gpt(embeddings, lengths=batch.lengths)

    with torch.no_grad():
        encoder = median_seconds(device, encode, repeats)
        decoder = median_seconds(device, decode, repeats)
        forward = median_seconds(device, lambda: model(batch), repeats)
    # Gradients exist from here on and are added to, which takes as long as writing them.
    forward_backward = median_seconds(device, lambda: step.forward_backward(batch), repeats)
    # max: on a busy machine the difference of two medians may come out below zero.
    return {
        "encoder forward": encoder,
        "decoder forward": decoder,
        "fusion and loss forward": max(0.0, forward - encoder - decoder),
        "backward": max(0.0, forward_backward - forward),
        "optimizer": max(0.0, step_seconds - forward_backward),
    }


# -----------------------------------------------------------------------------
# --what=generate

def measure_generation(args, cfg, device, mode):
    """Greedy generation of --new-tokens for each of --batch blank pages, no row ends early."""
    model = build(cfg, device, choose_dtype(device, args.dtype)).eval()
    cast_decoder(model)
    engine = engine_without_end(model, byte_tokenizer(), mode)
    blank = Image.new("RGB", (2 * mode.size, 2 * mode.size), "white")
    pages = [ocr_conversation(blank, "", "blank")] * args.batch
    _, prompt_lengths = engine.prompt_batch(pages)

    prefill = median_seconds(device, lambda: engine.generate(pages, 1), repeats=3)
    whole = median_seconds(device, lambda: engine.generate(pages, args.new_tokens), repeats=3)
    per_step = (whole - prefill) / (args.new_tokens - 1)
    # Decoding is bound by memory: a step does few FLOPs with everything that it reads. Rows grow by
    # a token per step, so on average half of the new tokens are in the cache.
    mean_length = prompt_lengths[0] + args.new_tokens / 2
    read_per_second = bytes_read_per_step(model, args.batch, mean_length) / per_step
    bandwidth = memory_bandwidth(device)
    return {
        "new_tokens": args.new_tokens,
        "seconds": whole,
        "pages_per_sec": args.batch / whole,
        "tokens_per_sec": args.batch * args.new_tokens / whole,
        "prefill_share": prefill / whole,  # preprocessing, encoder and prompt
        "bandwidth_share": read_per_second / bandwidth,
        "bandwidth_gb_per_sec": bandwidth / 1e9,
    }


def engine_without_end(model, tokenizer, mode):
    """An Engine that never says the end token: every row gets as many tokens as are asked for."""
    engine = Engine(model, tokenizer, mode)
    engine.banned.append(engine.end)  # never generated, like all other special tokens
    return engine


def bytes_read_per_step(model, rows, length):
    """What a decoding step has to read: weights of blocks and head, keys and values so far."""
    gpt = model.cfg.gpt
    blocks = sum(parameter.numel() for parameter in model.gpt.transformer.h.parameters())
    head = gpt.vocab_size * gpt.n_embd
    head_dim = gpt.n_embd // gpt.n_head
    # Keys and values; the embedding table is not in here, since a step gathers only `rows` of it.
    cache = 2 * gpt.n_layer * rows * gpt.n_kv_head * head_dim * length
    bytes_per_number = torch.finfo(model.dtype).bits // 8
    return (blocks + head + cache) * bytes_per_number


# -----------------------------------------------------------------------------
# --what=data

def measure_data(args, cfg, device, mode):
    """How fast pages come, how much of a batch is padding, how long a step waits for its batch."""
    sampler = page_sampler(cfg, mode)
    args.workers = workers_that_fit(sampler, args.batch, args.workers)
    record = {"workers": args.workers}
    record["dense_pages_per_cpu_second"] = dense_pages_per_cpu_second(args.pages)
    record["samples_per_second"] = samples_per_second(args, sampler)
    record["data_wait"], record["padding"] = wait_and_padding(args, cfg, device, sampler)
    return record


def page_sampler(cfg, mode, **settings):
    """
    The loader's Sampler on pages such as a preset of this size is trained on, and with the labels
    that are asked for in training. settings: Sampler's.
    """
    endless = 1 << 40  # pages are rendered when they are asked for
    # At 512 px and more a view has room for print of some 10 px on a whole page; below, for words.
    if mode.size >= 512:
        task = SynthPage("train", endless, mode.size, chars=(400, 1300), columns=(1, 2), parts=TEXT)
    else:
        task = SynthDoc("train", endless, mode.size, chars=(31, 41))
    return Sampler(task, byte_tokenizer(), mode, cfg.layout, cfg.gpt.sequence_len, labels=LABELS,
                   **settings)


def dense_pages_per_cpu_second(pages):
    """{size: pages} that one core renders, each as full as a page of Fox."""
    rates = {}
    for px in (640, 1024):
        for damage in (0, 1):
            task = SynthPage("train", 1 + pages, px, chars=(4000, 5000), columns=(1, 2), parts=TEXT,
                             damage=damage)
            task[0]  # reads fonts and words, once per process
            # CPU time, since a machine that renders has other work as well.
            start = time.process_time()
            for i in range(1, 1 + pages):
                task[i]
            name = f"{px}px, damaged" if damage else f"{px}px"
            rates[name] = pages / (time.process_time() - start)
    return rates


def samples_per_second(args, sampler):
    """What --workers processes (0: this one) render and collate while nothing else is done."""
    batches = loader(sampler, args.batch, 0, 1 + args.steps, workers=args.workers)
    next(batches)  # after it, the worker processes have started
    start = time.perf_counter()
    for _ in batches:
        pass
    return args.batch * args.steps / (time.perf_counter() - start)


def wait_and_padding(args, cfg, device, sampler):
    """(share of a stage-1 step spent waiting for data, share of padding), over half of --steps."""
    step = TrainingStep(args, build(cfg, device, choose_dtype(device, args.dtype)), "stage1")
    on_cuda = device.type == "cuda"
    batches = loader(
        sampler, args.batch, 0, args.steps, workers=args.workers, pin_memory=on_cuda)
    batches = ahead(batches, device)
    waited = 0.0
    total = 0.0
    positions = 0
    slots = 0
    for i in range(args.steps):
        start = time.perf_counter()
        batch = next(batches)  # without workers, it is rendered now
        wait = time.perf_counter() - start
        step(batch)
        synchronize(device)
        if i >= args.steps // 2:  # until then workers start and queues fill
            waited += wait
            total += time.perf_counter() - start
            positions += batch.counts["positions"]
            slots += batch.counts["slots"]
    return waited / total, 1 - positions / slots


# -----------------------------------------------------------------------------
# --what=syncs

def measure_syncs(args, cfg, device, mode):
    """
    How often the host waits for the GPU in a step of stage 1, and in which lines. One wait is
    meant: for the losses and the gradient norm, together.
    """
    if device.type != "cuda":
        raise ValueError("--what=syncs counts how often the host waits for a GPU: there is none "
                         "here")
    model = build(cfg, device, choose_dtype(device, args.dtype)).train()
    heads = make_heads(model, local_weight=1.0, place_weight=0.3)
    optimizer = Optimizer(model, args.optimizer, lr=1e-5, matrix_lr=1e-5, dtype=model.dtype,
                          heads=heads)
    compiled = choose_compile(device, args.compile)
    net = wrap_model(model, compiled, heads)
    # Rows as a run has them, see loop.row_multiple: of other lengths, every step would compile.
    longest = cfg.gpt.sequence_len
    pack = longest if args.pack > 1 else 0
    multiple = (64 if pack else longest // 4) if compiled else 1
    sampler = page_sampler(cfg, mode, pack=pack, multiple=multiple)
    warm_up = 5  # steps, in which kernels are compiled and state is made
    batches = loader(sampler, args.batch, 0, warm_up + args.steps, workers=args.workers,
                     pin_memory=True)
    batches = ahead(batches, device)
    weights = loss_weights(local_weight=1.0, place_weight=0.3)
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        for i in range(warm_up + args.steps):
            if i == warm_up:
                torch.cuda.set_sync_debug_mode("warn")
            train_step(i, net, optimizer, batches, 1, 1.0, 1.0, sampler.counters, weights)
        torch.cuda.set_sync_debug_mode("default")
    lines = lines_that_wait(waits)
    return {
        "steps": args.steps,
        "waits_per_step": lines.total() / args.steps,
        "lines": dict(lines.most_common()),
    }


def lines_that_wait(caught):
    """Counter of "file:line" over the warnings of torch's sync debug mode among all `caught`."""
    lines = Counter()
    for warning in caught:
        if "called a synchronizing" in str(warning.message):
            lines[f"{os.path.relpath(warning.filename)}:{warning.lineno}"] += 1
    return lines


# -----------------------------------------------------------------------------
# --what=memory

def measure_memory(args, cfg, mode, stage):
    """
    Predicted peak of a training step on a GPU, in GB: the very step, run on the meta device. On top
    come the CUDA context, workspaces of kernels and gaps between tensors.
    """
    # What counts is the GPU to be rented, not this machine: bf16, unless fp32 is asked for.
    dtype = torch.float32 if args.dtype == "float32" else torch.bfloat16
    fused = mock.patch.object(F, "scaled_dot_product_attention", flash_attention)
    with PeakMemory() as memory, fused:
        model = build(cfg, torch.device("meta"), dtype)
        weights = memory.live
        step = TrainingStep(args, model, stage)
        batch = make_batch(model, mode, args.batch, args.seq, args.pack)
        for _ in range(2):  # the optimizer's state is there from the second step on
            step(batch)
        between_steps = memory.live
    return {
        **step_flags(args),
        "stage": stage,
        "dtype": dtype_name(dtype),
        "predicted_gb": memory.peak / 1e9,
        "weights_gb": weights / 1e9,  # fp32: a Linear casts them when it is used
        "between_steps_gb": between_steps / 1e9,  # weights, optimizer's state and the batch
    }


@torch.inference_mode()
def measure_generation_memory(args, cfg, mode):
    """
    The same for generating --new-tokens for each of --batch pages with CUDA graphs: the prompt, and
    a step over the whole cache.
    """
    dtype = torch.float32 if args.dtype == "float32" else torch.bfloat16
    meta = torch.device("meta")
    prompt = page_plan(mode, cfg.token_stride).positions + PROMPT_ROOM
    fused = mock.patch.object(F, "scaled_dot_product_attention", flash_attention)
    with PeakMemory() as memory, fused:
        model = build(cfg, meta, dtype).eval()
        cast_decoder(model)
        weights = memory.live
        batch = make_batch(model, mode, args.batch, prompt)
        choose = TokenChoice([], None, temperature=0.0, seed=0, device=meta)
        positions = prompt + args.new_tokens
        fixed = GraphMemory(model, choose, args.batch, positions)
        live = LiveRows(model, choose, end=0, lengths=[prompt] * args.batch,
                        max_new_tokens=args.new_tokens, memory=fixed)
        live.prefill(batch)
        prefill_peak = memory.peak
        live.cache.reserve(positions - 1)
        live.step()
    return {
        "new_tokens": args.new_tokens,
        "stage": "generate",
        "dtype": dtype_name(dtype),
        "predicted_gb": memory.peak / 1e9,
        "prefill_gb": prefill_peak / 1e9,
        "weights_gb": weights / 1e9,
    }


# -----------------------------------------------------------------------------
# --what=transformers

def measure_transformers(args, device):
    """
    Our generation against transformers' with the weights of --checkpoint, for --batch pages and for
    one. Single rounds mislead (the same code gave 1.2x and 2.1x), so the two take turns.
    """
    model = NanoDeepseekOCR.from_pretrained(args.checkpoint, device)
    # fp32, unless bf16 is asked for: rounding alone would let the two greedy texts part ways.
    model.dtype = torch.float32 if args.dtype == "auto" else choose_dtype(device, args.dtype)
    cast_decoder(model)
    mode = get_mode(args.mode or model.meta["mode"])
    engine = engine_without_end(model, model.tokenizer, mode)
    twin = transformers_gpt(model.gpt).to(device, model.dtype)
    task = SynthDoc("heldout", args.batch, model.cfg.sam.image_size, chars=(24, 32), seed=2)

    def ours(pages):
        return [result.text for result in engine.generate(pages, args.new_tokens)]

    def theirs(pages):
        return generate_by_transformers(engine, twin, pages, args.new_tokens)

    for rows in (args.batch, 1):
        pages = [task[i] for i in range(rows)]
        record = {
            "checkpoint": args.checkpoint,
            "dtype": dtype_name(model.dtype),
            "batch": rows,
            "new_tokens": args.new_tokens,
            "rounds": args.rounds,
        }
        yield record | alternate(device, ours, theirs, pages, args)


@torch.inference_mode()
def generate_by_transformers(engine, twin, pages, new_tokens):
    """Texts of the pages by transformers' generate, with the same tokens banned."""
    batch, _ = engine.prompt_batch(pages)
    ids = twin.generate(
        inputs_embeds=engine.model.embed(batch),
        # Every prompt is as long: no padding
        attention_mask=torch.ones_like(batch.ids, device=engine.model.device),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        suppress_tokens=engine.banned,
        eos_token_id=None,
    )
    return [engine.tokenizer.decode(row) for row in ids.tolist()]


def alternate(device, ours, theirs, pages, args):
    """Tokens per second of both, and their ratio, over --rounds rounds of both in turn."""
    tokens = len(pages) * args.new_tokens
    speeds = {ours: [], theirs: []}
    texts = {}
    for _ in range(1 + args.rounds):  # the first round warms up
        for generate in (ours, theirs):
            start = time.perf_counter()
            texts[generate] = generate(pages)
            synchronize(device)
            speeds[generate].append(tokens / (time.perf_counter() - start))
    our_speeds = speeds[ours][1:]
    their_speeds = speeds[theirs][1:]
    ratios = [our_speed / their_speed for our_speed, their_speed in zip(our_speeds, their_speeds)]
    return {
        "tokens_per_sec": median_and_range(our_speeds),
        "transformers_tokens_per_sec": median_and_range(their_speeds),
        "ratio": median_and_range(ratios),
        "same_text": texts[ours] == texts[theirs],
    }


# -----------------------------------------------------------------------------
# --suite

def run_suite(path, device_type):
    """
    Runs the rows of SUITE that the file does not hold yet. Each has a process of its own, so that
    one out of memory does not take the others with it. device_type: of --device-type, "" = the best
    there is.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    records = []
    if os.path.exists(path):
        records, _ = read_json_lines(path)
        # Without the line that a kill has cut short: the next one would be written behind it.
        replace_file(path, "".join(json.dumps(record) + "\n" for record in records))
    done = {record["flags"] for record in records}
    for flags in SUITE:
        if flags in done:
            continue
        new_records = run_row(flags, device_type)
        records += new_records
        with open(path, "a") as f:  # at once: a suite that is interrupted goes on from here
            for record in new_records:
                f.write(json.dumps(record) + "\n")
                json_line(record)

    failed = [record["flags"] for record in records if "failed" in record]
    json_line({"bench": "suite", "rows": len(SUITE), "failed": failed, "path": path})
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(SUITE)} rows failed, {path} says why; delete their lines there "
            f"to run them again: {'; '.join(failed)}")


def run_row(flags, device_type):
    """The records of `python -m scripts.bench FLAGS`; if it fails, the last one says why."""
    command = [sys.executable, "-m", "scripts.bench", *flags.split()]
    if device_type:
        command.append(f"--device-type={device_type}")
    process = subprocess.run(command, capture_output=True, text=True)
    records = []
    for line in process.stdout.splitlines():
        if line.startswith("{"):
            records.append({"flags": flags, **json.loads(line)})
    if process.returncode:
        # The end of stderr is enough for the error and its traceback.
        records.append({"flags": flags, "failed": process.stderr.strip()[-2000:]})
    return records


# -----------------------------------------------------------------------------
# Command line

def parse_arguments(argv):
    parser = ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--what", default="stage1,stage2,generate", help=f"of {', '.join(MEASUREMENTS)}")
    flag("--suite", default="", help="FILE.jsonl: run the rows of SUITE it lacks, nothing else; of "
         "the other flags, --device-type counts")
    # Runtime
    flag("--device-type", default="", help="cuda, mps or cpu; empty = the best there is")
    flag("--dtype", default="auto", help="compute dtype: auto, bfloat16, float32")
    flag("--compile", default="auto", choices=["auto", "yes", "no"],
         help="torch.compile for training steps; auto: on CUDA where a compiler is found")
    flag("--repeats", type=positive_int, default=7, help="timed steps, of which the median counts")
    # Model
    flag("--preset", default="nano", choices=sorted(PRESETS), help="sizes of the model")
    flag("--mode", default="", help="image mode; empty = the first of the preset or checkpoint")
    # Training steps and memory
    flag("--batch", type=positive_int, default=32, help="rows")
    flag("--seq", type=positive_int, default=72, help="decoder positions of a row, pages included")
    flag("--pack", type=positive_int, default=1, help="samples in a row, each with a page")
    flag("--optimizer", default="muon", choices=["muon", "adamw"], help="of the training step")
    flag("--recompute", action="store_true", help="activation checkpointing")
    # Generation
    flag("--new-tokens", type=integer(2), default=200, help="tokens generated per page, at least 2")
    flag("--checkpoint", default="checkpoints/stage2", help="for transformers: whose weights")
    flag("--rounds", type=positive_int, default=5, help="for transformers: rounds of both in turn")
    # Data
    flag("--workers", type=integer(0, off=-1), default=0,
         help="loader processes; -1 = all cores but two, at most 24")
    flag("--pages", type=positive_int, default=100, help="dense pages to render per size")
    flag("--steps", type=positive_int, default=20,
         help="batches to load, and training steps on them")
    args = parser.parse_args(argv)

    for what in args.what.split(","):
        if what not in MEASUREMENTS:
            raise ValueError(f"--what={what}: must be of {', '.join(MEASUREMENTS)}")
    return args


def measure(what, args, device, peak):
    """Yields the records of one of MEASUREMENTS."""
    if what == "transformers":  # the checkpoint says which model, not the preset
        yield from measure_transformers(args, device)
        return
    preset_modes = PRESETS[args.preset]().modes
    mode = get_mode(args.mode or preset_modes[0])
    cfg = make_config(args, mode)
    common = {"preset": args.preset, "mode": mode.name, "batch": args.batch}
    if what in ("stage1", "stage2"):
        yield common | measure_training(args, cfg, device, mode, what, peak)
    elif what == "generate":
        yield common | measure_generation(args, cfg, device, mode)
    elif what == "data":
        yield common | measure_data(args, cfg, device, mode)
    elif what == "syncs":
        yield common | measure_syncs(args, cfg, device, mode)
    elif what == "memory":
        for stage in ("stage1", "stage2"):
            yield common | measure_memory(args, cfg, mode, stage)
        yield common | measure_generation_memory(args, cfg, mode)


def main(argv=None):
    args = parse_arguments(argv)
    if args.suite:
        run_suite(args.suite, args.device_type)
        return
    device = compute_init(args.device_type)
    dtype = choose_dtype(device, args.dtype)
    peak = matmul_rate(device, dtype)
    machine = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "dtype": dtype_name(dtype),
        "matmul_tflops": peak / 1e12,
        "torch": torch.__version__,
        "commit": git_commit(),
    }
    for what in args.what.split(","):
        for record in measure(what, args, device, peak):
            json_line({"bench": what} | machine | record)


if __name__ == "__main__":
    run_main(main)
