# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh. `set_up run` or `set_up dev` leaves a complete .venv at the root of the
# repository, with the exact versions of constraints.txt in it, or prints one line that says why not and exits
# with 2. Where that is done already, it only compares a checksum and starts Python once.
#
# MTNLG_PYTHON=/path/to/python3.13 forces an interpreter. Runs under the bash 3.2 of macOS, too.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv"
python="$venv/bin/python"
state="$venv/setup_state" # "installing", or the key and the kind ("run" or "dev") of what is complete
log="$venv/setup.log"

# Measured: 1.4 GB for .venv, 0.3 for the wheels while they are unpacked, 0.3 for pip's own copy of them; 1.1 GB more
# for the TPU compiler that the tests want.
space_mb=2000

say() { printf '%s\n' "$1" >&2; }

fail() {
  say "$1"
  exit 2
}

# One line about an interpreter: "yes VERSION PATH" where it can hold the pinned wheels, else "no VERSION WHY".
# Python 3.12 to 3.14, because every pinned package has wheels for these three and not for 3.15.
# PATH is what stands behind an active virtual environment, which may be the very one about to be made anew.
describe() {
  "$1" -I -c '
import sys
version = "%d.%d.%d" % sys.version_info[:3]
if not (3, 12) <= sys.version_info[:2] <= (3, 14):
    print("no " + version)
elif sys.implementation.name != "cpython" or "t" in sys.abiflags or sys.maxsize < 2**32:
    print("no " + version + " (not the ordinary 64-bit CPython)")
else:
    try:
        import ensurepip, venv
        print("yes " + version + " " + getattr(sys, "_base_executable", sys.executable))
    except ImportError:
        print("no " + version + " (without venv; on Debian and Ubuntu: apt install python3-venv)")
' </dev/null 2>/dev/null || # Python 2 knows no -I.
    "$1" -c 'import sys; print("no %d.%d.%d" % sys.version_info[:3])' </dev/null 2>/dev/null
}

# uv knows interpreters that stand on no PATH, and brings one where there is none.
python_of_uv() {
  uv python find --system '>=3.12,<3.15' 2>/dev/null && return
  say "no Python 3.12 to 3.14 here; asking uv for one"
  uv python install --quiet 3.13 >&2 && uv python find --system 3.13 2>/dev/null
}

# Prints what `describe` says of the first suitable interpreter.
find_python() {
  local candidate answer found="" IFS=$'\n'
  if [[ -n "${MTNLG_PYTHON:-}" ]]; then
    answer="$(describe "$MTNLG_PYTHON")" || answer="not a Python that runs"
    [[ "$answer" == yes* ]] ||
      fail "MTNLG_PYTHON=$MTNLG_PYTHON is ${answer#no }; name a Python 3.12 to 3.14 with venv, or unset it"
    printf '%s\n' "$answer"
    return
  fi
  # sort -V: 3.13.10 is newer than 3.13.9.
  for candidate in python3.13 python3.12 python3 python3.14 \
    $(printf '%s\n' "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*/bin/python | sort -rV) uv; do
    if [[ "$candidate" == uv ]]; then
      command -v uv >/dev/null || continue
      candidate="$(python_of_uv)" || found="${found:-no Python}, and uv could not download one"
    fi
    # What exists need not run: pyenv keeps a shim called python3.13 on the PATH whichever version is active.
    answer="$(describe "$candidate")" || continue
    if [[ "$answer" == yes* ]]; then
      printf '%s\n' "$answer"
      return
    fi
    [[ ", $found, " == *", ${answer#no }, "* ]] || found="${found:+$found, }${answer#no }"
  done
  fail "mtnlg_jax needs Python 3.12 to 3.14 with venv, found ${found:-no Python};\
 install Python 3.13 or uv, or set MTNLG_PYTHON=/path/to/python3.13"
}

# True where MTNLG_PYTHON is unset or is the interpreter that .venv was made with.
as_forced() {
  local ours theirs
  [[ -n "${MTNLG_PYTHON:-}" ]] || return 0
  ours="$(describe "$python")" && theirs="$(describe "$MTNLG_PYTHON")" || return 1
  [[ "${ours#yes * }" -ef "${theirs#yes * }" ]]
}

# True where .venv is complete for this kind ("dev" includes "run"), starts, and finds this package.
ready() {
  local done=""
  if [[ -f "$state" ]]; then done="$(<"$state")"; fi
  [[ "$done" == "$key $1" || "$done" == "$key dev" ]] && "$python" -I -c 'import mtnlg_jax' 2>/dev/null && as_forced
}

check_folder() {
  local free need=$space_mb
  free="$(df -Pk "$root" | awk 'NR == 2 {print int($4 / 1024)}')"
  if [[ -d "$venv" ]]; then
    # What is installed already saves its share; an exchange of some packages still wants a little.
    need=$((space_mb - $(du -sk "$venv" | cut -f 1) * 3 / 2048))
    if ((need < 300)); then need=300; fi
  fi
  ((free >= need)) || fail "no space: $root has $free MB free, installing takes about $need MB; free some or move the folder"
  if ! { : >>"$root/.venv.lock"; } 2>/dev/null || [[ -e "$venv" && ! -w "$venv" ]]; then
    fail "cannot write in $root, where .venv goes; make it writable, or copy the repository to a folder of yours"
  fi
}

# Written beside and renamed: a full disk or a kill leaves the old word or the new one.
mark() { printf '%s\n' "$1" >"$state.new" && mv "$state.new" "$state"; }

# -I: what a PYTHONPATH holds must not count as installed. TMPDIR: only one disk's free space must suffice.
pip_install() {
  PIP_USER=0 TMPDIR="$venv/tmp" "$python" -I -m pip install --disable-pip-version-check --no-input \
    --progress-bar off -c launch/constraints.txt "$@"
}

# install BASE WHAT: .venv from the interpreter BASE where there is none, and in it "." or ".[dev]".
install() {
  cd "$root" && mkdir -p "$venv/tmp" || return
  [[ -x "$python" ]] || "$1" -I -m venv "$venv" || return
  "$python" -I -c 'import pip' || "$python" -I -m ensurepip || return # uv makes a .venv without pip
  # setuptools is pinned like the rest, so it comes first and builds without an environment of its own.
  pip_install setuptools && pip_install --no-build-isolation -e "$2" || return
  # The TPU compiler lies apart, where only the processes that compile look (mtnlg_jax/planning/topology.py): JAX would
  # take it for a TPU in every other one. It has wheels for this platform only; elsewhere its tests skip.
  [[ "$2" == . || "$OSTYPE $HOSTTYPE" != "linux-gnu x86_64" ]] ||
    pip_install --no-deps --upgrade --target "$venv/ahead" libtpu
}

# Reads what `install` says: all of it to the log, one moving line to a terminal, the cause of a failure to
# standard output.
watch_install() {
  local line last="" cause="" step="" shown="" count=0
  while IFS= read -r line; do
    last="$line"
    { printf '%s\n' "$line" >>"$log"; } 2>/dev/null || true
    case "$line" in
      *"No space left on device"* | *"Disk quota exceeded"*) cause="space" ;;
      *"connection broken by"* | *"Max retries exceeded"* | *"ConnectionError"* | *"Read timed out"* | \
        *"Cannot install setuptools because"*) # all that pip says of it under PIP_RETRIES=0
        cause="${cause:-network}" step="the package index does not answer, trying again" ;;
      Collecting*) cause="" count=$((count + 1)) step="downloading, $count packages so far" ;;
      "Installing collected"*) step="installing" ;;
      [Ee][Rr][Rr][Oo][Rr]:*) cause="${cause:-${line#*: }}" ;;
    esac
    if [[ -t 2 && "$step" != "$shown" ]]; then printf '\r\033[K  %s' "$step" >&2; fi
    shown="$step"
  done
  if [[ -t 2 ]]; then printf '\r\033[K' >&2; fi
  printf '%s\n' "${cause:-$last}"
}

set_up() {
  local kind="$1" what="." key before="" answer="" cause
  local started=$SECONDS
  if [[ "$kind" == dev ]]; then
    what=".[dev]"
    space_mb=$((space_mb + 1100))
  fi
  # The folder is part of the key: a .venv that was copied or moved imports the package of the old place.
  key="$({ cat "$root/setup.py" "$root/launch/constraints.txt" && printf '%s' "$root"; } | cksum | tr ' ' -)"
  if ready "$kind"; then return; fi

  check_folder
  # One set-up at a time. Its processes share the lock, so a killed shell's pip still holds it. Where there is no
  # flock (macOS), or no locks on the file system, it is up to the person not to start two at once.
  exec 9>>"$root/.venv.lock"
  if command -v flock >/dev/null && ! flock -n 9 2>/dev/null; then
    say "another set-up is at work on $venv; waiting for it"
    flock 9 2>/dev/null || true
    if ready "$kind"; then
      exec 9>&-
      return
    fi
  fi

  if [[ -f "$state" ]]; then before="$(<"$state")"; fi
  if [[ "$before" != installing ]] && as_forced && answer="$(describe "$python")" && [[ "$answer" == yes* ]]; then
    before="${before:-made by hand}"
  else
    answer="$(find_python)"
    before=""
    if [[ -e "$venv" || -L "$venv" ]]; then
      say "making .venv anew: the one that is there is unfinished, broken or of another Python"
      # Renamed first: a removal that is cut off must not leave half a .venv under its name.
      rm -rf "$root/.venv.discarded"
      mv "$venv" "$root/.venv.discarded"
    fi
  fi
  { mkdir -p "$venv" && mark installing && : >"$log"; } 2>/dev/null || fail "cannot write in $venv; delete it, and run this again"
  rm -rf "$root/.venv.discarded"
  say "setting up .venv with Python $(cut -d ' ' -f 2 <<<"$answer"), about $((space_mb / 6)) MB to download the first time (log: $log)"
  if ! cause="$(install "${answer#yes * }" "$what" 2>&1 | watch_install)"; then
    # pip downloads everything before it changes anything: unless it was cut off between the two lines below,
    # what was complete still is.
    if [[ -n "$before" && "$cause" != space ]] &&
      awk '/^Installing collected/ {part = 1} /^Successfully installed/ {part = 0} END {exit part}' "$log"; then
      mark "$before"
    fi
    case "$cause" in
      space) fail "no space: the disk of $venv filled up; free about $space_mb MB and run this again" ;;
      network) fail "no network: pip reached no package index with the pinned packages (log: $log); connect, or set HTTPS_PROXY or PIP_INDEX_URL, and run this again" ;;
      *) fail "could not install the pinned packages: ${cause:-stopped} (log: $log)" ;;
    esac
  fi
  rm -rf "$venv/tmp"
  mark "$key $kind"
  ready "$kind" || fail "the new .venv does not import mtnlg_jax (log: $log); delete .venv and run this again"
  exec 9>&-
  say ".venv is ready after $((SECONDS - started)) s"
}
