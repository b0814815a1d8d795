"""
A training run on disk: checkpoints/<model-tag>/ with its settings (run.json), its numbers
(metrics.jsonl), what it has counted so far (LoopState, inside every checkpoint) and its curves.
"""
import fcntl
import json
import math
import os
from dataclasses import asdict, dataclass, field

import torch

from nanochat import checkpoint as ckpt
from nanochat.common import (
    barrier, dist_info, git_commit, init_wandb, is_master, print0, read_json, replace_file,
    write_json)

# Flags that change nothing in the result, so they may differ when a run is resumed.
NOT_PART_OF_THE_RUN = {"resume", "run", "workers", "checkpoints", "device_type"}


@dataclass
class LoopState:
    """What a run has counted so far. It travels in every checkpoint's meta.json."""
    seconds: float = 0.0          # spent in steps, without evaluation, saving and compiling
    waited: float = 0.0           # of these, this rank waiting for data
    timed_images: int = 0         # seen in those seconds, over all ranks
    timed_flops: float = 0.0      # spent in those seconds, over all ranks
    flops: float = 0.0            # all of them, steps that compiled included
    best: float = None            # lowest validation loss, nats per token
    best_step: int = None
    best_saved: float = None      # the same among the steps that were saved
    best_saved_step: int = None
    last_eval: dict = None        # figures of the last evaluation
    data: dict = field(default_factory=dict)  # samples counted so far: bad, clipped, drawn/<task>
    streams: list = None          # for each rank {worker: where its stream goes on}


class Run:
    """
    The run folder of one stage. `start` is the step it resumes from, None for a new run.

    Nothing is written before `begin`, so a mistake in the flags or the data leaves no folder that
    blocks the corrected command. Raises FileExistsError if the folder holds a run and --resume is
    not given, ValueError if it holds one under other flags.
    """
    def __init__(self, args, stage):
        if args.model_tag in ("", ".", "..") or os.path.basename(args.model_tag) != args.model_tag:
            raise ValueError(f"--model-tag={args.model_tag}: must be a plain folder name, "
                             f"it is created below --checkpoints")
        self.args = args
        self.stage = stage
        self.folder = os.path.join(args.checkpoints, args.model_tag)
        self.state = LoopState()
        self.config = {k: v for k, v in vars(args).items() if k not in NOT_PART_OF_THE_RUN}
        self.config_path = os.path.join(self.folder, "run.json")
        self.metrics_path = os.path.join(self.folder, "metrics.jsonl")
        self.limit = 60 * args.max_minutes if args.max_minutes > 0 else math.inf  # seconds of steps

        steps = ckpt.steps_of(self.folder)
        if (steps or os.path.exists(self.config_path)) and not args.resume:
            raise FileExistsError(f"{self.folder} holds a run: --resume continues it, another "
                                  f"--model-tag keeps it, or delete it")
        self.check_same_config()
        self.start = steps[-1] if steps else None
        if args.resume and not steps:
            print0(f"{self.folder} has no whole checkpoint: starting from the beginning")
        barrier()  # no rank writes before every rank has looked

    def check_same_config(self):
        if not os.path.exists(self.config_path):
            return
        before = read_json(self.config_path)
        changed = []
        for key in sorted({*before, *self.config}):
            old = before.get(key)
            new = self.config.get(key)
            if old != new:
                changed.append(f"--{key.replace('_', '-')} was {old!r}, now {new!r}")
        if changed:
            raise ValueError(f"cannot resume {self.folder} under a changed config: "
                             f"{'; '.join(changed)}")

    def load(self, model, optimizer, tokenizer, with_encoder=False):
        """
        Weights, optimizer and counts of the checkpoint at `start`, in place. with_encoder: the
        encoder alone, which stage 2 starts from, is written again if it is missing.
        """
        checkpoint = ckpt.checkpoint_dir(self.folder, self.start)
        meta = ckpt.read_record(checkpoint, ckpt.META, keys=["tokenizer", "loop_state"])
        if meta["tokenizer"] != tokenizer.fingerprint():
            raise ValueError(f"cannot resume {self.folder}: it was trained with another tokenizer "
                             f"than the one at --tokenizer now; ids mean nothing to another one")
        ckpt.load_training_state(self.folder, self.start, model, optimizer)
        self.state = LoopState(**meta.pop("loop_state"))
        if with_encoder and self.start not in ckpt.steps_of(self.folder, "deepencoder"):
            ckpt.save_encoder(self.folder, self.start, model, meta)
        print0(f"resuming {self.folder} at step {self.start}")

    def streams_of(self, rank):
        """{worker: where its stream goes on} of this rank; empty for a new run."""
        return dict(self.state.streams[rank]) if self.state.streams else {}

    def begin(self, tokenizer, mode):
        """Creates the folder and opens the logs: from here on the run exists."""
        self.meta = {
            "stage": self.stage,
            "user_config": vars(self.args),
            "mode": mode.name,
            "world_size": dist_info()[2],
            "commit": git_commit(),
            "tokenizer": tokenizer.fingerprint(),
            "torch": torch.__version__,
        }
        if is_master():
            os.makedirs(self.folder, exist_ok=True)
            self.lock()
            ckpt.clear_leftovers(self.folder)
            replace_file(self.config_path, json.dumps(self.config, indent=1))
            self.forget_lost_steps()
        barrier()
        self.wandb = init_wandb(self.args.run, vars(self.args))

    def lock(self):
        """One process writes into a run folder. The lock goes with the process, however it ends."""
        self.lock_file = open(os.path.join(self.folder, ".lock"), "w")
        try:
            fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.folder} is being trained by another process: wait for it, "
                             f"stop it, or use another --model-tag") from None

    def forget_lost_steps(self):
        """metrics.jsonl without what was logged after the checkpoint that the run resumes from."""
        kept = []
        if self.start is not None and os.path.exists(self.metrics_path):
            for record in self.metrics():
                # At the checkpoint's own step the evaluation was logged before it was saved, the
                # training step after.
                at_checkpoint = record["step"] == self.start and "train/loss" not in record
                if record["step"] < self.start or at_checkpoint:
                    kept.append(record)
        replace_file(self.metrics_path, "".join(json.dumps(r) + "\n" for r in kept))

    def metrics(self):
        """All records of metrics.jsonl. A killed run may have left half a line at its end."""
        with open(self.metrics_path) as f:
            return [json.loads(line) for line in f if line.endswith("\n")]

    def progress(self, step):
        """Share of the horizon that is done, in steps or in minutes, whichever is further."""
        return max(step / self.args.num_iterations, self.state.seconds / self.limit)

    def record(self, step, figures):
        """Appends figures by name to metrics.jsonl and W&B."""
        if not is_master():
            return
        record = {"step": step, **figures}
        with open(self.metrics_path, "a") as f:
            f.write(json.dumps(record) + "\n")
        self.wandb.log(record)

    def save(self, step, model, tokenizer, optimizer, with_encoder):
        """A checkpoint of this step; the last two and the best are kept. Every rank calls this."""
        state = self.state
        val_loss = state.last_eval["val/loss"]
        if state.best_saved is None or val_loss < state.best_saved:
            state.best_saved = val_loss
            state.best_saved_step = step
        meta = {**self.meta, "loop_state": asdict(state)}
        if with_encoder and is_master():
            # Before the checkpoint: a kill between the two then leaves one encoder too many, which
            # pruning removes, and never a checkpoint whose encoder is missing.
            ckpt.save_encoder(self.folder, step, model, self.meta)
        ckpt.save_checkpoint(self.folder, step, model, tokenizer, optimizer, meta)
        if is_master():
            keep = {*ckpt.steps_of(self.folder)[-2:], state.best_saved_step}
            ckpt.prune(self.folder, keep)
            ckpt.prune(self.folder, keep, "deepencoder")

    def finish(self, step, model, peak_flops):
        """Curves and summary.json. -> summary, the script's last line."""
        state = self.state
        world_size = dist_info()[2]
        seconds = max(state.seconds, 1e-9)  # a run may end before its first counted step
        summary = {
            "stage": self.stage,
            "steps": step,
            "minutes": round(state.seconds / 60, 2),
            "images_per_sec": state.timed_images / seconds,
            "mfu": state.timed_flops / world_size / seconds / peak_flops,
            "data_wait": state.waited / seconds,
            "params": model.num_params(),
            "min_val_loss": state.best,
            "min_val_loss_step": state.best_step,
            **state.last_eval,
            "data": state.data,
            "commit": self.meta["commit"],
            "seed": self.args.seed,
        }
        curves = os.path.join(self.folder, "curves.png")
        if is_master():
            draw_curves(self.metrics(), curves)
            write_json(os.path.join(self.folder, "summary.json"), summary)
            self.lock_file.close()
        self.wandb.finish()
        print0(f"min val loss {state.best:.4f} at step {state.best_step}; curves in {curves}")
        return summary


def draw_curves(records, path):
    """Loss, gap, cosines, 1-NED and local accuracy over steps, as a PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    names = dict.fromkeys(name for record in records for name in record)
    accuracies = ["val/one_minus_ned", "vision/local_accuracy"]  # the second not in every run
    panels = [
        ("loss, nats per token", ["train/loss", "val/loss"]),
        ("gap, nats per character", ["vision/gap"]),
        ("cosine between pages", [n for n in names if n.startswith("vision/cosine_")]),
        ("accuracy on fixed pages", [name for name in accuracies if name in names]),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.5))
    for axis, (title, curves) in zip(axes, panels):
        for name in curves:
            steps = [record["step"] for record in records if name in record]
            values = [record[name] for record in records if name in record]
            axis.plot(steps, values, label=name)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
