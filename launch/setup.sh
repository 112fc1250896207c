# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh. `set_up run` leaves a complete .venv at the root of the
# repository, with the exact versions of constraints.txt; `set_up dev` adds the test tools and
# `set_up ahead` the TPU compiler. Where that is done already, it compares a checksum and starts
# Python once. What fails is reported in one line, and the script exits with 2.
#
# uv does the work: it finds a Python or downloads one, and installs. Where uv is missing, pip
# installs it from the package index into the user's cache, beside nothing else.
#
# MTNLG_PYTHON=/path/to/python3.13 forces an interpreter. Runs under the bash 3.2 of macOS.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv"
python="$venv/bin/python"
state="$venv/setup_state" # "installing", or the key and the kind of what is complete
log="$root/.venv.log"

say() { printf '%s\n' "$1" >&2; }

fail() {
  say "$1"
  exit 2
}

# Every pinned package has wheels for these versions of Python, and not for 3.15.
versions="3.13 3.12 3.14"

# True where MTNLG_PYTHON is unset or is the interpreter that .venv was made from.
as_forced() {
  [[ -z "${MTNLG_PYTHON:-}" ]] ||
    [[ "$("$python" -I -c 'import sys; print(sys._base_executable)')" -ef \
      "$("$MTNLG_PYTHON" -I -c 'import sys; print(sys._base_executable)')" ]]
}

# The kinds in order: each includes the one before.
rank() { case "$1" in run) echo 1 ;; dev) echo 2 ;; ahead) echo 3 ;; *) echo 0 ;; esac }

# True where .venv is complete for this kind, starts, and finds this package.
ready() {
  local have=""
  if [[ -f "$state" ]]; then have="$(<"$state")"; fi
  [[ "$have" == "$key "* ]] && (($(rank "${have#* }") >= $(rank "$1"))) &&
    "$python" -I -c 'import mtnlg_jax' 2>/dev/null && as_forced
}

check_folder() {
  # Measured: 1.4 GB for .venv, and as much in uv's cache while it is unpacked; 1.1 GB more for the
  # TPU compiler.
  local free need=2000
  if [[ "$1" == ahead ]]; then need=3100; fi
  free="$(df -Pk "$root" | awk 'NR == 2 {print int($4 / 1024)}')"
  # What is installed already saves its share; an exchange of some packages still needs a little.
  if [[ -d "$venv" ]]; then need=$((need - $(du -sk "$venv" | cut -f 1) * 3 / 2048)); fi
  if ((need < 300)); then need=300; fi
  ((free >= need)) ||
    fail "no space: $root has $free MB free, installing takes about $need MB; free some or move the folder"
  if ! { : >>"$root/.venv.lock"; } 2>/dev/null || [[ -e "$venv" && ! -w "$venv" ]]; then
    fail "cannot write in $root, where .venv goes; make it writable, or copy the repository to a folder of yours"
  fi
}

# Says in one line why the last command failed, from what it wrote to the log since line $1.
explain() {
  local words
  words="$(tail -n "+$1" "$log")"
  case "$words" in
    *"No space left on device"* | *"Disk quota exceeded"*)
      fail "no space: the disk of $venv or of uv's cache filled up; free about 2000 MB and run this again" ;;
    *"error sending request"* | *"Could not connect"* | *"dns error"* | *"connection broken by"* | *"(from versions: none)"* | \
      *"Max retries exceeded"* | *"network connectivity is disabled"*)
      fail "no network: the package index does not answer (log: $log); connect, or set HTTPS_PROXY or UV_DEFAULT_INDEX, and run this again" ;;
  esac
  words="$(grep -m 1 -A 2 -iE '^ *(error:|×)' <<<"$words" | tr -s ' \n' ' ' || true)"
  fail "$2: ${words:-it stopped without a word} (log: $log)"
}

lines() { if [[ -f "$log" ]]; then awk 'END {print NR + 1}' "$log"; else echo 1; fi; }

# Sets $uv, and PATH so that uv sees the versions of pyenv.
find_uv() {
  local candidate cache="${XDG_CACHE_HOME:-$HOME/.cache}/mtnlg_jax/uv" from
  PATH="$PATH$(printf '%s\n' "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*/bin | sort -rV | awk '{printf ":%s", $0}')"
  export PATH
  # uv does not read the settings of pip; a mirror that is set for pip alone should serve it as well.
  if [[ -n "${PIP_INDEX_URL:-}" && -z "${UV_DEFAULT_INDEX:-}" ]]; then export UV_DEFAULT_INDEX="$PIP_INDEX_URL"; fi
  uv="$(command -v uv)" && return
  uv="$cache/bin/uv"
  if [[ -x "$uv" ]] && "$uv" --version >/dev/null 2>&1; then return; fi
  from="$(lines)"
  for candidate in ${MTNLG_PYTHON:+"$MTNLG_PYTHON"} python3 python3.13 python3.12 python3.14; do
    "$candidate" -I -c 'import venv, ensurepip' 2>/dev/null || continue
    say "installing uv, which sets up Python packages, into $cache"
    if rm -rf "$cache" && mkdir -p "$cache" && "$candidate" -I -m venv "$cache" >>"$log" 2>&1 &&
      PIP_USER=0 "$cache/bin/python" -I -m pip install --disable-pip-version-check --no-input uv >>"$log" 2>&1; then
      return
    fi
    rm -rf "$cache"
    explain "$from" "could not install uv"
  done
  fail "mtnlg_jax needs uv, or a Python 3 with venv that can install it; see https://docs.astral.sh/uv, or on Debian and Ubuntu: apt install python3-venv"
}

# Prints the interpreter to use: the forced one, or the first suitable one that uv finds or downloads.
find_python() {
  local version found from
  if [[ -n "${MTNLG_PYTHON:-}" ]]; then
    found="$("$MTNLG_PYTHON" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" ||
      fail "MTNLG_PYTHON=$MTNLG_PYTHON does not run; name a Python 3.12 to 3.14, or unset it"
    [[ " $versions " == *" $found "* ]] ||
      fail "MTNLG_PYTHON=$MTNLG_PYTHON is $found; name a Python 3.12 to 3.14, or unset it"
    printf '%s\n' "$MTNLG_PYTHON"
    return
  fi
  for version in $versions; do
    "$uv" python find --system --no-python-downloads "cpython-$version" 2>/dev/null && return
  done
  say "there is no Python 3.12 to 3.14 here; uv downloads one"
  from="$(lines)"
  { "$uv" python install 3.13 && "$uv" python find --system cpython-3.13; } 2>>"$log" ||
    fail "mtnlg_jax needs Python 3.12 to 3.14: none is here, and uv could not download one (log: $log);\
 install Python 3.13, or set MTNLG_PYTHON=/path/to/python3.13"
}

# Written beside and renamed: a full disk or a kill leaves the old word or the new one.
mark() { printf '%s\n' "$1" >"$state.new" && mv "$state.new" "$state"; }

install() {
  # The log gets every line; a terminal sees what is being downloaded.
  "$uv" pip install --python "$python" -c launch/constraints.txt "$@" 2>&1 | tee -a "$log" |
    { if [[ -t 2 ]]; then grep -E '^ *(Downloading|Resolved|Prepared)' >&2; else cat >/dev/null; fi || true; }
}

set_up() {
  local kind="$1" what=".[dev]" key before="" base="" from started=$SECONDS uv=""
  if [[ "$kind" == run ]]; then what="."; fi
  # The folder is part of the key: a .venv that was copied imports the package of the old folder.
  key="$({ cat "$root/setup.py" "$root/launch/constraints.txt" && printf '%s' "$root"; } | cksum | tr ' ' -)"
  if ready "$kind"; then return; fi

  check_folder "$kind"
  # One set-up at a time. Its processes share the lock, so a killed shell's uv still holds it. Where
  # there is no flock (macOS), starting two at once is the user's responsibility.
  exec 9>>"$root/.venv.lock"
  if command -v flock >/dev/null && ! flock -n 9 2>/dev/null; then
    say "another set-up is at work on $venv; waiting for it"
    flock 9 2>/dev/null || true
    if ready "$kind"; then
      exec 9>&-
      return
    fi
  fi

  : >"$log"
  find_uv
  if [[ -f "$state" ]]; then before="$(<"$state")"; fi
  if [[ "$before" == installing ]] || ! "$python" -I -c '' 2>/dev/null || ! as_forced; then
    base="$(find_python)"
    if [[ -e "$venv" || -L "$venv" ]]; then
      say "making .venv again: the one that is there is unfinished, broken or of another Python"
    fi
    before=""
    from="$(lines)"
    "$uv" venv --quiet --clear --python "$base" "$venv" >>"$log" 2>&1 || explain "$from" "could not make .venv"
  fi
  mark installing
  say "setting up .venv with Python $("$python" -I -c 'import platform; print(platform.python_version())') (log: $log)"
  from="$(lines)"
  # setuptools is pinned like the rest, so it comes first and builds without an environment of its own.
  if ! (cd "$root" && install setuptools && install --no-build-isolation -e "$what"); then
    # uv downloads everything before it changes anything: what was complete still is.
    if [[ -n "$before" ]] && ! grep -q "No space left" "$log"; then mark "$before"; fi
    explain "$from" "could not install the pinned packages"
  fi
  # The TPU compiler is separate, where only the processes that compile look for it
  # (mtnlg_jax/planning/topology.py): JAX would take it for a TPU in every other process. It has
  # wheels for this platform only; elsewhere its tests skip.
  if [[ "$kind" == ahead && "$OSTYPE $HOSTTYPE" == "linux-gnu x86_64" ]]; then
    (cd "$root" && install --no-deps --target "$venv/ahead" libtpu) ||
      explain "$from" "could not install the TPU compiler"
  fi
  mark "$key $kind"
  ready "$kind" || fail "the new .venv does not import mtnlg_jax (log: $log); delete .venv and run this again"
  exec 9>&-
  say ".venv is ready after $((SECONDS - started)) s"
}
