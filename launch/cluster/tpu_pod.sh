#!/usr/bin/env bash
# One run on all hosts of a TPU pod, over ssh:
#   bash launch/cluster/tpu_pod.sh TPU_NAME ZONE --config=... --workdir=RUN
# Every host has the repository with its .venv (extra tpu) in ~/mtnlg_jax; RUN is a folder that all
# of them see. After a failure all are restarted, MTNLG_RESTARTS times. --dry_run before TPU_NAME
# only prints the command. MTNLG_SCRIPT names another command of launch/, such as generate.
set -uo pipefail
dry=""
if [[ "${1:-}" == --dry_run ]]; then dry=1 && shift; fi
if (($# < 3)); then
  echo "error: tpu_pod.sh needs TPU_NAME ZONE and the flags of launch/pretrain.py" >&2
  exit 2
fi
tpu="$1" zone="$2"
shift 2
flags="$(printf ' %q' "$@")"
# ssh may hide the exit code of a host, so each host prints its own.
script="${MTNLG_SCRIPT:-pretrain}"
if [[ "$script" == pretrain ]]; then flags=" --noprogress$flags"; fi
remote="cd mtnlg_jax && .venv/bin/python launch/$script.py --distributed=on$flags; echo \"host ended with \$?\""
command=(gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" --worker=all --command="$remote")
if [[ -n "$dry" ]]; then
  printf '%q ' "${command[@]}" && echo
  exit 0
fi
output="$(mktemp)"
trap 'rm -f "$output"' EXIT
for ((failure = 1; ; failure++)); do
  "${command[@]}" 2>&1 | tee "$output"
  codes="$(sed -n 's/.*host ended with \([0-9]*\).*/\1/p' "$output" | sort -nu | tr '\n' ' ')"
  if [[ "$codes" == "0 " ]]; then exit 0; fi
  for code in $codes; do
    case $code in 2 | 3 | 5)
      echo "exit code $code: another start would end in the same way" >&2
      exit "$code"
      ;;
    esac
  done
  if ((failure > ${MTNLG_RESTARTS:-20})); then
    echo "exit codes ${codes:-unknown}: failure $failure, one more than MTNLG_RESTARTS allows" >&2
    exit 1
  fi
  wait=$((failure < 6 ? 10 * 2 ** (failure - 1) : 300))
  echo "exit codes ${codes:-unknown}: failure $failure, starting again in $wait s" >&2
  sleep "${MTNLG_WAIT:-$wait}"
done
