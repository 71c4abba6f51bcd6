#!/usr/bin/env bash
# ONNX Runtime's headers in a folder: Debian 13 packages them, the wheel has the library alone. On Debian, without root.
#   deploy/cpp/ort_headers.sh FOLDER
set -euo pipefail
folder=$(realpath -m "$1")
[ -e "$folder/complete" ] && exit 0
command -v apt-get > /dev/null || { echo "needs Debian's apt-get; take the headers of an ONNX Runtime release" >&2; exit 2; }
rm -rf "$folder"
mkdir -p "$folder"/apt/{lists/partial,cache/archives/partial,sources}
# The system's own mirrors, asked for Debian 13, with lists of their own: the system's apt stays as it is.
. /etc/os-release
cp /etc/apt/sources.list /etc/apt/sources.list.d/* "$folder/apt/sources" 2> /dev/null || true
sed -i "s/\b$VERSION_CODENAME\b/trixie/g" "$folder"/apt/sources/*
apt=(-qq -o "Dir::Etc::sourceparts=$folder/apt/sources" -o Dir::Etc::sourcelist=/dev/null
     -o "Dir::State::lists=$folder/apt/lists" -o "Dir::Cache=$folder/apt/cache" -o APT::Sandbox::User=root)
apt-get "${apt[@]}" update
cd "$folder"
apt-get "${apt[@]}" download libonnxruntime-dev
dpkg -x libonnxruntime-dev_*.deb "$folder"
touch "$folder/complete"
