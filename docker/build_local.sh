#!/usr/bin/env bash
# Build the image for CPUs without a Docker daemon or a registry of images, and train two steps in it: buildah in a
# chroot, on a Debian base that debootstrap makes. As root; needs `apt-get install buildah debootstrap`, 15 GB, 20 minutes.
#
#   docker/build_local.sh [BASE]          (BASE: the root directory of a Debian, instead of debootstrap's)
#
# TORCH (default torch==2.13.0), DEBIAN_SUITE (bookworm) and DEBIAN_MIRROR may be set. Where pip is configured with an
# index, directories or a certificate of its own, the build gets the same.
set -euo pipefail

repository=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d -t statex-image-XXXXXX)
base=${1:-$work/base}
suite=${DEBIAN_SUITE:-bookworm}
mkdir "$work/pip" "$work/runs"

for needed in buildah debootstrap python3; do
    command -v "$needed" > /dev/null || { echo "error: $needed is missing; apt-get install buildah debootstrap" >&2; exit 2; }
done
[[ $EUID == 0 ]] || { echo "error: debootstrap and buildah's chroot isolation need root" >&2; exit 2; }

# Storage of its own, so that nothing is left behind; chroot and vfs need no kernel feature that a container may lack.
export BUILDAH_ISOLATION=chroot
store=(--storage-driver vfs --root "$work/storage" --runroot "$work/run")
trap 'buildah "${store[@]}" rm --all > /dev/null || true; rm -rf --one-file-system "$work"' EXIT

if [[ $# == 0 ]]; then
    debootstrap --variant=minbase "$suite" "$base" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} > "$work/debootstrap.log" \
        || { tail -n 20 "$work/debootstrap.log" >&2; exit 1; }
fi
container=$(buildah "${store[@]}" from scratch)
buildah "${store[@]}" copy --quiet "$container" "$base" / > /dev/null
buildah "${store[@]}" commit --quiet --rm "$container" "localhost/debian:$suite" > /dev/null

# pip's settings as a file. The local directories and files that they name are mounted, under names of their own.
python3 - "$work/pip" <<'PYTHON'
import ast, os, re, subprocess, sys
from pathlib import Path

settings = {}
lines = subprocess.run(["pip", "config", "list"], capture_output=True, text=True, check=True).stdout.splitlines()
for line in sorted(lines, key=lambda line: line.startswith(":env:")):  # the environment goes before files
    name, value = line.split("=", 1)
    settings[name.split(".", 1)[1]] = ast.literal_eval(value).split()
mounts = {}
for words in settings.values():
    for index, word in enumerate(words):
        scheme, path = re.fullmatch(r"(file://)?(.*)", word).groups()
        if path.startswith("/") and os.path.exists(path):
            # The pages of an index point to files beside it.
            top, rest = (os.path.split(path)[0], "/simple") if path.endswith("/simple") else (path, "")
            words[index] = (scheme or "") + mounts.setdefault(top, f"/mnt/pip{len(mounts)}") + rest
directory = Path(sys.argv[1])
directory.joinpath("pip.conf").write_text("[global]\n" + "".join(f"{k} = {' '.join(v)}\n" for k, v in settings.items()))
directory.joinpath("volumes").write_text("".join(f"--volume\n{k}:{v}:ro\n" for k, v in mounts.items()))
PYTHON
mapfile -t volumes < "$work/pip/volumes"

buildah "${store[@]}" build --layers=false --format docker --file "$repository/docker/Dockerfile" --tag localhost/statex \
    --build-arg "BASE_IMAGE=localhost/debian:$suite" --build-arg "TORCH=${TORCH:-torch==2.13.0}" \
    --secret "id=pip,src=$work/pip/pip.conf" "${volumes[@]}" "$repository"
buildah "${store[@]}" images

# What follows is what `docker run` does: the image's own user, and its entry with arguments behind it.
chmod 777 "$work/runs"
container=$(buildah "${store[@]}" from --pull-never localhost/statex)
run() { buildah "${store[@]}" run --volume "$work/runs:/runs" "$container" -- "$@"; }
mapfile -t entry < <(buildah "${store[@]}" inspect --format '{{range .OCIv1.Config.Entrypoint}}{{println .}}{{end}}' "$container" | sed '/^$/d')
[[ $(run id -u) != 0 ]] || { echo "error: the container runs as root" >&2; exit 1; }

run python -c 'print(*(f"a line {number} of text" for number in range(2000)), sep="\n")' > "$work/runs/text.txt"
run statex prepare /runs/text.txt --out /runs/shards --workers 1
run "${entry[@]}" --config configs/demo_gla.yaml --data.path /runs/shards --run_dir /runs/tiny --train.num_steps 2 \
    --data.seq_len 128 --data.packs_per_step 2 --schedule.warmup_steps 1 --metrics.log_every 1 --metrics.wandb_project null
[[ $(wc -l < "$work/runs/tiny/metrics.jsonl") == 2 ]] || { echo "error: two steps were to be trained" >&2; exit 1; }
grep '"state": "complete"' "$work/runs/tiny/status.json"
echo "built, and trained two steps as user $(run id -u) with: ${entry[*]}"
