# shellcheck shell=bash
# What the scripts of this folder share. They set `dry` to something where commands are only to be printed.

# Says what is wrong with how the script was called, and ends it with status 2.
fail() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# Runs its arguments, or prints them as a shell would read them.
run() {
  if [[ ${dry:-} ]]; then
    show "$@"
  else
    "$@"
  fi
}

show() {
  local word
  printf '+'
  for word in "$@"; do
    if [[ $word =~ ^[-a-zA-Z0-9_./:=@%+,]+$ ]]; then printf ' %s' "$word"; else printf ' %s' "${word@Q}"; fi
  done
  printf '\n'
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || fail "needs bash 4.4 or newer; Cloud Shell has it"
