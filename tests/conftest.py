"""
What several test files share: no network, one thread, a small tokenizer, a tiny model and batches
for it.
"""

import multiprocessing
import os

# Before torch is imported, and for child processes
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", OMP_NUM_THREADS="1")
os.environ.pop("NANOCHAT_TRACEBACK", None)

import pytest
import torch
import torch.distributed as dist

from nanochat import config
from nanochat.batch import collate
from nanochat.dataloader import Sampler
from nanochat.image_modes import MODES
from nanochat.reader import NanoDeepseekOCR
from nanochat.tokenizer import Tokenizer
from scripts.tok_train import training_text
from tasks.synthchat import SynthChat
from tasks.synthdoc import SynthDoc

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(training_text(50_000, seed=0), 300).save(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir):
    return Tokenizer.load(tokenizer_dir)


@pytest.fixture
def cfg(tokenizer):
    cfg = config.tiny()
    cfg.gpt.vocab_size = tokenizer.get_vocab_size()
    cfg.image_token_id = tokenizer.image_token_id
    return cfg


@pytest.fixture
def make_model(cfg):
    """
    A function seed -> tiny model. A fresh model says the same whatever it sees, since lm_head and
    c_proj start at zero and the projector's share is small. So these are drawn at random here, and
    every input reaches every output.
    """
    def make(seed=0, cfg=cfg):
        model = NanoDeepseekOCR(cfg).init_weights(seed)
        for name, p in model.gpt.named_parameters():
            starts_at_zero = "c_proj" in name or "lm_head" in name
            if starts_at_zero:
                torch.nn.init.normal_(p, std=p.size(1) ** -0.5)
        return model
    return make


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture(scope="session")
def pages():
    """Ten pages of 64 px, as conversations."""
    return list(SynthDoc("heldout", 10, image_size=64, chars=(10, 24)))


@pytest.fixture(scope="session")
def chats():
    """Ten text-only conversations."""
    return list(SynthChat("train", 10))


@pytest.fixture
def make_batch(tokenizer, cfg):
    """A function conversations -> Batch."""
    def make(conversations, mode=MODES["64px"]):
        sampler = Sampler(conversations, tokenizer, mode, cfg.token_stride, max_tokens=256)
        return collate([sampler[i] for i in range(len(conversations))])
    return make


def on_a_rank(rank, world, rendezvous, function, args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    if world > 1:
        dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=world)
    function(rank, world, *args)


@pytest.fixture
def run_ranks(tmp_path):
    """A function (world, function, *args): calls function(rank, world, *args) on gloo ranks."""
    def run(world, function, *args):
        # Ranks that found each other by this file before would be waited for.
        (tmp_path / f"rendezvous_{world}").unlink(missing_ok=True)
        processes = []
        for rank in range(world):
            # Forked: starting torch anew would take seconds.
            process = multiprocessing.get_context("fork").Process(
                target=on_a_rank,
                args=(rank, world, tmp_path / f"rendezvous_{world}", function, args))
            process.start()
            processes.append(process)
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * world
    return run
