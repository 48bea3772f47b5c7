#!/bin/sh
# Checks a bundle on a GPU, by all that there is: bits against the CPU's library, launches in each
# way, bandwidth, and NVIDIA's compute-sanitizer where it is installed. Needs no network.
#
#     check_cuda.sh BUNDLE [FOLDER [TOKENS]]
#
# FOLDER (default: cuda-report) gets check.json, what each tool said, and summary.txt, and is what to send
# back; TOKENS (default: 200) are decoded. Ends with 0 where all that could be run found nothing. All
# together is given 8 minutes.
set -u
[ $# -ge 1 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
bundle=$1
out=${2:-cuda-report}
here=$(dirname "$0")
python=${PYTHON:-python3}
mkdir -p "$out" || exit 2
: > "$out/summary.txt"
failed=0

# note NAME STATUS: 0 passed, 77 left out, else failed.
note() {
  case $2 in
    0) echo "$1: passed" ;;
    77) echo "$1: left out, $3" ;;
    124) echo "$1: FAILED, its time was up" ;;
    *) echo "$1: FAILED with $2" ;;
  esac | tee -a "$out/summary.txt"
  case $2 in 0|77) ;; *) failed=1 ;; esac
}

{ uname -srm; cat /etc/nv_tegra_release /proc/device-tree/model; nvpmodel -q; nvidia-smi; } \
  > "$out/machine.txt" 2>/dev/null
timeout 180 "$python" "$here/check_cuda.py" "$bundle" --tokens "${3:-200}" > "$out/check.json" 2> "$out/check.err"
note "bits and times" $?

sanitizer=${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1)}
for tool in memcheck racecheck synccheck; do
  if [ -z "$sanitizer" ]; then
    note "$tool" 77 "there is no compute-sanitizer here"
    continue
  fi
  for way in "as compiled" direct; do
    # Its own threads and memory are many times as slow: a few tokens.
    timeout 45 "$sanitizer" --tool "$tool" --error-exitcode 9 --log-file "$out/$tool-${way% *}.log" \
      "$python" "$here/check_cuda.py" "$bundle" --prompt 20 --tokens 3 --way "$way" > /dev/null 2>> "$out/check.err"
    note "$tool, $way" $?
  done
done
[ -s "$out/check.err" ] && cat "$out/check.err" >&2
exit $failed
