"""
Proves that a change made for speed or clarity changes no number: 20 eager fp32 steps of the tiny
model on fixed random input give the losses below to 1e-5, as they did before. A change that is
meant to alter the mathematics prints new ones: python -m tests.test_golden

python -m pytest tests/test_golden.py
"""
import pytest
import torch

from nanochat import config
from nanochat.batch import Batch
from nanochat.image_modes import MODES, plan
from nanochat.model import DeepseekOCR
from nanochat.optim import Optimizer

GOLDEN = [
    5.7037816, 5.6979814, 5.692368, 5.6842089, 5.6838703, 5.6768041, 5.6670775, 5.6636462, 5.659812,
    5.6476412, 5.6448426, 5.6340666, 5.6346736, 5.6262832, 5.6195707, 5.6066952, 5.6008368,
    5.5949802, 5.5908461, 5.5797548]


def random_batch(cfg, rng):
    """8 rows: two tokens, an image of noise, and random text that is supervised."""
    p = plan(MODES["64px"], 64, 64, cfg.token_stride)
    text_starts = 2 + p.positions
    ids = torch.randint(20, (8, 40), generator=rng)
    ids[:, 2:text_starts] = cfg.image_token_id
    targets = ids.roll(-1, 1)
    targets[:, :text_starts] = -1
    targets[:, -1] = -1
    pixels = torch.randint(256, (8, 3, 64, 64), generator=rng, dtype=torch.uint8)
    return Batch(ids, targets, {64: pixels}, [p] * 8, [p.positions] * 8)


def losses():
    torch.set_num_threads(1)
    cfg = config.tiny()
    cfg.gpt.vocab_size = 300
    cfg.image_token_id = 299
    model = DeepseekOCR(cfg).init_weights(0).train()
    optimizer = Optimizer(model, "muon", lr=5e-4, matrix_lr=0.001)
    rng = torch.Generator().manual_seed(0)
    found = []
    for _ in range(20):
        batch = random_batch(cfg, rng)
        loss, count = model(batch)["text"]
        loss = loss / count
        loss.backward()
        optimizer.clip_grad_norm(1.0)
        optimizer.step(1.0)
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_golden_losses():
    assert losses() == pytest.approx(GOLDEN, abs=1e-5)


if __name__ == "__main__":
    print([round(x, 7) for x in losses()])
