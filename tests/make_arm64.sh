#!/usr/bin/env bash
# An ARM64 Python with numpy and ONNX Runtime in a folder, for qemu-user-static: `make test-arm64`. On Debian, without root.
#   tests/make_arm64.sh FOLDER PYTHON
set -euo pipefail
folder=$(realpath -m "$1") python=$(realpath -s "$2")
[ -e "$folder/complete" ] && exit 0
command -v qemu-aarch64-static > /dev/null || { echo "needs qemu: apt-get install qemu-user-static" >&2; exit 2; }
rm -rf "$folder"
mkdir -p "$folder"/{apt/lists/partial,apt/cache/archives/partial,debs,root,site,wheels}
# Lists and packages of the other architecture, in a folder of their own: the system's apt stays as it is.
apt=(-qq -o "Dir::State=$folder/apt" -o "Dir::Cache=$folder/apt/cache" -o APT::Architectures::=arm64
     -o APT::Sandbox::User=root)
touch "$folder/apt/status"
apt-get "${apt[@]}" -o "Dir::State::status=$folder/apt/status" update
cd "$folder/debs"
apt-get "${apt[@]}" -o "Dir::State::status=$folder/apt/status" download \
    {python3.11-minimal,libpython3.11-minimal,libpython3.11-stdlib,libc6,libgcc-s1,libstdc++6,libexpat1,zlib1g}:arm64 \
    {libssl3,libbz2-1.0,liblzma5,libffi8}:arm64
for package in *.deb; do dpkg -x "$package" "$folder/root"; done
# 1.32 of ONNX Runtime ends at its import under qemu 7.2.
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.11 \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
    -d "$folder/wheels" onnxruntime==1.23.2 numpy==2.2.6
for wheel in "$folder"/wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$folder/site"; done
touch "$folder/complete"
