"""
Proves that training and generation never mix devices and never ask a device for a value on the way:
the model is on torch's meta device, whose tensors have shapes but no values, while batches come
from the host, as they do on a GPU. An .item(), a forgotten .to(device) or a mask that is counted
raises there.

python -m pytest tests/test_meta.py
"""
import pytest
import torch

from nanochat.batch import collate
from nanochat.common import to_device
from nanochat.dataloader import Sampler, ahead
from nanochat.engine import Engine, LiveRows, TokenChoice
from nanochat.heads import LABELS, WithHeads, loss_weights, make_heads
from nanochat.image_modes import MODES, Mode
from nanochat.loop import accumulate_gradients
from nanochat.model import DeepseekOCR
from nanochat.optim import Optimizer

META = torch.device("meta")
PLAIN = MODES["64px"]
TILED = Mode("tiled", 64, tile=32, max_tiles=9)


@pytest.fixture
def meta_model(cfg):
    with META:
        model = DeepseekOCR(cfg)
    model.dtype = torch.bfloat16
    return model


def batch_of(conversations, tokenizer, mode=PLAIN, pack=0):
    sampler = Sampler(conversations, tokenizer, mode, 32, max_tokens=256, pack=pack, labels=LABELS)
    batch = collate([sampler[i] for i in range(len(conversations))], pack, max_images=16)
    return next(ahead([batch], META))


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_training_step(meta_model, tokenizer, pages, chats, monkeypatch, kind, chunked):
    """Pages and text, packed rows, tiles, and text alone, in one step of four micro-batches."""
    if chunked:
        logits = 20 * meta_model.cfg.gpt.vocab_size
        monkeypatch.setattr("nanochat.model.LOSS_CHUNK_CUDA", logits)
    batches = [
        batch_of([*pages, *chats], tokenizer),
        batch_of([*pages, *chats], tokenizer, pack=256),
        batch_of(pages[:2], tokenizer, mode=TILED),
        batch_of(chats, tokenizer),
    ]
    model = meta_model.train()
    model.recompute(chunked)
    heads = make_heads(model, 1.0, 0.3)
    net = WithHeads(model, heads)
    weights = loss_weights(1.0, 0.3)
    optimizer = Optimizer(model, kind, lr=1e-3, dtype=model.dtype, heads=heads)
    for _ in range(2):  # the optimizer's state is there from the second step on
        losses, flops = accumulate_gradients(net, batches, weights)
        assert len(losses) == 5
        norm = optimizer.clip_grad_norm(1.0)
        assert losses["text"].device == norm.device == META and flops > 0
        optimizer.step(1.0)
        optimizer.zero_grad()


@pytest.mark.parametrize("mode", [PLAIN, TILED])
@torch.inference_mode()
def test_generation(meta_model, tokenizer, pages, chats, mode):
    model = meta_model.eval()
    engine = Engine(model, tokenizer, mode)
    batch, lengths = engine.prompt_batch([*pages[:2], chats[0]])
    choose = TokenChoice(engine.banned, None, temperature=0.0, seed=0, device=META)
    live = LiveRows(model, choose, engine.end, lengths, max_new_tokens=100)
    live.prefill(batch)
    for n in range(1, 100):
        live.cache.reserve(max(lengths) + n)
        live.step()
    assert live.token.device == META and live.token.shape == (3,)


def test_the_meta_device_finds_what_it_should(meta_model, tokenizer, chats):
    """The checks of this file can fail."""
    batch = batch_of(chats, tokenizer)
    with pytest.raises(RuntimeError, match="meta"):
        meta_model(batch)["text"][0].item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        meta_model(batch.to(META))  # placeholders are looked for on the device


class OnAGPU:
    """Stands in for a CUDA tensor, which cannot be pinned."""
    device = torch.device("cuda")

    def pin_memory(self):
        raise RuntimeError("cannot pin 'torch.cuda.LongTensor' only dense CPU tensors can be pinned")

    def to(self, device, non_blocking):
        return self


def test_what_is_on_the_gpu_already_is_not_pinned():
    """In validation the whole batch is on the device; in a training step its ids are not."""
    tensor = OnAGPU()
    assert to_device(tensor, torch.device("cuda")) is tensor
