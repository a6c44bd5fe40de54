#!/bin/sh
# Double-click on macOS and Linux: sets LoRA Easel up on the first start, then opens its window.
cd "$(dirname "$0")" || exit 1
for python in python3.13 python3.12 python3.11 python3 python; do
    fits='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
    "$python" -c "$fits" >/dev/null 2>&1 && exec "$python" launch.py "$@"
done
# uv fetches a Python of its own.
command -v uv >/dev/null && exec uv run --no-project --python 3.13 launch.py "$@"
echo "LoRA Easel needs Python 3.11, 3.12 or 3.13: install it from python.org and start this again."
exit 1
