#!/usr/bin/env bash
# Trains on the NVIDIA cards of this machine: one process for all of them.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: gpu_local.sh [--gpus=0,1,...] [--dry-run] [--] TRAINING ARGUMENTS

  gpu_local.sh --config=configs/sp_cropping.py --workdir=runs/sp_cropping

--gpus     which cards, else all; --dry-run prints the command and runs nothing; the rest is python -m mllm_jax.train's.
Takes .venv of the repository where there is one (pip install -r requirements.txt "jax[cuda13]"), else python3. Started
again after a crash or a Ctrl-C, the same command goes on.
TEXT
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/shell.sh
source "$here/shell.sh"
# shellcheck source=launch/xla_flags.sh
source "$here/xla_flags.sh"

dry="" cards=""
while (($#)); do
  case $1 in
    --gpus=?*) cards=${1#*=} ;;
    --dry-run) dry=yes ;;
    --help | -h)
      usage
      exit 0
      ;;
    --)
      shift
      break
      ;;
    *) break ;;
  esac
  shift
done
[[ -z $cards || $cards =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "--gpus=$cards must be numbers with commas between"
[[ " $*" == *" --config="* ]] || fail "--config=FILE is missing; gpu_local.sh --help"
[[ " $*" == *" --workdir="* ]] || fail "--workdir=runs/NAME is missing; gpu_local.sh --help"

cd "$here/.."
python=python3
[[ ! -x .venv/bin/python ]] || python=.venv/bin/python
xla_flags gpu
# JAX takes three quarters of a card by default; nothing else wants the rest here but the libraries' own workspaces.
settings=(XLA_FLAGS="$XLA_FLAGS" XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}")
[[ -z $cards ]] || settings+=(CUDA_VISIBLE_DEVICES="$cards")
# exec: Ctrl-C and SIGTERM reach the trainer, which saves.
[[ $dry ]] || exec env "${settings[@]}" "$python" -m mllm_jax.train "$@"
show env "${settings[@]}" "$python" -m mllm_jax.train "$@"
