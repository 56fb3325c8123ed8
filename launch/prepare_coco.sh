#!/usr/bin/env bash
# Get COCO 2017, or a set of your own in its format, ready for detection, without a network:
#
#   bash launch/prepare_coco.sh SOURCE DATA [--most=IMAGES]
#   bash launch/prepare_coco.sh --train=ANNOTATIONS:IMAGES --eval=ANNOTATIONS:IMAGES DATA [--most=IMAGES]
#
# SOURCE holds the official archives train2017.zip, val2017.zip and annotations_trainval2017.zip, which
# https://cocodataset.org/#download gives, or the folders train2017, val2017 and annotations that they unpack to. DATA
# gets the archives' content, about 20 GB, or links to the folders. Of your own set name two annotation files, in COCO's
# JSON, each with the folder of its images; DATA gets links under the official names. Then both files are checked and
# described as `python -m halvit_jax.check` does. Train with --config.instances.root=DATA.
#
#   --most=IMAGES  read at most so many images of each set for the check; default 1000, at equal distances
#
# Run again, it leaves what is there and checks it. $PYTHON chooses the interpreter; else it is that of .venv, made if it
# is missing.
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

# absolute PATH: the path of a file or folder that is there.
absolute() {
  [ -e "$1" ] || fail "$1 is missing"
  printf '%s/%s\n' "$(cd "$(dirname "$1")" && pwd)" "$(basename "$1")"
}

# link TARGET NAME: DATA/NAME is a link to TARGET, unless it is there.
link() {
  [ -e "$data/$2" ] || ln -sfn "$1" "$data/$2"
}

# take NAME ARCHIVE: DATA/NAME from the folder SOURCE/NAME or from the archive, unless it is there.
take() {
  if [ -e "$data/$1" ]; then return; fi
  if [ -d "$archives/$1" ]; then
    link "$(absolute "$archives/$1")" "$1"
    return
  fi
  [ -f "$archives/$2" ] ||
    fail "$archives has neither the folder $1 nor $2; https://cocodataset.org/#download gives the archive"
  echo "unpacking $archives/$2"
  rm -rf "$data/unpacking"
  mkdir "$data/unpacking"
  "$PYTHON" -m zipfile -e "$archives/$2" "$data/unpacking" || fail "$archives/$2 is no whole archive; download it again"
  [ -d "$data/unpacking/$1" ] || fail "$archives/$2 has no folder $1; is it the archive of that name?"
  mv "$data/unpacking/$1" "$data/$1"
  rm -r "$data/unpacking"
}

# own SPLIT IMAGES ANNOTATIONS:IMAGES: links under the official names to a set of your own.
own() {
  case "$3" in *:*) ;; *) fail "--$1=$3 must be ANNOTATIONS:IMAGES" ;; esac
  [ -f "${3%%:*}" ] || fail "--$1=$3: ${3%%:*} is no file"
  [ -d "${3#*:}" ] || fail "--$1=$3: ${3#*:} is no folder"
  mkdir -p "$data/annotations"
  link "$(absolute "${3%%:*}")" "annotations/instances_$2.json"
  link "$(absolute "${3#*:}")" "$2"
}

archives='' data='' train='' evaluation='' most=1000 folders=()
for argument in "$@"; do
  case "$argument" in
    --train=*) train=${argument#*=} ;;
    --eval=*) evaluation=${argument#*=} ;;
    --most=*[!0-9]* | --most=) fail "$argument must be a number" ;;
    --most=*) most=${argument#*=} ;;
    -*) fail "$argument is unknown; there are --train=, --eval= and --most=" ;;
    *) folders+=("$argument") ;;
  esac
done
if [ "$train$evaluation" ]; then
  [ "$train" ] && [ "$evaluation" ] || fail "--train=ANNOTATIONS:IMAGES and --eval=ANNOTATIONS:IMAGES go together"
  [ "${#folders[@]}" -eq 1 ] || fail "give one folder with --train and --eval, that of the links"
  data=${folders[0]}
else
  [ "${#folders[@]}" -eq 2 ] || fail "give two folders: bash launch/prepare_coco.sh SOURCE DATA"
  archives=${folders[0]} data=${folders[1]}
  [ -d "$archives" ] || fail "$archives is no folder; give the one with COCO's archives or folders"
fi
mkdir -p "$data"
data=$(cd "$data" && pwd)
here=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
  pushd "$here" >/dev/null
  source launch/environment.sh
  environment -e '.[detection]'
  PYTHON=$here/$PYTHON
  popd >/dev/null
fi

if [ "$train" ]; then
  own train train2017 "$train"
  own eval val2017 "$evaluation"
else
  take annotations annotations_trainval2017.zip
  take train2017 train2017.zip
  take val2017 val2017.zip
fi

cd "$here"
export TF_CPP_MIN_LOG_LEVEL=2 TF_ENABLE_ONEDNN_OPTS=0
"$PYTHON" - "$data" "$most" <<'END'
import sys
from halvit_jax.config import default_config
from halvit_jax.data import make_detection_loaders
from halvit_jax.data.instance_check import check_instances
data, most = sys.argv[1:]
fields = {"root": data, "max_objects": 10**6}
try:
    loaders = make_detection_loaders(**default_config().instances.to_dict() | fields, batch_size=1, seed=0)
    report = check_instances(loaders, int(most))
except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
print(*report.lines, sep="\n")
if report.warning:
    print(f"warning: {report.warning}")
print(f"train with --config.instances.root={data}")
END
