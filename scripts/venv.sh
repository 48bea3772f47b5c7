# Sourced by the other scripts: makes .venv in the repository and installs slmtvm into it, editable.
#
#   use_venv EXTRAS      EXTRAS: "", "test" or "test,fixtures"
#
# Does nothing the second time, unless pyproject.toml or the extras have changed. PYTHON chooses the
# interpreter. Leaves $venv set to the environment's folder.

say() { printf '\033[1m==> %s\033[0m\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# The first Python 3.10 to 3.13; a pyenv shim may exist for a version that is not there.
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.13 python3.10}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' \
        2>/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  die "no Python 3.10 to 3.13 found; install one, or name it: PYTHON=/path/to/python3 $0"
}

make_venv() {
  local python
  python=$(find_python)
  say "making $venv with $("$python" --version)"
  rm -rf "$venv"
  if "$python" -m venv "$venv" >"$venv.log" 2>&1; then
    rm -f "$venv.log"
    return
  fi
  # Debian and Ubuntu keep what venv needs in a package of its own.
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt_install "$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    rm -rf "$venv"
    "$python" -m venv "$venv" && rm -f "$venv.log" && return
  fi
  cat "$venv.log" >&2
  die "cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv"
}

# Installs packages quietly; fails where apt does.
apt_install() {
  say "apt-get install $*"
  apt-get update -qq </dev/null >/dev/null &&
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" \
      </dev/null >/dev/null
}

use_venv() {
  local extras=$1 wanted
  venv=$root/.venv
  wanted="$extras $(cat "$root/pyproject.toml" | sha256sum)"
  if [ "$(cat "$venv/installed" 2>/dev/null)" = "$wanted" ] && "$venv/bin/python" -c 'import tvm_ffi' \
      2>/dev/null; then
    return
  fi
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 || make_venv
  say "installing slmtvm${extras:+ with $extras} (a few minutes the first time)"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    -e "$root${extras:+[$extras]}" || die "pip failed"
  printf '%s\n' "$wanted" >"$venv/installed"
}
