#!/usr/bin/env bash
# A .zst file that was cut off (a download that broke, a disk that filled) reads as shorter data, without an error, through
# zstandard 0.25.0: `zstandard.open(...).read()` and `ZstdDecompressor.stream_reader` end where the bytes end. gzip raises EOFError.
# So does whatever reads through it: datasets 5.2.0 gives fewer lines of a .txt.zst, and of a .jsonl.zst complains only where the
# last block that is whole happens to end inside a record.
#
# Seen: 600,000 lines cut in the middle: gzip raises "Compressed file ended before the end-of-stream marker was reached"; zstandard
#       gives about half of the bytes, datasets about half of the lines, and both return normally.
# What to do: `ZstdDecompressor().decompressobj()` tells: its `eof` is False when the input ends inside a frame. Or test files first
#       (`zstd -t`).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet zstandard==0.25.0 datasets==5.2.0 2>/dev/null

cat >"$work/program.py" <<'PYTHON'
import gzip
import sys
from importlib.metadata import version
from pathlib import Path

import datasets
import zstandard

datasets.disable_progress_bars()
work = Path(sys.argv[1])
lines = 600_000
raw = "".join(f"line {i} of {i * i}\n" for i in range(lines)).encode()
for name, whole in (("cut.txt.gz", gzip.compress(raw)), ("cut.txt.zst", zstandard.compress(raw))):
    (work / name).write_bytes(whole[: len(whole) // 2])


def outcome(read):
    """How much is read, as a share of what was written, or the error."""
    try:
        return f"{read():.2f}"
    except EOFError as error:
        return f"EOFError: {error}"


def streamed(name):
    data = datasets.load_dataset("text", data_files=str(work / name), split="train", streaming=True)
    return sum(1 for _ in data) / lines


def told():
    state = zstandard.ZstdDecompressor().decompressobj()
    state.decompress((work / "cut.txt.zst").read_bytes())
    return state.eof


print("versions   ", "zstandard", version("zstandard"), "datasets", version("datasets"))
print("gzip       ", outcome(lambda: len(gzip.open(work / "cut.txt.gz").read()) / len(raw)))
print("open       ", outcome(lambda: len(zstandard.open(work / "cut.txt.zst").read()) / len(raw)))
with open(work / "cut.txt.zst", "rb") as file:
    reader = zstandard.ZstdDecompressor().stream_reader(file)
    print("reader     ", outcome(lambda: len(reader.read()) / len(raw)))
print("eof        ", told())
print("datasets.gz", outcome(lambda: streamed("cut.txt.gz")))
print("datasets   ", outcome(lambda: streamed("cut.txt.zst")))
PYTHON

said=$(HF_HOME="$work/home" HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/program.py" "$work" 2>"$work/log") || { cat "$work/log"; exit 1; }
echo "$said"
changed() { echo "CHANGED: $1"; exit 1; }
short='0\.[3-6][0-9]'
[[ $said =~ gzip\ +EOFError ]] || changed "gzip reads a file that is cut off"
[[ $said =~ open\ +$short ]] || changed "zstandard.open notices"
[[ $said =~ reader\ +$short ]] || changed "stream_reader notices"
[[ $said =~ eof\ +False ]] || changed "decompressobj does not tell"
[[ $said =~ datasets\.gz\ +EOFError ]] || changed "datasets reads a .gz that is cut off"
[[ $said =~ datasets\ +$short ]] || changed "datasets notices"
echo "as described"
