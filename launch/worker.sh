#!/usr/bin/env bash
# What one worker does, from getting ready to training. tpu.sh calls it on every worker of every slice; it can be called
# by hand on one, too. Everything that it keeps lies in ~/mllm_jax_run.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: worker.sh [--dry-run] COMMAND

  setup [--bucket=NAME]     a virtual environment, and the bucket mounted at ~/bucket with the folders weights, playground
                            and runs of the repository in it
  start CHIP SLICES ARGUMENTS...
                            python -m mllm_jax.train ARGUMENTS in a tmux session, with the XLA flags of CHIP
  state                     one line: host, whether the session lives, its exit status, the newest checkpoint
  metrics                   the last line of the run's metrics.jsonl
  stop                      SIGTERM to the run, which saves and ends; what is left after five minutes is killed

--dry-run prints the commands of setup, start and stop and runs none.
TEXT
}

readonly SESSION=mllm_jax
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/shell.sh
source "$repository/launch/shell.sh"
readonly repository kept="$HOME/mllm_jax_run" environment="$HOME/mllm_jax_venv" mount="$HOME/bucket"
dry=""

setup() {
  local bucket=""
  for argument in "$@"; do
    case $argument in
      --bucket=?*) bucket=${argument#*=} ;;
      *) fail "setup: unknown argument '$argument'" ;;
    esac
  done
  alive && fail "a run is alive here; worker.sh stop ends it"
  cd "$repository"
  run mkdir -p "$kept"
  # The image's own Python is 3.10; uv brings one that is new enough.
  if [[ ! -x $HOME/.local/bin/uv ]]; then
    run bash -c "set -o pipefail; curl -LsSf https://astral.sh/uv/install.sh | sh"
  fi
  [[ -x $environment/bin/python ]] || run "$HOME/.local/bin/uv" venv --quiet --python=3.12 "$environment"
  run "$HOME/.local/bin/uv" pip install --quiet --python="$environment/bin/python" \
    --requirement="$repository/requirements.txt" "jax[tpu]"
  run "$environment/bin/python" -c "import flax, jax, libtpu, mllm_jax"
  [[ -z $bucket ]] || mount_bucket "$bucket"
  run touch "$kept/ready"
}

mount_bucket() {
  local repo key=/usr/share/keyrings/cloud.google.asc
  repo=gcsfuse-$(lsb_release -c -s 2>/dev/null || echo jammy)
  if ! command -v gcsfuse >/dev/null; then
    run bash -c "set -o pipefail; curl -sSf https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee $key >/dev/null"
    run bash -c "echo 'deb [signed-by=$key] https://packages.cloud.google.com/apt $repo main' |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null"
    run sudo apt-get -qq -o DPkg::Lock::Timeout=300 update
    run sudo apt-get -qq -o DPkg::Lock::Timeout=300 install gcsfuse
  fi
  run mkdir -p "$mount"
  # Without the caches a worker sees at once what another has written. Machines of this size would keep them for ever.
  mountpoint -q "$mount" 2>/dev/null ||
    run gcsfuse --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "$1" "$mount"
  for folder in weights playground runs; do
    run mkdir -p "$mount/$folder"
    # A folder of this name would be filled on one worker only.
    [[ ! -e $repository/$folder || -L $repository/$folder ]] || fail "$repository/$folder is in the way of the bucket's"
    run ln -sfn "$mount/$folder" "$repository/$folder"
  done
}

alive() {
  tmux has-session -t "=$SESSION" 2>/dev/null
}

start() {
  (($# >= 3)) || fail "start needs CHIP SLICES ARGUMENTS..."
  alive && fail "a run is alive here; worker.sh stop ends it"
  if [[ ! $dry ]]; then
    [[ -e $kept/ready ]] || fail "not set up yet"
    printf '%s\0' "$@" >"$kept/arguments"
    rm -f "$kept/exit"
  fi
  run tmux new-session -d -s "$SESSION" "bash $(printf %q "$repository/launch/worker.sh") main"
}

# Inside the session. The output goes to a file without a pipe: at a shutdown everything gets SIGTERM at once, and the
# trainer must be able to speak while it saves.
main() {
  local given trainer told="" status=0 copier=""
  mapfile -d '' -t given <"$kept/arguments"
  cd "$repository"
  # shellcheck source=launch/xla_flags.sh
  source launch/xla_flags.sh
  xla_flags "${given[0]}" "${given[1]}"
  if [[ -d $mount/runs ]]; then
    (
      mkdir -p "$mount/runs/logs"
      while sleep 60 && kill -0 $$ 2>/dev/null; do cp "$kept/log" "$mount/runs/logs/$HOSTNAME.log" || true; done
    ) &
    copier=$!
  fi
  # At a shutdown the trainer gets SIGTERM as well, and a second one would end it before it has saved: none is passed on.
  trap 'told=yes' TERM HUP
  "$environment/bin/python" -m mllm_jax.train "${given[@]:2}" >>"$kept/log" 2>&1 &
  trainer=$!
  echo "$trainer" >"$kept/pid"
  wait "$trainer" || status=$?
  while [[ $told ]]; do # a signal has ended the waiting only
    told="" status=0
    wait "$trainer" || status=$?
  done
  if [[ $copier ]]; then
    kill "$copier" || true
    cp "$kept/log" "$mount/runs/logs/$HOSTNAME.log" || true
  fi
  echo "$status" >"$kept/exit"
}

# The folder of the run that was started last, or nothing.
workdir() {
  local given=() argument
  [[ ! -e $kept/arguments ]] || mapfile -d '' -t given <"$kept/arguments"
  for argument in "${given[@]}"; do
    [[ $argument != --workdir=* ]] || (cd "$repository" && realpath -m "${argument#*=}")
  done
}

state() {
  local session=gone exit=none folder newest=""
  if alive; then session=alive; elif [[ -s $kept/exit ]]; then exit=$(<"$kept/exit"); fi
  folder=$(workdir)
  if [[ -d $folder ]]; then
    # A checkpoint that is not finished has a longer name.
    newest=$(cd "$folder" && find . -maxdepth 3 -regex '\./[a-z]*/checkpoints/[0-9]+' -printf '%P\n' | sort -V | tr '\n' ',')
  fi
  echo "worker=$HOSTNAME session=$session exit=$exit checkpoints=${newest:-none}"
}

stop() {
  if [[ $dry ]]; then
    show kill -TERM "PID in $kept/pid"
    return
  fi
  alive || return 0
  kill -TERM "$(<"$kept/pid")" || true
  for _ in {1..300}; do
    alive || return 0
    sleep 1
  done
  kill -KILL "$(<"$kept/pid")" || true
  tmux kill-session -t "=$SESSION" || true
}

main_command() {
  local words=() argument
  for argument in "$@"; do # what follows start is the trainer's
    if [[ $argument == --dry-run && ${words[0]:-} != start ]]; then dry=yes; else words+=("$argument"); fi
  done
  set -- "${words[@]}"
  local command=${1:-}
  shift || true
  case $command in
    setup) setup "$@" ;;
    start) start "$@" ;;
    main) main ;;
    state) state ;;
    metrics) tail -n 1 "$(workdir)/metrics.jsonl" 2>/dev/null || echo "no metrics yet" ;;
    stop) stop ;;
    --help | -h) usage ;;
    "") fail "a command is missing; worker.sh --help lists them" ;;
    *) fail "unknown command '$command'; worker.sh --help lists them" ;;
  esac
}

main_command "$@"
