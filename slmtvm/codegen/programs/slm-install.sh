#!/bin/sh
# Puts packages of models (slmtvm package --format tar.gz) on a device, and takes them back. POSIX sh
# with what busybox has; signatures are checked by slm-verify beside this file, else by openssl.
#
#   slm-install [options] install FILE    check, unpack beside the present version, test, switch
#   slm-install [options] rollback NAME   back to the version before
#   slm-install [options] status [NAME]   what is installed
#   slm-install [options] fetch URL FILE  download, going on where an earlier try was cut
#
# Below the root, a model's versions lie in NAME/versions/COUNTER-VERSION; NAME/current is a link to the
# one in use, NAME/previous to the one before, and NAME/counter holds the highest that was ever taken.
# `current` changes by one rename, after everything that it leads to is on the disk: whenever the power
# fails, it names a whole version.
set -u
LC_ALL=C
export LC_ALL
umask 022

root=/opt/slm keys=/etc/slm/keys.pem downgrade=no health='' reload='' speed=0 here=$(dirname "$0")
staging='' locked=''

usage() {
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" | sed '/^set/d' >&2
  cat >&2 <<EOF
options:
  --root DIR         where models are installed (default $root)
  --keys FILE        the public keys that are trusted, PEM (default $keys)
  --allow-downgrade  take an older version than was here before
  --reload CMD       run after each switch, such as "systemctl reload slm-NAME": the server takes the version
                     in use; where it fails, the version before comes back
  --health CMD       run after the switch with the version's folder as its argument; where it fails, or the
                     self-test does, the version before comes back
  --least-speed N    tokens a second that the self-test must reach (default 0: any)
EOF
  exit 64
}

say() { echo "slm-install: $*" >&2; }
die() { say "$*"; exit 1; }

finish() {
  [ -z "$staging" ] || rm -rf "$staging"
  [ -z "$locked" ] || rm -f "$root/.lock"
}
trap finish EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# Files and folders to the disk: sync takes names in coreutils and most of busybox, else it is all of it.
flush() { sync "$@" 2>/dev/null || sync; }

verify() { # FILE SIGNATURE: is it signed by a key that is trusted?
  [ -r "$keys" ] || die "$keys: no public keys to trust; --keys names them"
  if "$here/slm-verify" "$keys" "$1" "$2" 2>/dev/null; then return 0; fi
  # No slm-verify that runs here: openssl takes one key of a file, the first, at a time.
  "$here/slm-verify" >/dev/null 2>&1
  [ $? -eq 64 ] && return 1
  command -v openssl >/dev/null 2>&1 || die "neither slm-verify beside this program nor openssl is here"
  awk -v out="$staging/key" '/-----BEGIN PUBLIC KEY-----/ { n++ } n { print > (out n) }' "$keys"
  for key in "$staging"/key[0-9]*; do
    [ -e "$key" ] || continue
    openssl pkeyutl -verify -pubin -inkey "$key" -rawin -in "$1" -sigfile "$2" >/dev/null 2>&1 && return 0
  done
  return 1
}

field() { sed -n "s/^$2 //p" "$1" | head -n 1; } # FILE NAME

number() { case $1 in '' | *[!0-9]* | ????????????????*) return 1 ;; esac; }

word() { case $1 in '' | .* | -* | *[!A-Za-z0-9._+-]*) return 1 ;; esac; }

# The lock is a link to who holds it: made in one step, and worth nothing after a restart or once that
# process is gone. What a power cut or a kill left of an earlier try goes.
take_lock() {
  me=$(cat /proc/sys/kernel/random/boot_id 2>/dev/null).$$
  if ! ln -s "$me" "$root/.lock" 2>/dev/null; then
    holder=$(readlink "$root/.lock") || die "$root: cannot be written"
    if [ "${holder%.*}" = "${me%.*}" ] && kill -0 "${holder##*.}" 2>/dev/null; then
      die "$root: another slm-install is at work, process ${holder##*.}"
    fi
    rm -f "$root/.lock"
    ln -s "$me" "$root/.lock" 2>/dev/null || die "$root: another slm-install is at work"
  fi
  locked=yes
  rm -rf "$root"/.install.*
}

switch() { # LINK TARGET, in the current folder, in one step
  rm -f ".$1.new"
  ln -s "$2" ".$1.new" && flush . && mv -T ".$1.new" "$1" && flush .
}

put() { # FILE TEXT, in one step
  echo "$2" >".$1.new" && flush ".$1.new" && mv -f ".$1.new" "$1" && flush .
}

# What the archive holds must be what its signed description names: nothing else, no links, no `..`.
# A delta may hold less, and parts of files; what is made of them is compared with the description later.
check_listing() { # ARCHIVE PREFIX
  tar -tzvf "$1" >"$staging/listing" 2>/dev/null || die "$1: damaged: not a whole tar.gz"
  {
    echo "$(wc -c <"$staging/package" | tr -d ' ') package"
    echo "$(wc -c <"$staging/package.sig" | tr -d ' ') package.sig"
    sed -n 's/^file [0-7]* [0-9a-f]* \([0-9]* \)/\1/p' "$staging/package"
  } | sed "s| | $2/|" | sort >"$staging/named"
  grep -v '^[-d]' "$staging/listing" >/dev/null && die "$1: holds something else than files and folders"
  grep '^-' "$staging/listing" | awk '{ print $3, $NF }' | sort >"$staging/found"
  if is_delta "$2"; then
    {
      echo "$2/delta"
      sed 's/^[0-9]* //; p; s/$/.parts/' "$staging/named"
    } >"$staging/may"
    sed 's/^[0-9]* //' "$staging/found" | grep -v -x -F -f "$staging/may" >/dev/null &&
      die "$1: holds what its description does not name"
    [ -z "$(sed 's/^[0-9]* //' "$staging/found" | sort | uniq -d)" ] || die "$1: holds a file twice"
  else
    cmp -s "$staging/named" "$staging/found" || die "$1: does not hold what its description names"
  fi
  grep '^d' "$staging/listing" | sed 's/.* //; s|/$||' | while IFS= read -r path; do
    case /$path/ in */../* | *//*) echo bad ;; /$2/*) ;; *) echo bad ;; esac
  done | grep bad >/dev/null && die "$1: holds a folder outside of its own"
  return 0
}

is_delta() { grep "^-.* $1/delta\$" "$staging/listing" >/dev/null; } # PREFIX

piece() { # FILE SIZE SKIP COUNT
  number "$2" && number "$3" && number "$4" && [ "$2" -gt 0 ] && [ "$2" -le 1048576 ] &&
    dd if="$1" bs="$2" skip="$3" count="$4" 2>/dev/null
}

inside() { case /$1/ in //* | */../*) return 1 ;; esac; } # PATH

# Makes the files that a delta leaves out, of those of the version in use. What they are is checked
# afterwards, so that a wrong recipe makes nothing that is used.
apply_delta() { # OLD NEW
  made=
  while read -r what first second third fourth; do
    case $what in
      base)
        [ -e "$1/package" ] && [ "$(sha256sum <"$1/package" | cut -d' ' -f1)" = "$first" ] ||
          { say "the delta is not from the version that is in use here"; return 1; }
        ;;
      copy)
        inside "$first" && inside "$second" && mkdir -p "$2/$(dirname "$second")" &&
          cp "$1/$first" "$2/$second" || return 1
        ;;
      take) inside "$first" && [ -f "$2/$first" ] || return 1 ;;
      join)
        inside "$first" && mkdir -p "$2/$(dirname "$first")" && : >"$2/$first" || return 1
        made=$first
        ;;
      old) inside "$first" && piece "$1/$first" "$second" "$third" "$fourth" >>"$2/$made" || return 1 ;;
      new) piece "$2/$made.parts" "$first" "$second" "$third" >>"$2/$made" || return 1 ;;
      *) return 1 ;;
    esac
  done <"$2/delta"
  find "$2" -name '*.parts' -exec rm -f {} + && rm -f "$2/delta"
}

check_description() { # FILE ARCHIVE
  [ "$(head -n 1 "$1")" = "slm-package 1" ] || die "$2: a package of another kind, or none"
  name=$(field "$1" name) version=$(field "$1" version) counter=$(field "$1" counter)
  bytes=$(field "$1" bytes) arch=$(field "$1" arch) target=$(field "$1" target)
  word "$name" && word "$version" && word "$target" && number "$counter" && number "$bytes" ||
    die "$2: its description is damaged"
  if sed -n 's/^file //p' "$1" | grep -v '^0[67][0-7][0-7] [0-9a-f]\{64\} [0-9]\{1,15\} [A-Za-z0-9._+/-]*$' |
    grep . >/dev/null || sed -n 's/^file //p' "$1" | grep -e '\.\.' -e ' /' >/dev/null; then
    die "$2: its description names a file outside of its own folder"
  fi
}

install() { # ARCHIVE
  [ -f "$1" ] || die "$1: no such file"
  mkdir -p "$root" 2>/dev/null || die "$root: cannot be made"
  root=$(cd "$root" && pwd) || die "$root: cannot be entered"
  take_lock
  staging=$(mktemp -d "$root/.install.XXXXXX" 2>/dev/null) || die "$root: cannot be written"
  first=$(tar -tzf "$1" 2>/dev/null | head -n 2 | sed -n 's|/package$||p' | head -n 1)
  word "$first" || die "$1: not a package: its first file is no description"
  tar -xzOf "$1" "$first/package" >"$staging/package" 2>/dev/null || die "$1: damaged, or the disk is full"
  tar -xzOf "$1" "$first/package.sig" >"$staging/package.sig" 2>/dev/null || die "$1: not signed"
  verify "$staging/package" "$staging/package.sig" ||
    die "$1: not signed by a key of $keys, or changed since"
  check_description "$staging/package" "$1"
  check_listing "$1" "$first"
  # Which features the CPU has is asked by the self-test, before it uses any.
  [ "$(uname -m)" = "$arch" ] || die "$1: for $arch, this CPU is $(uname -m)"
  folder=$root/$name
  highest=0
  for file in "$folder/counter" "$folder/current/package"; do
    found=$(sed -n 's/^counter //p; s/^[0-9]*$/&/p' "$file" 2>/dev/null | grep . | head -n 1)
    number "$found" && [ "$found" -gt "$highest" ] && highest=$found
  done
  if [ "$counter" -lt "$highest" ] && [ "$downgrade" = no ]; then
    die "$1: its counter is $counter, $highest was here before; --allow-downgrade takes it all the same"
  fi
  id=$counter-$version
  if [ "$(readlink "$folder/current" 2>/dev/null)" = "versions/$id" ] &&
    cmp -s "$staging/package" "$folder/current/package"; then
    # Whoever put it there may have been killed before the rest was done.
    cd "$folder" || die "$folder: cannot be entered"
    [ "$(cat counter 2>/dev/null)" = "$highest" ] || put counter "$highest"
    clean
    echo "$name $version is installed already"
    return 0
  fi
  # The folder's blocks as well as the bytes.
  free=$(df -Pk "$root" | awk 'NR == 2 { print $4 }')
  need=$((bytes / 1024 + 256))
  [ "$free" -ge "$need" ] || die "$root: $free kB are free, $name $version takes $need"
  # Owners and folders' permissions are nothing that was signed.
  mkdir "$staging/new" && tar -xzof "$1" -C "$staging/new" 2>/dev/null ||
    die "$1: cannot be unpacked below $root: is the disk full?"
  new=$staging/new/$first
  if is_delta "$first"; then
    apply_delta "$folder/current" "$new" || die "$1: cannot be applied here; install the whole package"
  fi
  sed -n 's/^file [0-7]* \([0-9a-f]*\) [0-9]* /\1  /p' "$new/package" >"$staging/sums"
  cmp -s "$staging/package" "$new/package" && (cd "$new" && sha256sum -c "$staging/sums" >/dev/null 2>&1) ||
    die "$1: a file in it is not what was signed"
  sed -n 's/^file \([0-7]*\) [0-9a-f]* [0-9]* /\1 /p' "$new/package" | while read -r mode path; do
    chmod "$mode" "$new/$path" || exit 1
  done && chmod 0644 "$new/package" "$new/package.sig" &&
    find "$new" -type d -exec chmod 0755 {} + || die "$1: permissions cannot be set"
  test_version "$new" || die "$name $version does not work here: nothing was changed"
  find "$new" -type f -o -type d | while IFS= read -r path; do flush "$path"; done
  mkdir -p "$folder/versions" || die "$folder/versions: cannot be made"
  # Of the same name there may be what a cut left, or another build.
  if [ -e "$folder/versions/$id" ]; then
    case " $(readlink "$folder/current") $(readlink "$folder/previous") " in
      *" versions/$id "*) id=$id.$(date +%s) ;;
      *) rm -rf "$folder/versions/$id" ;;
    esac
  fi
  mv "$new" "$folder/versions/$id" || die "$folder/versions/$id: cannot be written"
  flush "$folder/versions" "$folder" "$root"
  cd "$folder" || die "$folder: cannot be entered"
  before=$(readlink current)
  switch current "versions/$id" || die "$folder/current: cannot be changed"
  failed=''
  if [ -n "$reload" ] && ! $reload; then
    failed='was not taken by --reload'
  elif [ -n "$health" ] && ! $health "$folder/current"; then
    failed='failed its health check'
  fi
  if [ -n "$failed" ]; then
    if [ -n "$before" ]; then switch current "$before"; else rm -f current; fi
    [ -z "$reload" ] || $reload || say "$reload: failed"
    rm -rf "versions/$id"
    die "$name $version $failed: ${before:-nothing} is in use again"
  fi
  [ -n "$before" ] && [ "$before" != "versions/$id" ] && switch previous "$before"
  [ "$counter" -gt "$highest" ] && put counter "$counter"
  clean
  echo "$name $version (counter $counter, $target) is installed"
}

test_version() { # FOLDER: does what is in it compute what it should?
  [ -x "$1/bin/slm-selftest" ] || return 0
  set -- "$1" --seconds 0.2 --least-speed "$speed"
  where=$1
  shift
  "$where/bin/slm-selftest" "$where/bundle" "$@" >"$staging/test" 2>&1 && return 0
  sed 's/^/  /' "$staging/test" >&2
  return 1
}

clean() { # in the folder of a model: what no link leads to
  for path in versions/*; do
    case $path in "$(readlink current)" | "$(readlink previous)") ;; *) rm -rf "$path" ;; esac
  done
  return 0
}

rollback() { # NAME
  word "$1" || die "$1: no name of a model"
  root=$(cd "$root" 2>/dev/null && pwd) || die "$root: nothing is installed here"
  cd "$root/$1" 2>/dev/null || die "$1: not installed below $root"
  take_lock
  now=$(readlink current) before=$(readlink previous) || die "$1: there is no version before"
  [ -d "$before" ] || die "$1: there is no version before"
  switch current "$before" || die "$root/$1/current: cannot be changed"
  switch previous "$now"
  [ -z "$reload" ] || $reload || say "$reload: failed; restart what serves $1"
  echo "$1: $(field current/package version) is in use again"
}

status() {
  for folder in "$root"/${1:-*}; do
    [ -e "$folder/current/package" ] || continue
    echo "$(basename "$folder") $(field "$folder/current/package" version)" \
      "counter $(field "$folder/current/package" counter)" \
      "target $(field "$folder/current/package" target)" \
      "previous $(field "$folder/previous/package" version 2>/dev/null)"
    found=yes
  done
  [ -n "${found:-}" ] || die "${1:-nothing}: not installed below $root"
}

fetch() { # URL FILE
  # -c goes on where an earlier try was cut; what is whole is a matter of the signature.
  wget -q -c -O "$2.part" "$1" || die "$1: cannot be fetched whole; a next try goes on where this one ended"
  flush "$2.part"
  mv -f "$2.part" "$2" || die "$2: cannot be written"
  echo "$2"
}

while [ $# -gt 0 ]; do
  case $1 in
    --root | --keys | --health | --reload | --least-speed)
      [ $# -ge 2 ] || usage
      case $1 in
        --root) root=$2 ;; --keys) keys=$2 ;; --health) health=$2 ;; --reload) reload=$2 ;; *) speed=$2 ;;
      esac
      shift 2
      ;;
    --allow-downgrade) downgrade=yes && shift ;;
    -*) usage ;;
    *) break ;;
  esac
done
[ $# -ge 1 ] || usage
verb=$1
shift
case $verb/$# in
  install/1 | rollback/1 | fetch/2 | status/0 | status/1) $verb "$@" ;;
  *) usage ;;
esac
