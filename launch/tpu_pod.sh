#!/usr/bin/env bash
# Trains on a Cloud TPU slice: creates it or uses the one there is, copies this checkout, runs on all hosts, shows their output.
#
#   launch/tpu_pod.sh --name=books --zone=us-west4-a --type=v5litepod-16 --nfs=10.0.0.2:/runs \
#       --config=experiments/pods.py:llama31_8b_v5e16 --run=books --spot -- --config.corpus=/mnt/runs/books.txt
#
#   --name, --zone      of the slice; --project if it is not gcloud's default
#   --type              accelerator type, as `gcloud compute tpus accelerator-types list --zone=ZONE` writes it
#   --version           runtime version; the default is the one for that type
#   --nfs               HOST:/SHARE of a file system that all hosts mount at /mnt/runs (Filestore, for example) and that stores the run
#   --config, --run     the run's config, and the name of its folder under /mnt/runs
#   --env               NAME=VALUE,… for the run, such as HF_TOKEN
#   --spot              a cheaper slice that may be preempted: then it is created again and the run resumes
#   --attempts          largest number of attempts (20)
#   --keep              does not delete the slice when the run has ended; a slice that this run did not create is never deleted
#   --dry_run           only prints the commands
#   -- …                further flags of launch/train.py
set -euo pipefail

name='' zone='' project='' type='' version='' nfs='' config='' run='' environment='' attempts=20
spot=false keep=false dry_run=false

fail() {
  echo "error: $*" >&2
  exit 2
}

while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --nfs=*) nfs=${1#*=} ;;
    --config=*) config=${1#*=} ;;
    --run=*) run=${1#*=} ;;
    --env=*) environment=${1#*=} ;;
    --attempts=*) attempts=${1#*=} ;;
    --spot) spot=true ;;
    --keep) keep=true ;;
    --dry_run) dry_run=true ;;
    --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown option $1: launch/tpu_pod.sh --help lists them" ;;
  esac
  shift
done
for option in name zone type nfs config run; do
  [[ -n ${!option} ]] || fail "--$option is missing: launch/tpu_pod.sh --help shows an example"
done
[[ $attempts =~ ^[1-9][0-9]*$ ]] || fail "--attempts=$attempts: give a number of 1 or more"

if [[ -z $version ]]; then
  case $type in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) fail "--type=$type has no runtime version known here: give --version" ;;
  esac
fi

cd "$(dirname "$0")/.."
# A config may take an argument after a colon.
[[ -f ${config%%:*} ]] || fail "--config=$config: there is no file ${config%%:*}"
$dry_run || command -v gcloud >/dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk"

where=("--zone=$zone")
[[ -z $project ]] || where+=("--project=$project")
tpu=(gcloud compute tpus tpu-vm)
archive=/tmp/cartridges_jax_$name.tar.gz
# The mark of a slice that this run created, in the letters that Google Cloud allows. It outlives this script, which may be
# killed and started again.
label=cartridges_jax_run
owner=$(printf %s "$run" | tr '[:upper:]' '[:lower:]' | tr -c 'a-z0-9_-' - | cut -c1-63)
created=false

# Runs a command, or prints it in a form that can be pasted.
do_it() {
  if $dry_run; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

state() {
  $dry_run || "${tpu[@]}" describe "$name" "${where[@]}" '--format=value(state)' 2>/dev/null || true
}

# The same, once a slice that is being created or deleted has settled.
settled_state() {
  local found
  for _ in {1..30}; do
    found=$(state)
    case $found in '' | READY | PREEMPTED | TERMINATED | STOPPED) break ;; esac
    sleep 20
  done
  echo "$found"
}

# Whether this run created the slice, now or before it was started again.
is_ours() {
  $created || [[ $("${tpu[@]}" describe "$name" "${where[@]}" "--format=value(labels.$label)" 2>/dev/null) == "$owner" ]]
}

delete() {
  do_it "${tpu[@]}" delete "$name" "${where[@]}" --quiet
}

on_all_hosts() {
  do_it "${tpu[@]}" ssh "$name" "${where[@]}" --worker=all --command="$1"
}

# A slice that is ready: the one there is, or a new one. One that stopped is replaced only if this run created it.
prepare() {
  local found
  found=$(settled_state)
  case $found in
    READY) echo "using the slice $name" >&2 ;;
    '') create ;;
    PREEMPTED | TERMINATED | STOPPED)
      is_ours || fail "the slice $name is $found, and the run $run did not create it: start or delete it, or choose another --name"
      delete && create
      ;;
    *) fail "the slice $name is still $found: wait, or delete it" ;;
  esac
}

create() {
  local options=("--accelerator-type=$type" "--version=$version" "--labels=$label=$owner")
  ! $spot || options+=(--spot)
  do_it "${tpu[@]}" create "$name" "${where[@]}" "${options[@]}" && created=true
}

# The files of this checkout that git does not ignore, as they are on disk: new ones too, deleted ones not.
pack() {
  # shellcheck disable=SC2016  # the inner shell's variables
  do_it bash -c 'set -o pipefail
    git ls-files -z --cached --others --exclude-standard |
      while IFS= read -rd "" file; do [[ ! -e $file && ! -L $file ]] || printf "%s\0" "$file"; done |
      tar --null --files-from=- -czf "$1"' bash "$archive"
}

copy() {
  local setup
  # A line each: `set -e` lets a failure in the middle of `a && b` pass.
  setup=$(
    cat <<HERE
set -e
sudo mkdir -p /mnt/runs
if ! mountpoint -q /mnt/runs; then
  sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y nfs-common
  sudo mount -t nfs $(printf %q "$nfs") /mnt/runs
fi
[ -w /mnt/runs ] || { echo "error: \$(hostname): \$USER may not write to /mnt/runs ($nfs)" >&2; exit 2; }
mkdir -p cartridges_jax
tar -xzf $archive -C cartridges_jax
cd cartridges_jax
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python 3.11
python3 -m uv pip install --quiet -e ".[tpu]"
HERE
  )
  do_it "${tpu[@]}" scp "$archive" "$name:$archive" "${where[@]}" --worker=all && on_all_hosts "$setup"
}

train() {
  # bash 3.2, a Mac's, reports an empty array as not set.
  local variables=() command
  [[ -z $environment ]] || IFS=, read -ra variables <<<"$environment"
  command=$(printf '%q ' env ${variables[@]+"${variables[@]}"} .venv/bin/python launch/train.py --config="$config" --workdir="/mnt/runs/$run" "$@")
  # Every host logs its own output and shows it here.
  on_all_hosts "set -o pipefail; cd cartridges_jax && $command 2>&1 | tee -a /mnt/runs/$(printf %q "$run").\$(hostname).log"
}

$dry_run || gcloud compute tpus accelerator-types describe "$type" "${where[@]}" >/dev/null ||
  fail "gcloud does not find --type=$type in --zone=$zone (logged in? gcloud auth login)"
pack

for ((attempt = 1; attempt <= attempts; attempt++)); do
  echo "attempt $attempt of $attempts" >&2
  status=0
  { prepare && copy && train "$@"; } || status=$?
  if ((status == 0)); then
    if $keep; then
      :
    elif is_ours; then
      delete
    else
      echo "the slice $name was not created by the run $run and is kept" >&2
    fi
    exit 0
  fi
  # gcloud reports a preemption later than ssh does.
  ! $spot || sleep 60
  # A run that fails on a slice that is ready would fail again.
  case $(settled_state) in
    READY) fail "the run ended with $status; the slice $name is kept, its logs are in /mnt/runs" ;;
  esac
  $spot || fail "it ended with $status, and there is no slice $name"
  echo "there is no slice, or no more" >&2
done
fail "gave up after $attempts attempts"
