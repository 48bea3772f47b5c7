# Sourced by the other scripts: makes .venv in the repository and installs slmtvm into it, editable.
#
#   use_venv EXTRAS      EXTRAS: "", "test" or "test,fixtures"
#
# Does nothing where that is done already and pyproject.toml is the same. PYTHON chooses the
# interpreter. Leaves $venv set to the environment's folder.

bold='' plain=''
if [ -t 2 ]; then bold=$'\033[1m' plain=$'\033[0m'; fi
say() { printf '%s==> %s%s\n' "$bold" "$*" "$plain" >&2; }
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

# Whether what was installed last includes all of the extras in $1, for the same pyproject.toml.
is_installed() {
  local stamp extras extra
  { read -r stamp extras <"$venv/installed"; } 2>/dev/null || return 1
  [ "$stamp" = "$2" ] || return 1
  for extra in ${1//,/ }; do
    case ",$extras," in *",$extra,"*) ;; *) return 1 ;; esac
  done
  "$venv/bin/python" -c 'import slmtvm, tvm' 2>/dev/null
}

# By uv, which takes a fifth of pip's time; by pip where that fails, as with a pip.conf that uv does
# not read.
install_packages() {
  local pip=("$venv/bin/python" -m pip install -qq --disable-pip-version-check)
  if { [ -x "$venv/bin/uv" ] || "${pip[@]}" uv </dev/null; } 2>/dev/null &&
    "$venv/bin/uv" pip install -q --python "$venv/bin/python" "$@" </dev/null 2>"$venv/uv.log"; then
    return
  fi
  "${pip[@]}" --no-compile "$@" </dev/null || die "pip failed"
}

use_venv() {
  local extras=$1 stamp
  venv=$root/.venv
  # What one process has compiled of Python the next ones read, whatever keeps the tree and the
  # packages free of it: to import TVM takes a third of the time.
  unset PYTHONDONTWRITEBYTECODE
  export PYTHONPYCACHEPREFIX=$venv/bytecode
  stamp=$(sha256sum <"$root/pyproject.toml" | cut -c1-16)
  if is_installed "$extras" "$stamp"; then
    return
  fi
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 || make_venv
  say "installing slmtvm${extras:+ with $extras}: up to a few minutes the first time"
  install_packages -e "$root${extras:+[$extras]}"
  printf '%s %s\n' "$stamp" "$extras" >"$venv/installed"
}
