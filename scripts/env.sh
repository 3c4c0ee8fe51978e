# Sourced by the other shell scripts: activates an environment with the project installed; the first call creates it.
#
# An active virtual environment is used; otherwise .venv in the repository, which is created if needed. Packages come
# from pip's configured index. QUACK_TORCH_INDEX=<url> adds an index for this installation, for example PyTorch's own
# index of CPU builds, which avoids downloading the CUDA packages on a machine without a GPU.

quack_find_python() {
  local name
  for name in python3 python3.13 python3.12 python3.11; do
    if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "$name"
      return
    fi
  done
  echo "error: no Python of version 3.11 or later found; install one, for example: apt install python3 python3-venv" >&2
  return 1
}

quack_make_venv() {
  local python
  python=$(quack_find_python) || return 1
  # Debian ships Python without these modules, and venv fails halfway without ensurepip.
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "error: $python has no venv module; install it: apt install python3-venv" >&2
    return 1
  fi
  echo "making the virtual environment .venv"
  # bin/activate is written last, so an interrupted attempt is not taken for an environment.
  rm -rf .venv && "$python" -m venv .venv
}

quack_install() {
  # Already installed, for this pyproject.toml and this directory?
  local stamp="$VIRTUAL_ENV/.quack_lm_installed" wanted
  wanted="$PWD $(cksum <pyproject.toml)"
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    return
  fi
  echo "installing the project and its packages into $VIRTUAL_ENV (minutes, once)"
  python -m pip install --quiet --disable-pip-version-check \
    ${QUACK_TORCH_INDEX:+--extra-index-url "$QUACK_TORCH_INDEX"} -e '.[dev]' || return 1
  echo "$wanted" >"$stamp"
}

if [[ -z ${VIRTUAL_ENV:-} ]]; then
  if [[ ! -f .venv/bin/activate ]]; then
    quack_make_venv || exit 1
  fi
  source .venv/bin/activate
fi
quack_install || exit 1
