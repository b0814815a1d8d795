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
    DummyWandb, barrier, check_wandb, gather, get_world_size, git_commit, init_wandb, is_master,
    print0, read_json_lines, read_record, replace_file, write_json)

# Flags that change nothing in the result, so they may differ when a run is resumed.
# (The tokenizer is compared by its fingerprint, wherever its folder is.)
NOT_PART_OF_THE_RUN = {"resume", "run", "workers", "checkpoints", "device_type", "tokenizer"}
# Flags that may differ too, since they only change rounding: the way out when memory runs out, or
# when a compiled kernel fails. `say_changes` prints what else they change.
ONLY_ROUNDING = {"device_batch_size", "recompute", "compile"}


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
    lost_steps: int = 0           # in a row, with a loss as of a run that has diverged
    streams: list = None          # for each rank {worker: where its stream goes on}


def earlier_config(args):
    """run.json of the run that --resume goes on with; {} for one that starts at the beginning."""
    folder = os.path.join(args.checkpoints, args.model_tag)
    path = os.path.join(folder, "run.json")
    # Without a checkpoint there is nothing to resume: a run that failed at once must not be tied to
    # the flags, or the data, that made it fail.
    if not args.resume or not ckpt.steps_of(folder) or not os.path.exists(path):
        return {}
    try:
        config = read_record(path, {"total_batch_size": int, "device_batch_size": int,
                                    "data_fingerprints": dict})
        for key in ("total_batch_size", "device_batch_size"):
            if config[key] <= 0:
                raise ValueError(f"{path}: {key} is {config[key]}")
        return config
    except ValueError as error:
        raise ValueError(f"{error}: delete it to resume without comparing the flags with those of "
                         f"the run, which each checkpoint's meta.json has too") from error


def samples_per_step(args):
    """Samples per optimizer step, over all ranks."""
    world_size = get_world_size()
    per_pass = args.device_batch_size * world_size
    total = args.total_batch_size
    if total == -1:
        # A run that is resumed with a smaller micro-batch keeps its steps as they were.
        total = earlier_config(args).get("total_batch_size", per_pass)
    if total % per_pass:
        raise ValueError(f"--total-batch-size={total} is not a multiple of one pass: "
                         f"{args.device_batch_size} x {world_size} ranks = {per_pass}")
    return total


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
        self.config["total_batch_size"] = samples_per_step(args)
        self.config_path = os.path.join(self.folder, "run.json")
        self.metrics_path = os.path.join(self.folder, "metrics.jsonl")
        self.limit = 60 * args.max_minutes if args.max_minutes > 0 else math.inf  # seconds of steps

        steps = ckpt.steps_of(self.folder)
        if steps and not args.resume:
            raise FileExistsError(f"{self.folder} holds a run: --resume continues it, another "
                                  f"--model-tag keeps it, or delete it")
        # What a killed first save leaves is an encoder, too; but then the run has not ended.
        ended = os.path.exists(os.path.join(self.folder, "summary.json"))
        begun = os.path.exists(self.config_path)
        if ckpt.steps_of(self.folder, "deepencoder") and not steps and (ended or not begun):
            raise FileExistsError(f"{self.folder} holds encoders without their models, which a run "
                                  f"there would delete: use another --model-tag, or move them")
        check_wandb(args.run)
        self.earlier = earlier_config(args)
        if self.earlier:
            self.check_same_config()
        self.start = steps[-1] if steps else None
        if not steps and (args.resume or begun):
            print0(f"{self.folder} has no whole checkpoint: starting from the beginning")
        barrier()  # no rank writes before every rank has looked

    def check_same_config(self):
        before = dict(self.earlier)
        before.pop("data_fingerprints", None)  # compared by `check_data`
        changed = []
        for key in sorted({*before, *self.config} - ONLY_ROUNDING):
            old = before.get(key)
            new = self.config.get(key)
            if old != new:
                changed.append(f"--{key.replace('_', '-')} was {old!r}, now {new!r}")
        if changed:
            raise ValueError(f"cannot resume {self.folder} under a changed config: "
                             f"{'; '.join(changed)}. Give the values that it began with, or begin "
                             f"another run with another --model-tag")
        self.say_changes(before)

    def say_changes(self, before):
        """Says what a resumed run changes by the flags that may differ."""
        old = before.get("device_batch_size")
        new = self.args.device_batch_size
        if old != new:
            # The state of a stream is that of its workers, which take turns by micro-batches.
            if self.args.stream:
                raise ValueError(f"cannot resume {self.folder}: --device-batch-size was {old}, now "
                                 f"{new}, and a stream (--stream) would go on with other samples; "
                                 f"use --recompute for less memory")
            print0(f"NOTE: --device-batch-size was {old}, now {new}. Every step still has the same "
                   f"{self.config['total_batch_size']} samples, so only rounding differs")
        for flag in ("recompute", "compile"):
            new = getattr(self.args, flag)
            if before.get(flag) != new:
                print0(f"NOTE: --{flag} was {before.get(flag)}, now {new}: the same numbers up to "
                       f"rounding")

    def check_data(self, fingerprints):
        """
        fingerprints: {data set: text that tells its state}. ValueError if they are others than
        those that a resumed run began with: its steps would not be those of the unbroken run.
        """
        self.config["data_fingerprints"] = fingerprints
        if not self.earlier:
            return
        before = self.earlier["data_fingerprints"]
        changed = []
        for name in sorted({*before, *fingerprints}):
            old = before.get(name)
            new = fingerprints.get(name)
            if old != new:
                changed.append(f"{name} was {old}, now {new}")
        if changed:
            raise ValueError(f"cannot resume {self.folder}: its data have changed since it began "
                             f"({'; '.join(changed)}): put them back as they were, or begin "
                             f"another run with another --model-tag")

    def load(self, model, optimizer, tokenizer, with_encoder=False):
        """
        Weights, optimizer and counts of the checkpoint at `start`, in place. with_encoder: the
        encoder alone, which stage 2 starts from, is written again if it is missing.
        """
        checkpoint = ckpt.checkpoint_dir(self.folder, self.start)
        needed = ["tokenizer", "loop_state", "world_size"]
        meta = ckpt.read_record(checkpoint, ckpt.META, needed)
        if meta["tokenizer"] != tokenizer.fingerprint():
            raise ValueError(f"cannot resume {self.folder}: it was trained with another tokenizer "
                             f"than the one at --tokenizer now; ids mean nothing to another one")
        print0(f"loading {checkpoint}")
        ckpt.load_training_state(self.folder, self.start, model, optimizer,
                                 allow_other_world_size=not self.args.stream)
        world_size = get_world_size()
        if meta["world_size"] != world_size:
            print0(f"NOTE: it was written by {meta['world_size']} processes, now there are "
                   f"{world_size}. Every step has the same samples, so only rounding differs")
        try:
            self.state = LoopState(**meta.pop("loop_state"))
        except TypeError as error:  # another version's, or none at all
            path = os.path.join(checkpoint, ckpt.META)
            raise ValueError(f"{path}: loop_state has other keys than this version's "
                             f"({error}); {ckpt.way_out(checkpoint)}") from error
        if with_encoder and self.start not in ckpt.steps_of(self.folder, "deepencoder"):
            ckpt.save_encoder(self.folder, self.start, model, meta)
        print0(f"resuming {self.folder} at step {self.start}")

    def streams_of(self, rank):
        """{worker: where its stream goes on} of this rank; empty for a new run."""
        return dict(self.state.streams[rank]) if self.state.streams else {}

    def begin(self, tokenizer, mode):
        """Creates the folder and opens the logs: from here on the run exists."""
        self.wandb = DummyWandb()
        self.log_vocab = math.log(tokenizer.get_vocab_size())  # loss of a uniform guess, nats
        self.meta = {
            "stage": self.stage,
            "user_config": vars(self.args),
            "mode": mode.name,
            "world_size": get_world_size(),
            "commit": git_commit(),
            "tokenizer": tokenizer.fingerprint(),
            "torch": torch.__version__,
        }
        if is_master():
            os.makedirs(self.folder, exist_ok=True)
            self.lock()
            self.wandb = init_wandb(self.args.run, vars(self.args))  # may fail: no key, no network
            ckpt.clear_leftovers(self.folder)
            self.prune()  # a kill may have cut it short
            replace_file(self.config_path, json.dumps(self.config, indent=1))
            self.forget_lost_steps()
        barrier()

    def lock(self):
        """One process writes into a run folder. The lock goes with the process, however it ends."""
        self.lock_file = open(os.path.join(self.folder, ".lock"), "w")
        # The loader's workers are forks, which outlive a killed run by seconds. With the lock they
        # would keep it from being resumed.
        os.register_at_fork(after_in_child=self.lock_file.close)
        try:
            fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.folder} is being trained by another process: wait for it, "
                             f"stop it, or use another --model-tag") from None
        except OSError as error:  # some network file systems have no locks
            print0(f"NOTE: {self.folder} cannot be locked ({error}): nothing here would notice a "
                   f"second run that writes into it, so start none")

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
        """All records of metrics.jsonl; damaged lines are skipped, and their number is printed."""
        records, damaged = read_json_lines(self.metrics_path)
        sound = [record for record in records if isinstance(record.get("step"), int)]
        damaged += len(records) - len(sound)
        if damaged:
            print0(f"NOTE: {damaged} damaged lines of {self.metrics_path} are left out")
        return sound

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

    def save(self, step, model, tokenizer, optimizer, streams, with_encoder=False):
        """
        A checkpoint of this step; the last two and the best are kept. Every rank calls this.
        streams: {worker: where its stream goes on} of this rank; with_encoder: the encoder alone
        as well, for stage 2.
        """
        state = self.state
        state.streams = gather(streams) if streams else None
        val_loss = state.last_eval["val/loss"]
        if state.best_saved is None or val_loss < state.best_saved:
            state.best_saved = val_loss
            state.best_saved_step = step
        meta = {**self.meta, "loop_state": asdict(state)}
        print0(f"step {step:05d} | saving to {self.folder}")
        if with_encoder and is_master():
            # Before the checkpoint: a kill between the two then leaves one encoder too many, which
            # pruning removes, and never a checkpoint whose encoder is missing.
            ckpt.save_encoder(self.folder, step, model, self.meta)
        ckpt.save_checkpoint(self.folder, step, model, tokenizer, optimizer, meta)
        if is_master():
            self.prune()

    def prune(self):
        """Deletes all checkpoints but the last two and the best."""
        keep = {*ckpt.steps_of(self.folder)[-2:], self.state.best_saved_step}
        ckpt.prune(self.folder, keep)
        ckpt.prune(self.folder, keep, "deepencoder")

    def finish(self, step, model, peak_flops):
        """Curves and summary.json. -> summary, the script's last line."""
        state = self.state
        world_size = get_world_size()
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
    # The heads' accuracies are not in every run.
    accuracies = ["val/one_minus_ned", "vision/local_accuracy", "vision/place_accuracy"]
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
