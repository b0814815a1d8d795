"""
Kills a tiny training run again and again, resumes it, and compares what it leaves with the run that
nobody killed: weights, optimizer, counts, metrics.jsonl, encoder folders, the listing of files.

    python -m tests.kill_campaign                 # 6 kills, a minute
    KILLS=1000 python -m tests.kill_campaign      # hours; --seed=N for other kills

A chain is one run that is killed one to four times. Half of the kills come at a random moment, by
SIGKILL, SIGTERM or SIGINT. The others are aimed: SIGKILL just before or after the n-th call that
changes or flushes a file, or in the middle of a line of metrics.jsonl. Each chain draws a variant:
stage 1 or 2, loader processes, packed rows, a stream of pages, two ranks, and is compared with an
unbroken run of that variant.

Of two ranks, an aimed kill takes rank 0, which writes the files; a random one takes either of them
or both. The other is then stopped, as torchrun does it.

Every run is a fork of this process, which has imported all and computed nothing, so that a start
takes no time. The last line is JSON; the exit status is 1 if anything differed.
"""
import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

import torch

from nanochat import common
from nanochat.run import Run
from nanochat.tokenizer import Tokenizer
from scripts import vis_mid_train, vis_tok_train
from scripts.tok_train import training_text
from tasks.synthdoc import SynthDoc
from tests.streamed_set import write_streamed_set

STEPS = 7
TRAIN = ["--dtype=float32", "--device-type=cpu", f"--num-iterations={STEPS}", "--warmup-steps=2",
         "--device-batch-size=4", "--eval-every=3", "--save-every=2", "--eval-pages=4"]
VARIANTS = {
    "stage1": [],
    "stage1 workers": ["--workers=1"],
    "stage1 packed": ["--pack=128", "--max-seq-len=64", "--total-batch-size=8"],
    "stage1 stream": ["--stream", "--pack=256", "--workers=2", "--total-batch-size=8",
                      "--bad-data=skip"],
    "stage1 ranks": ["--total-batch-size=8"],
    "stage1 ranks stream": ["--stream", "--workers=1", "--total-batch-size=8", "--bad-data=skip"],
    "stage2": [],
    "stage2 ranks": ["--total-batch-size=16"],  # two passes a step
}
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# Exit statuses of what was killed; 130: Ctrl-C as the script answers it.
KILLED = (130, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)
LIMIT = 300  # seconds of a run
# What may differ from the unbroken run: clocks, and what is computed from them.
CLOCKS = {"train/dt", "train/tok_per_sec", "train/img_per_sec", "train/mfu", "train/total_seconds",
          "data/wait"}
CLOCKS_OF_STATE = {"seconds", "waited"}

# -----------------------------------------------------------------------------
# Events: calls by which a run changes or flushes files

class Events:
    """Counts them in this process, and kills it at one of them."""
    def __init__(self, kill_at=None, after=False):
        self.kill_at = kill_at
        self.after = after
        self.n = 0

    def install(self):
        self.pid = os.getpid()
        for name in ("rename", "replace", "fsync", "rmdir", "unlink", "mkdir"):
            setattr(os, name, self.counted(getattr(os, name)))
        Run.record = self.torn(Run.record)

    def counted(self, call):
        def counting(*args, **kwargs):
            if os.getpid() != self.pid:  # a worker of the loader, which is a fork
                return call(*args, **kwargs)
            now = self.n == self.kill_at
            self.n += 1
            if now and not self.after:
                die()
            result = call(*args, **kwargs)
            if now:
                die()
            return result
        return counting

    def torn(self, record):
        """Run.record, which as an event leaves half a line."""
        def recording(run, step, figures):
            now = self.n == self.kill_at
            self.n += 1
            if now:
                with open(run.metrics_path, "a") as f:
                    f.write(json.dumps({"step": step, **figures})[:40])
                die()
            record(run, step, figures)
        return recording


def die():
    os.kill(os.getpid(), signal.SIGKILL)


# -----------------------------------------------------------------------------
# Runs, each a fork for every rank

def start(main, flags, log, events, ranks=1):
    """Forks a run. The events are rank 0's. -> pids, a rank's at its place"""
    if ranks == 1:
        return [fork(main, flags, log, events, {})]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(ranks):
        torchrun = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        pids.append(fork(main, flags, log, events if rank == 0 else None, torchrun))
    return pids


def fork(main, flags, log, events, environment):
    pid = os.fork()
    if pid:
        return pid
    status = 70  # of an error that the script did not expect
    try:
        os.setsid()
        os.environ.update(environment)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if events:
            events.install()
        common.run_main(lambda: main(flags))
        status = 0
        if events:
            with open(log + ".events", "w") as f:
                f.write(str(events.n))
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def finish(pids, kill_after=None, kill_signal=None, victims=()):
    """
    Waits for a run, and sends its victims a signal after so many seconds. Once a rank has failed,
    the others are stopped. -> its status (< 0: of a signal); 0 if none has failed
    """
    begin = time.monotonic()
    running = list(pids)
    statuses = []  # of the ranks that were first to fail
    while running:
        ended = {}
        for pid in running:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                ended[pid] = os.waitstatus_to_exitcode(status)
        running = [pid for pid in running if pid not in ended]
        failed = [status for status in ended.values() if status]
        if failed and not statuses:
            statuses = failed
            for pid in running:
                os.kill(pid, signal.SIGTERM)
        seconds = time.monotonic() - begin
        if kill_after is not None and seconds > kill_after:
            for pid in set(victims) & set(running):
                os.kill(pid, kill_signal)
            kill_after = None
        if seconds > LIMIT:
            raise SystemExit(f"a run has not ended after {LIMIT} s: processes {running}")
        time.sleep(0.005)
    # A rank whose peer was killed ends with an error, perhaps in the same moment: the kill counts.
    by_kill = [status for status in statuses if status in KILLED]
    return (by_kill or statuses or [0])[0]


class Campaign:
    def __init__(self, folder, seed, variants):
        self.variants = variants
        self.folder = Path(folder)
        self.rng = random.Random(seed)
        self.kills = {"random": 0, "aimed": 0}
        self.differences = []
        self.unbroken = {}  # {variant: (its folder, seconds, events)}
        if any("stream" in variant for variant in variants):
            os.environ["HF_HOME"] = str(self.folder / "hub")  # read by the import that follows
            import datasets  # noqa: F401, so that the forks need not
        self.tokenizer = self.folder / "tokenizer"
        Tokenizer.train(training_text(30_000, seed=0), 280).save(self.tokenizer)
        self.streamed = self.folder / "streamed"
        if any("stream" in variant for variant in variants):
            # In a process of its own: pyarrow begins threads, which a fork would lack.
            log = self.folder / "pages.log"
            if finish([fork(self.write_pages, None, str(log), None, {})]):
                raise SystemExit(f"the pages were not written:\n{log.read_text()[-3000:]}")

    def write_pages(self, _):
        pages = SynthDoc("train", 1000, image_size=64, chars=(10, 12))
        write_streamed_set(self.streamed, pages, n_shards=4)

    def command(self, variant, name):
        """-> (main, flags) of a run of this variant in the folder of that name."""
        flags = [f"--checkpoints={self.folder}", f"--model-tag={name}", *TRAIN, *VARIANTS[variant]]
        if variant.startswith("stage1"):
            flags += ["--preset=tiny", f"--tokenizer={self.tokenizer}"]
            if "stream" in variant:
                flags += [f"--data=finevision:{self.streamed}/pages=3,synthchat=1"]
            else:
                flags += ["--chars=10-12"]
            return vis_tok_train.main, flags
        encoder, _, _ = self.run_unbroken("stage1")
        return vis_mid_train.main, [f"--encoder={encoder}", "--text-share=25", *flags]

    def run_unbroken(self, variant):
        if variant not in self.unbroken:
            name = "unbroken-" + variant.replace(" ", "-")
            main, flags = self.command(variant, name)
            log = str(self.folder / f"{name}.log")
            begin = time.monotonic()
            status = finish(start(main, flags, log, Events(), ranks_of(variant)))
            if status:
                raise SystemExit(f"the unbroken run failed:\n{Path(log).read_text()[-3000:]}")
            events = int(Path(log + ".events").read_text())
            self.unbroken[variant] = (self.folder / name, time.monotonic() - begin, events)
        return self.unbroken[variant]

    def chain(self, number, kills):
        """One run that is killed so many times, then goes on to its end, and is compared."""
        variant = self.rng.choice(self.variants)
        unbroken, seconds, events = self.run_unbroken(variant)
        name = f"chain-{number}"
        main, flags = self.command(variant, name)
        ranks = ranks_of(variant)
        log = str(self.folder / f"{name}.log")
        plan = []
        for attempt in range(kills):
            resume = ["--resume"] if attempt else []
            if self.rng.random() < 0.5:
                aim = Events(self.rng.randrange(events), after=self.rng.random() < 0.5)
                plan.append(f"aimed {aim.kill_at} {'after' if aim.after else 'before'}")
                status = finish(start(main, flags + resume, log, aim, ranks))
                self.kills["aimed"] += status < 0
            else:
                at = self.rng.uniform(0, seconds)
                which = self.rng.choice(SIGNALS)
                pids = start(main, flags + resume, log, Events(), ranks)
                victims = pids if self.rng.random() < 0.5 else [self.rng.choice(pids)]
                which_ranks = [pids.index(pid) for pid in victims]
                plan.append(f"{which.name} to ranks {which_ranks} after {at:.2f} s")
                status = finish(pids, at, which, victims)
                self.kills["random"] += status != 0
            if status not in (0, *KILLED):  # 0: it was faster than the kill
                self.differences.append(f"{name} ({variant}: {plan}): status {status}, see {log}")
                return
        status = finish(start(main, flags + ["--resume"], log, Events(), ranks))
        found = [f"status {status}"] if status else compare(unbroken, self.folder / name)
        if found:
            self.differences.append(f"{name} ({variant}: {plan}), see {log}: {found}")
        else:
            shutil.rmtree(self.folder / name)


def ranks_of(variant):
    return 2 if "ranks" in variant else 1


# -----------------------------------------------------------------------------
# Comparison

def compare(unbroken, folder):
    """What differs between two run folders, as a list of texts."""
    names = listing(unbroken)
    if names != listing(folder):
        return [f"files differ: {sorted(set(names) ^ set(listing(folder)))}"]
    found = []
    for name in names:
        a = unbroken / name
        b = folder / name
        if name.endswith((".safetensors", "config.json", "tokenizer.json")):
            same = a.read_bytes() == b.read_bytes()
        elif name == "metrics.jsonl":
            same = metrics_of(a) == metrics_of(b)
        elif name.endswith("meta.json"):
            same = meta_of(a) == meta_of(b)
        else:  # curves, and sums and summaries, which follow from the clocks
            same = True
        if not same:
            found.append(name)
    return found


def listing(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def metrics_of(path):
    records = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        records.append({name: v for name, v in record.items() if name not in CLOCKS})
    return records


def meta_of(path):
    meta = json.loads(path.read_text())
    meta.pop("user_config")  # has the folder's name, and --resume
    state = meta.get("loop_state", {})
    for name in CLOCKS_OF_STATE:
        state.pop(name, None)
    for name in CLOCKS & set(state.get("last_eval") or {}):
        state["last_eval"].pop(name)
    return meta


# -----------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--kills", type=int, default=int(os.environ.get("KILLS", 6)),
                        help="kills in all; default: KILLS of the environment, or 6")
    parser.add_argument("--seed", type=int, default=0, help="which kills")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="kinds of runs, with commas")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)

    folder = tempfile.mkdtemp(prefix="kills-")
    campaign = Campaign(folder, args.seed, args.variants.split(","))
    number = 0
    planned = 0
    begin = time.monotonic()
    while planned < args.kills:
        kills = min(campaign.rng.randint(1, 4), args.kills - planned)
        planned += kills
        campaign.chain(number, kills)
        number += 1
        if number % 10 == 0:
            print(f"{planned} kills planned in {number} chains: {campaign.kills} happened, "
                  f"{len(campaign.differences)} differences", flush=True)
    for difference in campaign.differences:
        print(difference)
    print(json.dumps({"chains": number, "planned": planned, "kills": campaign.kills,
                      "differences": len(campaign.differences),
                      "seconds": round(time.monotonic() - begin)}))
    if campaign.differences:
        print(f"what they left is in {folder}")
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
