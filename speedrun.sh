#!/usr/bin/env bash
# The main job: from nothing to a model that reads pages it has never seen.
#
#   bash speedrun.sh           nano: two CPU cores, no GPU, no hub, about 14 minutes (the default)
#   bash speedrun.sh page      a paragraph a page: the same machine, 135 minutes of training
#   bash speedrun.sh small     dense pages at the paper's geometry: one CUDA GPU, no hub,
#                              16 minutes of training
#   bash speedrun.sh gpu       the same, after every benchmark of scripts/bench.py
#   bash speedrun.sh full      the published sizes, with the hub's weights and data sets,
#                              on all GPUs of a node
#
# Run it again after any interruption: finished stages are skipped, and a stage that was cut short
# goes on from its last checkpoint.
#
# PYTHON=...            an existing environment instead of .venv
# TORCH_INDEX_URL=...   where pip takes torch from, e.g. the index of a CUDA build
# WANDB_RUN=name        logs to W&B
# CHECKPOINTS=...       writes elsewhere than ./checkpoints
# GPUS=...              GPUs of the node that full uses; default all
# FLAGS=...             extra flags for both stages
# MINUTES1=, MINUTES2=  minutes of training at most in the stages of page (95 and 40) and small
#                       (10 and 6)
# NANOCHAT_CUDNN=0      SAM's global attention without cuDNN, should that fail on your GPU
# TRIAL=1               runs page's, small's or full's commands at toy size, on a CPU
set -euo pipefail
cd "$(dirname "$0")"
STARTED=$(date +%s)
KIND=${1:-nano}
RUN=${WANDB_RUN:-dummy}

# -----------------------------------------------------------------------------
# What a kind needs, said before anything is installed

die() { echo "error: $*" >&2; exit 1; }

case "$KIND" in
nano)      OUT=${CHECKPOINTS:-checkpoints} ;;
page)      OUT=${CHECKPOINTS:-checkpoints/page} ;;
small|gpu) OUT=${CHECKPOINTS:-checkpoints/small} ;;
full)      OUT=${CHECKPOINTS:-checkpoints/full} ;;
*)         die "unknown kind '$KIND': use nano, page, small, gpu or full" ;;
esac
NEEDS_GPU=""
case "$KIND" in small|gpu|full) [ -n "${TRIAL:-}" ] || NEEDS_GPU=1 ;; esac
if [ -n "$NEEDS_GPU" ] && ! nvidia-smi -L >/dev/null 2>&1; then
    die "speedrun.sh $KIND needs a CUDA GPU and nvidia-smi finds none. On a CPU: bash speedrun.sh nano"
fi

PACKAGES=""
[ "$KIND" != full ] || PACKAGES="datasets huggingface_hub"
[ "$RUN" = dummy ] || PACKAGES="$PACKAGES wandb"
. ./setup_env.sh "$PACKAGES"  # quoted: without an argument it would be given ours, the kind

DEVICE=""
[ -z "${TRIAL:-}" ] || DEVICE="--device-type cpu"
if [ -n "$NEEDS_GPU" ]; then
    # A driver that is older than the CUDA version of torch's build makes torch fall back to the
    # CPU without a word. Find out now, and ask for cuda by name below.
    "$PYTHON" -c 'import torch; torch.zeros(1, device="cuda")' ||
        die "torch cannot use the GPU (driver $(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -1)," \
            "torch $("$PYTHON" -c 'import torch; print(torch.__version__, "built for CUDA", torch.version.cuda)'))." \
            "Update the driver, or set TORCH_INDEX_URL to a build for an older CUDA and delete .venv"
    DEVICE="--device-type cuda"
fi
if [ "$KIND" = full ] && [ -z "${TRIAL:-}" ]; then
    "$PYTHON" -c 'from nanochat.hub import online; raise SystemExit(not online())' ||
        die "speedrun.sh full needs the Hugging Face hub (published weights and data sets), which does" \
            "not answer. Without it: bash speedrun.sh nano (a CPU) or small (a GPU)"
fi

# -----------------------------------------------------------------------------
# Steps

resume() {  # prints --resume if the run folder $1 exists
    if [ -e "$OUT/$1/run.json" ]; then echo --resume; fi
}

tokenizer() {  # trains a tokenizer of $1 tokens, unless there is one
    [ -e "$OUT/tokenizer/tokenizer.json" ] ||
        "$PYTHON" -m scripts.tok_train --out "$OUT/tokenizer" --vocab-size "$1"
}

launch() {  # launch MODULE FLAGS...: one process, or one per GPU for full
    local module=$1; shift
    if [ "$KIND" = full ]; then
        # The -- keeps torchrun from taking our flags for its own (--run is short for --run-path).
        "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$GPUS" -m "$module" -- "$@"
    else
        "$PYTHON" -m "$module" "$@"
    fi
}

stage() {  # stage NAME FLAGS...: a training script
    local name=$1; shift
    # shellcheck disable=SC2086
    launch "scripts.$name" --checkpoints "$OUT" --run "$RUN" $DEVICE "$@" ${FLAGS:-}
}

# -----------------------------------------------------------------------------
# The kinds

case "$KIND" in
nano)
    echo "== tokenizer"
    tokenizer 270
    echo "== stage 1: the encoder learns to read"
    stage vis_tok_train --tokenizer "$OUT/tokenizer" $(resume stage1)
    echo "== stage 2: a fresh decoder on the frozen SAM"
    stage vis_mid_train --encoder "$OUT/stage1" $(resume stage2)
    echo "== evaluation"
    "$PYTHON" -m scripts.vision_eval --checkpoint "$OUT/stage2" \
        --task heldout,heldout_words,random_chars --chars 31-41 --out "$OUT/stage2/eval"
    "$PYTHON" -m scripts.speedrun_report --checkpoints "$OUT" --started "$STARTED"
    ;;
page)
    # Paragraphs of 128 to 512 characters (2 to 8 a vision token) in eight faces, slightly damaged.
    # Minutes end a stage, or the steps of a faster machine.
    CHARS=120-136,248-264,376-392,504-520
    SIZE=(--num-iterations 20000 --device-batch-size 16 --eval-every 250 --save-every 250)
    READ=(--max-problems 256)
    if [ -n "${TRIAL:-}" ]; then
        SIZE=(--num-iterations 2 --device-batch-size 8 --eval-pages 8)
        READ=(--max-problems 4 --max-new-tokens 20)
    fi
    COMMON=(--max-seq-len 1000 "${SIZE[@]}")
    echo "== tokenizer"
    tokenizer 270
    echo "== stage 1"
    stage vis_tok_train --preset page --tokenizer "$OUT/tokenizer" \
        --chars 128-512 --min-px 11 --damage 0.3 --random-share 0.15 \
        --faces sans,sans-bold,sans-oblique,serif,serif-bold,mono,stix,stix-bold \
        --ramp 16000 --primer 8x4,16x8,24x12 --max-minutes "${MINUTES1:-95}" \
        "${COMMON[@]}" $(resume stage1)
    echo "== stage 2"
    stage vis_mid_train --encoder "$OUT/stage1" --ramp 6000 --primer 8x4,16x8,24x12 \
        --max-minutes "${MINUTES2:-40}" "${COMMON[@]}" $(resume stage2)
    echo "== evaluation"
    "$PYTHON" -m scripts.vision_eval --checkpoint "$OUT/stage2" --task heldout --controls \
        --chars "$CHARS" --out "$OUT/stage2/eval" "${READ[@]}"
    "$PYTHON" -m scripts.vision_eval --checkpoint "$OUT/stage2" --task heldout_words,random_chars \
        --chars 248-264 --out "$OUT/stage2/other_text" "${READ[@]}"
    "$PYTHON" -m scripts.speedrun_report --checkpoints "$OUT" --started "$STARTED" \
        --evaluations eval,other_text
    ;;
small|gpu)
    # Pages grow from a few large words to 1,300 characters; whichever comes first, steps or
    # minutes, ends a stage. Both modes of the paper's study (640 px and 100 tokens, 512 px and 64)
    # are trained together and read apart.
    MODES=640px,512px
    SIZE=(--preset small --num-iterations 20000 --device-batch-size 64)
    READ=(--max-problems 256)
    if [ -n "${TRIAL:-}" ]; then
        MODES=512px
        SIZE=(--preset mini --num-iterations 2 --device-batch-size 8)
        READ=(--max-problems 2 --max-new-tokens 20)
    fi
    # Rows are filled 24-51 % with one page each, so several share a row.
    COMMON=(--mode "$MODES" --workers -1 --max-seq-len 1536 --pack 1536 --random-share 0.1
            --save-every 1000 --eval-every 500)
    STATUS=0
    if [ "$KIND" = gpu ] && [ -z "${TRIAL:-}" ]; then
        echo "== benchmarks"
        # Training does not depend on them, so a failure is remembered and reported at the end.
        "$PYTHON" -m scripts.bench --suite "$OUT/bench.jsonl" $DEVICE || STATUS=1
    fi
    echo "== tokenizer"
    tokenizer 1024
    echo "== stage 1"
    stage vis_tok_train --tokenizer "$OUT/tokenizer" --data synthdoc=3,synthpage=1 \
        --chars 40-1300 --ramp 150000 --max-minutes "${MINUTES1:-10}" \
        "${SIZE[@]}" "${COMMON[@]}" $(resume stage1)
    echo "== stage 2"
    stage vis_mid_train --encoder "$OUT/stage1" --data synthdoc=1,synthpage=1 --ramp 20000 \
        --max-minutes "${MINUTES2:-6}" "${SIZE[@]:2}" "${COMMON[@]}" $(resume stage2)
    EVALUATIONS=""
    for MODE in ${MODES//,/ }; do
        echo "== evaluation, mode $MODE"
        "$PYTHON" -m scripts.vision_eval --checkpoint "$OUT/stage2" --mode "$MODE" $DEVICE \
            --task heldout --out "$OUT/stage2/curve_$MODE" --max-new-tokens 1000 \
            --chars 120-136,248-264,376-392,504-520,632-648,792-808,1192-1208 "${READ[@]}"
        "$PYTHON" -m scripts.vision_eval --checkpoint "$OUT/stage2" --mode "$MODE" $DEVICE \
            --task fox_like,omnidocbench_like --out "$OUT/stage2/pages_$MODE" \
            --max-new-tokens 2400 "${READ[@]}"
        EVALUATIONS+="${EVALUATIONS:+,}curve_$MODE,pages_$MODE"
    done
    "$PYTHON" -m scripts.speedrun_report --checkpoints "$OUT" --started "$STARTED" \
        --evaluations "$EVALUATIONS"
    exit "$STATUS"
    ;;
full)
    # The paper's two stages (section 3.5) on FineVision's document sets, from the published SAM,
    # CLIP and nanochat weights. Between SAM and CLIP is a compressor that knows nothing, and the
    # decoder is a good language model: a model that begins so may learn to do without its pages, as
    # the earlier attempt's did. So there is a stage 0 of rendered pages, whose letters and places
    # are asked for, and some of them stay in stage 1.
    GPT=${GPT:-nanochat-students/base-d20}
    GPUS=${GPUS:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
    PRESET=base
    COMMON=(--optimizer adamw --mode 1024px --too-long clip --bad-data skip
            --workers -1 --eval-every 500 --save-every 1000 --num-iterations 5000)
    RENDERED=(--chars 400-2500 --damage 0.3)
    if [ -z "${TRIAL:-}" ]; then
        HUB=${HF_HOME:-$HOME/.cache/huggingface}
        mkdir -p "$HUB" "$OUT"
        echo "full keeps about 220 GB of data sets in $HUB, where $(df -Ph "$HUB" | awk 'NR==2 {print $4}') is" \
            "free, and about 130 GB of checkpoints in $OUT, where $(df -Ph "$OUT" | awk 'NR==2 {print $4}')" \
            "is free (both estimated)"
    fi
    # A GPU's share of a step, 32 and 24 pages, is done in parts, so that nothing need be computed
    # twice (--recompute): about 3 rows of 3 pages, and 2 rows of 6 in stage 2, take 51 and 40 GB,
    # and rows vary (predicted: FINDINGS.md, "hours of base").
    SIZE1=(--max-seq-len 4096 --pack 4096
           --device-batch-size 8 --total-batch-size $((32 * GPUS)))
    SIZE0=("${SIZE1[@]}" --num-iterations 1000)
    SIZE2=(--max-seq-len 8192 --pack 8192
           --device-batch-size 12 --total-batch-size $((24 * GPUS)))
    READ=(--max-new-tokens 4096)
    if [ -n "${TRIAL:-}" ]; then  # against a hub of tiny weights: python -m tests.full_trial
        PRESET=tiny
        COMMON=(--optimizer adamw --mode 64px --too-long clip --bad-data skip
                --workers 1 --num-iterations 2 --eval-pages 8)
        RENDERED=(--chars 20-40 --damage 0.3)
        SIZE1=(--max-seq-len 256 --pack 256 --device-batch-size 4 --total-batch-size $((8 * GPUS)))
        SIZE0=("${SIZE1[@]}")
        SIZE2=(--max-seq-len 384 --pack 384 --device-batch-size 2 --total-batch-size $((4 * GPUS)))
        READ=(--max-new-tokens 8)
    fi
    echo "== stage 0: rendered pages"
    stage vis_tok_train --model-tag stage0 --preset "$PRESET" \
        --sam facebook/sam-vit-base --clip openai/clip-vit-large-patch14 --gpt "$GPT" \
        --data synthpage --lr 5e-5 --part-lr compressor=1e-3,projector=1e-3 \
        "${COMMON[@]}" "${SIZE0[@]}" "${RENDERED[@]}" $(resume stage0)
    echo "== stage 1"
    stage vis_tok_train --init "$OUT/stage0" \
        --data finevision:olmOCR-mix-0225-documents=9,finevision:olmOCR-mix-0225-books=1,synthpage=2 \
        --lr 5e-5 --schedule cosine "${RENDERED[@]}" "${SIZE1[@]}" "${COMMON[@]}" $(resume stage1)
    echo "== stage 2"
    stage vis_mid_train --encoder "$OUT/stage1" --gpt "$GPT" --text-share 0 \
        --data finevision:olmOCR-mix-0225-documents=7,chartqa=2,smoltalk=1 \
        --lr 3e-5 --schedule step "${SIZE2[@]}" "${COMMON[@]}" $(resume stage2)
    echo "== evaluation"
    launch scripts.vision_eval --checkpoint "$OUT/stage2" $DEVICE \
        --task fox,omnidocbench,chartqa-test --out "$OUT/stage2/eval" "${READ[@]}"
    ;;
esac
