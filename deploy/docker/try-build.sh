#!/usr/bin/env bash
# Builds both images with buildah on a base made by debootstrap, so nothing is pulled from a registry of images. Compiling
# is left to cargo outside: here a stand-in hands over the binary named. Prints the sizes and tries the CPU image. As root:
#   deploy/docker/try-build.sh target/release/cohort
set -euo pipefail
binary=$(realpath "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

work=$(mktemp -d)
export BUILDAH_ISOLATION=chroot
buildah=(buildah --storage-driver vfs --root "$work/images" --runroot "$work/run")
cleanup() {
    "${buildah[@]}" umount --all >/dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT

debootstrap --variant=minbase --include=python3-pip,ca-certificates bookworm "$work/base" >"$work/log" || {
    tail -n 20 "$work/log" >&2
    exit 1
}
install -m 755 "$binary" "$work/base/opt/cohort"
cat >"$work/base/usr/local/bin/cargo" <<'CARGO'
#!/bin/sh
mkdir -p target/dist && cp /opt/cohort target/dist/cohort
CARGO
chmod 755 "$work/base/usr/local/bin/cargo"
# Whatever this machine needs to reach the package index.
for file in /etc/ssl/certs/ca-certificates.crt /etc/pip.conf; do
    if [[ -e $file ]]; then cp -L "$file" "$work/base$file"; fi
done
"${buildah[@]}" from --name base scratch >/dev/null
"${buildah[@]}" copy --quiet base "$work/base" / >/dev/null
"${buildah[@]}" commit --quiet base localhost/base >/dev/null

build() {
    "${buildah[@]}" bud --quiet --layers=false -f "deploy/docker/$1.Dockerfile" -t "localhost/cohort:$1" "${@:2}" . >/dev/null
}
build cpu --build-arg RUST_IMAGE=localhost/base --build-arg BASE_IMAGE=localhost/base
build cuda --build-arg PYTHON_IMAGE=localhost/base --build-arg COHORT_IMAGE=localhost/cohort:cpu

for image in cpu cuda; do
    container=$("${buildah[@]}" from "localhost/cohort:$image")
    root=$("${buildah[@]}" mount "$container")
    printf '%s image: %s, user %s, files: %s\n' "$image" "$(du -sh "$root" | cut -f1)" \
        "$("${buildah[@]}" inspect --format '{{.OCIv1.Config.User}}' "$container")" "$(find "$root" -type f | wc -l)"
    if [[ $(find "$root" -name '*sh' -path '*bin/*' | wc -l) != 0 ]]; then
        echo "there is a shell in the $image image" >&2
        exit 1
    fi
    chroot --userspec=65532:65532 "$root" /usr/bin/cohort --version
    chroot --userspec=65532:65532 "$root" /usr/bin/cohort config check
done
