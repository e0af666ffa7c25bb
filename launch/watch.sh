# shellcheck shell=bash
# tpu.sh resume: machines and the run on them, until it is done. Uses what tpu.sh defines, which shellcheck cannot see.
# shellcheck disable=SC2153,SC2154

readonly LONGEST=900               # seconds to wait after failures, at most
readonly FAILURES=3 UNREACHABLE=5  # in a row, before the run is given up, and the machines are replaced

# The checkpoints at the last look, and at the last failure; failures since there was a new one.
seen="" seen_at_failure="" failures=0 unreachable=0

say() { echo "$(date +%H:%M:%S) $name: $*"; }

give_up() {
  echo "given up: $*. The machines are still there and cost money: tpu.sh delete --name=$name --zone=$zone" >&2
  exit 1
}

# After a failure: waits, longer each time, or ends the script where nothing was gained since the last one.
failed() {
  local delay
  [[ $seen == "$seen_at_failure" ]] || failures=0
  seen_at_failure=$seen
  failures=$((failures + 1))
  say "$* ($failures of $FAILURES without a new checkpoint)" >&2
  ((failures < FAILURES)) || give_up "the same command goes on once the reason is gone"
  delay=$((POLL << failures))
  sleep $((delay < LONGEST ? delay : LONGEST))
}

replace() {
  say "$*; asking for new machines"
  give_back || failed "the old ones cannot be given back"
}

# A failure, unless the machines have been taken away meanwhile.
failed_if_active() {
  [[ $(resource_state) != ACTIVE ]] || failed "$*"
}

# A run that has not begun, or on machines that have started anew and lost their mounts.
begin() {
  if ! { on_all "[ ! -e mllm_jax_run/ready ] || $WORKER stop" && setup_patiently && start; }; then
    failed_if_active "the run could not be started"
  fi
}

begin_again() {
  if ! { on_all "$WORKER stop" && start; }; then failed_if_active "the run could not be started again"; fi
}

# One look at machines that are there. Returns 0 when the run is done.
look() {
  local lines ended
  if ! lines=$(on_all "$STATE"); then
    unreachable=$((unreachable + 1))
    say "not every worker can be reached ($unreachable of $UNREACHABLE)" >&2
    if ((unreachable >= UNREACHABLE)); then
      unreachable=0
      failed "a worker is lost"
      replace "a worker is lost"
    fi
    return 1
  fi
  unreachable=0
  seen=$(grep -o 'checkpoints=.*' <<<"$lines" | head -n 1 || true)
  ended=$(grep -o 'exit=[1-9][0-9]*' <<<"$lines" | sort -u | tr '\n' ' ' || true)
  if grep -q '^new$' <<<"$lines"; then
    begin
  elif [[ $ended ]]; then
    on_first "tail -n 20 mllm_jax_run/log" || true
    if [[ $ended == *exit=2\ * ]]; then
      give_up "the run asks for something to be put right first"
    fi
    failed "the run has ended with $ended"
    begin_again
  elif grep -q 'session=gone exit=none' <<<"$lines"; then
    failed "the run is gone without a word"
    begin
  elif ! grep -q session=alive <<<"$lines"; then
    return 0
  fi
  return 1
}

resume() {
  local state="" before=""
  [[ $repo ]] || pack # once: a preemption at night must not bring in what was edited since
  if [[ $dry ]]; then
    create && resource_state && setup && start && on_all "$STATE"
    echo "# after a preemption, before all that again"
    give_back
    return
  fi
  while true; do
    state=$(resource_state)
    [[ $state == "$before" ]] || say "$state"
    [[ $before || $state != UNKNOWN ]] || exit 1
    before=$state
    case $state in
      ABSENT) create || failed "the machines could not be asked for" ;;
      ACTIVE)
        if look; then
          say "done; tpu.sh delete --name=$name --zone=$zone gives the machines back"
          return
        fi
        ;;
      SUSPENDED) replace "preempted" ;;
      FAILED)
        tpus queued-resources describe "$name" --format="yaml(state)" >&2 || true
        failed "the request has failed"
        replace "a failed request is never tried again"
        ;;
    esac
    sleep "$POLL"
  done
}
