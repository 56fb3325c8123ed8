#!/usr/bin/env bash
# Prepare ImageNet-1k for training from its two official archives, with the real TFDS builder and without a network:
#
#   bash launch/prepare_imagenet.sh TARS_DIR DATA_DIR [--md5] [--any-size] [--array-record]
#
# TARS_DIR holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, which https://image-net.org/download-images gives
# after registering. DATA_DIR gets about 150 GB in some hours; then train with --config.data.data_dir=DATA_DIR.
#
#   --md5           compare the archives' MD5 sums too, which takes minutes
#   --any-size      for subsets in the layout of the archives: neither sizes nor MD5 sums are compared
#   --array-record  prepare ArrayRecord files, not TFRecord
#
# Run again, it reports what is prepared. $PYTHON chooses the interpreter; else it is that of .venv, made if it is missing.
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

# archive NAME BYTES MD5: the file is there and is the one that image-net.org gives.
archive() {
  local file="$tars/$1" size sum
  [ -f "$file" ] || fail "$file is missing; https://image-net.org/download-images gives it after registering"
  if [ "$any_size" ]; then return; fi
  size=$(($(wc -c <"$file")))
  [ "$size" -eq "$2" ] || fail "$file has $size bytes, the official archive $2; download it again, or pass --any-size"
  if [ "$md5" ]; then
    echo "reading $file for its MD5 sum"
    sum=$(md5sum <"$file")
    [ "${sum%% *}" = "$3" ] || fail "$file has the MD5 sum ${sum%% *}, the official archive $3; get it again"
  fi
}

# prepare WORDS: run the builder of TFDS where there is nothing yet, then open the result as training does and say how
# much it is. Not the command `tfds build`, which asks for Apache Beam.
prepare() {
  "$PYTHON" - "$tars" "$data" "$format" "$1" <<'END'
import sys
import tensorflow_datasets as tfds
from halvit_jax.data import open_source
tars, data, file_format, words = sys.argv[1:]
builder = tfds.builder("imagenet2012", data_dir=data, try_gcs=False)
if not builder.is_prepared():
    config = tfds.download.DownloadConfig(manual_dir=tars, try_download_gcs=False)
    builder.download_and_prepare(download_config=config, file_format=file_format)
try:
    train, val = (open_source("imagenet2012", data, split).info.num_examples for split in ("train", "validation"))
except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
print(f"{words} as {builder.info.file_format.value}: {train} training and {val} validation images")
print(f"train with --config.data.data_dir={data}")
END
}

tars='' data='' md5='' any_size='' format=tfrecord
for argument in "$@"; do
  case "$argument" in
    --md5) md5=yes ;;
    --any-size) any_size=yes ;;
    --array-record) format=array_record ;;
    -*) fail "$argument is unknown; there are --md5, --any-size and --array-record" ;;
    *) if [ -z "$tars" ]; then tars=$argument; elif [ -z "$data" ]; then data=$argument; else fail "too many folders"; fi ;;
  esac
done
[ "$data" ] || fail "give two folders: bash launch/prepare_imagenet.sh TARS_DIR DATA_DIR"
[ -d "$tars" ] || fail "$tars is not a folder; give the one with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar"
mkdir -p "$data"
tars=$(cd "$tars" && pwd)
data=$(cd "$data" && pwd)

# Archives that are wrong are found before Python is started; what is prepared needs none.
words='already prepared'
if ! compgen -G "$data/imagenet2012/*/dataset_info.json" >/dev/null; then
  words=prepared
  archive ILSVRC2012_img_train.tar 147897477120 1d675b47d978889d74fa0da5fadfb00e
  archive ILSVRC2012_img_val.tar 6744924160 29b22e2961454d5413ddabcf34fc5622
  for leftover in "$data"/imagenet2012/incomplete.*; do
    if [ -e "$leftover" ]; then echo "note: $leftover is left from a try that did not end; delete it"; fi
  done
fi

cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
  source launch/environment.sh
  environment -r requirements.txt
fi
export TF_CPP_MIN_LOG_LEVEL=2 TF_ENABLE_ONEDNN_OPTS=0
prepare "$words"
