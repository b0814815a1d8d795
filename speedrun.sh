#!/usr/bin/env bash
# The main job: from nothing to a model that reads pages it has never seen.
#
#   bash speedrun.sh           nano: two CPU cores, no GPU, no hub, about 14 minutes (the default everywhere)
#   bash speedrun.sh small     dense pages at the paper's geometry: one CUDA GPU, no hub, 16 minutes of training
#   bash speedrun.sh gpu       the same after every benchmark of scripts/bench.py: all the figures that a GPU is asked for
#   bash speedrun.sh full      the published sizes, with the hub's weights and data sets, on a GPU node
#
# Every stage that is done is skipped and a stage that was cut short goes on where it was: run it again after any interruption.
# PYTHON=... uses an environment that stands; TORCH_INDEX_URL=... chooses torch's build; WANDB_RUN=name logs to W&B;
# CHECKPOINTS=... writes elsewhere than ./checkpoints; GPUS=... of a node (full; default all); FLAGS=... goes to both stages;
# MINUTES1=10 and MINUTES2=6 are what small trains at most in its stages; TRIAL=1 runs its commands at toy size, on a CPU.
set -euo pipefail
cd "$(dirname "$0")"
STARTED=$(date +%s)
KIND=${1:-nano}
RUN=${WANDB_RUN:-dummy}
require() {  # says at once what is missing for small and full, before anything is installed
    nvidia-smi -L >/dev/null 2>&1 ||
        { echo "error: speedrun.sh $KIND needs a CUDA GPU and nvidia-smi finds none. On a CPU: bash speedrun.sh nano" >&2; exit 1; }
    [ "$KIND" != full ] || "${PYTHON:-python3}" -c 'from nanochat.hub import online; raise SystemExit(not online())' ||
        { echo "error: speedrun.sh full needs the Hugging Face hub (published weights and data sets), which does not answer. Without it:" \
               "bash speedrun.sh nano (a CPU) or small (a GPU)" >&2; exit 1; }
}
case "$KIND" in
small|gpu|full) [ -n "${TRIAL:-}" ] || require ;;
esac
case "$KIND" in
nano)  OUT=${CHECKPOINTS:-checkpoints}; . ./setup_env.sh ;;
small|gpu) OUT=${CHECKPOINTS:-checkpoints/small}; . ./setup_env.sh ;;
full)  OUT=${CHECKPOINTS:-checkpoints/full}; . ./setup_env.sh datasets huggingface_hub ;;
*)     echo "error: unknown kind '$KIND': use nano, small, gpu or full" >&2; exit 1 ;;
esac

resume() {  # --resume when the run folder $1 is there
    if [ -e "$OUT/$1/run.json" ]; then echo --resume; fi
}
tokenizer() {  # one of $1 tokens, unless it is there
    [ -e "$OUT/tokenizer/tokenizer.json" ] || "$PYTHON" -m scripts.tok_train --out "$OUT/tokenizer" --vocab-size "$1"
}
stage() {  # stage NAME FLAGS...: a training script, alone or on every GPU of the node
    local name=$1; shift
    local launch=("$PYTHON")
    if [ "$KIND" = full ]; then
        launch+=(-m torch.distributed.run --standalone --nproc_per_node "${GPUS:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')}")
    fi
    # shellcheck disable=SC2046,SC2086
    "${launch[@]}" -m "scripts.$name" --checkpoints "$OUT" --run "$RUN" "$@" ${FLAGS:-}
}

case "$KIND" in
nano)
    echo "== tokenizer"
    tokenizer 270
    echo "== stage 1: the encoder learns to read"
    stage vis_tok_train --tokenizer "$OUT/tokenizer" $(resume stage1)
    echo "== stage 2: a fresh decoder on the frozen SAM"
    stage vis_mid_train --encoder "$OUT/stage1" $(resume stage2)
    echo "== evaluation"
    "$PYTHON" -m scripts.vision_eval --checkpoint "$OUT/stage2" --task heldout,heldout_words,random_chars --chars 31-41 --out "$OUT/stage2/eval"
    "$PYTHON" -m scripts.speedrun_report --checkpoints "$OUT" --started "$STARTED"
    ;;
small|gpu)
    # Pages grow from a few large words to 1,300 characters; whichever of the two limits comes first ends a stage. Both modes of the
    # paper's study (640 px and 100 tokens, 512 px and 64) are trained together and read apart.
    MODE=small,tiny EVALUATIONS=""
    if [ -n "${TRIAL:-}" ]; then
        MODE=tiny COMMON=(--preset mini --num-iterations 2 --device-batch-size 8) READ=(--max-problems 2 --max-new-tokens 20)
    else
        COMMON=(--preset small --num-iterations 20000 --device-batch-size 64) READ=(--max-problems 256)
    fi
    if [ "$KIND" = gpu ] && [ -z "${TRIAL:-}" ]; then
        echo "== benchmarks"
        "$PYTHON" -m scripts.bench --suite "$OUT/bench.jsonl" || STATUS=1  # what failed is said there; training does not depend on it
    fi
    echo "== tokenizer"
    tokenizer 1024
    COMMON+=(--mode "$MODE" --workers "$(($(nproc) > 2 ? $(nproc) - 2 : 1))" --max-seq-len 1536 --random-share 0.1 --save-every 1000 --eval-every 500)
    echo "== stage 1"
    stage vis_tok_train --tokenizer "$OUT/tokenizer" --data synthdoc=3,synthpage=1 --chars 40-1300 --ramp 150000 --max-minutes "${MINUTES1:-10}" \
        "${COMMON[@]}" $(resume stage1)
    echo "== stage 2"
    stage vis_mid_train --encoder "$OUT/stage1" --data synthdoc=1,synthpage=1 --ramp 20000 --max-minutes "${MINUTES2:-6}" "${COMMON[@]:2}" $(resume stage2)
    for MODE in ${MODE//,/ }; do
        echo "== evaluation, mode $MODE"
        "$PYTHON" -m scripts.vision_eval --checkpoint "$OUT/stage2" --mode "$MODE" --task heldout --out "$OUT/stage2/curve_$MODE" \
            --chars 120-136,248-264,376-392,504-520,632-648,792-808,1192-1208 --max-new-tokens 1000 "${READ[@]}"
        "$PYTHON" -m scripts.vision_eval --checkpoint "$OUT/stage2" --mode "$MODE" --task fox_like,omnidocbench_like --out "$OUT/stage2/pages_$MODE" \
            --max-new-tokens 2400 "${READ[@]}"
        EVALUATIONS+="${EVALUATIONS:+,}curve_$MODE,pages_$MODE"
    done
    "$PYTHON" -m scripts.speedrun_report --checkpoints "$OUT" --started "$STARTED" --evaluations "$EVALUATIONS"
    exit "${STATUS:-0}"
    ;;
full)
    # The paper's two stages (section 3.5) on FineVision's document sets, from the published SAM, CLIP and nanochat weights.
    GPT=${GPT:-nanochat-students/base-d20}
    COMMON=(--optimizer adamw --mode base --recompute --too-long clip --bad-data skip --workers 8 --eval-every 500 --save-every 1000)
    echo "== stage 1"
    stage vis_tok_train --preset base --standardize channel --sam facebook/sam-vit-base --clip openai/clip-vit-large-patch14 --gpt "$GPT" \
        --data finevision:olmOCR-mix-0225-documents=9,finevision:olmOCR-mix-0225-books=1 --lr 5e-5 --schedule cosine --max-seq-len 4096 \
        --device-batch-size 10 --num-iterations 5000 "${COMMON[@]}" $(resume stage1)
    echo "== stage 2"
    stage vis_mid_train --encoder "$OUT/stage1" --gpt "$GPT" --text-share 0 \
        --data finevision:olmOCR-mix-0225-documents=7,chartqa=2,smoltalk=1 --lr 3e-5 --schedule step --max-seq-len 8192 --pack 8192 \
        --device-batch-size 4 --num-iterations 5000 "${COMMON[@]}" $(resume stage2)
    echo "== evaluation"
    "$PYTHON" -m scripts.vision_eval --checkpoint "$OUT/stage2" --task fox,omnidocbench,chartqa-test --max-new-tokens 4096 --out "$OUT/stage2/eval"
    ;;
esac
