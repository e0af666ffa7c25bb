#!/usr/bin/env bash
# Trains on Cloud TPUs: queued resources, on demand or spot, one slice or several.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: tpu.sh COMMAND --name=NAME --zone=ZONE [OPTIONS] [-- TRAINING ARGUMENTS]

  create    ask for the machines (a queued resource of that name)
  setup     wait for them; then on every worker the code, a virtual environment and the bucket
  run       start python -m mllm_jax.train TRAINING ARGUMENTS in tmux on every worker
  status    the request's state, every worker's run, the last line of its metrics
  logs      what the run says on the first worker; --follow goes on
  resume    all of the above until the run is done: asks for the machines, sets them up, runs, looks every minute; after a
            preemption begins again; gives up at a failure that repeats without a new checkpoint in between
  stop      end the run where it is, saved; run or resume go on from there (end a resume before)
  delete    give the machines back

  --name=NAME             of the request, and of its machines
  --zone=ZONE             where, for instance us-west4-a
  --topology=v5e-16       Cloud's name of a slice: v4-N, v5e-N, v5p-N, v6e-N (create, run, resume)
  --slices=1              how many such slices, as one run; the same number for every command
  --project=PROJECT       else gcloud's own
  --spot                  cheap machines that may be taken away at any time (create, resume)
  --service-account=MAIL  that the machines act as (create, resume); else the project's default one
  --bucket=NAME           with a hierarchical namespace; holds weights, playground and runs (setup, resume)
  --repo=URL --ref=REF    clone this at that commit, tag or branch instead of copying this checkout (setup, resume)
  --follow, -f            (logs)
  --yes                   do not ask (delete)
  --dry-run               print the commands and run none
  --help

The training arguments are those on any machine and name their workdir, which --bucket keeps, with runs/ in front:
  tpu.sh resume --name=sp --zone=us-west4-a --topology=v5e-16 --spot --bucket=MINE -- \
    --config=configs/sp_cropping.py --workdir=runs/sp_cropping
TEXT
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly here
# shellcheck source=launch/shell.sh
source "$here/shell.sh"
# shellcheck source=launch/watch.sh
source "$here/watch.sh"

readonly COMMANDS="create setup run status logs resume stop delete"
readonly POLL=60 # seconds between two looks
readonly WORKER="bash mllm_jax/launch/worker.sh"
readonly STATE="if [ -e mllm_jax_run/ready ]; then $WORKER state; else echo new; fi"

command="" name="" zone="" topology="" slices=1 project="" spot="" account="" bucket="" repo="" ref="" follow="" yes=""
dry="" training=()

# ---- arguments -------------------------------------------------------------------------------------------------------

parse() {
  while (($#)); do
    case $1 in
      --name=?*) name=${1#*=} ;;
      --zone=?*) zone=${1#*=} ;;
      --topology=?*) topology=${1#*=} ;;
      --slices=?*) slices=${1#*=} ;;
      --project=?*) project=${1#*=} ;;
      --service-account=?*) account=${1#*=} ;;
      --bucket=?*) bucket=${1#*=} ;;
      --repo=?*) repo=${1#*=} ;;
      --ref=?*) ref=${1#*=} ;;
      --spot) spot=yes ;;
      --follow | -f) follow=yes ;;
      --yes) yes=yes ;;
      --dry-run) dry=yes ;;
      --help | -h)
        usage
        exit 0
        ;;
      --)
        shift
        training=("$@")
        break
        ;;
      -*) fail "unknown option '$1'; --help lists them, and the trainer's own come after --" ;;
      *)
        [[ -z $command && " $COMMANDS " == *" $1 "* ]] || fail "unknown command '$1'; one of $COMMANDS"
        command=$1
        ;;
    esac
    shift
  done
}

check() {
  [[ $command ]] || fail "a command is missing: one of $COMMANDS"
  [[ $name ]] || fail "--name is missing"
  [[ $name =~ ^[a-z]([-a-z0-9]{0,50}[a-z0-9])?$ ]] || fail "--name=$name must be small letters, digits and hyphens"
  [[ $zone ]] || fail "--zone is missing"
  [[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices=$slices must be 1 or more"
  [[ -z $ref || $repo ]] || fail "--ref needs --repo"
  case $command in
    create | run | resume)
      [[ $topology ]] || fail "--topology is missing, for instance --topology=v5e-16"
      [[ $topology =~ ^(v4|v5e|v5p|v6e)-[1-9][0-9]*$ ]] ||
        fail "--topology=$topology is unknown; v4-N, v5e-N, v5p-N or v6e-N as Cloud counts them"
      ;;
  esac
  case $command in
    run | resume)
      [[ " ${training[*]}" == *" --config="* ]] || fail "the training arguments lack --config: -- --config=FILE ..."
      [[ " ${training[*]}" == *" --workdir="* ]] || fail "the training arguments lack --workdir: -- --workdir=runs/NAME ..."
      ;;
    *) ((${#training[@]} == 0)) || fail "$command takes no training arguments" ;;
  esac
}

chip() { echo "${topology%-*}"; }

accelerator() { echo "${topology/#v5e-/v5litepod-}"; }

runtime() {
  case $(chip) in
    v4) echo tpu-ubuntu2204-base ;;
    v5e) echo v2-alpha-tpuv5-lite ;;
    v5p) echo v2-alpha-tpuv5 ;;
    v6e) echo v2-alpha-tpuv6e ;;
  esac
}

# The machines' names: one is that of the request, several are numbered by Cloud in this way.
nodes() {
  if ((slices == 1)); then echo "$name"; else seq -f "$name-%.0f" 0 $((slices - 1)); fi
}

# ---- gcloud ----------------------------------------------------------------------------------------------------------

# gcloud compute tpus WORDS... with zone and project.
tpus() {
  run gcloud compute tpus "$@" --zone="$zone" ${project:+"--project=$project"}
}

# Runs a command on every worker of every slice. --quiet: gcloud makes its key for ssh without asking.
on_all() {
  local node
  for node in $(nodes); do
    tpus tpu-vm ssh "$node" --worker=all --quiet --command="$1" || return
  done
}

# The same on the first worker of the first slice only.
on_first() {
  tpus tpu-vm ssh "$(nodes | head -n 1)" --worker=0 --quiet --command="$1"
}

# ACTIVE, SUSPENDED and so on; ABSENT where there is no such request, UNKNOWN where gcloud cannot say.
resource_state() {
  local answer
  if answer=$(tpus queued-resources describe "$name" --format="value(state.state)" 2>&1); then
    tail -n 1 <<<"$answer"
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo ABSENT
  else
    echo "$answer" >&2
    echo UNKNOWN
  fi
}

create() {
  local shape=(--node-id="$name") answer
  ((slices == 1)) || shape=(--node-count="$slices" --node-prefix="$name")
  shape+=(--accelerator-type="$(accelerator)" --runtime-version="$(runtime)")
  [[ -z $spot ]] || shape+=(--spot)
  [[ -z $account ]] || shape+=(--service-account="$account")
  if [[ $dry ]]; then
    tpus queued-resources create "$name" "${shape[@]}"
    return
  fi
  answer=$(tpus queued-resources create "$name" "${shape[@]}" 2>&1) && return
  echo "$answer" >&2
  case $answer in
    *ALREADY_EXISTS*) echo "$name exists already: tpu.sh status tells its state, tpu.sh delete gives it back" >&2 ;;
    *[Qq]uota* | *RESOURCE_EXHAUSTED*)
      echo "the project's quota for $topology in $zone${spot:+ (spot has its own)} is too small: ask for more under" \
        "'IAM & Admin, Quotas', or use another --zone or --topology" >&2
      ;;
  esac
  return 1
}

wait_until_active() {
  local state="" before=""
  if [[ $dry ]]; then
    resource_state
    return
  fi
  while true; do
    state=$(resource_state)
    [[ $state == "$before" ]] || echo "$name: $state"
    case $state in
      ACTIVE) return ;;
      ABSENT)
        echo "there is no $name in $zone; tpu.sh create asks for it" >&2
        return 1
        ;;
      FAILED | SUSPENDING | SUSPENDED)
        tpus queued-resources describe "$name" --format="yaml(state)" >&2 || true
        echo "$name will not start again; tpu.sh delete removes it, tpu.sh resume does that and asks anew" >&2
        return 1
        ;;
    esac
    before=$state
    sleep "$POLL"
  done
}

# ---- code and run ----------------------------------------------------------------------------------------------------

archive=""

# This checkout with what is not committed yet, without what git ignores, and without tests.
pack() {
  archive=mllm_jax.tar.gz
  if [[ $dry ]]; then
    echo "# git ls-files --cached --others --exclude-standard -- . ':!tests', as $archive"
    return
  fi
  archive=$(mktemp -d)/$archive
  trap 'rm -rf "$(dirname "$archive")"' EXIT
  (
    cd "$here/.."
    git ls-files -z --cached --others --exclude-standard -- . ':!tests' |
      while IFS= read -r -d '' file; do [[ ! -e $file ]] || printf '%s\0' "$file"; done |
      tar --null --files-from=- -czf "$archive"
  )
}

setup() {
  local node get="rm -rf mllm_jax && mkdir mllm_jax && tar -xzf mllm_jax.tar.gz -C mllm_jax"
  # Python loads modules late: under a run the code must stay.
  local idle="! tmux has-session -t =mllm_jax 2>/dev/null || { echo 'a run is alive here' >&2; exit 1; }"
  if [[ $repo ]]; then
    get="rm -rf mllm_jax && git clone --quiet $(printf %q "$repo") mllm_jax"
    [[ -z $ref ]] || get+=" && git -C mllm_jax checkout --quiet $(printf %q "$ref")"
  else
    [[ $archive ]] || pack || return
    for node in $(nodes); do
      tpus tpu-vm scp "$archive" "$node:mllm_jax.tar.gz" --worker=all --quiet || return
    done
  fi
  on_all "$idle; $get && $WORKER setup${bucket:+ --bucket=$bucket}"
}

# With retries: a machine that has just begun does not always let one in at once.
setup_patiently() {
  local wait
  wait_until_active || return
  for wait in 20 60 0; do
    setup && return
    ((wait == 0)) || { echo "not every worker could be set up; once more in $wait seconds" >&2 && sleep $wait; }
  done
  echo "setting up $name failed; the lines above say on which worker, and tpu.sh setup tries again" >&2
  return 1
}

start() {
  local words
  words=$(printf ' %q' "${training[@]}")
  on_all "$WORKER start $(chip) $slices$words"
}

status() {
  local state=ACTIVE
  if [[ $dry ]]; then resource_state; else state=$(resource_state); fi
  echo "$name: $state"
  [[ $state == ACTIVE ]] || return 0
  on_all "$STATE"
  on_first "$WORKER metrics"
}

logs() {
  on_first "tail -n 100${follow:+ -F} mllm_jax_run/log"
}

give_back() {
  tpus queued-resources delete "$name" --force --quiet
}

delete() {
  local answer=""
  if [[ -z $yes && -z $dry ]]; then
    read -r -p "give back $name in $zone, and end what runs there? (y/N) " answer || true
    [[ $answer == [yY]* ]] || { echo "$name stays; --yes does not ask" >&2 && return 1; }
  fi
  give_back
}

parse "$@"
check
case $command in
  setup) setup_patiently ;;
  run) start ;;
  stop) on_all "$WORKER stop" ;;
  *) "$command" ;;
esac
