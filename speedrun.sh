#!/usr/bin/env bash
# The main job: from nothing to a model that reads pages it has never seen.
#
#   bash speedrun.sh           nano: two CPU cores, no GPU, no hub, about 20 minutes (the default everywhere)
#   bash speedrun.sh full      the published sizes, with the hub's weights and data sets, on a GPU node
#
# Every stage that is done is skipped and a stage that was cut short goes on where it was: run it again after any interruption.
# PYTHON=... uses an environment that stands; TORCH_INDEX_URL=... chooses torch's build; WANDB_RUN=name logs to W&B;
# CHECKPOINTS=... writes elsewhere than ./checkpoints.
set -euo pipefail
cd "$(dirname "$0")"
STARTED=$(date +%s)
KIND=${1:-nano}
RUN=${WANDB_RUN:-dummy}
OUT=${CHECKPOINTS:-checkpoints}

case "$KIND" in
nano) ;;
full)
    echo "error: speedrun.sh full needs a CUDA GPU and the Hugging Face hub (published weights and data sets); its recipe is not" \
         "in this version yet. Use: bash speedrun.sh nano" >&2
    exit 1 ;;
*)  echo "error: unknown kind '$KIND': use nano or full" >&2
    exit 1 ;;
esac

. ./setup_env.sh

resume() {  # --resume when the run folder $1 is there
    if [ -e "$OUT/$1/run.json" ]; then echo --resume; fi
}

echo "== tokenizer"
[ -e "$OUT/tokenizer/tokenizer.json" ] || "$PYTHON" -m scripts.tok_train --out "$OUT/tokenizer"

echo "== stage 1: the encoder learns to read"
"$PYTHON" -m scripts.vis_tok_train --checkpoints "$OUT" --tokenizer "$OUT/tokenizer" --run "$RUN" $(resume stage1)

echo "== stage 2: a fresh decoder on the frozen SAM"
"$PYTHON" -m scripts.vis_mid_train --checkpoints "$OUT" --encoder "$OUT/stage1" --run "$RUN" $(resume stage2)

echo "== evaluation"
"$PYTHON" -m scripts.vision_eval --checkpoint "$OUT/stage2" --task heldout,heldout_words,random_chars --out "$OUT/stage2/eval"
"$PYTHON" -m scripts.speedrun_report --checkpoints "$OUT" --started "$STARTED"
