#!/usr/bin/env bash
# From photographs to a video around the edited scene:
#
#     bash turntable.sh PHOTOS "turn the bear into a panda" OUT [METHOD [OPTION ...]]
#
# PHOTOS is a folder of photographs from all around an object, or a scene with a transforms.json. METHOD is wys unless another one is
# given, and OPTION any option of `ns-train METHOD`; wys-tiny edits toy scenes on a CPU, with the embedded editor. OUT receives the
# scene, the run and turntable.mp4. Requires COLMAP for photographs, and ffmpeg.
set -euo pipefail

if [ $# -lt 3 ]; then
    echo "usage: bash turntable.sh PHOTOS INSTRUCTION OUT [METHOD [OPTION ...]]" >&2
    exit 2
fi
photos=$1 instruction=$2 out=$3 method=${4:-wys}

if [ -f "$photos/transforms.json" ]; then
    scene=$photos
else
    scene=$out/scene
    ns-process-data images --data "$photos" --output-dir "$scene"
fi
ns-train "$method" --data "$scene" --instruction "$instruction" --output-dir "$out" --experiment-name run --timestamp edited \
    --viewer.quit-on-train-completion True "${@:5}"
ns-render interpolate --load-config "$out/run/$method/edited/config.yml" --pose-source train --order-poses True \
    --output-path "$out/turntable.mp4"
